"""Read public text in blocks (docs/methods.md (m11-blocks)), and public prompts like the task's.

SGP, ODA and the border map see only these, or what the full LLM writes instead; they never see an edge's data. Writing is
`self_generated.py`'s.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from fedsoda_edge.data.chat import ChatTemplates
from fedsoda_edge.data.examples import RowReader, Skipped
from fedsoda_edge.data.formats import DataRow
from fedsoda_edge.data.local_data import LocalData, remedy_for_columns
from fedsoda_edge.data.samples import Renderer, SampleTokenizer
from fedsoda_edge.data.tokenizer_files import TokenizerFile, read_text
from fedsoda_edge.errors import DataProblem, UsageProblem
from fedsoda_edge.protocol.template import TextTemplate

MAX_HELD_OUT = 32
MIN_PROMPTS, MAX_PROMPTS, MAX_PROMPT_IDS = 50, 500, 1 << 16  # MAX_PROMPTS: how many the full LLM writes


def read_blocks(
    text: Path, tokenizer_json: TokenizerFile, bos_id: int | None, sequences: int, length: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Cut a text into blocks of `length` ids, each bos (if there is one) and the next ids of the text.

    The text is tokenized in one call without special tokens; the first `sequences` blocks are used, the
    next min(32, rest) are held out.

    Returns:
        (used, held out), (length,) ids each.

    Raises:
        UsageProblem: the file cannot be read, or is too short for a held-out block; says how many ids are needed.
    """
    try:
        data = text.read_bytes()
        words = data.decode(json.detect_encoding(data)).replace("\r\n", "\n").replace("\r", "\n")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else f"byte {error.start + 1}: {error.reason}"
        raise UsageProblem(
            f"[public] text: {text} cannot be read ({why}); name a file of UTF-8 text that you may read"
        ) from error
    ids = Tokenizer.from_str(read_text(tokenizer_json)).encode(words, add_special_tokens=False).ids
    step = length - (bos_id is not None)
    head = [] if bos_id is None else [bos_id]
    blocks = [torch.tensor(head + ids[at : at + step]) for at in range(0, len(ids) - step + 1, step)][
        : sequences + MAX_HELD_OUT
    ]
    if len(blocks) <= sequences:
        raise UsageProblem(
            f"[public] text: {text} has {len(ids)} ids, but sequences = {sequences} of length = {length} and one "
            f"held-out block need {(sequences + 1) * step}; give a longer text, or lower sequences or length"
        )
    return blocks[:sequences], blocks[sequences:]


def read_like_task(
    rows: Path,
    prompt: TextTemplate,
    completion: TextTemplate,
    tokenizer: SampleTokenizer,
    max_length: int,
    chat: ChatTemplates | None = None,
) -> list[Tensor]:
    """Render these rows as the run's samples until there are `MAX_PROMPT_IDS` ids: prompt and completion, or a prompt alone
    where a row lacks a column of the completion.

    Args:
        max_length: ids that are kept of a text.
        chat: the model's chat template, for conversations; None: it has none.

    Returns:
        (T_i,) ids each.

    Raises:
        UsageProblem: the rows lack a column of the prompt, or are too few to fit a border map.
    """
    data = LocalData(rows)
    found: list[Tensor] = []
    left = MAX_PROMPT_IDS
    renderer = Renderer(prompt, completion, chat)
    try:
        with remedy_for_columns("name a file of rows with all columns of [task] prompt"):
            reader = data.reader(prompt, completion)
            for line, row in data.rows():
                with data.at(line):
                    ids = _ids(reader, row, renderer, tokenizer)[:max_length]
                if not ids:
                    continue
                left -= len(ids)
                if left < 0:
                    break
                found.append(torch.tensor(ids))
    except DataProblem as error:
        raise UsageProblem(f"[public] like_task: {error}") from error
    if len(found) < MIN_PROMPTS:
        raise UsageProblem(
            f"[public] like_task: {rows} gives {len(found)} prompts, but a border map needs {MIN_PROMPTS}; name a file "
            "with more rows"
        )
    return found


def _ids(reader: RowReader, row: DataRow, renderer: Renderer, tokenizer: SampleTokenizer) -> list[int]:
    """Tokenize a row with its answer, or its prompt alone where it has none; nothing where it has no text."""
    lacks_answer = not reader.is_conversation(row) and any(name not in row for name in reader.completion.columns)
    example = reader.read_prompt(row) if lacks_answer else reader.read(row)
    if isinstance(example, Skipped):
        example = reader.read_prompt(row) if example.reason == "empty" and not reader.is_conversation(row) else example
    if isinstance(example, Skipped):
        return []
    if isinstance(example, str):
        return tokenizer.begun(example)
    sample = renderer.sample(example, tokenizer)
    return [] if isinstance(sample, Skipped) else list(sample.ids)
