"""Deal the rows of a comparison to edges by split and seed, and choose the questions that all models answer.

The ways to deal are `splits.py`'s.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path

from fedsoda_edge.data.examples import ChatExample, Skipped, TextExample
from fedsoda_edge.data.formats import DataRow
from fedsoda_edge.data.local_data import LocalData, SkippedRows, remedy_for_columns
from fedsoda_edge.errors import DataProblem
from fedsoda_edge.ports.disk import write_durably
from fedsoda_edge.protocol.template import TextTemplate
from fedsoda_hub.compare.results import EdgeRows
from fedsoda_hub.compare.settings import Comparison
from fedsoda_hub.compare.splits import choose, deal
from fedsoda_hub.evaluation.questions import templates_of

MAX_LABELS = 20  # that are counted one by one


class DealtData:
    """The dealt rows of a comparison. Making it reads all rows and writes the questions to `eval_file`.

    parts: by split and seed, the indices of each edge's rows. questions: the sha256 of `eval_file`.

    Raises:
        UsageProblem, DataProblem: the rows do not suit a split or the template.
    """

    def __init__(self, comparison: Comparison, out: Path) -> None:
        self._comparison = comparison
        c, first = comparison.compare, comparison.settings[comparison.baseline_of]
        self._rows: list[DataRow] = []
        self._completions: list[str] = []
        self._files: list[str] = []
        for name in c.data:
            data = LocalData(comparison.path.parent / name)
            for row, example in _usable(data, first.prompt, first.completion):
                self._rows.append(row)
                self._completions.append(_completion_of(example))
                self._files.append(name)
        assert first.eval_data is not None, "settings.py refuses a comparison without evaluation data"
        data = LocalData(first.eval_data)
        asked = [row for row, _ in _usable(data, *templates_of(data, first.prompt, first.completion))]
        chosen = sorted(choose(len(asked), c.eval_rows, 0))
        out.mkdir(parents=True, exist_ok=True)
        self.eval_file = out / "eval.jsonl"
        self.questions = write_rows(self.eval_file, [asked[row] for row in chosen])
        self.parts = {(split, seed): self._deal(split, seed) for split in c.splits for seed in c.seeds}

    def _deal(self, split: str, seed: int) -> list[list[int]]:
        c = self._comparison.compare
        chosen = choose(len(self._rows), c.rows, seed)
        return deal(split, chosen, self._values(split), edges=c.edges, least=c.least_rows, seed=seed)

    def _values(self, split: str) -> list[str]:
        """List for each row the value that the split deals by."""
        if split == "files":
            return self._files
        column = split.removeprefix("users:") if split.startswith("users:") else self._comparison.compare.label
        if column is None:
            return self._completions
        missing = next((at for at, row in enumerate(self._rows) if column not in row), None)
        if missing is not None:
            raise DataProblem(
                f"split {split} needs the column {column!r}, but row {missing + 1} of [compare] data has "
                f"{', '.join(sorted(self._rows[missing]))}; name a column that all rows have"
            )
        return [str(row[column]) for row in self._rows]

    def rows(self, part: Sequence[int]) -> list[DataRow]:
        """Look up the rows with these indices."""
        return [self._rows[row] for row in part]

    def held(self, names: Mapping[str, Sequence[int]]) -> dict[str, list[DataRow]]:
        """Look up the rows of each of these edges."""
        return {name: self.rows(part) for name, part in names.items()}

    def named(self, split: str, seed: int) -> dict[str, list[int]]:
        """Map the names of a split's edges, edge-0, edge-1, ..., all of one width, to the indices of their rows."""
        parts = self.parts[split, seed]
        return {f"edge-{number:0{len(str(len(parts) - 1))}d}": part for number, part in enumerate(parts)}

    def described(self, split: str, seed: int) -> dict[str, EdgeRows]:
        """Count each edge's rows, and its rows of each label if there are at most MAX_LABELS."""
        label = self._comparison.compare.label
        found = {}
        for name, part in self.named(split, seed).items():
            labels = Counter(str(self._rows[at][label]) if label else self._completions[at] for at in part)
            few = dict(sorted(labels.items())) if len(labels) <= MAX_LABELS else {}
            found[name] = EdgeRows(rows=len(part), labels=few)
        return found


def _usable(
    data: LocalData, prompt: TextTemplate, completion: TextTemplate
) -> Iterator[tuple[DataRow, TextExample | ChatExample]]:
    """Yield the rows that have anything to learn or to ask.

    Raises:
        DataProblem: a row cannot be used, or none has anything.
    """
    reader, skipped, count = data.reader(prompt, completion), SkippedRows(), 0
    with remedy_for_columns("rename a column in the file, or use another in [task] prompt and completion"):
        for line, row in data.rows():
            count += 1
            with data.at(line):
                example = reader.read(row)
            if isinstance(example, Skipped):
                skipped.add(example.reason, line)
            else:
                yield row, example
    data.refuse_without(count, skipped)


def _completion_of(example: TextExample | ChatExample) -> str:
    return example.completion if isinstance(example, TextExample) else str(example.messages[-1].get("content"))


def write_rows(path: Path, rows: Sequence[DataRow]) -> str:
    """Write rows as JSON Lines, without the columns that JSON cannot hold, and return the file's sha256.

    Raises:
        DiskFull: the disk has no space left.
    """
    lines = [
        json.dumps({name: _json(value) for name, value in row.items() if _is_json(value)}, ensure_ascii=False)
        for row in rows
    ]
    # Half a character in a column that is not read becomes its escape.
    data = "".join(f"{line}\n" for line in lines).encode(errors="backslashreplace")
    write_durably(path, data)
    return hashlib.sha256(data).hexdigest()


def _json(value: object) -> object:
    return f"{value:f}" if isinstance(value, Decimal) else value


def _is_json(value: object) -> bool:
    """Tell whether JSON has such a value, or text for it that a prompt would have."""
    match value:
        case dict():
            return all(isinstance(name, str) and _is_json(part) for name, part in value.items())
        case list():
            return all(map(_is_json, value))
        case Decimal():
            return value.is_finite()
    return value is None or isinstance(value, str | int | float)
