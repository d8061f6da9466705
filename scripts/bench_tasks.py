"""Write the rows of a task for `bench_compare`: those that are dealt, those that are judged on, and rows like the task.

No row is of two of these kinds. Rows lie in ../shared/data, whose README says where they come from.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from fedsoda_edge.ports.disk import write_durably

Row = dict[str, str]
LIKE_TASK = "like_task.jsonl"
DOLLY_USERS = 4
DOLLY_LENGTH = 200  # characters; longer instructions are left out


@dataclass(frozen=True)
class Sizes:
    """How many rows of each kind a task has.

    judged: rows to judge on, where the data have no file of them. like_task: unlabelled rows, which no edge is dealt.
    length: characters of a row at most, where its task has long ones.
    """

    judged: int = 0
    like_task: int = 500
    length: int = 0


@dataclass(frozen=True)
class Written:
    """[compare] data and [task] eval_data of a COMPARE.toml."""

    data: list[str]
    eval_data: str


Writer = Callable[[Path, Path, str, Sizes], Written]  # (directory to write to, directory of the data, prompt, sizes)


def write_sst2(directory: Path, data: Path, prompt: str, sizes: Sizes) -> Written:
    """Write the rows of SST-2, shuffled: the first ones are like the task, the others are dealt."""
    rows = _lines(data / "sst2" / "train.jsonl")
    random.Random(0).shuffle(rows)
    _write_rows(directory / "train.jsonl", rows[sizes.like_task :])
    _write_like_task(directory, prompt, ({"sentence": row["sentence"]} for row in rows[: sizes.like_task]))
    return Written(["train.jsonl"], str(data / "sst2" / "dev.jsonl"))


def write_dolly(directory: Path, data: Path, prompt: str, sizes: Sizes) -> Written:
    """Write the rows of Dolly by user, each with a few of eight categories, as `write_sst2` does.

    Questions to judge on are drawn from all users.
    """
    users = [data / "dolly_federated" / f"local_training_{user}.json" for user in range(DOLLY_USERS)]
    found = {
        row["instruction"]: {"user": user.stem, "instruction": row["instruction"], "category": row["category"]}
        for user in users
        for row in json.loads(user.read_text(encoding="utf-8"))
        if len(row["instruction"]) <= DOLLY_LENGTH
    }
    rows = list(found.values())
    random.Random(0).shuffle(rows)
    judged, like, dealt = _cut(rows, sizes)
    _write_rows(directory / "eval_rows.jsonl", judged)
    _write_like_task(directory, prompt, ({"instruction": row["instruction"]} for row in like))
    for user in users:
        _write_rows(directory / f"{user.stem}.jsonl", (row for row in dealt if row["user"] == user.stem))
    return Written([f"{user.stem}.jsonl" for user in users], "eval_rows.jsonl")


def write_boolq(directory: Path, data: Path, prompt: str, sizes: Sizes) -> Written:
    """Write the rows of BoolQ with short passages, as `write_sst2` does. They are few, so both of its files are used."""
    rows = [row for name in ("train.jsonl", "dev.jsonl") for row in _lines(data / "boolq" / name)]
    rows = [row for row in rows if len(row["passage"]) <= sizes.length]
    random.Random(0).shuffle(rows)
    judged, like, dealt = _cut(rows, sizes)
    _write_rows(directory / "eval_rows.jsonl", judged)
    _write_like_task(directory, prompt, ({name: row[name] for name in ("passage", "question")} for row in like))
    _write_rows(directory / "train.jsonl", dealt)
    return Written(["train.jsonl"], "eval_rows.jsonl")


def write_gsm8k(directory: Path, data: Path, prompt: str, sizes: Sizes) -> Written:
    """Write the rows of GSM8K whose question and answer are short, as `write_sst2` does."""
    train, test = (
        [row for row in _lines(data / "gsm8k" / name) if len(row["question"] + row["answer"]) <= sizes.length]
        for name in ("train.jsonl", "test.jsonl")
    )
    random.Random(0).shuffle(train)
    _write_rows(directory / "eval_rows.jsonl", test)
    _write_like_task(directory, prompt, ({"question": row["question"]} for row in train[: sizes.like_task]))
    _write_rows(directory / "train.jsonl", train[sizes.like_task :])
    return Written(["train.jsonl"], "eval_rows.jsonl")


WRITERS: dict[str, Writer] = {"sst2": write_sst2, "dolly": write_dolly, "boolq": write_boolq, "gsm8k": write_gsm8k}


def _cut(rows: list[Row], sizes: Sizes) -> tuple[list[Row], list[Row], list[Row]]:
    """Cut shuffled rows into those that are judged on, like the task, and dealt."""
    like = sizes.judged + sizes.like_task
    return rows[: sizes.judged], rows[sizes.judged : like], rows[like:]


def _lines(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _write_like_task(directory: Path, prompt: str, rows: Iterable[Row]) -> None:
    """Write unlabelled rows, and the task's prompts with them as public text."""
    rows = list(rows)
    _write_rows(directory / LIKE_TASK, rows)
    _write_lines(directory / "like_task.txt", (prompt.format(**row) for row in rows))


def _write_rows(path: Path, rows: Iterable[Row]) -> None:
    _write_lines(path, map(json.dumps, rows))


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write a file as a whole, since another call may be reading the same one."""
    write_durably(path, "".join(f"{line}\n" for line in lines).encode())
