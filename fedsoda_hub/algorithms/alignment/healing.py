"""Heal a pruned emulator in closed form before it leaves the hub: down_proj of each kept layer is refitted by least squares.

    minimise  sum_i w_i |W z_i - r_i|^2  +  lambda |W - W_down|^2

z_i (F,) is what down_proj gets in the sub-emulator, whose lower layers are healed already, and r_i (C,) what it has to
add there so that the stream is the full LLM's: behind the removed layers of its group for a retained layer, behind the
layer itself for another one. So a layer also takes up what pruning and rounding below it left. This is ReplaceMe's map
(arXiv 2505.02819) at the full width of the MLP. Of a layer in NF4 all other matrices are rounded first, and down_proj so
that its products change least (`gptq.py`). Nothing is added that an edge would have to store or to compute.

w_i = 1 / |h_i|^2 with h_i the full LLM's state, since every reader of the stream divides by its length. Some tokens have
massive activations (arXiv 2402.17762), whose |h_i| is above MASSIVE times the median. In most LLMs the first token of
every text is one, and layers above attend to it as to a sink (arXiv 2309.17453), whatever the text, so a sub-LLM without
it is far off everywhere. A first token that is massive in this or a lower layer is therefore held by a weight of its own.
It and lambda are those that leave the least mean error on texts that the fit did not see, plus SINKS times the mean error
of held tokens. A massive token further on, such as a space or an article, is weighted as all others: what makes it massive
is often its context, which only removed layers look at, so that to hold it would be to err on all tokens that look like it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedsoda_edge.model.families import layer_on_meta, linear_modules
from fedsoda_edge.model.nf4 import NF4Tensor, quantize
from fedsoda_edge.model.source import Checkpoint, LayerSource, dense
from fedsoda_edge.model.streaming import LayersDone, buckets, stream
from fedsoda_edge.protocol.manifest import Half
from fedsoda_hub.algorithms.alignment.gptq import quantize_for

DOWN, OUT = "mlp.down_proj", "self_attn.o_proj"
RIDGES = tuple(10.0**power for power in range(-3, 1))  # lambda, of the mean of the Gram matrix's diagonal
HELD_OUT = 5  # every fifth text
MASSIVE = 5.0  # times the median length of a state; errors are judged on shorter ones alone
SINKS = 100.0  # times the mean error of all other tokens
WEIGHTS = tuple(10.0**power for power in range(0, 5, 2))  # of held tokens, beside 1 of others
BATCH_TOKENS = 4096
COLUMNS = 384  # of a Gram matrix that are multiplied together

StoredLayer = dict[str, Tensor | NF4Tensor]  # a layer's tensors as a bundle stores them, by name within the layer


def refit(sums: Sums, down: Tensor, ridge: float) -> Tensor:
    """Solve for W: the minimum of sum_i w_i |W z_i - r_i|^2 + ridge |W - W_down|^2.

    Args:
        down: W_down (C, F).
        ridge: lambda, above 0.

    Returns:
        (C, F), float64.
    """
    damped = sums.gram.clone()
    damped.diagonal().add_(ridge)
    factor = torch.linalg.cholesky(damped)
    return torch.cholesky_solve((sums.cross + ridge * down.to(sums.cross)).T, factor).T.contiguous()


def heal(
    source: Checkpoint,
    after: Mapping[int, int],
    texts: Sequence[Tensor],
    *,
    in_nf4: bool,
    lacking: Mapping[int, Half],
    healed: Mapping[int, StoredLayer],
    target: Callable[[int], Sequence[Tensor]] | None = None,
    compute_dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    progress: LayersDone | None = None,
) -> Iterator[tuple[int, StoredLayer]]:
    """Heal the layers of a sub-emulator from below, each on the states that the healed layers below it leave.

    One layer is resident; of each text the states of full LLM and sub-emulator are in memory, and what the layer's
    down_proj gets.

    Args:
        source: the full LLM.
        after: the sub-emulator's layers, ascending, each with the full LLM's layer whose output it has to give.
        texts: (T_i,) ids each.
        lacking: halves of the sub-emulator's layers that are pruned.
        in_nf4: whether the layers are stored in NF4; otherwise as in the checkpoint.
        healed: layers that an earlier call has yielded: they are run and not solved for again.
        target: gives the full LLM's states behind a layer (T_i, C), asked for in ascending order; None: they are computed.
        progress: called as progress(layers done, layers in all).

    Yields:
        each layer that is not in `healed` with its tensors, in the order of `after`.
    """
    batches = buckets([len(text) for text in texts], BATCH_TOKENS)
    below = 0
    at = states = stream(source, (), texts)
    is_sink = torch.zeros(len(texts), dtype=torch.bool)  # whose first token was massive so far

    def run(some: Checkpoint, layers: Sequence[int], start: Sequence[Tensor], enter: Any = None) -> list[Tensor]:
        return stream(
            some,
            layers,
            texts,
            start=start,
            batches=batches,
            enter=enter,
            compute_dtype=compute_dtype,
            store_dtype=torch.float32,
            device=device,
        )

    def behind(last: int) -> Sequence[Tensor]:
        nonlocal below, at
        at, below = run(source, range(below, last + 1), at), last + 1
        return at

    pruned = source.without(lacking)
    for done, (number, last) in enumerate(after.items()):
        wanted = (target or behind)(last)
        begun = rounded(pruned, number) if in_nf4 else pruned.stored_layer(number)
        module = refitted(pruned, number)
        parts = _Parts(batches, [len(text) for text in texts], module)
        states = run(pruned.with_layers({number: begun}), (number,), states, parts.enter)
        is_sink |= massive_first(wanted)
        layer = healed.get(number, begun)
        if module is not None:
            name = f"{module}.weight"
            if number not in healed:
                fitted, gram = LayerSums(parts, wanted, is_sink).fit(pruned.layer(number)[name])
                layer[name] = quantize_for(fitted, gram) if in_nf4 else fitted.to(pruned.dtype)
            states = parts.outputs(dense(layer)[name])
        if number not in healed:
            yield number, layer
        if progress is not None:
            progress(done + 1, len(after))


def refitted(source: LayerSource, number: int) -> str | None:
    """Name the linear module of a layer whose output is added to the stream last, as it is; None: there is none."""
    module = layer_on_meta(source.family, source.fields, number, source.lacking.get(number))
    if hasattr(module, "post_feedforward_layernorm"):  # a norm lies between (gemma3, olmo2)
        return None
    name = OUT if source.lacking.get(number) == "mlp" else DOWN  # the mixture of qwen3_moe has many down_proj
    return name if name in linear_modules(module) else None


def rounded(source: LayerSource, number: int) -> StoredLayer:
    """Round the matrices of a layer that a bundle stores in NF4, without regard to their inputs."""
    module = layer_on_meta(source.family, source.fields, number, source.lacking.get(number))
    linear = {f"{name}.weight" for name in linear_modules(module)}
    return {name: quantize(tensor) if name in linear else tensor for name, tensor in source.layer(number).items()}


class Sums:
    """Weighted sums over tokens in float64: gram (F, F) of z, cross (C, F) of r and z, square of |r|^2."""

    def __init__(self, outputs: int, inputs: int) -> None:
        self.square, self.count = 0.0, 0
        self.gram = torch.zeros(inputs, inputs, dtype=torch.float64)
        self.cross = torch.zeros(outputs, inputs, dtype=torch.float64)

    def add(self, z: Tensor, r: Tensor) -> None:
        """Add tokens: z (N, F) and r (N, C), each times the root of its weight; products are summed in their dtype."""
        for begin in range(0, z.shape[1], COLUMNS):  # it is symmetric: half of its products are enough
            part = (z[:, begin:].T @ z[:, begin : begin + COLUMNS]).double().cpu()
            self.gram[begin:, begin : begin + COLUMNS] += part
            self.gram[begin : begin + COLUMNS, begin + COLUMNS :] += part[COLUMNS:].T
        self.cross += (r.T @ z).double().cpu()
        self.square += float(r.square().sum())
        self.count += len(z)

    def times(self, weight: float) -> Sums:
        """Give all tokens this many times their weight."""
        other = Sums(0, 0)
        other.gram, other.cross, other.square = weight * self.gram, weight * self.cross, weight * self.square
        other.count = self.count
        return other

    def mean_error(self, weight: Tensor) -> float:
        """Compute the mean of w_i |W z_i - r_i|^2 for W (C, F), float64; 0 without tokens."""
        total = (weight @ self.gram * weight).sum() - 2 * (weight * self.cross).sum() + self.square
        return float(total) / max(1, self.count)

    def __add__(self, other: Sums) -> Sums:
        both = Sums(0, 0)
        both.gram, both.cross = self.gram + other.gram, self.cross + other.cross
        both.square, both.count = self.square + other.square, self.count + other.count
        return both


class _Parts:
    """The two parts of a layer's outputs, kept batch by batch while `stream` runs it: what it adds last, and the rest."""

    def __init__(self, batches: Sequence[Sequence[int]], lengths: Sequence[int], module: str | None) -> None:
        self._batches, self._lengths, self._module = batches, lengths, module
        self._made: list[tuple[Tensor, Tensor]] = []

    def enter(self, _: int, layer: Any) -> None:
        """Hook the layer that runs next."""
        if self._module is None:
            return
        last, turns = layer.get_submodule(self._module), iter(self._batches)
        made: list[tuple[Tensor, Tensor]] = []

        def keep(_: Any, args: tuple[Tensor, ...], out: Tensor) -> None:
            made[:] = [(args[0], out if last.bias is None else out - last.bias)]

        def add(_: Any, __: Any, out: Tensor | tuple[Tensor, ...]) -> None:
            output = out[0] if isinstance(out, tuple) else out
            lengths = [self._lengths[sample] for sample in next(turns)]

            def flat(states: Tensor) -> Tensor:  # without pads
                return torch.cat([row[:length] for row, length in zip(states, lengths, strict=True)])

            inner, added = made[0]
            self._made.append((flat(inner), flat(output.float() - added.float())))

        last.register_forward_hook(keep)
        layer.register_forward_hook(add)

    def __iter__(self) -> Iterator[tuple[Sequence[int], Tensor, Tensor]]:
        """Yield by batch its samples, what the module gets (N, F), and the stream without what it adds (N, C) fp32."""
        for batch, (inner, rest) in zip(self._batches, self._made, strict=True):
            yield batch, inner, rest

    def outputs(self, weight: Tensor) -> list[Tensor]:
        """Compute the layer's outputs (T_i, C) with another weight (C, F) of its module, by sample, on the CPU."""
        found: dict[int, Tensor] = {}
        for batch, inner, rest in self:
            out = rest + (inner @ weight.to(inner).T).float()
            found |= zip(batch, out.cpu().split([self._lengths[sample] for sample in batch]), strict=True)
        return [found[sample] for sample in range(len(self._lengths))]


def massive_first(states: Sequence[Tensor]) -> Tensor:
    """Tell of which texts the first state is massive beside those (T_i, C) of all texts; (N,) bool."""
    lengths = [state.norm(dim=1) for state in states]
    return torch.stack([length[0] for length in lengths]) > MASSIVE * torch.cat(lengths).median()


class LayerSums:
    """The sums of one layer.

    held: the first tokens of texts with a sink. seen: all others of most texts. unseen: those of every HELD_OUT-th text.

    Args:
        parts: of the layer, as it is stored so far: by batch its samples, what the module gets, the stream beside it.
        wanted: (T_i, C) states that it has to give.
        is_sink: (N,) bool, whether the first token of a text is held.
    """

    def __init__(
        self, parts: Iterable[tuple[Sequence[int], Tensor, Tensor]], wanted: Sequence[Tensor], is_sink: Tensor
    ) -> None:
        self.seen = self.unseen = self.held = Sums(0, 0)
        for batch, inner, rest in parts:
            target = torch.cat([wanted[sample] for sample in batch]).float().to(rest.device)
            length = target.norm(dim=1, keepdim=True)
            root = length.clamp(min=torch.finfo(torch.float32).tiny).reciprocal()
            z, r = inner.float() * root, (target - rest) * root
            if not len(self.seen.gram):
                self.seen, self.unseen, self.held = (Sums(r.shape[1], z.shape[1]) for _ in range(3))
            is_unseen = torch.cat([torch.full((len(wanted[i]),), i % HELD_OUT == HELD_OUT - 1) for i in batch])
            is_held = torch.cat([(torch.arange(len(wanted[i])) == 0) & is_sink[i] for i in batch])
            for sums, chosen in (
                (self.held, is_held),
                (self.seen, ~is_held & ~is_unseen),
                (self.unseen, ~is_held & is_unseen),
            ):
                # Held tokens are few and their weight may be large: rounding of fp32 products would show in the others.
                sums.add(*(x[chosen].double() if sums is self.held else x[chosen] for x in (z, r)))

    def fit(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Refit W (C, F) with the ridge of RIDGES that leaves the least error on texts that the fit did not see.

        Returns:
            (C, F), float64, fitted on all texts, and the Gram matrix (F, F) that it was fitted with.
        """

        def ridge(sums: Sums, share: float) -> float:
            return share * float(sums.gram.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny))

        def left(sums: Sums, share: float, times: float) -> float:
            fitted = refit(sums + self.held.times(times), weight, ridge(sums, share))
            return self.unseen.mean_error(fitted) + SINKS * self.held.mean_error(fitted)

        share = min(RIDGES, key=lambda share: left(self.seen, share, WEIGHTS[1]))
        times = min(WEIGHTS, key=lambda times: left(self.seen, share, times)) if self.held.count else 1.0
        everything = self.seen + self.unseen
        sums = everything + self.held.times(times)
        return refit(sums, weight, ridge(everything, share)), sums.gram
