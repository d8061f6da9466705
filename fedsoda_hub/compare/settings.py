"""Read and check COMPARE.toml: the tables of a RUN.toml, what to compare in [compare], overrides in [variants.NAME].

All of it is checked before any work. What a variant's settings do is each room's own matter.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

import msgspec
from msgspec import Meta

from fedsoda_edge.errors import UsageProblem
from fedsoda_hub.compare.splits import SPLITS, check_split
from fedsoda_hub.settings.combine import without_unused
from fedsoda_hub.settings.keys import TOML, refuse_unless
from fedsoda_hub.settings.methods import METHODS
from fedsoda_hub.settings.run import RunSettings, settings_of
from fedsoda_hub.settings.tables import MAX_SEED, SELF_GENERATED, Section
from fedsoda_hub.settings.toml import as_table, read_toml, table_of

Baseline = Literal["untouched", "alone", "central"]
AttackKind = Literal["sign-flip", "scaled", "noise", "label-flip", "a-little", "inner-product", "colluding"]
# What a comparison sets itself, so that cells differ in their variant alone: every edge takes part, and no deadline passes.
ITS_OWN: dict[str, tuple[str, ...] | None] = {
    "name": None,
    "seed": None,
    "listen": None,
    "tls": None,
    "rounds": ("min_edges", "quorum", "deadline_seconds"),
}
ITS_OWN |= {"task": ("eval_every",)}
NO_DEADLINE = 365 * 86400.0
WHAT, DATA, LIMITS = {"panel": "what to compare"}, {"panel": "data"}, {"panel": "limits"}  # of --help
ATTACKS = {"panel": "attackers = {share = 0.2, kind = ...}"}


class Attackers(Section, frozen=True):
    """The attackers, [compare] attackers: which edges attack, and how."""

    share: Annotated[
        float,
        Meta(
            ge=0, lt=1, description="share of the edges that attack, the last of them; 0: all are honest", extra=ATTACKS
        ),
    ] = 0.0
    kind: Annotated[AttackKind, Meta(description="what they hand in (docs/methods.md)", extra=ATTACKS)] = "sign-flip"


class Compare(Section, frozen=True):
    """[compare]: what is compared, and on which rows."""

    data: Annotated[
        list[str], Meta(min_length=1, description="files of rows to deal to edges, relative to this one", extra=DATA)
    ]
    seeds: Annotated[
        list[Annotated[int, Meta(ge=0, le=MAX_SEED)]],
        Meta(
            min_length=1,
            description="every variant runs with each of them, on every split; a claim needs at least 5",
            extra=WHAT,
        ),
    ] = msgspec.field(default_factory=lambda: [0, 1, 2, 3, 4])
    prepare: Annotated[
        Literal["each", "once"],
        Meta(
            description="a bundle for each seed, or one of the first seed for all: then seeds decide only who holds which "
            "rows, and intervals are those of one bundle",
            extra=WHAT,
        ),
    ] = "each"
    splits: Annotated[list[str], Meta(min_length=1, description=f"ways to deal the rows: {SPLITS}", extra=WHAT)] = (
        msgspec.field(default_factory=lambda: ["iid"])
    )
    edges: Annotated[
        int, Meta(ge=1, description="edges to deal to; with users or files, at most this many", extra=LIMITS)
    ] = 10
    rows: Annotated[int, Meta(ge=0, description="rows to deal in all; 0: all rows", extra=LIMITS)] = 0
    least_rows: Annotated[int, Meta(ge=1, description="least number of rows of an edge", extra=LIMITS)] = 10
    label: Annotated[
        str | None,
        Meta(description="the column that dirichlet splits deal by; not given: the completion", extra=DATA),
    ] = None
    eval_rows: Annotated[int, Meta(ge=0, description="questions to judge on; 0: all questions", extra=LIMITS)] = 0
    eval_every: Annotated[
        int, Meta(ge=0, description="rounds between evaluations; 0: only after the last round", extra=LIMITS)
    ] = 1
    baselines: Annotated[
        list[Baseline],
        Meta(
            description="what variants are compared with: the untouched full LLM, each edge trained alone, central "
            "training on all rows",
            extra=WHAT,
        ),
    ] = msgspec.field(default_factory=lambda: list(get_args(Baseline)))
    baseline_of: Annotated[
        str | None,
        Meta(description="the variant whose settings the baselines have; not given: the first", extra=WHAT),
    ] = None
    level_of: Annotated[
        str | None,
        Meta(
            description="the variant whose final accuracy is the level that others are timed to; not given: fedot, or "
            "the first",
            extra=WHAT,
        ),
    ] = None
    central_learning_rates: Annotated[
        list[Annotated[float, Meta(ge=0, lt=1)]],
        Meta(
            description="learning rates of central training, of which the best counts; empty: that of [local]",
            extra=WHAT,
        ),
    ] = msgspec.field(default_factory=list)
    attackers: Attackers = Attackers()


@dataclass(frozen=True)
class Cell:
    """One federated run of a comparison. alone: the only edge that takes part, for a baseline; None: all edges do."""

    variant: str
    split: str
    seed: int
    alone: int | None = None

    def __str__(self) -> str:
        who = "" if self.alone is None else f", edge {self.alone} alone"
        return f"{self.variant}, {self.split}, seed {self.seed}{who}"

    @property
    def directory(self) -> Path:
        """The cell's path, relative to the directory of all cells."""
        alone = "all" if self.alone is None else f"alone-{self.alone}"
        return Path(self.variant, self.split.replace(":", "-"), f"seed-{self.seed}", alone)


@dataclass(frozen=True)
class Comparison:
    """All of COMPARE.toml.

    settings: by variant, checked and with absolute paths. overrides: by variant, as they were written.
    """

    path: Path
    compare: Compare
    settings: dict[str, RunSettings]
    overrides: dict[str, TOML]

    @property
    def baseline_of(self) -> str:
        """The variant whose settings edges alone and central training have."""
        return self.compare.baseline_of or next(iter(self.settings))

    @property
    def level_of(self) -> str:
        """The variant whose final accuracy others are timed to."""
        return self.compare.level_of or ("fedot" if "fedot" in self.settings else next(iter(self.settings)))

    def cells(self) -> Iterator[Cell]:
        """Yield the federated runs of all variants: every variant of a seed and split before the next split and seed."""
        for seed in self.compare.seeds:
            for split in self.compare.splits:
                for variant in self.settings:
                    yield Cell(variant, split, seed)


def read_comparison(path: Path) -> Comparison:
    """Read and check COMPARE.toml.

    Raises:
        UsageProblem: as in `settings.run.read_settings`; the problem of a variant names the variant.
    """
    raw = read_toml(path, "a COMPARE.toml (docs/guide.md, Comparing methods)")
    file = path.name
    for name in ("compare", "task"):
        if name not in raw:
            raise UsageProblem(
                f"{file} has no [{name}], which a comparison needs; write it (docs/guide.md, Comparing methods)"
            )
    compare = table_of(raw.pop("compare"), Compare, "compare", file)
    given = raw.pop("variants", {name: {"method": {"name": name}} for name in METHODS})
    if not isinstance(given, dict) or not all(isinstance(values, dict) for values in given.values()):
        raise UsageProblem(f"{file}: variants are tables; write [variants.NAME] with what differs, such as align.steps")
    overrides: dict[str, TOML] = given
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


def _variant(base: TOML, name: str, values: TOML, path: Path) -> RunSettings:
    """Override the base with a variant's values, table by table, and check the result."""
    is_name = bool(re.fullmatch(r"[\w+-]+", name))  # such as a method's; it is the name of a directory
    refuse_unless(is_name, "the name", name, "letters, digits, -, _ and +", path.name)
    _refuse_its_own(values, path.name)
    if "eval_data" in _table_in(values, "task", path.name):
        raise UsageProblem(
            "[task] eval_data is given here, but all variants answer the same questions; name them in [task] alone"
        )
    merged = dict(base)
    method = _table_in(values, "method", path.name).get("name")
    if isinstance(method, str) and method in METHODS:
        merged = without_unused(base, METHODS[method])  # the base need not suit all methods, an override must
    for key, value in values.items():
        merged[key] = {**_table_in(merged, key, path.name), **value} if isinstance(value, dict) else value
    merged["rounds"] = {**_table_in(merged, "rounds", path.name), "quorum": 1.0, "deadline_seconds": NO_DEADLINE}
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


def _table_in(tables: TOML, name: str, file: str) -> TOML:
    """Return one of these tables; an empty one where it was not written."""
    return as_table(tables.get(name, {}), name, file)


def _refuse_its_own(raw: TOML, file: str) -> None:
    """Raise UsageProblem for a key that a comparison sets itself."""
    for table, keys in ITS_OWN.items():
        given = _table_in(raw, table, file) if keys is not None else {}
        found = (
            table if keys is None and table in raw else next((f"[{table}] {k}" for k in keys or () if k in given), "")
        )
        if found:
            raise UsageProblem(f"{file} has {found}, which a comparison sets itself; delete it, and see [compare]")


def _check(comparison: Comparison, file: str) -> None:
    """Check what goes together in [compare]; each value by itself is checked when it is read."""
    c, known = comparison.compare, f"one of {', '.join(comparison.settings)}"
    refuse_unless(len(set(c.seeds)) == len(c.seeds), "[compare] seeds", c.seeds, "different numbers", file)
    refuse_unless(len(set(c.splits)) == len(c.splits), "[compare] splits", c.splits, "different splits", file)
    variants = comparison.settings
    refuse_unless(comparison.baseline_of in variants, "[compare] baseline_of", c.baseline_of, known, file)
    refuse_unless(comparison.level_of in variants, "[compare] level_of", c.level_of, known, file)
    num_attackers = round(c.attackers.share * c.edges)
    refuse_unless(
        not c.attackers.share or 1 <= num_attackers < c.edges,
        "[compare] attackers: share",
        c.attackers.share,
        f"a share of {c.edges} edges that is at least one of them and not all",
        file,
    )
    codecs = {settings.wire.codec for settings in variants.values()}
    if c.attackers.share and "nf4-weight" in codecs:
        raise UsageProblem(
            f"[compare] attackers: share = {c.attackers.share} beside [wire] codec = 'nf4-weight' in {file}: attackers "
            "forge steps, and whole weights travel; write another codec, or share = 0"
        )
    for split in c.splits:
        check_split(split)
    for name in c.data:
        if not (comparison.path.parent / name).exists():
            raise UsageProblem(
                f"[compare] data: {comparison.path.parent / name} is not there; correct the path, which is relative to "
                f"the directory of {file}"
            )
