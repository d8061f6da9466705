"""Define what a comparison finds: what it keeps of each cell, and the report of `compare --json`.

Filling them is `run.py`'s and `summary.py`'s.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from fedsoda_hub.compare.settings import Cell, Compare
from fedsoda_hub.settings.keys import TOML

# --- kept --------------------------------------------------------------------------------------------------


class KeptChoices(msgspec.Struct, frozen=True, kw_only=True):
    """The choices of a model, by question. gold, chosen: places of the right and of the chosen one among the choices.

    margins: of two choices, the score of the second less that of the first. ranks: of more, that of the right one by its
    score; 1 is best.
    """

    choices: list[str]
    gold: list[int]
    chosen: list[int]
    margins: list[float] | None
    ranks: list[float] | None


class KeptAnswers(msgspec.Struct, frozen=True, kw_only=True):
    """A model's answers as a file keeps them. right: a 1 or 0 for each question. losses: as in `evaluator.Answers`.

    of_choices: None where answers were generated.
    """

    right: str
    losses: list[float]
    of_choices: KeptChoices | None

    @property
    def accuracy(self) -> float:
        """The share of questions that were answered right."""
        return self.right.count("1") / len(self.right)


class CellRound(msgspec.Struct, frozen=True, kw_only=True):
    """A closed round of a cell. accuracy: that of the plug-in; None: it was not judged. Bytes are those of all edges."""

    round: int
    master: str
    accuracy: float | None
    bytes_up: int
    bytes_down: int


class Costs(msgspec.Struct, frozen=True, kw_only=True):
    """The costs of a run for an edge. edge_peak_rss_bytes None: edges have no process of their own."""

    trainable: float
    parameters_per_round: float
    model_bytes: float
    edge_memory_bytes: float
    edge_peak_rss_bytes: float | None
    gflop_per_edge_round: float
    seconds_per_edge_round: float


class CellResult(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A federated run that is over and judged. public_kl, costs None: the run is that of one edge alone."""

    cell: str
    edges: int
    rounds: list[CellRound]
    answered: dict[str, KeptAnswers]
    public_kl: dict[str, float] | None = None
    costs: Costs | None = None


class BaselineResult(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A baseline that is not federated, judged. learning_rate: the best one of central training."""

    answered: KeptAnswers
    learning_rate: float | None = None


class EdgeRows(msgspec.Struct, frozen=True, kw_only=True):
    """The rows that an edge holds. labels: how many rows of each label, if there are few labels."""

    rows: int
    labels: dict[str, int]


@dataclass
class Results:
    """All that a comparison has found. central, dealt: by split and seed."""

    cells: dict[Cell, CellResult] = field(default_factory=dict)
    central: dict[tuple[str, int], KeptAnswers] = field(default_factory=dict)
    untouched: KeptAnswers | None = None
    dealt: dict[tuple[str, int], dict[str, EdgeRows]] = field(default_factory=dict)


# --- reported ----------------------------------------------------------------------------------------------


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """A mean over seeds and questions. spread: the sample standard deviation over seeds.

    interval_95: seeds and questions are both drawn (docs/methods.md (m12-claims)). spread, interval_95 None: there is one
    seed.
    """

    mean: float
    spread: float | None
    per_seed: list[float]
    interval_95: tuple[float, float] | None


class AnswerShare(msgspec.Struct, frozen=True, kw_only=True):
    """The share of questions for which a model chose an answer, beside the share of which it is right."""

    chosen: Estimate
    right: float


class GapClosed(msgspec.Struct, frozen=True, kw_only=True):
    """The share of the way from untouched to central that a variant has gone, with its 95 % interval."""

    share: float
    interval_95: tuple[float, float]


class Paired(msgspec.Struct, frozen=True, kw_only=True):
    """The certainty of a paired difference: its 95 % interval and p-values. p_holm: adjusted for all pairs of the split.

    None: there is one seed. is_shown: p_holm is below .05, and there are at least 5 seeds.
    """

    interval_95: tuple[float, float] | None
    p: float | None
    p_holm: float | None
    is_shown: bool


class LossDifference(Paired, frozen=True, kw_only=True):
    """A difference of losses in nats a completion id."""

    nats: float


class AUCDifference(Paired, frozen=True, kw_only=True):
    """A difference of AUCs, which lie between 0 and 1."""

    auc: float


class RankDifference(Paired, frozen=True, kw_only=True):
    """A difference of mean ranks of the right choice."""

    ranks: float


class Difference(Paired, frozen=True, kw_only=True):
    """A difference of accuracies in points, and of the other measures; None: one of the two has no such figure."""

    points: float
    loss: LossDifference
    auc: AUCDifference | None
    mean_rank: RankDifference | None


class NamedDifference(Difference, frozen=True, kw_only=True):
    """A difference, `one` less `other`, between two variants or baselines."""

    one: str
    other: str


class RoundPoint(msgspec.Struct, frozen=True, kw_only=True):
    """A point of a curve: accuracy after a round, and the bytes of all edges up to then."""

    round: int
    accuracy: float | None
    bytes_up: float
    bytes_down: float


class EdgeRoundBytes(msgspec.Struct, frozen=True, kw_only=True):
    """The mean bytes of an invited edge in a round."""

    up_per_edge_round: float
    down_per_edge_round: float


class LevelReached(msgspec.Struct, frozen=True, kw_only=True):
    """The rounds and the bytes of all edges until a variant reaches a level of accuracy; None: it never does."""

    level: float
    rounds: int | None
    bytes: float | None


class Variant(Costs, frozen=True, kw_only=True):
    """A variant on one split: means over seeds. plug_in, sub_llm: accuracies; the other measures are by these two.

    auc: empty unless there are two choices. mean_rank: of the right choice, empty unless there are more. shares: by model
    and answer, empty without choices. gap_closed: by measure, None where central is not better than untouched by more than
    its interval; empty where not both were asked for.
    """

    plug_in: Estimate
    sub_llm: Estimate
    loss: dict[str, Estimate]
    auc: dict[str, Estimate]
    mean_rank: dict[str, Estimate]
    shares: dict[str, dict[str, AnswerShare]]
    gap_closed: dict[str, GapClosed | None]
    by_round: list[RoundPoint]
    bytes: EdgeRoundBytes
    public_kl: dict[str, float]
    to_level: LevelReached


class Alone(msgspec.Struct, frozen=True, kw_only=True):
    """Edges trained alone: the best of them, by the same answers, and the mean of all."""

    best: Estimate
    mean: Estimate


class Baselines(msgspec.Struct, frozen=True, kw_only=True):
    """The baselines that are not federated, on one split; None: not asked for. aucs, mean_ranks: as in `Variant`."""

    untouched: Estimate | None
    alone: Alone | None
    central: Estimate | None
    losses: dict[str, Estimate]
    aucs: dict[str, Estimate]
    mean_ranks: dict[str, Estimate]
    shares: dict[str, dict[str, AnswerShare]]


class Split(msgspec.Struct, frozen=True, kw_only=True):
    """All results on one split, and the differences between any two of them."""

    variants: dict[str, Variant]
    baselines: Baselines
    differences: list[NamedDifference]


class CompareReport(msgspec.Struct, frozen=True, kw_only=True):
    """The report of a comparison. variants: the keys that each changes. dealt: by split, seed and edge."""

    transport: str
    eval_rows: int
    compare: Compare
    variants: dict[str, TOML]
    baseline_of: str
    level_of: str
    dealt: dict[str, dict[str, dict[str, EdgeRows]]]
    splits: dict[str, Split]
    orderings: list[str]


class Pages(msgspec.Struct, frozen=True, kw_only=True):
    """The paths of a report's pages."""

    report: str
    markdown: str
    pictures: list[str]


class WrittenReport(CompareReport, frozen=True, kw_only=True):
    """A report, with the paths of its pages and of its own file."""

    report: str
    markdown: str
    pictures: list[str]
    results: str
