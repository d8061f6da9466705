"""The best of the evaluated rounds: highest accuracy and AUC, least loss and mean rank, the earliest of equals."""

from __future__ import annotations

from typing import cast, get_type_hints

import pytest

from fedsoda_edge.protocol.messages import Digest
from fedsoda_hub.federation.best import Judged, Metric, best_of
from fedsoda_hub.federation.jobs import EvaluateResult
from fedsoda_hub.settings import tables


def judged(number: int, accuracy: float, loss: float | None, auc: float | None, rank: float | None) -> Judged:
    result = EvaluateResult(
        accuracy={"full": 0.9, "sub_llm": 0.1, "plug_in": accuracy},
        loss={"full": 0.1, "sub_llm": 9.0, "plug_in": loss},
        auc={"plug_in": auc},
        mean_rank={"plug_in": rank},
        num_examples=10,
    )
    master, view, manifest = (Digest(f"{what}{number}") for what in ("master", "view", "manifest"))
    return Judged(number, master, view, manifest, result)


ROUNDS = [
    judged(2, 0.5, None, None, 2.0),
    judged(4, 0.75, 0.5, 0.6, 1.5),
    judged(6, 0.75, 0.25, 0.8, 1.25),
    judged(8, 0.625, 0.375, 0.8, 1.75),
]


@pytest.mark.parametrize(("metric", "best"), [("accuracy", 4), ("loss", 6), ("auc", 6), ("mean_rank", 6)])
def test_the_best_round_by_each_figure(metric: str, best: int) -> None:
    found = best_of(ROUNDS, cast(Metric, metric))
    assert found is not None
    assert (found.round, found.master) == (best, f"master{best}")


def test_rounds_without_the_figure_are_not_compared() -> None:
    assert best_of([], "accuracy") is None
    assert best_of(ROUNDS[:1], "auc") is None
    assert best_of(ROUNDS[:1], "loss") is None


def test_settings_name_the_figures_that_there_are() -> None:
    assert get_type_hints(tables.Task)["metric"] == Metric
