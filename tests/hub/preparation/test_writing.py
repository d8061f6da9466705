"""Texts that a model writes together are those that it writes one at a time, and come in the order in which they began."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import fedsoda_hub.preparation.writing as writing
from fedsoda_edge.model.source import Checkpoint
from fedsoda_edge.model.sub_llm import SubLLM, build
from fedsoda_hub.preparation.writing import Ask, Text, Writer, cache_bytes, continuation, texts_at_once
from tests.tiny import FAMILY_CONFIGS, make_tiny


@pytest.fixture
def model(tiny_llama: Path) -> SubLLM:
    return build(Checkpoint.open(str(tiny_llama)), range(8), embedding=True)


@pytest.fixture(scope="module")
def reference(tiny_llama: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)


def greedily(reference: Any, ids: list[int], most: int) -> list[int]:
    with torch.no_grad():
        out = reference.generate(
            torch.tensor([ids]), do_sample=False, max_new_tokens=most, eos_token_id=None, pad_token_id=0
        )
    return list(out[0, len(ids) :].tolist())


def test_texts_of_any_length_are_written_as_alone_and_come_in_the_order_in_which_they_began(
    model: SubLLM, reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "TEXTS", 3)
    monkeypatch.setattr(writing, "GROWTH", 4)
    starts = [[1, *range(9, 9 + length)] for length in (3, 1, 12, 5, 2, 7, 30, 4)]
    mosts = [9, 2, 4, 0, 17, 1, 6, 3]
    coming = zip(starts, mosts, strict=True)

    def begin() -> Text[list[int]] | None:
        return next((continuation(start, most, ends=(), among=1) for start, most in coming), None)

    made = list(Writer(model, longest=40, seed=0).write(begin))
    assert made == [greedily(reference, start, most) if most else [] for start, most in zip(starts, mosts, strict=True)]


@pytest.mark.parametrize("family", [pytest.param(name, marks=pytest.mark.slow) for name in sorted(FAMILY_CONFIGS)])
def test_every_family_writes_as_alone(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "TEXTS", 2)
    directory = make_tiny(tmp_path, family)
    plain = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    starts = [[1, *range(9, 9 + length)] for length in (3, 11, 7)]
    coming = iter(starts)
    writer = Writer(build(Checkpoint.open(str(directory)), range(8), embedding=True), longest=40, seed=0)
    made = writer.write(lambda: next((continuation(start, 12, ends=(), among=1) for start in coming), None))
    assert list(made) == [greedily(plain, start, 12) for start in starts]


def test_a_text_may_put_ids_of_its_own_anywhere(model: SubLLM, reference: Any) -> None:
    def text() -> Text[list[int]]:
        first = yield Ask([1, 20, 21], 1)
        second = yield Ask([1, 20, 21, first, 30, 31, 32], 1)  # more than it was sent
        third = yield Ask([1, 20, 40, 41], 1)  # not what it was sent
        fourth = yield Ask([1, 20], 1)  # less
        return [first, second, third, fourth]

    coming: Iterator[Text[list[int]]] = iter([text(), text()])
    [made, same] = Writer(model, longest=20, seed=0).write(lambda: next(coming, None))
    first = greedily(reference, [1, 20, 21], 1)
    wanted = [
        first,
        *(greedily(reference, ids, 1) for ids in ([1, 20, 21, *first, 30, 31, 32], [1, 20, 40, 41], [1, 20])),
    ]
    assert made == same == [token for [token] in wanted]


def test_a_continuation_ends_where_the_model_or_the_caller_says(model: SubLLM, reference: Any) -> None:
    ids = greedily(reference, [1, 20, 21], 8)
    end = next(at for at in range(1, 8) if ids[at] not in ids[:at])
    texts = [
        continuation([1, 20, 21], 8, ends={ids[end]}, among=1),
        continuation([1, 20, 21], 8, ends=(), among=1, is_over=lambda made: len(made) == 3),
    ]
    coming = iter(texts)
    assert list(Writer(model, longest=20, seed=0).write(lambda: next(coming, None))) == [ids[:end], ids[:3]]


def test_no_text_begins_as_long_as_there_should_be_none(model: SubLLM) -> None:
    written: list[list[int]] = []
    begun = 0

    def begin() -> Text[list[int]] | None:
        nonlocal begun
        if begun - len(written) >= 2 or begun == 5:
            return None
        begun += 1
        return continuation([1, begun], begun, ends=(), among=1)

    for text in Writer(model, longest=20, seed=0).write(begin):
        assert begun - len(written) <= 2
        written.append(text)
    assert [len(text) for text in written] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("among", [3, None])
def test_ids_are_drawn_by_their_shares(
    model: SubLLM, reference: Any, among: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "TEXTS", 64)
    count, begun = 4000, 0

    def text() -> Text[int]:
        return (yield Ask([1, 20, 21], among))

    def begin() -> Text[int] | None:
        nonlocal begun
        begun += 1
        return text() if begun <= count else None

    drawn = Counter(Writer(model, longest=3, seed=0).write(begin))
    with torch.no_grad():
        scores = reference(torch.tensor([[1, 20, 21]]), use_cache=False).logits[0, -1]
    if among is not None:
        scores = scores.masked_fill(scores < scores.topk(among).values[-1], -torch.inf)
    shares = scores.softmax(0)
    assert all(shares[token] > 0 for token in drawn)
    often = [token for token in range(len(shares)) if shares[token] * count >= 5]
    missed = sum((drawn[token] - shares[token] * count) ** 2 / (shares[token] * count) for token in often)
    assert abs(float(missed) - len(often)) < 4 * (2 * len(often)) ** 0.5  # chi-square


def test_long_texts_and_wide_models_are_written_fewer_at_once(model: SubLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    config, position = model.model.config, 2 * 8 * 2 * 16 * 4  # both, layers, heads, features, bytes
    assert texts_at_once(config, 100, torch.float32) == writing.TEXTS
    monkeypatch.setattr(writing, "CACHE_BYTES", 100 * 5 * position)
    assert texts_at_once(config, 100, torch.float32) == 5
    assert texts_at_once(config, 100, torch.bfloat16) == 10
    assert texts_at_once(config, 10**6, torch.float32) == 1
    assert cache_bytes(config, 99, torch.float32) == 5 * 99 * position
