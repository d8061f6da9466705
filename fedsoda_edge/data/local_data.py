"""LocalData: a description of private data, and how its rows become samples.

The agent holds the description and checks the rows; token ids exist only in the worker. Nothing here knows
the network, and `transport.py` cannot import this file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsoda_edge.errors import DataProblem, UsageProblem
from fedsoda_edge.protocol.template import TextTemplate

if TYPE_CHECKING:
    from fedsoda_edge.data.chat import ChatTemplate

Row = dict[str, Any]


@dataclass(frozen=True)
class LocalData:
    """Where rows are and how columns map; no row is held.

    path: JSON Lines, JSON, Parquet (`.parquet`) or the directory of a saved Hugging Face dataset.
    columns: template name -> column in the file.
    """

    path: Path
    columns: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_jsonl(cls, path: str | Path, *, columns: Mapping[str, str] | None = None) -> LocalData:
        """JSON Lines, one object a line, or a JSON file that holds a list of objects."""
        return cls(Path(path), dict(columns or {}))

    @classmethod
    def from_parquet(cls, path: str | Path, *, columns: Mapping[str, str] | None = None) -> LocalData:
        """A Parquet file."""
        return cls(Path(path), dict(columns or {}))

    @classmethod
    def from_dataset(cls, path: str | Path, *, columns: Mapping[str, str] | None = None) -> LocalData:
        """A directory that `datasets.Dataset.save_to_disk` wrote."""
        return cls(Path(path), dict(columns or {}))

    @property
    def is_text(self) -> bool:
        """JSON, which any process reads; other formats need libraries that the agent does not load."""
        return self.path.suffix != ".parquet" and not self.path.is_dir()

    def rows(self) -> Iterator[tuple[int, Row]]:
        """(line, row) in file order, columns renamed; in binary formats the line is the row's number from 1.

        Raises:
            DataProblem: the file is missing, empty or damaged, or a line is not a JSON object.
        """
        count = 0
        for line, row in self._text_rows() if self.is_text else self._table_rows():
            count += 1
            yield line, row | {name: row[column] for name, column in self.columns.items() if column in row}
        if not count:
            raise DataProblem(f"the data {self.path} has no rows; it needs at least one")

    def _text_rows(self) -> Iterator[tuple[int, Row]]:
        try:
            with self.path.open(encoding="utf-8") as file:
                yield from self._parse(file)
        except OSError as error:
            raise DataProblem(f"the data {self.path} cannot be read: {error.strerror}; check the path") from error
        except UnicodeDecodeError as error:
            raise DataProblem(f"the data {self.path} is not UTF-8 ({error.reason}); save it as UTF-8") from error

    def _table_rows(self) -> Iterator[tuple[int, Row]]:
        try:
            import datasets
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise UsageProblem(
                f"reading {self.path} needs the datasets library: pip install 'fedsoda[datasets]', or save it as JSON Lines"
            ) from None
        try:
            if self.path.is_dir():
                table = datasets.load_from_disk(str(self.path))
                if isinstance(table, dict):
                    one = next(iter(table))
                    raise DataProblem(f"{self.path} holds the splits {', '.join(table)}; name one: {self.path / one}")
                rows: Iterator[Row] = iter(table)
            else:
                # Not through `datasets`, which would leave a copy of private rows in its cache.
                batches = pyarrow.parquet.ParquetFile(self.path).iter_batches(1024)
                rows = (row for batch in batches for row in batch.to_pylist())
            for number, row in enumerate(rows, start=1):
                yield number, dict(row)
        except (OSError, pyarrow.ArrowException, ValueError, KeyError) as error:
            wanted = "a directory of Dataset.save_to_disk" if self.path.is_dir() else "a Parquet file"
            raise DataProblem(
                f"the data {self.path} cannot be read: {str(error).rstrip('.')}; it must be {wanted}"
            ) from error

    def _parse(self, file: Any) -> Iterator[tuple[int, Row]]:
        if self.path.suffix == ".json":
            try:
                found = json.load(file)
            except json.JSONDecodeError as error:
                raise DataProblem(
                    f"{self.path}:{error.lineno}: not JSON: {error.msg} (column {error.colno}); mend it there"
                ) from error
            if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
                raise DataProblem(f"{self.path} is not a list of objects; write [{{...}}, ...] or JSON Lines")
            yield from enumerate(found, start=1)
            return
        for line, text in enumerate(file, start=1):
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except json.JSONDecodeError as error:
                raise DataProblem(
                    f"{self.path}:{line}: not JSON: {error.msg} (column {error.colno}); write one object a line"
                ) from error
            if not isinstance(row, dict):
                raise DataProblem(
                    f"{self.path}:{line}: a {type(row).__name__}, not an object; write one {{...}} a line"
                )
            yield line, row

    def check(self, prompt: TextTemplate, completion: TextTemplate) -> int:
        """Read every row; the number of rows.

        Raises:
            DataProblem: a column is missing (lists those there are) or a completion is not a string.
        """
        count = 0
        wanted = (*prompt.columns, *completion.columns)
        for line, row in self.rows():
            count += 1
            if is_chat(row, wanted):
                _check_messages(f"{self.path}:{line}", row["messages"])
                continue
            for name in wanted:
                if name not in row:
                    raise DataProblem(
                        f"{self.path}:{line}: no column {self.columns.get(name, name)!r}; there are "
                        f"{', '.join(sorted(row.keys() - self.columns.keys()))}; rename one, "
                        f"or let fedsoda-edge map it: --column {name}=COLUMN"
                    )
            for name in completion.columns:
                if not isinstance(row[name], str):
                    raise DataProblem(
                        f"{self.path}:{line}: {name!r} is {row[name]!r}, which is no string; "
                        "completions must be strings, write it in quotes"
                    )
        return count


def is_chat(row: Row, wanted: Sequence[str]) -> bool:
    """A conversation under the default template, which asks for `prompt` and `completion` and does not find them."""
    return "messages" in row and set(wanted) == {"prompt", "completion"} and not set(wanted) & set(row)


def _check_messages(where: str, messages: Any) -> None:
    is_talk = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    )
    if not is_talk or not messages:
        raise DataProblem(f'{where}: messages must be a list of {{"role": "...", "content": "..."}}')
    if messages[-1]["role"] != "assistant":
        raise DataProblem(
            f"{where}: the last message is of {messages[-1]['role']!r}; it must be the assistant's, which is trained on"
        )


@dataclass(frozen=True)
class Sample:
    """ids: prompt, completion and eos. start: index of the first completion id."""

    ids: tuple[int, ...]
    start: int

    @property
    def num_supervised(self) -> int:
        return len(self.ids) - self.start


@dataclass(frozen=True)
class Samples:
    """What a file gave: samples in file order; rows without a completion id left are counted."""

    samples: tuple[Sample, ...]
    num_skipped: int

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps([[s.ids, s.start] for s in self.samples]).encode()).hexdigest()


def join_text(prompt: str, completion: str) -> str:
    """One space between them, unless either side has its own white space there (contract.md, Sample)."""
    bare = prompt and completion and not prompt[-1].isspace() and not completion[0].isspace()
    return prompt + (" " if bare else "") + completion


class SampleTokenizer:
    """Text to samples with the model's own tokenizer.json, as contract.md "Sample" reads it."""

    def __init__(self, tokenizer_json: Path, eos_id: int | Sequence[int] | None) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(tokenizer_json))
        self._tokenizer.no_truncation()  # tokenizer.json may carry the settings of whoever saved it
        self._tokenizer.no_padding()
        # Some configs list every id that may end a generation; a sample ends with the first.
        self._eos = [] if eos_id is None else [eos_id] if isinstance(eos_id, int) else list(eos_id[:1])

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text).ids)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids)))

    def sample(self, prompt: str, completion: str, max_length: int | None = None) -> Sample | None:
        """None when no completion id is left within max_length."""
        return _sample(self.encode(prompt), self.encode(join_text(prompt, completion)) + self._eos, max_length)

    def chat_sample(self, prompt: str, whole: str, max_length: int | None = None) -> Sample | None:
        """A conversation without and with its last message, as a chat template wrote both.

        Templates write special tokens themselves, so none are added; eos only where the template writes none.
        """
        alone, ids = (list(self._tokenizer.encode(text, add_special_tokens=False).ids) for text in (prompt, whole))
        is_ended = bool(self._eos) and self._eos[0] in ids[len(alone) :]
        return _sample(alone, ids if is_ended else ids + self._eos, max_length)


def _sample(alone: Sequence[int], whole: Sequence[int], max_length: int | None) -> Sample | None:
    """The completion starts at the first id that differs from those of the prompt alone."""
    start = 0
    while start < min(len(alone), len(whole)) and alone[start] == whole[start]:
        start += 1
    ids = whole[:max_length]
    return Sample(tuple(ids), start) if start < len(ids) else None


@dataclass(frozen=True)
class Renderer:
    """How a row becomes text and a sample: by the templates, a conversation by the model's own chat template."""

    prompt: TextTemplate
    completion: TextTemplate
    chat: ChatTemplate | None = None

    def texts(self, row: Row) -> tuple[str, str]:
        """(prompt, completion); of a conversation (what the assistant answers to, the whole).

        Raises:
            DataProblem: a conversation, and the model has no chat template or it refuses.
        """
        if not self.is_chat(row):
            return self.prompt.render(row), self.completion.render(row)
        if self.chat is None:
            raise DataProblem(
                "a conversation, and this model has no chat template; write rows with prompt and completion"
            )
        messages = row["messages"]
        return (
            self.chat.render(messages[:-1], add_generation_prompt=True),
            self.chat.render(messages, add_generation_prompt=False),
        )

    def is_chat(self, row: Row) -> bool:
        return is_chat(row, (*self.prompt.columns, *self.completion.columns))

    def samples(self, data: LocalData, tokenizer: SampleTokenizer) -> Iterator[Sample | None]:
        """Of each row its sample, uncut; None where its completion is empty. Errors name the line."""
        for line, row in data.rows():
            try:
                texts = self.texts(row)
            except DataProblem as error:
                raise DataProblem(f"{data.path}:{line}: {error}") from error
            yield tokenizer.chat_sample(*texts) if self.is_chat(row) else tokenizer.sample(*texts)


def read_samples(
    data: LocalData,
    prompt: TextTemplate,
    completion: TextTemplate,
    tokenizer: SampleTokenizer,
    max_length: int,
    chat: ChatTemplate | None = None,
) -> Samples:
    """All rows as samples; conversations through `chat`, the model's own template.

    Raises:
        DataProblem: no sample has a completion id left; names the max_length that keeps 90 % of them.
    """
    samples: list[Sample] = []
    needed: list[int] = []
    for made in Renderer(prompt, completion, chat).samples(data, tokenizer):
        if made is None:
            needed.append(0)
            continue
        needed.append(made.start + 1)
        if made.start < max_length:
            samples.append(Sample(made.ids[:max_length], made.start))
    if not samples:
        raise _nothing_left(data, needed, max_length)
    return Samples(tuple(samples), len(needed) - len(samples))


def _nothing_left(data: LocalData, needed: Sequence[int], max_length: int) -> DataProblem:
    """needed: ids up to the first completion id of each row; 0 where its completion is empty."""
    enough = sorted(n for n in needed if n)
    advice = (
        f"max_length = {enough[(9 * len(enough) - 1) // 10]} keeps 90 % of them"
        if enough
        else "every completion is empty"
    )
    return DataProblem(
        f"none of the {len(needed)} rows of {data.path} has a completion within {max_length} ids; {advice}"
    )


SHOWN = 3  # samples that `data check` shows
BINS = 10  # bars of its histogram


def inspect(
    data: LocalData,
    prompt: TextTemplate,
    completion: TextTemplate,
    *,
    tokenizer: SampleTokenizer | None = None,
    max_length: int = 512,
    chat: ChatTemplate | None = None,
) -> dict[str, Any]:
    """What `data check` reports: schema, samples as they are trained on, lengths, what truncation cuts, duplicates.

    Keys with None need a tokenizer. A conversation is shown through `chat`, else as its last two messages.

    Raises:
        DataProblem: as `LocalData.check`.
    """
    rows = data.check(prompt, completion)
    renderer = Renderer(prompt, completion, chat)
    columns: dict[str, str] = {}
    shown: list[dict[str, str]] = []
    seen: set[str] = set()
    for _, row in data.rows():
        for name, value in row.items():
            columns.setdefault(name, type(value).__name__)
        if renderer.is_chat(row) and chat is None:
            texts = "\n".join(m["content"] for m in row["messages"][:-1][-1:]), row["messages"][-1]["content"]
        else:
            texts = renderer.texts(row)
        if len(shown) < SHOWN:
            is_whole = renderer.is_chat(row) and chat is not None
            shown.append({"prompt": texts[0], "completion": texts[1].removeprefix(texts[0]) if is_whole else texts[1]})
        seen.add(hashlib.sha256(json.dumps(texts).encode()).hexdigest())
    found: dict[str, Any] = {
        "rows": rows,
        "columns": columns,
        "samples": shown,
        "duplicates": rows - len(seen),
        "lengths": None,
        "skipped": None,
        "truncated": None,
    }
    if tokenizer is not None:
        made = list(renderer.samples(data, tokenizer))
        needed = [0 if sample is None else sample.start + 1 for sample in made]
        ordered = sorted(0 if sample is None else len(sample.ids) for sample in made)
        skipped = sum(not 0 < n <= max_length for n in needed)
        if skipped == rows:
            raise _nothing_left(data, needed, max_length)
        width = max(1, -(-ordered[-1] // BINS))
        found |= {
            "lengths": {
                "min": ordered[0],
                "median": ordered[len(ordered) // 2],
                "p90": ordered[(9 * len(ordered) - 1) // 10],
                "max": ordered[-1],
                "histogram": [
                    {
                        "up_to": (at + 1) * width,
                        "rows": sum(at * width < max(n, 1) <= (at + 1) * width for n in ordered),
                    }
                    for at in range(-(-ordered[-1] // width))
                ],
            },
            "skipped": skipped,
            "truncated": sum(n > max_length for n in ordered) - sum(n > max_length for n in needed),
        }
    return found
