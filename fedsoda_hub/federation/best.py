"""Decide which evaluated round of a run is the best, by one figure of its plug-in. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, Protocol, TypeVar

import msgspec

from fedsoda_edge.protocol.messages import Digest
from fedsoda_hub.federation.jobs import EvaluateResult

Metric = Literal["accuracy", "loss", "auc", "mean_rank"]
IS_BETTER_LESS = frozenset({"loss", "mean_rank"})


class Judged(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An evaluated round, with the digests of what was judged: w, and the largest sub-LLM's emulator view and manifest."""

    round: int
    master: Digest
    emulator_view: Digest
    manifest: Digest
    result: EvaluateResult


class HasResult(Protocol):
    """A round that was evaluated: `Judged`, or its record."""

    @property
    def result(self) -> EvaluateResult: ...


T = TypeVar("T", bound=HasResult)


def figure_of(result: EvaluateResult, metric: Metric) -> float | None:
    """Return the plug-in's figure; None: it is not finite, or these questions have no such figure."""
    match metric:
        case "accuracy":
            return result.accuracy.get("plug_in")
        case "loss":
            return result.loss.get("plug_in")
        case "auc":
            return result.auc.get("plug_in")
        case "mean_rank":
            return result.mean_rank.get("plug_in")


def best_of(judged: Iterable[T], metric: Metric) -> T | None:
    """Return the best round, of equals the earliest; None: no round has the figure."""
    best: tuple[float, T] | None = None
    for one in judged:
        figure = figure_of(one.result, metric)
        if figure is None:
            continue
        figure = -figure if metric in IS_BETTER_LESS else figure
        if best is None or figure > best[0]:
            best = figure, one
    return None if best is None else best[1]
