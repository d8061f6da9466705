"""Who holds which rows: every row once, the same rows for every split of a seed."""

from __future__ import annotations

from collections import Counter

import pytest

from fedsoda_edge.errors import UsageProblem
from fedsoda_hub.compare.splits import check_split, choose, deal

LABELS = ["yes", "no"] * 200


def dealt(split: str, values: list[str] = LABELS, *, edges: int = 4, least: int = 1, seed: int = 3) -> list[list[int]]:
    return deal(split, choose(len(LABELS), 0, seed), values, edges=edges, least=least, seed=seed)


@pytest.mark.parametrize("split", ["iid", "dirichlet-0.1", "dirichlet-1.0"])
def test_every_row_goes_to_one_edge_and_again_to_the_same(split: str) -> None:
    parts = dealt(split)
    assert sorted(row for part in parts for row in part) == list(range(400))
    assert parts == dealt(split)
    assert parts != dealt(split, seed=4)


def test_iid_parts_are_of_one_size_and_a_small_alpha_makes_edges_of_one_label() -> None:
    def largest_share(part: list[int]) -> float:
        return max(Counter(LABELS[row] for row in part).values()) / len(part)

    assert [len(part) for part in dealt("iid")] == [100] * 4
    assert max(map(largest_share, dealt("iid"))) < 0.65
    assert min(map(largest_share, dealt("dirichlet-0.01"))) > 0.9
    assert max(map(largest_share, dealt("dirichlet-1000"))) < 0.55


def test_dirichlet_shares_are_drawn_again_until_every_edge_has_enough() -> None:
    assert min(len(part) for part in dealt("dirichlet-0.1", least=20)) >= 20
    with pytest.raises(UsageProblem, match=r"gives one of 4 edges .* rows, but \[compare\] least_rows = 101"):
        dealt("dirichlet-0.1", least=101)


def test_users_are_edges_and_of_too_many_those_with_most_rows() -> None:
    users = ["ann"] * 50 + ["bob"] * 250 + ["eve"] * 100
    parts = dealt("users:name", users, edges=2)
    assert [{users[row] for row in part} for part in parts] == [{"bob"}, {"eve"}]
    assert [len(part) for part in dealt("files", users, edges=9)] == [50, 250, 100]


def test_a_column_of_many_values_is_no_label() -> None:
    with pytest.raises(UsageProblem, match="400 different labels; name a column with at most 100"):
        dealt("dirichlet-0.5", [str(row) for row in range(400)])


@pytest.mark.parametrize("split", ["IID", "dirichlet", "dirichlet-0", "dirichlet--1", "users:", "shards-2"])
def test_what_is_no_split_is_refused_with_those_there_are(split: str) -> None:
    with pytest.raises(UsageProblem, match="is not a split; write iid, dirichlet-ALPHA, users:COLUMN or files"):
        check_split(split)


def test_fewer_rows_are_the_first_of_all() -> None:
    assert choose(400, 10, 3) == choose(400, 0, 3)[:10]
    assert choose(400, 10, 3) != choose(400, 10, 4)
