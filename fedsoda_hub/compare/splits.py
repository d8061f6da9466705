"""Deal rows to edges: evenly, by Dirichlet shares of each label, by a column that names users, or a file each.

The same seed chooses the same rows for every split, so splits differ in who holds a row and in nothing else. Where rows
come from is the caller's business.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

from fedsoda_edge.errors import UsageProblem

MAX_LABELS = 100  # a column with more values is not a label
DRAWS = 1000  # of Dirichlet shares, until every edge has enough rows
SPLITS = "iid, dirichlet-ALPHA, users:COLUMN or files"


def check_split(split: str) -> None:
    """Check the name of a split.

    Raises:
        UsageProblem: it names none.
    """
    if split not in ("iid", "files") and not re.fullmatch(r"users:\w+", split):
        _alpha(split)


def _alpha(split: str) -> float:
    found = re.fullmatch(r"dirichlet-(\d+(?:\.\d+)?)", split)
    if found is None or float(found[1]) == 0:
        raise UsageProblem(f"[compare] splits: {split!r} is not a split; write {SPLITS}, such as dirichlet-0.5")
    return float(found[1])


def choose(num_rows: int, wanted: int, seed: int) -> list[int]:
    """Draw the indices of `wanted` rows in an order of the seed; 0: of all."""
    order = np.random.default_rng([seed, 0]).permutation(num_rows).tolist()
    return order[:wanted] if wanted else order


def deal(
    split: str, chosen: Sequence[int], values: Sequence[str], *, edges: int, least: int, seed: int
) -> list[list[int]]:
    """Deal rows to edges, all of `chosen` except users beyond the `edges` largest.

    Args:
        values: for each row of the data what this split asks for: its label, its user or its file; "iid" asks for none.
        least: rows that an edge must have.

    Raises:
        UsageProblem: the rows do not give every edge `least`.
    """
    if split == "iid":
        parts = [list(chosen[edge::edges]) for edge in range(edges)]
    elif split == "files" or split.startswith("users:"):
        parts = _by_value(chosen, values, edges)
    else:
        parts = _dirichlet(chosen, values, _alpha(split), edges, least, seed)
    fewest = min(map(len, parts))
    if fewest < least:
        raise UsageProblem(
            f"split {split} gives one of {len(parts)} edges {fewest} rows, [compare] least_rows = {least}; "
            "lower it, take fewer edges or more rows"
        )
    return parts


def _by_value(chosen: Sequence[int], values: Sequence[str], edges: int) -> list[list[int]]:
    """Take the `edges` values with most rows, in the order of their names."""
    most = Counter(values[row] for row in chosen)
    kept = sorted(sorted(most, key=lambda value: (-most[value], value))[:edges])
    parts: dict[str, list[int]] = {value: [] for value in kept}
    for row in chosen:
        if values[row] in parts:
            parts[values[row]].append(row)
    return list(parts.values())


def _dirichlet(
    chosen: Sequence[int], labels: Sequence[str], alpha: float, edges: int, least: int, seed: int
) -> list[list[int]]:
    """Deal each label's rows by shares drawn from Dirichlet(alpha, ..., alpha) (Hsu et al. 2019, arXiv 1909.06335).

    Shares are drawn again until every edge has `least` rows (Li et al. 2022, arXiv 2102.02079). numpy draws them:
    flwr-datasets is bound to datasets < 2.20, fedlab brings torchvision, fedartml Jupyter.
    """
    of_label: defaultdict[str, list[int]] = defaultdict(list)
    for row in chosen:
        of_label[labels[row]].append(row)
    if len(of_label) > MAX_LABELS:
        raise UsageProblem(
            f"split dirichlet-{alpha:g} asks for labels, and the rows have {len(of_label):,} different ones; name a "
            f"column with at most {MAX_LABELS} values: [compare] label = ..."
        )
    chance = np.random.default_rng([seed, 1])
    parts: list[list[int]] = []
    for _ in range(DRAWS):
        parts = [[] for _ in range(edges)]
        for _, rows in sorted(of_label.items()):
            cuts = np.cumsum(chance.dirichlet([alpha] * edges))[:-1] * len(rows)
            for part, some in zip(parts, np.split(np.array(rows), cuts.round().astype(int)), strict=True):
                part += some.tolist()
        if min(map(len, parts)) >= least:
            return parts
    return parts
