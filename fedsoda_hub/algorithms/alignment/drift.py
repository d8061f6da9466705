"""Measure how far a sub-LLM has drifted from its full LLM while the adapter trained (docs/methods.md (m5-drift)).

Edges follow the gradient of the adapter's LoRA in the sub-LLM; the plug-in needs the gradient in the full LLM. When to
align again is decided in `federation/schedule.py`.
"""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import Tensor

from fedsoda_edge.model import lora
from fedsoda_edge.model.loss import cross_entropy
from fedsoda_edge.model.sub_llm import SubLLM

BATCH_SIZE = 4


def adapter_gradient(model: SubLLM, layers: Container[int], start: Tensor, ids: Tensor) -> Tensor:
    """Compute the gradient of the mean next-token loss by the LoRA on these layers, in the order of names.

    Args:
        start: (N, T, C), hidden states below the model's first layer.
        ids: (N, T).

    Returns:
        (P,), fp32 on the CPU.
    """
    trained = list(lora.on(layers, lora.parameters(model)).values())
    total = [torch.zeros(parameter.shape) for parameter in trained]
    for parameter in trained:
        parameter.requires_grad_(True)
    for states, wanted in zip(start.split(BATCH_SIZE), ids.to(start.device).split(BATCH_SIZE), strict=True):
        hidden = model.hidden(states=states)[:, :-1]
        loss = cross_entropy(hidden.flatten(0, 1), model.head, wanted[:, 1:].flatten())
        for sum_, grad in zip(total, torch.autograd.grad(loss, trained), strict=True):
            sum_ += grad.float().cpu() * len(states) / len(ids)
    for parameter in trained:
        parameter.requires_grad_(False)
    return torch.cat([sum_.flatten() for sum_ in total])


def cosine(a: Tensor, b: Tensor) -> float:
    """Compute the cosine of two gradients (P,); 0 where one of them is 0."""
    return float(torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0))
