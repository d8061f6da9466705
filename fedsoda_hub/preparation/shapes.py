"""Judge sub-LLMs of several shapes by what healing really leaves of their error, in one pass over the full LLM.

Every layer of the full LLM is run once, and the sub-LLMs are healed beside it, layer by layer, as `algorithms/alignment/
healing.py` does it; of each only states are kept. Which shapes are worth it is the caller's to choose.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fedsoda_edge.model.source import Checkpoint
from fedsoda_edge.model.streaming import stream
from fedsoda_edge.protocol.manifest import LayerPlan
from fedsoda_hub.algorithms.alignment.healing import HELD_OUT, MASSIVE, heal
from fedsoda_hub.federation.jobs import ShapeHealed
from fedsoda_hub.preparation.full_llm import StreamedLLM
from fedsoda_hub.preparation.heal import healing_texts, restored
from fedsoda_hub.preparation.running import How

CHOOSING_IDS = 1 << 14  # of the texts that a run is healed on, which shapes and groups are judged on
JUDGED = 4  # every fourth text: nothing is fitted on it, and the errors are of it
STAGE = "healing each size on trial"


def choosing_texts(llm: StreamedLLM) -> list[Tensor]:
    """Choose some of the texts that this run is healed on, (T_i,) ids each: about CHOOSING_IDS in all."""
    texts = healing_texts(llm)
    return texts[:: min(len(texts) // HELD_OUT, math.ceil(sum(map(len, texts)) / CHOOSING_IDS))]


def healed_errors(llm: StreamedLLM, plans: Sequence[LayerPlan]) -> list[float]:
    """Measure how far the border states of each plan's sub-LLM are from the full LLM's, healed and stored as the run does.

    Returns:
        for each plan the mean of |h' - h|^2 / |h|^2 over positions of texts that nothing was fitted on.
    """
    texts = choosing_texts(llm)
    seen = [text for place, text in enumerate(texts) if place % JUDGED != JUDGED - 1]
    judged = texts[JUDGED - 1 :: JUDGED]
    how = llm.running.how(STAGE)
    full = _FullStates(llm.source, [*seen, *judged], how)
    shapes = [_Shape(llm, plan, full, seen, judged, how) for plan in plans]
    total, done = sum(len(shape.after) for shape in shapes), 0
    how["progress"](0, total)
    while waiting := [shape for shape in shapes if not shape.is_done]:
        # The one that needs the lowest layer of the full LLM next: so that is run once, from below.
        min(waiting, key=lambda shape: shape.next_target).advance()
        done += 1
        how["progress"](done, total)
    return [shape.error() for shape in shapes]


def shape_healed(stage: str, plan: LayerPlan, error: float) -> ShapeHealed:
    """Say what was found of a plan whose groups are of one size."""
    size = len(plan.groups[0].removed) if plan.groups else 0
    return ShapeHealed(stage=stage, layers_per_group=size, groups=len(plan.groups), error=error)


class _FullStates:
    """The full LLM's states of all texts behind one layer, which only rises."""

    def __init__(self, source: Checkpoint, texts: Sequence[Tensor], how: How) -> None:
        self._source, self._texts, self._how = source, texts, how
        self._states = stream(source, (), texts)
        self._below = 0

    def behind(self, layer: int) -> list[Tensor]:
        """Return the states (T_i, C) behind a layer that is not below the one that was asked for before."""
        assert layer >= self._below - 1, f"the full LLM is behind layer {self._below - 1}, and {layer} was asked for"
        self._states = _run(self._source, range(self._below, layer + 1), self._texts, self._states, self._how)
        self._below = layer + 1
        return self._states


class _Shape:
    """A sub-LLM that is healed beside others. after: its layers, with the full LLM's whose output each has to give."""

    def __init__(
        self,
        llm: StreamedLLM,
        plan: LayerPlan,
        full: _FullStates,
        seen: Sequence[Tensor],
        judged: Sequence[Tensor],
        how: How,
    ) -> None:
        self.after = restored(plan)
        self._source, self._full, self._how = llm.source.without(plan.lacking), full, how
        self._judged, self._num_seen = judged, len(seen)
        self._states = stream(llm.source, (), judged)
        self._targets = list(self.after.values())
        self._wanted: list[Tensor] = []
        self._healing = heal(
            llm.source,
            self.after,
            seen,
            in_nf4=llm.settings.method.emulator_base == "nf4",
            lacking=plan.lacking,
            healed={},
            target=self._target,
            compute_dtype=how["compute_dtype"],
            device=how["device"],
        )

    @property
    def is_done(self) -> bool:
        """Whether all layers are healed."""
        return not self._targets

    @property
    def next_target(self) -> int:
        """The layer of the full LLM whose output the next layer has to give."""
        return self._targets[0]

    def advance(self) -> None:
        """Heal the next layer, and run the judged texts through it."""
        self._targets.pop(0)
        number, layer = next(self._healing)
        healed = self._source.with_layers({number: layer})
        self._states = _run(healed, (number,), self._judged, self._states, self._how)

    def _target(self, layer: int) -> Sequence[Tensor]:
        states = self._full.behind(layer)
        self._wanted = states[self._num_seen :]
        return states[: self._num_seen]

    def error(self) -> float:
        """Compute the error behind the last layer."""
        made, wanted = (torch.cat([state[1:] for state in states]) for states in (self._states, self._wanted))
        squares = wanted.square().sum(dim=1)
        is_judged = squares <= MASSIVE**2 * squares.median()
        relative = (made - wanted).square().sum(dim=1)[is_judged] / squares[is_judged]
        return float(relative.mean())


def _run(
    source: Checkpoint, layers: Sequence[int], texts: Sequence[Tensor], start: Sequence[Tensor], how: How
) -> list[Tensor]:
    return stream(
        source,
        layers,
        texts,
        start=start,
        compute_dtype=how["compute_dtype"],
        store_dtype=torch.float32,
        device=how["device"],
    )
