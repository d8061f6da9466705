"""Bytes, seconds and counts as people write and read them."""

from __future__ import annotations

import pytest

from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.units import counted, finite, human_bytes, human_seconds, parse_bytes, parse_seconds

GIB = 2**30


def test_times_have_a_unit() -> None:
    assert [parse_seconds(text, "--for") for text in ("90s", "30m", "1h", "1.5 H", "7d")] == [
        90,
        1800,
        3600,
        5400,
        604800,
    ]
    for wrong in ("90", "1w", "-1h", "0s", "", "h"):
        with pytest.raises(UsageProblem) as failure:
            parse_seconds(wrong, "--for")
        assert str(failure.value) == f"--for {wrong!r} is not a time; write it as 90s, 30m, 1h or 7d"


def test_sizes_are_read_by_people() -> None:
    assert [human_bytes(size) for size in (0, 5 * 2**20, GIB, 3 * GIB // 2)] == [
        "0 B",
        "5.00 MiB",
        "1.00 GiB",
        "1.50 GiB",
    ]


def test_things_are_counted_in_their_number() -> None:
    assert [counted(number, "edge") for number in (0, 1, 2, 1200)] == ["0 edges", "1 edge", "2 edges", "1,200 edges"]


def test_durations_are_told_as_people_say_them() -> None:
    assert [human_seconds(seconds) for seconds in (3, 119, 400, 9000)] == ["3 s", "119 s", "7 min", "2.5 h"]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("500", 500),
        ("500B", 500),
        ("3K", 3 * 1024),
        ("3KB", 3000),
        ("3KiB", 3 * 1024),
        ("500 MiB", 500 << 20),
        ("500mb", 500 * 10**6),
        ("8GB", 8 * 10**9),
        ("8G", 8 << 30),
        (" 8 gib ", 8 << 30),
        ("1.5T", 3 << 39),
        ("0.5TB", 5 * 10**11),
    ],
)
def test_a_size_is_read_as_people_write_it(text: str, size: int) -> None:
    assert parse_bytes(text, "--max-disk") == size


@pytest.mark.parametrize(
    "text", ["", "GB", "-1GB", "8 G B", "8XB", "1e9", "1,5GB", ".5G", "8GB free", "nan", "1i", "8iB", "9" * 400]
)
def test_what_is_not_a_size_is_refused_with_how_to_write_one(text: str) -> None:
    with pytest.raises(UsageProblem) as failure:
        parse_bytes(text, "--max-disk")
    assert str(failure.value) == f"--max-disk {text!r} is not a size; write it as 8GB, 500MiB or 2T"


def test_what_is_no_number_is_null_wherever_it_stands() -> None:
    nan, inf = float("nan"), float("inf")
    given = {
        "loss": nan,
        "losses": [1.5, -inf, [nan]],
        "by": {"a": inf, "b": 2},
        "name": "nan",
        "pair": (nan, 1),
        "is": True,
    }
    assert finite(given) == {
        "loss": None, "losses": [1.5, None, [None]], "by": {"a": None, "b": 2}, "name": "nan", "pair": [None, 1], "is": True
    }  # fmt: skip
