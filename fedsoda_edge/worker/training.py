"""Train one local round: LoRA in the adapter on border states, with AdamW and FedProx.

A step's samples go through in micro-batches, whose gradients are summed; where memory runs out, micro-batches are halved.
Coding the delta is left to `worker.py`, talking to the hub to the agent.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor
from torch.nn import Parameter

from fedsoda_edge.errors import DeviceTooSmall
from fedsoda_edge.model import lora
from fedsoda_edge.model.loss import cross_entropy
from fedsoda_edge.model.sub_llm import SubLLM
from fedsoda_edge.protocol.coded import is_of
from fedsoda_edge.protocol.messages import Factor, LocalSettings
from fedsoda_edge.worker.batches import Batch, SweptSamples
from fedsoda_edge.worker.checkpoint import RoundCheckpoint

BETAS = (0.9, 0.95)  # paper, 6.1.2
# What torch says where it has no error class: about memory of a CPU, of CUDA, and for the workspace of a product.
NO_MEMORY = ("you tried to allocate", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


@dataclass(frozen=True)
class TrainedDelta:
    """The result of a local round.

    delta: trained adapter LoRA minus the view, fp32. loss: mean over steps, in nats; NaN or infinite where training
    diverged. num_examples: distinct samples trained on. num_tokens: ids of all samples of all steps. seconds: how long
    it took, for people only. micro_batch: samples that went through at once in the end.
    """

    delta: dict[str, Tensor]
    num_examples: int
    loss: float
    num_steps: int
    num_tokens: int
    seconds: float
    micro_batch: int


StepDone = Callable[[int, int, float, float], None]  # step, steps, loss, tokens per second


def data_order(num_samples: int, epochs: int, seed: int, round_number: int, edge: str) -> Iterator[int]:
    """Order the samples of a round by index: one permutation per epoch, seeded by (seed, round, edge id, epoch)."""
    for epoch in range(epochs):
        key = f"{seed}/{round_number}/{edge}/{epoch}".encode()
        number = int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 1
        yield from torch.randperm(num_samples, generator=torch.Generator().manual_seed(number)).tolist()


def num_steps(num_samples: int, settings: LocalSettings) -> int:
    """Count the optimiser steps of a round; a step may take samples of two epochs, and the last step may have fewer."""
    steps = math.ceil(num_samples * settings.epochs / settings.batch_size)
    return min(steps, settings.max_steps) if settings.max_steps else steps


def completion_loss(sub_llm: SubLLM, batch: Batch) -> Tensor:
    """Average the cross-entropy over the completion ids of the batch, eos included."""
    hidden = sub_llm.hidden_at(batch.rows, batch.columns, states=batch.states, positions=batch.positions)
    return cross_entropy(hidden, sub_llm.head, batch.labels)


def accumulate(
    sub_llm: SubLLM, swept: SweptSamples, indices: Sequence[int], micro_batch: int, parameters: Sequence[Parameter]
) -> tuple[Tensor, int, int]:
    """Set the parameters' gradients to those of the completion loss, its mean over all labels of these samples.

    Args:
        micro_batch: samples that go through at once; where memory runs out, it is halved and the step begins again.

    Returns:
        The loss, the number of ids, and the micro-batch that memory allowed.

    Raises:
        DeviceTooSmall: memory runs out with a single sample.
    """
    while True:
        for parameter in parameters:
            parameter.grad = None
        try:
            loss, tokens = _accumulate(sub_llm, swept, indices, micro_batch)
            return loss, tokens, micro_batch
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if micro_batch == 1:
                longest = max(len(swept.samples[index].ids) for index in indices)
                raise DeviceTooSmall(
                    f"memory ran out on {sub_llm.device} with a single sample of up to {longest} ids; close other "
                    "programs, or shorten the rows"
                ) from error
        micro_batch = math.ceil(min(micro_batch, len(indices)) / 2)
        if sub_llm.device.type == "cuda":
            torch.cuda.empty_cache()


def _accumulate(sub_llm: SubLLM, swept: SweptSamples, indices: Sequence[int], micro_batch: int) -> tuple[Tensor, int]:
    total, tokens = torch.zeros((), device=sub_llm.device), 0
    num_labels = sum(swept.num_labels(index) for index in indices)
    for begin in range(0, len(indices), micro_batch):
        batch = swept.batch(indices[begin : begin + micro_batch], sub_llm.device)
        loss = completion_loss(sub_llm, batch) * (len(batch.labels) / num_labels)
        loss.backward()
        total += loss.detach()
        tokens += batch.num_tokens
    return total, tokens


def probe(sub_llm: SubLLM, swept: SweptSamples, view: Container[str], indices: Sequence[int], micro_batch: int) -> int:
    """Find the micro-batch that memory allows, at most `micro_batch`, by the gradient of these samples; keep nothing.

    Args:
        view: the names of the LoRA tensors that train.

    Raises:
        DeviceTooSmall: memory runs out with a single sample.
    """
    parameters = list(_named(sub_llm, view).values())
    for parameter in parameters:
        parameter.requires_grad_(True)
    _, _, allowed = accumulate(sub_llm, swept, indices, micro_batch, parameters)
    for parameter in parameters:
        parameter.requires_grad_(False)
        parameter.grad = None
    return allowed


def _named(sub_llm: SubLLM, view: Container[str]) -> dict[str, Parameter]:
    """Select the attached LoRA that trains; the emulator LoRA of layers above the border does not train."""
    return {name: parameter for name, parameter in lora.parameters(sub_llm).items() if name in view}


def is_out_of_memory(error: RuntimeError) -> bool:
    """Tell whether the error is torch's lack of memory, on any device."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in NO_MEMORY)


def fine_tune(
    sub_llm: SubLLM,
    swept: SweptSamples,
    view: dict[str, Tensor],
    settings: LocalSettings,
    *,
    seed: int,
    round_number: int,
    edge: str,
    trains: Factor = "both",
    micro_batch: int | None = None,
    progress: StepDone | None = None,
    checkpoint: RoundCheckpoint | None = None,
) -> TrainedDelta:
    """Train the adapter LoRA, the attached tensors that `view` names, from `view` and return the delta.

    Minimises F_k(w) + mu/2 ||w - view||^2 (paper eq. 9; the sign in its eq. 10 is reversed,
    docs/methods.md (m8-fedprox)) with a fresh AdamW, LoRA in fp32, no dropout.

    Args:
        sub_llm: the layers from the border on with LoRA attached; it keeps the trained values.
        swept: this edge's samples; order and steps depend only on their number.
        view: the adapter LoRA from which the round starts, fp32, by name.
        trains: the factor that is trained; the other one keeps the view's bits and is not in the delta.
        micro_batch: samples of a step that go through at once; None: all of them.
        progress: called as progress(step, steps, loss, tokens per second) after each step.
        checkpoint: saved states of this round; on a CPU a round that continues from one ends with the same bits.

    Raises:
        DeviceTooSmall: memory runs out with a single sample.
    """
    started = time.monotonic()
    lora.load(sub_llm, view)
    named = {name: value for name, value in _named(sub_llm, view).items() if is_of(trains, name)}
    parameters = list(named.values())
    for parameter in parameters:
        parameter.requires_grad_(True)
    reference = torch.cat([view[name].flatten() for name in named]).to(sub_llm.device)
    optimizer = torch.optim.AdamW(
        parameters, lr=settings.learning_rate, betas=BETAS, weight_decay=settings.weight_decay, fused=True
    )
    total = num_steps(len(swept.samples), settings)
    size = settings.batch_size
    order = list(islice(data_order(len(swept.samples), settings.epochs, seed, round_number, edge), total * size))
    at_once = min(micro_batch or size, size)
    losses: list[Tensor] = []
    done = tokens = 0
    saved = checkpoint.load() if checkpoint else None
    if saved is not None:
        done = saved.step
        losses = list(saved.tensors.pop("losses").to(sub_llm.device))
        tokens = saved.tokens
        at_once = min(at_once, saved.micro_batch)  # what memory allowed before, for the same sums
        _restore(optimizer, named, saved.tensors)
    before = tokens
    swept.expect(order[done * size :])
    for step in range(done, total):
        indices = order[step * size : (step + 1) * size]
        loss, num_ids, allowed = accumulate(sub_llm, swept, indices, at_once, parameters)
        if allowed < at_once:
            at_once = allowed
            swept.expect(order[(step + 1) * size :])  # the step asked for its samples twice
        drift = torch.cat([parameter.flatten() for parameter in parameters]) - reference
        (settings.proximal_mu / 2 * drift.square().sum()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        optimizer.step()
        losses.append(loss)
        tokens += num_ids
        if not torch.isfinite(losses[-1]):
            break  # no later step can repair that; the hub refuses the update and says so
        if checkpoint is not None and checkpoint.is_due(step + 1, total):
            checkpoint.save(step + 1, tokens, at_once, _state(optimizer, named) | {"losses": torch.stack(losses)})
        if progress is not None:
            seconds = time.monotonic() - started
            progress(step + 1, total, losses[-1].item(), (tokens - before) / max(seconds, 1e-9))
    for parameter in parameters:
        parameter.requires_grad_(False)
    trained = lora.snapshot(sub_llm)
    return TrainedDelta(
        delta={name: trained[name] - view[name] for name in named},
        num_examples=len(set(order[: len(losses) * size])),
        loss=torch.stack(losses).mean().item(),
        num_steps=len(losses),
        num_tokens=tokens,
        seconds=time.monotonic() - started,
        micro_batch=at_once,
    )


def _state(optimizer: torch.optim.Optimizer, named: Mapping[str, Parameter]) -> dict[str, Tensor]:
    """Collect LoRA and AdamW's moments and step counts, by name."""
    state: dict[str, Tensor] = dict(named)
    for name, parameter in named.items():
        state |= {f"{name}#{kind}": value for kind, value in optimizer.state[parameter].items()}
    return state


def _restore(optimizer: torch.optim.Optimizer, named: Mapping[str, Parameter], state: dict[str, Tensor]) -> None:
    """Set LoRA and AdamW to what `_state` collected."""
    for name, parameter in named.items():
        with torch.no_grad():
            parameter.copy_(state[name])
        prefix = f"{name}#"
        optimizer.state[parameter] = {
            key.removeprefix(prefix): value.to(parameter.device)
            for key, value in state.items()
            if key.startswith(prefix)
        }
