"""Cross-entropy and KL over a large vocabulary in chunks of rows: B x T x V never exists at once.

Only the hidden states get a gradient: the head is frozen (method.md 8c). Which rows count is the caller's
business.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

CHUNK_ROWS = 256


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grads = []
        for rows, wanted in zip(hidden.split(CHUNK_ROWS), labels.split(CHUNK_ROWS), strict=True):
            logits = functional.linear(rows, head).float()
            total += functional.cross_entropy(logits, wanted, reduction="sum")
            grad = logits.softmax(dim=-1)
            grad[torch.arange(len(wanted), device=grad.device), wanted] -= 1.0
            grads.append(grad.to(head.dtype) @ head)
        ctx.save_for_backward(torch.cat(grads) / len(labels))
        return total / len(labels)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (hidden_grad,) = ctx.saved_tensors
        return hidden_grad * grad, None, None


def cross_entropy(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """Mean over rows of -log softmax(hidden head^T)[label], fp32.

    Args:
        hidden: (M, C), supervised rows only. head: (V, C), frozen. labels: (M,) int64.
    """
    return _CrossEntropy.apply(hidden, head, labels)


def log_likelihoods(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """(M,): log softmax(hidden head^T)[label], fp32, without a gradient.

    Args:
        hidden: (M, C), supervised rows only. head: (V, C). labels: (M,) int64.
    """
    found = []
    with torch.no_grad():
        for rows, wanted in zip(hidden.split(CHUNK_ROWS), labels.split(CHUNK_ROWS), strict=True):
            logits = functional.linear(rows, head).float()
            found.append(-functional.cross_entropy(logits, wanted, reduction="none"))
    return torch.cat(found)


class _KL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, head: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=student.device)
        grads = []
        for ours, theirs in zip(student.split(CHUNK_ROWS), teacher.split(CHUNK_ROWS), strict=True):
            log_student = functional.linear(ours, head).float().log_softmax(dim=-1)
            log_teacher = functional.linear(theirs, head).float().log_softmax(dim=-1)
            total += functional.kl_div(log_student, log_teacher, reduction="sum", log_target=True)
            grads.append((log_student.exp() - log_teacher.exp()).to(head.dtype) @ head)
        ctx.save_for_backward(torch.cat(grads) / len(student))
        return total / len(student)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (student_grad,) = ctx.saved_tensors
        return student_grad * grad, None, None


def kl_divergence(student: Tensor, teacher: Tensor, head: Tensor) -> Tensor:
    """Mean over rows of KL(teacher || student) in nats (paper eq. 7), fp32, temperature 1.

    Args:
        student, teacher: (M, C) after the final norm; the teacher gets no gradient. head: (V, C).
    """
    return _KL.apply(student, teacher, head)
