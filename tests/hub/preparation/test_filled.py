"""Filled rows have the prompt's own words around pieces of public text, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedsoda_edge.data.samples import SampleTokenizer
from fedsoda_edge.protocol.template import TextTemplate
from fedsoda_hub.preparation.filled import REUSE, filled_rows

WORDS = [
    "the",
    "river",
    "ran",
    "past",
    "old",
    "mills",
    "and",
    "into",
    "a",
    "wide",
    "green",
    "valley",
    "where",
    "nobody",
    "had",
    "lived",
    "for",
    "years",
]
PROMPT = TextTemplate("Passage: {passage}\nQuestion: {question}\nAnswer:")


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> SampleTokenizer:
    return SampleTokenizer(tiny_llama / "tokenizer.json", None)


@pytest.fixture(scope="module")
def blocks(tokenizer: SampleTokenizer) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    orders = (torch.randperm(len(WORDS), generator=generator).tolist() for _ in range(40))
    return [torch.tensor(tokenizer.encode(" ".join(WORDS[at] for at in order))) for order in orders]


def fill(
    blocks: list[Tensor],
    tokenizer: SampleTokenizer,
    prompt: TextTemplate = PROMPT,
    *,
    num_ids: int = 4000,
    seed: int = 0,
) -> list[str]:
    rows = filled_rows(blocks, prompt, tokenizer, 120, num_ids=num_ids, seed=seed)
    assert sum(map(len, rows)) <= num_ids
    assert max(map(len, rows), default=0) <= 120
    return [tokenizer.decode(row.tolist()) for row in rows]


def test_columns_are_pieces_of_the_text(blocks: list[Tensor], tokenizer: SampleTokenizer) -> None:
    public = [tokenizer.decode(block.tolist()) for block in blocks]
    lengths, prompts = set(), set()
    for row in fill(blocks, tokenizer):
        passage, rest = row.removeprefix("Passage: ").split("\nQuestion: ")
        question, completion = rest.split("\nAnswer:")
        for piece in (passage, question, completion.strip()):
            assert piece
            assert any(piece in text for text in public)
            lengths.add(len(piece))
        prompts.add((passage, question))
    assert len(prompts) == len(fill(blocks, tokenizer)) > 20
    assert min(lengths) <= 2
    assert max(lengths) >= 30


def test_the_same_seed_fills_the_same_rows(blocks: list[Tensor], tokenizer: SampleTokenizer) -> None:
    assert fill(blocks, tokenizer) == fill(blocks, tokenizer) != fill(blocks, tokenizer, seed=1)


def test_a_little_text_makes_few_rows(blocks: list[Tensor], tokenizer: SampleTokenizer) -> None:
    rows = filled_rows(blocks[:2], PROMPT, tokenizer, 120, num_ids=100_000, seed=0)
    assert 0 < sum(map(len, rows)) <= REUSE * sum(map(len, blocks[:2]))


def test_a_prompt_that_leaves_no_room_makes_none(blocks: list[Tensor], tokenizer: SampleTokenizer) -> None:
    assert fill(blocks, tokenizer, TextTemplate("word " * 120 + "{column}")) == []
    assert fill(blocks, tokenizer, TextTemplate("no column")) == []


def test_a_character_is_not_cut(tokenizer: SampleTokenizer) -> None:
    block = torch.tensor(tokenizer.encode("žluťoučký kůň příšerně úpěl ďábelské ódy " * 4))
    rows = fill([block], tokenizer, TextTemplate("Say {word}:"))
    assert rows
    assert not any("\N{REPLACEMENT CHARACTER}" in row for row in rows)
