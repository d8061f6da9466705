"""The report of answers that were made up: what is shown is what was planted, and tables say it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from fedsoda_hub.compare.pictures import write_pages
from fedsoda_hub.compare.results import (
    CellResult,
    CellRound,
    CompareReport,
    Costs,
    EdgeRows,
    KeptAnswers,
    KeptChoices,
    NamedDifference,
    Results,
)
from fedsoda_hub.compare.settings import read_comparison
from fedsoda_hub.compare.summary import summarise
from fedsoda_hub.compare.tables import markdown
from tests.hub.compare.files import write_comparison
from tests.schema import HUB

QUESTIONS = 120
VARIANTS: dict[str, dict[str, Any]] = {
    name: {"align": {"steps": at}} for at, name in enumerate(("good", "bad", "same"))
}
COSTS = Costs(
    trainable=1,
    parameters_per_round=2,
    model_bytes=3,
    edge_memory_bytes=4,
    edge_peak_rss_bytes=None,
    gflop_per_edge_round=5,
    seconds_per_edge_round=6,
)


def answered(skill: float, seed: int, choices: Sequence[str]) -> KeptAnswers:
    """Answers of a model that finds the right choice the better the greater its skill; -1: it generates."""
    gold = np.arange(QUESTIONS) % len(choices)
    chance = np.random.default_rng([seed, int(100 * skill)])
    scores = chance.standard_normal((QUESTIONS, len(choices))) / 2
    scores[np.arange(QUESTIONS), gold] += skill
    chosen = scores.argmax(axis=1)
    own = scores[np.arange(QUESTIONS), gold]
    is_two = len(choices) == 2
    return KeptAnswers(
        right="".join("01"[int(right)] for right in chosen == gold),
        losses=np.logaddexp(0, -own).tolist(),
        of_choices=KeptChoices(
            choices=list(choices),
            gold=gold.tolist(),
            chosen=chosen.tolist(),
            margins=(scores[:, 1] - scores[:, 0]).tolist() if is_two else None,
            ranks=None if is_two else (1.0 + (scores > own[:, None]).sum(axis=1)).tolist(),
        ),
    )


def report_of(directory: Path, model: Path, seeds: int, choices: Sequence[str] | None) -> CompareReport:
    """Make a report with answers among these choices; None: they were generated."""
    baselines = ["untouched", "alone", "central"]
    path = write_comparison(directory, model, VARIANTS, compare={"seeds": list(range(seeds)), "baselines": baselines})
    comparison = read_comparison(path)

    def kept(skill: float, seed: int) -> KeptAnswers:
        of = answered(skill, seed, choices or "ab")
        return of if choices else msgspec.structs.replace(of, of_choices=None)

    results = Results(untouched=kept(0.2, 99))
    last = CellRound(round=1, master="m", accuracy=0.5, bytes_up=10, bytes_down=20)
    for number, cell in enumerate(comparison.cells()):
        skill = {"good": 0.8, "bad": 0.3, "same": 0.3}[cell.variant]
        models = {"plug_in": kept(skill, cell.seed + 10 * (cell.variant == "same")), "sub_llm": kept(0.7, number)}
        results.cells[cell] = CellResult(
            cell=str(cell),
            edges=2,
            rounds=[last],
            answered=models,
            public_kl=dict.fromkeys(("pruned", "quantized", "aligned"), 1.0),
            costs=COSTS,
        )
    for seed in range(seeds):
        results.dealt["iid", seed] = {f"edge-{edge}": EdgeRows(rows=8, labels={}) for edge in range(2)}
        results.central["iid", seed] = kept(0.9, 50 + seed)
        for edge in range(2):
            cell = next(comparison.cells())
            alone = type(cell)(cell.variant, "iid", seed, edge)
            models = {"plug_in": kept(0.4, 70 + seed + 10 * edge)}
            results.cells[alone] = CellResult(cell=str(alone), edges=1, rounds=[last], answered=models)
    return summarise(comparison, results, "memory")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> CompareReport:
    return report_of(tmp_path_factory.mktemp("two"), tiny_llama, 5, ["no", "yes"])


def pair(report: CompareReport, one: str, other: str) -> NamedDifference:
    return next(found for found in report.splits["iid"].differences if (found.one, found.other) == (one, other))


def test_what_was_planted_is_shown_by_each_measure_and_nothing_else_is(report: CompareReport) -> None:
    planted, nothing = pair(report, "good", "bad"), pair(report, "bad", "same")
    assert planted.auc is not None
    assert nothing.auc is not None
    assert planted.is_shown
    assert planted.auc.is_shown
    assert planted.loss.is_shown
    assert not any(found.is_shown for found in (nothing, nothing.auc, nothing.loss))
    assert planted.mean_rank is None
    about = [line for line in report.orderings if "good" in line and "bad" in line]
    assert about == [
        f"iid: good above bad by {planted.points:.1f} points",
        f"iid: AUC of good above that of bad by {planted.auc.auc:.3f}",
        f"iid: loss of good below that of bad by {-planted.loss.nats:.3f} nats a completion id",
    ]
    assert not [line for line in report.orderings if "bad" in line and "same" in line]


def test_p_values_are_adjusted_for_all_pairs_of_a_measure(report: CompareReport) -> None:
    differences = report.splits["iid"].differences
    assert len(differences) == 15  # of three variants and three baselines
    p_values = [(one.p, one.p_holm) for one in differences]
    smallest = min(range(15), key=lambda at: p_values[at][0] or 0)
    assert p_values[smallest][1] == pytest.approx(15 * (p_values[smallest][0] or 0))


def test_figures_of_a_difference_are_those_of_its_models(report: CompareReport) -> None:
    rows, found = report.splits["iid"].variants, pair(report, "good", "bad")
    assert found.auc is not None
    assert found.points == pytest.approx(100 * (rows["good"].plug_in.mean - rows["bad"].plug_in.mean))
    assert found.auc.auc == pytest.approx(rows["good"].auc["plug_in"].mean - rows["bad"].auc["plug_in"].mean)
    assert found.loss.nats == pytest.approx(rows["good"].loss["plug_in"].mean - rows["bad"].loss["plug_in"].mean)
    ends = rows["good"].plug_in.interval_95
    assert ends is not None
    assert 0 < ends[0] < rows["good"].plug_in.mean < ends[1] < 1


def test_the_gap_that_is_closed_is_that_of_the_means(report: CompareReport) -> None:
    of = report.splits["iid"]
    untouched, central = of.baselines.aucs["untouched"].mean, of.baselines.aucs["central"].mean
    closed = of.variants["good"].gap_closed
    assert closed.keys() == {"accuracy", "auc"}
    by_auc = closed["auc"]
    assert by_auc is not None
    assert by_auc.share == pytest.approx((of.variants["good"].auc["plug_in"].mean - untouched) / (central - untouched))
    assert by_auc.interval_95[0] < by_auc.share < by_auc.interval_95[1]


def test_the_report_and_its_pages_are_as_promised(report: CompareReport, tmp_path: Path) -> None:
    pages = write_pages(report, {}, tmp_path)
    HUB.check("compare", told_of(report) | msgspec.to_builtins(pages))
    text, page = markdown(report), (tmp_path / "compare.html").read_text()
    row = report.splits["iid"].variants["good"]
    low, high = (100 * end for end in row.plug_in.interval_95 or (0, 0))
    told = f"{100 * row.plug_in.mean:.1f} ± {100 * (row.plug_in.spread or 0):.1f} ({low:.1f} to {high:.1f})"
    assert f"| good | {told} |" in text
    for shown in (told, "AUC", "Share of each answer", "Share of the gap", "Differences, iid", "good - bad"):
        assert shown in text
        assert shown in page
    assert "| right | 50.0 | 50.0 |" in text
    chosen = [f"{100 * row.shares[which]['no'].chosen.mean:.1f}" for which in ("plug_in", "sub_llm")]
    assert f"| good | {chosen[0]} / {chosen[1]} |" in text
    assert "| accuracy, AUC, loss |\n" in text
    assert "| not shown |\n" in text


def test_of_three_seeds_the_same_difference_is_not_shown(tmp_path: Path, tiny_llama: Path) -> None:
    report = report_of(tmp_path, tiny_llama, 3, ["no", "yes"])
    found = pair(report, "good", "bad")
    assert found.interval_95 is not None
    assert found.p_holm is not None
    assert not found.is_shown
    assert report.orderings == []
    assert "Not shown (3 seeds; at least 5 are needed).\n" in markdown(report)


def test_of_more_choices_the_mean_rank_takes_the_place_of_auc(tmp_path: Path, tiny_llama: Path) -> None:
    report = report_of(tmp_path, tiny_llama, 5, ["a|b", "c", "d", "e"])
    of, found = report.splits["iid"], pair(report, "good", "bad")
    row = of.variants["good"]
    assert row.auc == of.baselines.aucs == {}
    assert found.auc is None
    assert found.mean_rank is not None
    assert found.mean_rank.ranks < 0
    assert row.gap_closed.keys() == {"accuracy", "mean_rank"}
    assert row.mean_rank["plug_in"].mean >= 1
    by = -found.mean_rank.ranks
    assert f"iid: mean rank of good below that of bad by {by:.2f}" in report.orderings
    text = markdown(report)
    assert "|  | a/b | c | d | e |" in text  # a name does not break its table
    assert "Mean rank of the right choice" in text
    HUB.check("compare", told_of(report))


def test_of_generated_answers_there_are_accuracy_and_loss_alone(tmp_path: Path, tiny_llama: Path) -> None:
    report = report_of(tmp_path, tiny_llama, 5, None)
    row, found = report.splits["iid"].variants["good"], pair(report, "good", "bad")
    assert not any((row.auc, row.mean_rank, row.shares))
    assert found.auc is None
    assert found.mean_rank is None
    assert row.gap_closed.keys() == {"accuracy"}
    assert "Share of each answer" not in markdown(report)
    HUB.check("compare", told_of(report))


def told_of(report: CompareReport) -> dict[str, Any]:
    """What `compare --json` prints, with paths of files that nobody wrote."""
    told: dict[str, Any] = json.loads(msgspec.json.encode(report))
    return {"schema": 1, "status": "ok", **told, "report": "", "markdown": "", "pictures": [], "results": ""}
