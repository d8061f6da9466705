"""Chunked losses are torch's own, in value and in gradient, however many chunks there are."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from fedsoda_edge.model import loss


@pytest.mark.parametrize("rows", [1, 255, 600])
def test_cross_entropy_is_torchs(rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, 16, generator=generator, requires_grad=True)
    head = torch.randn(50, 16, generator=generator)
    labels = torch.randint(0, 50, (rows,), generator=generator)
    ours = loss.cross_entropy(hidden, head, labels)
    (3 * ours).backward()
    reference = hidden.detach().clone().requires_grad_()
    expected = functional.cross_entropy(reference @ head.T, labels)
    (3 * expected).backward()
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(hidden.grad, reference.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("rows", [1, 256, 600])
def test_log_likelihoods_are_torchs(rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    hidden, head = torch.randn(rows, 16, generator=generator), torch.randn(50, 16, generator=generator)
    labels = torch.randint(0, 50, (rows,), generator=generator)
    expected = (hidden @ head.T).log_softmax(-1)[torch.arange(rows), labels]
    torch.testing.assert_close(loss.log_likelihoods(hidden, head, labels), expected)


def test_kl_is_teacher_to_student_and_zero_for_equals() -> None:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(300, 16, generator=generator, requires_grad=True)
    teacher, head = torch.randn(300, 16, generator=generator), torch.randn(50, 16, generator=generator)
    ours = loss.kl_divergence(student, teacher, head)
    ours.backward()
    reference = student.detach().clone().requires_grad_()
    p, log_q = (teacher @ head.T).softmax(-1), (reference @ head.T).log_softmax(-1)
    expected = (p * (p.log() - log_q)).sum(-1).mean()
    expected.backward()
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(student.grad, reference.grad, rtol=1e-4, atol=1e-7)
    assert float(loss.kl_divergence(teacher, teacher, head)) == pytest.approx(0.0, abs=1e-6)
