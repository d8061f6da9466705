"""Rounding with regard to inputs changes products less than plain rounding, in the same form and bytes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedsoda_edge.model.nf4 import BLOCK, CODEBOOK, NF4Tensor, dequantize, quantize
from fedsoda_hub.algorithms.alignment.gptq import DAMPING, quantize_for


def correlated(seed: int, tokens: int, features: int) -> Tensor:
    """(N, F) inputs of few directions, of very different lengths, as those of a real layer are."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(tokens, features // 4, generator=generator, dtype=torch.float64)
    mixed = base @ torch.randn(features // 4, features, generator=generator, dtype=torch.float64)
    noise = torch.randn(tokens, features, generator=generator, dtype=torch.float64)
    return (mixed + noise) * torch.rand(features, generator=generator, dtype=torch.float64)


def one_by_one(weight: Tensor, gram: Tensor) -> Tensor:
    """The dense result of the method's definition (optimal brain quantization): (R, F).

    Round the column with the largest input, move the others so that products change least, go on with what is left.
    """
    absmax = quantize(weight).absmax_values().double().view(len(weight), -1)
    left, table = weight.double().clone(), torch.tensor(CODEBOOK, dtype=torch.float64)
    damped = gram + DAMPING * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    order = gram.diagonal().argsort(descending=True, stable=True).tolist()
    for place, column in enumerate(order):
        scale = absmax[:, column // BLOCK]
        nearest = (left[:, column, None] / scale[:, None] - table).abs().argmin(dim=1)
        rounded = table[nearest] * scale
        rest = order[place + 1 :]
        if rest:
            change = torch.linalg.solve(damped[rest][:, rest], damped[rest, column])
            left[:, rest] += torch.outer(left[:, column] - rounded, change)
        left[:, column] = rounded
    return left


def test_columns_are_rounded_as_optimal_brain_quantization_does_it() -> None:
    inputs = correlated(0, 400, 2 * BLOCK)
    weight = torch.randn(6, 2 * BLOCK, generator=torch.Generator().manual_seed(1))
    made = dequantize(quantize_for(weight, inputs.T @ inputs)).double()
    torch.testing.assert_close(made, one_by_one(weight, inputs.T @ inputs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_products_change_less_than_with_plain_rounding(seed: int) -> None:
    inputs = correlated(seed, 2000, 192)
    weight = torch.randn(48, 192, generator=torch.Generator().manual_seed(seed))

    def change(rounded: NF4Tensor) -> float:
        return float((inputs @ (dequantize(rounded).double() - weight.double()).T).square().sum())

    assert change(quantize_for(weight, inputs.T @ inputs)) < 0.5 * change(quantize(weight))


def test_the_form_is_that_of_plain_rounding() -> None:
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(2))
    inputs = correlated(3, 300, 128)
    plain, made = quantize(weight), quantize_for(weight, inputs.T @ inputs)
    assert made.shape == plain.shape
    for name, part in plain.tensors("w").items():
        assert (made.tensors("w")[name].shape, made.tensors("w")[name].dtype) == (part.shape, part.dtype)
    assert torch.equal(made.absmax_values(), plain.absmax_values())


def test_inputs_that_say_nothing_leave_plain_rounding() -> None:
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(4))
    made = quantize_for(weight, torch.zeros(128, 128, dtype=torch.float64))
    differ = dequantize(made) != dequantize(quantize(weight))  # beside a middle, where absmax is rounded itself
    assert differ.float().mean() < 0.02


def test_blocks_that_run_on_from_row_to_row_are_rounded_plainly() -> None:
    weight = torch.randn(8, 96, generator=torch.Generator().manual_seed(5))
    inputs = correlated(6, 300, 96)
    assert torch.equal(quantize_for(weight, inputs.T @ inputs).codes, quantize(weight).codes)
