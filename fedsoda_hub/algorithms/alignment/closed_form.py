"""Pre-align the emulator LoRA without gradients: reduced-rank ridge regression on the retained layers' down_proj.

ReplaceMe's linear map in the place of removed layers (arXiv 2505.02819), at the rank of the LoRA, read as in
docs/methods.md (m7-closed-form). It is a start for `oda.align`, or the whole alignment. Teacher targets are given; making
and caching them is `preparation/teacher.py`'s.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.model.delta import LoRATensors
from fedsoda_edge.model.families import layer_on_meta, linear_modules
from fedsoda_edge.model.source import LayerSource
from fedsoda_edge.model.streaming import LayersDone, buckets, stream
from fedsoda_edge.protocol.manifest import LayerPlan

MODULE = "mlp.down_proj"
DAMPING = 1e-4  # lambda, as a share of the mean of the Gram matrix's diagonal
BATCH_TOKENS = 2048


def solve(
    gram: Tensor, cross: Tensor, down: Tensor, scale: float, rank: int, damping: float = DAMPING
) -> tuple[Tensor, Tensor]:
    """Solve for the LoRA (A, B) of down_proj whose scale * B A brings its output nearest to output + residual.

    Least squares over maps M -> M C^T of the output M with rank C <= `rank` and a ridge of lambda ||C||^2: with G =
    M^T M + lambda I and H = M^T R the best C of any rank is (G^-1 H)^T, and its best part of this rank lies in the top
    eigenvectors V of C G C^T (Izenman 1975). B = V / scale, A = V^T C W_down.

    Args:
        gram: M^T M (C, C).
        cross: M^T R (C, C).
        down: W_down (C, F).
        damping: lambda, as a share of trace(gram) / C.

    Returns:
        fp32 (rank, F) and (C, rank).
    """
    ridge = gram + damping * gram.trace() / len(gram) * torch.eye(len(gram), dtype=gram.dtype)
    map_ = torch.linalg.solve(ridge, cross).T
    top = torch.linalg.eigh(map_ @ ridge @ map_.T).eigenvectors[:, -rank:]
    return (top.T @ map_ @ down.double().cpu()).float(), (top / scale).float().contiguous()


def align(
    source: LayerSource,
    plan: LayerPlan,
    blocks: Sequence[Tensor],
    start: Sequence[Tensor],
    retained: Mapping[int, Tensor],
    emulator_lora: LoRATensors,
    scale: float,
    *,
    damping: float = DAMPING,
    compute_dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    progress: LayersDone | None = None,
) -> LoRATensors:
    """Solve for the emulator LoRA's down_proj factors, layer by layer from below; all other factors keep their values.

    This is one forward pass of the sub-emulator with one layer resident. A group is solved on states that the groups
    below it have corrected already, against the full LLM's states after the group. Position 0 is left out: its massive
    activations (arXiv 2402.17762) would be all that least squares sees.

    Args:
        source: the sub-LLM, quantized.
        blocks: (T,) ids each.
        start: (T, C) of each block below the first aligned layer.
        retained: by group start t_i the full LLM's output of layer t_i + n (blocks, T, C), as `oda.Teacher` has it.
        emulator_lora: what to start from, with down_proj factors.
        scale: alpha / rank.

    Returns:
        `emulator_lora` with the factors that were solved for, fp32.

    Raises:
        UsageProblem: a retained layer has no down_proj that ends its MLP, or no LoRA on it.
    """
    check(source, plan.retained, emulator_lora)
    solved = dict(emulator_lora)
    states, begin = list(start), plan.retained[0]
    for done, layer in enumerate(plan.retained):
        between = [number for number in plan.sub_emulator if begin <= number < layer]
        states = stream(
            source,
            between,
            blocks,
            start=states,
            lora=solved,
            lora_scale=scale,
            compute_dtype=compute_dtype,
            device=device,
        )
        begin = layer
        a, b = (f"layers.{layer}.{MODULE}.lora_{side}" for side in "AB")
        rank = len(solved.pop(a))
        solved.pop(b)  # the layer is solved for without what its LoRA learned before
        fit = _LayerSums(retained[layer], buckets([len(block) for block in blocks], BATCH_TOKENS))
        stream(
            source,
            (layer,),
            blocks,
            start=states,
            lora=solved,
            lora_scale=scale,
            compute_dtype=compute_dtype,
            device=device,
            batches=fit.batches,
            enter=fit.enter,
        )
        solved[a], solved[b] = solve(fit.gram, fit.cross, fit.down, scale, rank, damping)
        if progress is not None:
            progress(done + 1, len(plan.retained))
    return solved


def check(source: LayerSource, layers: Iterable[int], names: Container[str]) -> None:
    """Check that each of these layers can be solved for, with LoRA tensors of these names.

    Raises:
        UsageProblem: one cannot; says which, and what to write.
    """
    for layer in layers:
        module = layer_on_meta(source.family, source.fields, layer)
        # gemma3 and olmo2 have a norm behind the MLP, qwen3_moe many down_proj.
        if MODULE not in linear_modules(module) or hasattr(module, "post_feedforward_layernorm"):
            raise UsageProblem(
                f"closed-form alignment needs an MLP that ends in one down_proj, and layer {layer} of this "
                f"{source.family.model_type} model has none; write [align] closed_form = false"
            )
        if f"layers.{layer}.{MODULE}.lora_A" not in names:
            raise UsageProblem(
                f"closed-form alignment needs LoRA on down_proj, and layer {layer} has none there; add 'down_proj' to "
                "[lora] targets, or write [align] closed_form = false"
            )


class _LayerSums:
    """Sums over one retained layer's tokens, while `stream` runs it: gram = M^T M, cross = M^T R (C, C), float64.

    M is the output of down_proj without bias, R the target less the output of the layer. down: W_down (C, F).
    """

    def __init__(self, target: Tensor, batches: list[list[int]]) -> None:
        width = target.shape[-1]
        self.batches = batches
        self.gram, self.cross = (torch.zeros(width, width, dtype=torch.float64) for _ in range(2))
        self._target = target

    def enter(self, _: int, layer: Any) -> None:
        """Hook the layer that runs next."""
        down, turns = layer.get_submodule(MODULE), iter(self.batches)
        self.down = down.weight
        made: list[Tensor] = []

        def keep(_: Any, __: Any, out: Tensor) -> None:
            made[:] = [out if down.bias is None else out - down.bias]

        def add(_: Any, __: Any, out: Tensor | tuple[Tensor, ...]) -> None:
            output = out[0] if isinstance(out, tuple) else out
            wanted = self._target[next(turns)].to(output.device)
            inner, residual = (x[:, 1:].flatten(0, 1).double() for x in (made[0], wanted.double() - output.double()))
            self.gram += (inner.T @ inner).cpu()
            self.cross += (inner.T @ residual).cpu()

        down.register_forward_hook(keep)
        layer.register_forward_hook(add)
