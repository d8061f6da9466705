"""What a comparison finds, as types: what it keeps of each cell, and the report of `compare --json`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec

from fedsoda_hub.compare.settings import Cell, Compare

# --- kept --------------------------------------------------------------------------------------------------


class KeptAnswers(msgspec.Struct, frozen=True):
    """A model's answers. right: a 1 or 0 for each question. losses: as `evaluator.Answers` has them."""

    right: str
    losses: list[float]

    @property
    def share(self) -> float:
        """The share of questions that are answered rightly."""
        return self.right.count("1") / len(self.right)


class CellRound(msgspec.Struct, frozen=True, kw_only=True):
    """A closed round. accuracy: of the plug-in; None where it was not judged. Bytes are those of all edges in it."""

    round: int
    master: str
    accuracy: float | None
    bytes_up: int
    bytes_down: int


class Costs(msgspec.Struct, frozen=True, kw_only=True):
    """What an edge of a run pays. edge_peak_rss_bytes: None where edges have no process of their own."""

    trainable: float
    parameters_per_round: float
    model_bytes: float
    edge_memory_bytes: float
    edge_peak_rss_bytes: float | None
    gflop_per_edge_round: float
    seconds_per_edge_round: float


class CellResult(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A federated run that is over and judged. What an edge trained alone is not asked for is None."""

    cell: str
    edges: int
    rounds: list[CellRound]
    answered: dict[str, KeptAnswers]
    public_kl: dict[str, float] | None = None
    costs: Costs | None = None


class BaselineResult(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is not federated, judged. learning_rate: the one that central training did best with."""

    answered: KeptAnswers
    learning_rate: float | None = None


class EdgeRows(msgspec.Struct, frozen=True, kw_only=True):
    """How many rows an edge holds, and how many of each label where there are few labels."""

    rows: int
    labels: dict[str, int]


@dataclass
class Results:
    """All that a comparison has found; central and dealt by split and seed."""

    cells: dict[Cell, CellResult] = field(default_factory=dict)
    central: dict[tuple[str, int], KeptAnswers] = field(default_factory=dict)
    untouched: KeptAnswers | None = None
    dealt: dict[tuple[str, int], dict[str, EdgeRows]] = field(default_factory=dict)


# --- reported ----------------------------------------------------------------------------------------------


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """A mean over seeds. spread: the sample's standard deviation; None for a single seed."""

    mean: float
    spread: float | None
    per_seed: list[float]


class LossDifference(msgspec.Struct, frozen=True, kw_only=True):
    """nats: a completion id."""

    nats: float
    interval_95: tuple[float, float]
    is_shown: bool


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """One less the other, accuracy in points, with the paired 95 % interval. is_shown: whether that excludes 0."""

    points: float
    interval_95: tuple[float, float]
    is_shown: bool
    loss: LossDifference


class NamedDifference(Difference, frozen=True, kw_only=True):
    """A difference between two variants or baselines."""

    one: str
    other: str


class RoundPoint(msgspec.Struct, frozen=True, kw_only=True):
    """A point of a curve: accuracy after a round, and the bytes of all edges until then."""

    round: int
    accuracy: float | None
    bytes_up: float
    bytes_down: float


class EdgeRoundBytes(msgspec.Struct, frozen=True, kw_only=True):
    """The bytes of an invited edge in a round."""

    up_per_edge_round: float
    down_per_edge_round: float


class LevelReached(msgspec.Struct, frozen=True, kw_only=True):
    """When a variant has a level of accuracy: rounds, and bytes of all edges; None where it never has."""

    level: float
    rounds: int | None
    bytes: float | None


class Variant(Costs, frozen=True, kw_only=True):
    """A variant on one split, means over seeds."""

    plug_in: Spread
    sub_llm: Spread
    loss: dict[str, Spread]
    by_round: list[RoundPoint]
    bytes: EdgeRoundBytes
    public_kl: dict[str, float]
    to_level: LevelReached


class Alone(msgspec.Struct, frozen=True, kw_only=True):
    """Edges trained alone: the best by its very answers, and all of them."""

    best: Spread
    mean: Spread


class Baselines(msgspec.Struct, frozen=True, kw_only=True):
    """What is not federated, on one split; None where it was not asked for."""

    untouched: Spread | None
    alone: Alone | None
    central: Spread | None
    losses: dict[str, Spread]


class Split(msgspec.Struct, frozen=True, kw_only=True):
    variants: dict[str, Variant]
    baselines: Baselines
    differences: list[NamedDifference]


class CompareReport(msgspec.Struct, frozen=True, kw_only=True):
    """The report of a comparison. variants: what each changes, as it was written. dealt: by split, seed and edge."""

    transport: str
    eval_rows: int
    compare: Compare
    variants: dict[str, dict[str, Any]]
    baseline_of: str
    level_of: str
    dealt: dict[str, dict[str, dict[str, EdgeRows]]]
    splits: dict[str, Split]
    orderings: list[str]


class Pages(msgspec.Struct, frozen=True, kw_only=True):
    """Where the pages of a report lie."""

    report: str
    markdown: str
    pictures: list[str]


class WrittenReport(CompareReport, frozen=True, kw_only=True):
    """A report, and where it and its pages lie."""

    report: str
    markdown: str
    pictures: list[str]
    results: str
