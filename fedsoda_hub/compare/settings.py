"""COMPARE.toml: the tables of a RUN.toml, what to compare in [compare], and overrides in [variants.NAME].

All of it is checked before any work. What a variant's settings do is each room's own business.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from fedsoda_edge.errors import UsageProblem
from fedsoda_hub.algorithms.methods.by_name import METHODS
from fedsoda_hub.compare.splits import check_split
from fedsoda_hub.settings.run import (
    SELF_GENERATED,
    RunSettings,
    Section,
    read_toml,
    refuse_unless,
    settings_of,
    table_of,
    without_unused,
)

BASELINES = ("untouched", "alone", "central")
# What a comparison decides, so that cells differ in their variant alone: every edge is there, and no clock has a say.
ITS_OWN: dict[str, tuple[str, ...] | None] = {
    "name": None,
    "seed": None,
    "listen": None,
    "rounds": ("min_edges", "quorum", "deadline_seconds"),
}
ITS_OWN |= {"task": ("eval_every",)}
NO_DEADLINE = 365 * 86400.0


class Compare(Section, frozen=True):
    """[compare]. data: rows to deal, relative to the file. rows, eval_rows: 0 takes all. edges: at most so many users.

    label: the column that Dirichlet splits deal by; None: the completion. eval_every: rounds; 0: after the last alone.
    baseline_of: the variant whose settings edges alone and central training have; level_of: the variant whose final
    accuracy others are timed to; None: the first variant, and "fedot" where there is one.
    """

    data: list[str]
    seeds: list[int] = msgspec.field(default_factory=lambda: [0, 1, 2])
    splits: list[str] = msgspec.field(default_factory=lambda: ["iid"])
    edges: int = 10
    rows: int = 0
    least_rows: int = 10
    label: str | None = None
    eval_rows: int = 0
    eval_every: int = 1
    baselines: list[str] = msgspec.field(default_factory=lambda: list(BASELINES))
    baseline_of: str | None = None
    level_of: str | None = None
    central_learning_rates: list[float] = msgspec.field(default_factory=list)


@dataclass(frozen=True)
class Cell:
    """One federated run. alone: the one edge that takes part, where it is a baseline."""

    variant: str
    split: str
    seed: int
    alone: int | None = None

    def __str__(self) -> str:
        who = "" if self.alone is None else f", edge {self.alone} alone"
        return f"{self.variant}, {self.split}, seed {self.seed}{who}"

    @property
    def directory(self) -> Path:
        """Below those of all cells."""
        alone = "all" if self.alone is None else f"alone-{self.alone}"
        return Path(self.variant, self.split.replace(":", "-"), f"seed-{self.seed}", alone)


@dataclass(frozen=True)
class Comparison:
    """All of COMPARE.toml. settings: of each variant, checked, with absolute paths. overrides: as they were written."""

    path: Path
    compare: Compare
    settings: dict[str, RunSettings]
    overrides: dict[str, dict[str, Any]]

    @property
    def baseline_of(self) -> str:
        return self.compare.baseline_of or next(iter(self.settings))

    @property
    def level_of(self) -> str:
        return self.compare.level_of or ("fedot" if "fedot" in self.settings else next(iter(self.settings)))

    def cells(self) -> Iterator[Cell]:
        """The federated runs of all variants: every variant of a seed and split before the next ones."""
        for seed in self.compare.seeds:
            for split in self.compare.splits:
                for variant in self.settings:
                    yield Cell(variant, split, seed)


def read_comparison(path: Path) -> Comparison:
    """Read and check COMPARE.toml.

    Raises:
        UsageProblem: as `config.read_settings`; a variant's problem names the variant.
    """
    raw = read_toml(path, "a COMPARE.toml (README, Compare methods)")
    file = path.name
    for name in ("compare", "task"):
        if name not in raw:
            raise UsageProblem(f"{file} has no [{name}]; a comparison needs one (README, Compare methods)")
    compare = table_of(raw.pop("compare"), Compare, "compare", file)
    overrides: Any = raw.pop("variants", {name: {"method": {"name": name}} for name in METHODS})
    if not isinstance(overrides, dict) or not all(isinstance(values, dict) for values in overrides.values()):
        raise UsageProblem(f"{file}: variants are tables; write [variants.NAME] with what differs, such as align.steps")
    _refuse_its_own(raw, file)
    settings = {}
    for name, values in overrides.items():
        try:
            settings[name] = _variant(raw, name, values, path)
        except UsageProblem as error:
            raise UsageProblem(f"variant {name}: {error}") from None
    comparison = Comparison(path.resolve(), compare, settings, overrides)
    _check(comparison, file)
    return comparison


def _variant(base: dict[str, Any], name: str, values: dict[str, Any], path: Path) -> RunSettings:
    """The base with these values, table by table."""
    is_name = bool(re.fullmatch(r"[\w+-]+", name))  # a method's, say, and a directory's
    refuse_unless([("the name", name, is_name, "letters, digits, -, _ and +")], path.name)
    _refuse_its_own(values, path.name)
    if "eval_data" in values.get("task", {}):
        raise UsageProblem("[task] eval_data; all variants answer the same questions: name them in [task] alone")
    merged = dict(base)
    if (method := values.get("method", {}).get("name")) in METHODS:
        merged = without_unused(base, METHODS[method])  # the base need not suit all methods, an override must
    for key, value in values.items():
        merged[key] = {**merged.get(key, {}), **value} if isinstance(value, dict) else value
    merged["rounds"] = {**merged.get("rounds", {}), "quorum": 1.0, "deadline_seconds": NO_DEADLINE}
    checked = settings_of({**merged, "name": "cell", "listen": {"port": 0}}, path)
    if checked.eval_data is None:
        raise UsageProblem(f"{path.name} has no [task] eval_data; write eval_data = ... below [task]")
    model = checked.directory / checked.model
    return msgspec.structs.replace(
        checked,
        model=str(model.resolve()) if model.is_dir() else checked.model,
        public=msgspec.structs.replace(
            checked.public,
            text=str(checked.public_text or SELF_GENERATED),
            like_task=str(checked.like_task or SELF_GENERATED),
        ),
        task=msgspec.structs.replace(checked.task, eval_data=str(checked.eval_data)),
    )


def _refuse_its_own(raw: dict[str, Any], file: str) -> None:
    for table, keys in ITS_OWN.items():
        given = raw.get(table, {})
        found = (
            table if keys is None and table in raw else next((f"[{table}] {k}" for k in keys or () if k in given), "")
        )
        if found:
            raise UsageProblem(f"{file} has {found}, which a comparison sets itself; delete it (see [compare])")


def _check(comparison: Comparison, file: str) -> None:
    c = comparison.compare
    known = ", ".join(comparison.settings)
    refuse_unless(
        [
            ("[compare] data", c.data, bool(c.data), "at least one file"),
            ("[compare] seeds", c.seeds, bool(c.seeds) and len(set(c.seeds)) == len(c.seeds), "different numbers"),
            ("[compare] seeds", c.seeds, all(0 <= seed < 2**63 for seed in c.seeds), "0 to 2^63-1"),
            ("[compare] splits", c.splits, bool(c.splits) and len(set(c.splits)) == len(c.splits), "different splits"),
            ("[compare] edges", c.edges, c.edges >= 1, "at least 1"),
            ("[compare] rows", c.rows, c.rows >= 0, "at least 0 (0: all)"),
            ("[compare] least_rows", c.least_rows, c.least_rows >= 1, "at least 1"),
            ("[compare] eval_rows", c.eval_rows, c.eval_rows >= 0, "at least 0 (0: all)"),
            ("[compare] eval_every", c.eval_every, c.eval_every >= 0, "at least 0 rounds (0: at the end only)"),
            ("[compare] baselines", c.baselines, set(c.baselines) <= set(BASELINES), f"of {', '.join(BASELINES)}"),
            ("[compare] baseline_of", c.baseline_of, comparison.baseline_of in comparison.settings, f"one of {known}"),
            ("[compare] level_of", c.level_of, comparison.level_of in comparison.settings, f"one of {known}"),
            (
                "[compare] central_learning_rates",
                c.central_learning_rates,
                all(0 <= rate < 1 for rate in c.central_learning_rates),
                "at least 0, below 1",
            ),
        ],
        file,
    )
    for split in c.splits:
        check_split(split)
    for name in c.data:
        if not (comparison.path.parent / name).exists():
            raise UsageProblem(
                f"[compare] data: {comparison.path.parent / name} is not there; paths are relative to {file}"
            )
