"""Orchestrated distillation alignment: train the emulator LoRA so that the sub-LLM follows the full LLM.

FedSODA (arXiv 2508.12727) eqs. 6-8, read as in docs/methods.md (m5-losses). What never changes is given as tensors: the
teacher's hidden states, and the student's own below the first layer that trains. Making and caching them is
`preparation/teacher.py`'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsoda_edge.model import lora
from fedsoda_edge.model.loss import kl_divergence
from fedsoda_edge.model.sub_llm import SubLLM
from fedsoda_edge.protocol.manifest import LayerPlan

WARM_UP = 0.05  # share of the steps
FINAL_RATE = 0.05  # share of the learning rate that is left at the end of the cosine


@dataclass(frozen=True)
class AlignSettings:
    """The length and the speed of an alignment. representation_weight and kl_weight are alpha and beta of eq. 8."""

    steps: int
    batch_size: int
    learning_rate: float
    representation_weight: float
    kl_weight: float


@dataclass(frozen=True)
class Teacher:
    """The full LLM's states on the public blocks; none of them depends on the LoRA that trains.

    retained: (N, T, C) for each layer of the student that is compared; in FedSODA the output of layer t_i + n for group
    start t_i. border: the output of the emulator's last layer (N, T, C). final: the states after the final norm, with the
    current adapter LoRA (N, T, C).
    """

    retained: Mapping[int, Tensor]
    border: Tensor
    final: Tensor


def representation_loss(teacher: Tensor, student: Tensor) -> Tensor:
    """Compute mean(((T - S) / rms(T))^2) in fp32, without position 0.

    A raw squared norm grows with T * C, and the massive activations of the first token dominate it
    (docs/methods.md (m5-losses), arXiv 2402.17762).

    Args:
        teacher, student: (N, T, C) each.
    """
    wanted, made = teacher[:, 1:].float(), student[:, 1:].float()
    return (wanted - made).square().mean() / wanted.square().mean()


def forward(student: SubLLM, layers: Iterable[int], start: Tensor) -> tuple[dict[int, Tensor], Tensor]:
    """Run the student for its own outputs (not teacher-forced) of these layers, and its final hidden states.

    Args:
        start: (B, T, C), hidden states below the student's first layer.

    Returns:
        ({layer: (B, T, C)}, (B, T, C) after the norm).
    """
    kept: dict[int, Tensor] = {}
    handles = []
    for number in set(layers):

        def keep(_: object, __: object, out: Tensor | tuple[Tensor, ...], number: int = number) -> None:
            kept[number] = out[0] if isinstance(out, tuple) else out

        handles.append(student.layer(number).register_forward_hook(keep))
    try:
        final = student.hidden(states=start)
    finally:
        for handle in handles:
            handle.remove()
    return kept, final


def objective(
    student: SubLLM, plan: LayerPlan, start: Tensor, teacher: Teacher, settings: AlignSettings
) -> tuple[Tensor, Tensor]:
    """Compute (alpha * (L_inter + L_final) + beta * L_KL, L_KL) of a batch (paper, eq. 8).

    L_inter is the mean over `teacher.retained`, L_final the loss at the border.

    Args:
        start: (B, T, C), hidden states below the student's first layer.
        teacher: the states on the same B blocks.
    """
    last = plan.sub_emulator[-1]
    outputs, final = forward(student, [*teacher.retained, last], start)
    rep = representation_loss(teacher.border, outputs[last])
    if teacher.retained:
        inter = [representation_loss(wanted, outputs[layer]) for layer, wanted in teacher.retained.items()]
        rep = rep + torch.stack(inter).mean()
    kl = kl_divergence(final.flatten(0, 1), teacher.final.flatten(0, 1), student.head)
    return settings.representation_weight * rep + settings.kl_weight * kl, kl


def align(
    student: SubLLM,
    plan: LayerPlan,
    start: Tensor,
    teacher: Teacher,
    settings: AlignSettings,
    *,
    seed: int,
    progress: Callable[[int, int, float], None] | None = None,
) -> None:
    """Train the student's emulator LoRA in place; nothing else of it changes.

    Args:
        start: (N, T, C) for all blocks, constant because nothing below the first aligned layer trains.
        seed: decides the order of the blocks; each pass over them is a new permutation.
        progress: called as progress(steps done, steps in all, KL in nats).
    """
    trained = list(lora.on(plan.emulator, lora.parameters(student)).values())
    if not trained or settings.steps == 0:
        return
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, settings.steps))
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for step in range(settings.steps):
        while len(order) < settings.batch_size:
            order += torch.randperm(len(start), generator=generator).tolist()
        batch, order = order[: settings.batch_size], order[settings.batch_size :]
        loss, kl = objective(student, plan, start[batch], _rows(teacher, batch), settings)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress(step + 1, settings.steps, float(kl.detach()))
    for parameter in trained:
        parameter.requires_grad_(False)


def rate(step: int, steps: int) -> float:
    """Compute the share of the learning rate at a step: a linear warm-up, then a cosine down to FINAL_RATE."""
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    done = (step - warm) / max(1, steps - warm)
    return FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * done))


def _rows(teacher: Teacher, rows: Sequence[int]) -> Teacher:
    index = list(rows)
    return Teacher(
        {t: states[index] for t, states in teacher.retained.items()}, teacher.border[index], teacher.final[index]
    )


def public_kl(student: SubLLM, start: Tensor, teacher_final: Tensor, batch_size: int = 4) -> float:
    """Measure KL(teacher || student) in nats, the mean over all positions of the blocks (docs/methods.md (m11-kl)).

    Args:
        start: (N, T, C) below the student's first layer.
        teacher_final: (N, T, C) after the final norm.
    """
    total = 0.0
    with torch.no_grad():
        for states, wanted in zip(start.split(batch_size), teacher_final.split(batch_size), strict=True):
            hidden = student.hidden(states=states)
            total += float(kl_divergence(hidden.flatten(0, 1), wanted.flatten(0, 1), student.head)) * len(states)
    return total / len(start)
