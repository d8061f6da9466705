"""Quantize a matrix to NF4 so that its products with given inputs change least: GPTQ (arXiv 2210.17323).

Columns are rounded one after another, those with the largest inputs first, and what a column's rounding changes in the
products is taken up by the columns that are not rounded yet. The absmax of each block are those of plain quantization, so
that the result has the same form and size as `nf4.quantize`'s.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedsoda_edge.model.nf4 import BLOCK, NF4Tensor, codebook, quantize

DAMPING = 0.01  # of the mean of the Gram matrix's diagonal, as GPTQ's authors have it
COLUMNS = 64  # columns whose changes reach the other columns together


def quantize_for(weight: Tensor, gram: Tensor) -> NF4Tensor:
    """Quantize W (R, F) with a small |X (W - W')^T|^2 for inputs X with this Gram matrix.

    Args:
        weight: dense, any dtype.
        gram: X^T X (F, F), float64.

    Returns:
        NF4; rounded plainly where F cannot be divided by 64, so that blocks run from row to row.
    """
    plain = quantize(weight)
    rows, cols = weight.shape
    if cols % BLOCK:
        return plain
    table = codebook().double()
    middles = (table[1:] + table[:-1]) / 2
    absmax = plain.absmax_values().double().view(rows, -1).repeat_interleave(BLOCK, dim=1)
    order = gram.diagonal().argsort(descending=True, stable=True)
    absmax, left = absmax[:, order], weight.double()[:, order]
    spread = _inverse_factor(gram[order][:, order])
    codes = torch.empty(rows, cols, dtype=torch.int64)
    for begin in range(0, cols, COLUMNS):
        end = min(begin + COLUMNS, cols)
        errors = torch.empty(rows, end - begin, dtype=torch.float64)
        for column in range(begin, end):
            scale = absmax[:, column]
            wanted = (left[:, column] / scale.clamp(min=torch.finfo(torch.float32).tiny)).clamp(-1.0, 1.0)
            codes[:, column] = torch.bucketize(wanted, middles)
            error = (left[:, column] - table[codes[:, column]] * scale) / spread[column, column]
            left[:, column:end] -= torch.outer(error, spread[column, column:end])
            errors[:, column - begin] = error
        left[:, end:] -= errors @ spread[begin:end, end:]
    ordered = torch.empty_like(codes, dtype=torch.uint8)
    ordered[:, order] = codes.to(torch.uint8)
    pairs = ordered.view(-1, 2)
    return NF4Tensor((pairs[:, 0] << 4) | pairs[:, 1], plain.absmax, plain.nested_absmax, plain.offset, (rows, cols))


def _inverse_factor(gram: Tensor) -> Tensor:
    """Compute the upper Cholesky factor (F, F) of the inverse of the damped Gram matrix."""
    damped = gram.clone()
    # An input that is always 0 asks nothing of its column.
    damped.diagonal().add_(DAMPING * gram.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny))
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
