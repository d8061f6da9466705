"""Deal rows to edges: evenly, by Dirichlet shares of each label, by a column that names users, or a file each.

The same seed chooses the same rows for every split, so splits differ only in who holds a row. Reading rows is
`dealt.py`'s.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

from fedsoda_edge.errors import UsageProblem

MAX_LABELS = 100  # values of a column up to which it counts as a label
DRAWS = 1000  # most drawings of Dirichlet shares, until every edge has enough rows
SPLITS = "iid, dirichlet-ALPHA, users:COLUMN or files"


def check_split(split: str) -> None:
    """Check the name of a split.

    Raises:
        UsageProblem: it is not the name of a split.
    """
    if split not in ("iid", "files") and not re.fullmatch(r"users:\w+", split):
        _alpha(split)


def _alpha(split: str) -> float:
    found = re.fullmatch(r"dirichlet-(\d+(?:\.\d+)?)", split)
    if found is None or float(found[1]) == 0:
        raise UsageProblem(f"[compare] splits: {split!r} is not a split; write {SPLITS}, such as dirichlet-0.5")
    return float(found[1])


def choose(num_rows: int, wanted: int, seed: int) -> list[int]:
    """Draw the indices of `wanted` rows, in an order that the seed decides; 0: of all rows."""
    order = np.random.default_rng([seed, 0]).permutation(num_rows).tolist()
    return order[:wanted] if wanted else order


def deal(
    split: str, chosen: Sequence[int], values: Sequence[str], *, edges: int, least: int, seed: int
) -> list[list[int]]:
    """Deal all rows of `chosen` to edges; only rows of users or files beyond the `edges` largest are left out.

    Args:
        values: for each row of the data the value that the split deals by: its label, user or file; "iid" reads none.
        least: how many rows an edge must have.

    Returns:
        the indices of each edge's rows.

    Raises:
        UsageProblem: an edge would have fewer than `least` rows, or there are too many labels.
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
            f"split {split} gives one of {len(parts)} edges {fewest} rows, but [compare] least_rows = {least}; lower "
            "least_rows, or take fewer edges or more rows"
        )
    return parts


def _by_value(chosen: Sequence[int], values: Sequence[str], edges: int) -> list[list[int]]:
    """Deal the rows of each of the `edges` values with most rows to an edge, in the order of the values."""
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

    Shares are drawn again until every edge has `least` rows (Li et al. 2022, arXiv 2102.02079). numpy draws them, because
    flwr-datasets needs datasets < 2.20, fedlab brings torchvision and fedartml Jupyter.
    """
    of_label: defaultdict[str, list[int]] = defaultdict(list)
    for row in chosen:
        of_label[labels[row]].append(row)
    if len(of_label) > MAX_LABELS:
        raise UsageProblem(
            f"split dirichlet-{alpha:g} deals by label, but the rows have {len(of_label):,} different labels; name a "
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
