"""Chunked losses are torch's own, in value and in gradient, however many chunks there are."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from fedsoda_edge.model import loss
from fedsoda_edge.model.nf4 import NF4Linear, dequantize, quantize
from fedsoda_edge.protocol import needs


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


# -- heads that are not dense in the dtype of the hidden states ------------------------------------------


VOCAB, WIDTH = 13_607, 80  # a tile has 13056 rows; the last block of 64 weights is a short one


def stored(form: str) -> tuple[loss.Head, torch.Tensor]:
    """(the head as it is stored, its values in fp32)."""
    weight = torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(1)) / WIDTH**0.5
    if form == "bf16":
        return weight.bfloat16(), weight.bfloat16().float()
    tensor = quantize(weight)
    return NF4Linear(tensor, None, "cpu"), dequantize(tensor)


@pytest.mark.parametrize("form", ["nf4", "bf16"])
@pytest.mark.parametrize(
    ("dtype", "most"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=["fp32 compute", "bf16 compute"]
)
def test_a_head_of_several_tiles_is_the_dense_one(
    form: str, dtype: torch.dtype, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three chunks of logits; some labels are in the last tile."""
    assert loss.TILE_WEIGHTS["cpu"] // WIDTH < VOCAB
    monkeypatch.setattr(needs, "LOGITS", 40 * VOCAB)
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(100, WIDTH, generator=generator).to(dtype)
    teacher = torch.randn(100, WIDTH, generator=generator).to(dtype)
    labels = torch.randint(0, VOCAB, (100,), generator=generator)
    labels[:3] = torch.tensor([VOCAB - 1, 13_056, 13_055])
    head, values = stored(form)
    values = values.to(dtype).float()
    logits = [(states.float() @ values.T).requires_grad_() for states in (hidden, teacher)]
    scores, wanted = logits[0].log_softmax(-1), logits[1].detach().log_softmax(-1)
    expected = {
        "cross-entropy": -scores[torch.arange(100), labels].mean(),
        "KL": (wanted.exp() * (wanted - scores)).sum(-1).mean(),
    }
    ours = {
        "cross-entropy": lambda states: loss.cross_entropy(states, head, labels),
        "KL": lambda states: loss.kl_divergence(states, teacher, head),
    }
    for name, reference in expected.items():
        states = hidden.clone().requires_grad_()
        found = ours[name](states)
        found.backward()
        [by_logit] = torch.autograd.grad(reference, logits[0], retain_graph=True)
        gradient = by_logit @ values
        assert found.dtype == torch.float32
        assert found.item() == pytest.approx(reference.item(), rel=most), name
        assert states.grad is not None
        assert (states.grad.float() - gradient).norm() <= most * gradient.norm(), name
    likelihoods = loss.log_likelihoods(hidden, head, labels)
    torch.testing.assert_close(likelihoods, scores[torch.arange(100), labels].detach(), rtol=most, atol=most)
