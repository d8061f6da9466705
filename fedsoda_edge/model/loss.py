"""Compute cross-entropy and KL over a large vocabulary in chunks of rows: B x T x V never exists at once.

Only the hidden states get a gradient: the head is frozen, docs/methods.md (m8-loss). Where the head is not held in the
dtype of the hidden states, one tile of the vocabulary is dense at a time. Which rows count is left to the caller.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from fedsoda_edge.model.nf4 import BLOCK, NF4Linear
from fedsoda_edge.protocol.needs import chunk_rows

Head: TypeAlias = Tensor | NF4Linear  # (V, C), frozen

TILE_WEIGHTS = {"cpu": 1 << 20, "cuda": 1 << 24}  # weights in a tile of a head that is held in fewer bits


def _tiles(head: Head, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Cut the head into tiles: (which ids, their dense rows in `dtype`), ascending. The next tile may overwrite one."""
    if isinstance(head, Tensor) and head.dtype == dtype:
        yield slice(0, len(head)), head
        return
    vocab, width = head.shape
    step = max(1, TILE_WEIGHTS[_device(head).type] // width // BLOCK) * BLOCK
    for begin in range(0, vocab, step):
        end = min(begin + step, vocab)
        rows = head[begin:end].to(dtype) if isinstance(head, Tensor) else head.rows(begin, end, dtype)
        yield slice(begin, end), rows


def _device(head: Head) -> torch.device:
    return head.device if isinstance(head, Tensor) else head.weight.device


def _logits(hidden: Tensor, head: Head) -> Tensor:
    """Compute the logits (M, V), fp32; products are in the dtype of the hidden states."""
    out = torch.empty(len(hidden), head.shape[0], device=hidden.device)
    for ids, rows in _tiles(head, hidden.dtype):
        if hidden.dtype == torch.float32:
            torch.mm(hidden, rows.T, out=out[:, ids])
        else:
            out[:, ids] = hidden @ rows.T
    return out


def _times_head(grad: Tensor, head: Head, dtype: torch.dtype) -> Tensor:
    """Multiply grad (M, V) by the head: (M, C), products in `dtype`, sums over tiles in fp32."""
    total = torch.zeros(len(grad), head.shape[1], device=grad.device)
    for ids, rows in _tiles(head, dtype):
        if dtype == torch.float32:
            total.addmm_(grad[:, ids], rows)
        else:
            total += grad[:, ids].to(dtype) @ rows
    return total


class _CrossEntropy(torch.autograd.Function):
    """The mean cross-entropy over rows; the gradient of the hidden states is computed in the forward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Head, labels: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grads = torch.empty_like(hidden)
        step = chunk_rows(head.shape[0])
        for begin in range(0, len(labels), step):
            rows, wanted = hidden[begin : begin + step], labels[begin : begin + step, None]
            scores = _logits(rows, head)
            scores -= scores.amax(dim=1, keepdim=True)
            chosen = scores.gather(1, wanted)
            sums = scores.exp_().sum(dim=1, keepdim=True)
            total += (sums.log() - chosen).sum()
            scores /= sums  # softmax, in the logits' own place
            scores.scatter_add_(1, wanted, torch.full_like(chosen, -1.0))
            grads[begin : begin + step] = _times_head(scores, head, hidden.dtype)
        ctx.save_for_backward(grads)
        ctx.count = len(labels)
        return total / len(labels)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (hidden_grad,) = ctx.saved_tensors
        return hidden_grad * (grad / ctx.count).to(hidden_grad.dtype), None, None


def cross_entropy(hidden: Tensor, head: Head, labels: Tensor) -> Tensor:
    """Average -log softmax(hidden head^T)[label] over rows, fp32.

    Args:
        hidden: (M, C), supervised rows only. head: (V, C), frozen, in any dtype or in NF4. labels: (M,) int64.
    """
    loss: Tensor = _CrossEntropy.apply(hidden, head, labels)
    return loss


def log_likelihoods(hidden: Tensor, head: Head, labels: Tensor) -> Tensor:
    """Compute log softmax(hidden head^T)[label] of each row: (M,), fp32, without a gradient.

    Args:
        hidden: (M, C), supervised rows only. head: (V, C). labels: (M,) int64.
    """
    found = []
    step = chunk_rows(head.shape[0])
    with torch.no_grad():
        for rows, wanted in zip(hidden.split(step), labels.split(step), strict=True):
            found.append(-functional.cross_entropy(_logits(rows, head), wanted, reduction="none"))
    return torch.cat(found)


class _KL(torch.autograd.Function):
    """The mean KL divergence over rows; the gradient of the student's states is computed in the forward pass."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, head: Head) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=student.device)
        grads = torch.empty_like(student)
        step = chunk_rows(head.shape[0])
        for begin in range(0, len(student), step):
            log_student = _logits(student[begin : begin + step], head).log_softmax(dim=-1)
            log_teacher = _logits(teacher[begin : begin + step], head).log_softmax(dim=-1)
            total += functional.kl_div(log_student, log_teacher, reduction="sum", log_target=True)
            grads[begin : begin + step] = _times_head(log_student.exp_().sub_(log_teacher.exp_()), head, student.dtype)
        ctx.save_for_backward(grads)
        ctx.count = len(student)
        return total / len(student)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (student_grad,) = ctx.saved_tensors
        return student_grad * (grad / ctx.count).to(student_grad.dtype), None, None


def kl_divergence(student: Tensor, teacher: Tensor, head: Head) -> Tensor:
    """Average KL(teacher || student) over rows, in nats (paper eq. 7), fp32, temperature 1.

    Args:
        student, teacher: (M, C) after the final norm; the teacher gets no gradient. head: (V, C), frozen.
    """
    divergence: Tensor = _KL.apply(student, teacher, head)
    return divergence
