"""Text that the full LLM writes is its own: what plain Transformers would write, cut into blocks as public text is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

import fedsoda_hub.preparation.self_generated as self_generated
import fedsoda_hub.preparation.writing as writing
from fedsoda_edge.data.samples import Sample, SampleTokenizer
from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.model.source import Checkpoint
from fedsoda_edge.protocol.template import TextTemplate
from fedsoda_hub.preparation.self_generated import generate_blocks, generate_samples

BOS, EOS = 1, 2


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "TEXTS", 6)
    monkeypatch.setattr(self_generated, "PATIENCE", 20)
    monkeypatch.setattr(self_generated, "MAX_HELD_OUT", 3)
    monkeypatch.setattr(self_generated, "COLUMN_IDS", 20)
    monkeypatch.setattr(self_generated, "MAX_PROMPTS", 12)
    monkeypatch.setattr(self_generated, "MIN_PROMPTS", 5)


@pytest.fixture(scope="module")
def reference(tiny_llama: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)


def likeliest(reference: Any, ids: list[int]) -> int:
    with torch.no_grad():
        return int(reference(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())


def test_blocks_are_those_of_a_public_text_and_the_same_every_time(tiny_llama: Path) -> None:
    source = Checkpoint.open(str(tiny_llama))
    used, held_out = generate_blocks(source, 4, 12, seed=0)
    assert [len(blocks) for blocks in (used, held_out)] == [4, 3]
    assert all(len(block) == 12 and int(block[0]) == BOS and block.dtype == torch.int64 for block in used + held_out)
    before = torch.get_rng_state()
    again, others = (torch.cat(generate_blocks(source, 4, 12, seed=seed)[0]) for seed in (0, 1))
    assert torch.equal(again, torch.cat(used))
    assert not torch.equal(others, again)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_text_begins_broadly_and_continues_with_the_likeliest_ids(
    tiny_llama: Path, reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(self_generated, "TOP_K", 1)
    used, held_out = generate_blocks(Checkpoint.open(str(tiny_llama)), 3, 12, seed=0)
    texts = [block.tolist() for block in used + held_out]
    for at in range(1, 5):
        assert any(text[at] != likeliest(reference, text[:at]) for text in texts)
    for text in texts:
        assert text[5:] == [likeliest(reference, text[:at]) for at in range(5, 12)]


def test_only_the_k_likeliest_are_drawn(tiny_llama: Path, reference: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_generated, "TOP_K", 3)
    used, held_out = generate_blocks(Checkpoint.open(str(tiny_llama)), 3, 12, seed=0)
    ranks = []
    for text in used + held_out:
        with torch.no_grad():
            logits = reference(text[None], use_cache=False).logits[0]
        ranks += [int((logits[at - 1] > logits[at - 1, text[at]]).sum()) for at in range(5, 12)]
    assert set(ranks) == {0, 1, 2}


def samples(model: Path, template: str, max_length: int = 64, **changes: Any) -> list[Sample]:
    source = Checkpoint.open(str(model))
    source.fields.update(changes)
    return generate_samples(source, TextTemplate(template), max_length, seed=3)


def prompts(model: Path, template: str, max_length: int = 64, **changes: Any) -> list[torch.Tensor]:
    found = samples(model, template, max_length, **changes)
    return [torch.tensor(sample.ids[: sample.start]) for sample in found]


def test_prompts_are_the_template_with_columns_that_the_model_has_written(
    tiny_llama: Path, reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(self_generated, "TOP_K", 1)
    tokenizer = Tokenizer.from_file(str(tiny_llama / "tokenizer.json"))
    found = prompts(tiny_llama, "Say {word}? Then {answer}:", 200)
    texts = [tokenizer.decode(ids.tolist()) for ids in found]
    assert len(set(texts)) == len(texts) == 12
    for ids, text in zip(found, texts, strict=True):
        assert ids.tolist() == tokenizer.encode(text).ids  # with bos, as an edge reads it
        word, answer = text.removeprefix("Say ").removesuffix(":").split("? Then ")
        assert text == f"Say {word}? Then {answer}:"
        assert "?" not in word  # where the next fixed text begins, a column ends
        start = tokenizer.encode(f"Say {word}? Then").ids
        made: list[int] = []
        while len(made) < 20 and (not made or made[-1] != EOS):
            made.append(likeliest(reference, start + made))
        written = tokenizer.decode([token for token in made if token != EOS]).lstrip()
        assert answer == written.partition("\n")[0].partition(":")[0].strip()


def test_prompts_are_few_enough_and_whole(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every, written = prompts(tiny_llama, "Say {word}:"), samples(tiny_llama, "Say {word}:")
    assert samples(tiny_llama, "Say {word}:") == written
    longest = max(map(len, every))
    shorter = prompts(tiny_llama, "Say {word}:", longest - 1)
    assert len(shorter) == 12
    assert max(map(len, shorter)) < longest
    assert {int(ids[-1]) for ids in every + shorter} == {int(every[0][-1])}  # the colon: nothing is cut off
    most = sum(len(sample.ids) for sample in written[:7])
    monkeypatch.setattr(self_generated, "MAX_PROMPT_IDS", most)
    fewer = samples(tiny_llama, "Say {word}:")
    assert 6 <= len(fewer) <= 12
    assert sum(len(sample.ids) for sample in fewer) <= most


def test_samples_are_prompts_with_what_the_model_writes_behind_them_as_edges_join_them(
    tiny_llama: Path, reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(self_generated, "TOP_K", 1)
    tokenizer = SampleTokenizer(tiny_llama / "tokenizer.json", EOS)
    found = samples(tiny_llama, "Say {word}:", 200)
    assert len({sample.ids[: sample.start] for sample in found}) == len(found) == 12
    for sample in found:
        prompt = list(sample.ids[: sample.start])
        made: list[int] = []
        while len(made) < 20 and (not made or made[-1] != EOS):
            made.append(likeliest(reference, prompt + made))
        written = tokenizer.decode([token for token in made if token != EOS]).lstrip().partition("\n")[0].strip()
        assert sample == tokenizer.sample(tokenizer.decode(prompt), written)
        assert sample.ids[-1] == EOS


def test_a_sample_is_cut_where_an_edge_cuts_its_own(tiny_llama: Path) -> None:
    whole, cut = samples(tiny_llama, "Say {word}:", 64), samples(tiny_llama, "Say {word}:", 26)
    assert max(len(sample.ids) for sample in whole) > 26
    assert len(cut) == 12
    assert max(len(sample.ids) for sample in cut) == 26
    assert all(sample.start < len(sample.ids) for sample in cut)


def test_a_model_that_ends_behind_every_prompt_gives_samples_of_eos_alone(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    author = self_generated._Author
    column = author._column

    def silent(self: Any, start: list[int], following: str, broad: int) -> Any:
        if broad:
            return (yield from column(self, start, following, broad))
        return ""

    monkeypatch.setattr(author, "_column", silent)
    assert {(len(sample.ids) - sample.start, sample.ids[-1]) for sample in samples(tiny_llama, "Say {word}:")} == {
        (1, EOS)
    }
    with pytest.raises(UsageProblem, match="has written 0 different prompts"):
        samples(tiny_llama, "Say {word}:", eos_token_id=None)


def test_prompts_do_not_depend_on_which_are_finished_first(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that end early would be too many among the first to be finished."""
    monkeypatch.setattr(self_generated, "TOP_K", 1)
    monkeypatch.setattr(self_generated, "BROAD_IDS", 0)
    monkeypatch.setattr(self_generated, "MIN_PROMPTS", 1)
    order: list[int] = []
    row = self_generated._Author.row

    def counted(self: Any, *args: Any, **options: Any) -> Any:
        order.append(number := len(order))

        def text() -> Any:
            yield from row(self, *args, **options)  # of which all are the same
            for _ in range(20 - 3 * (number % 5)):
                yield writing.Ask([BOS], 1)
            return self_generated._Row(str(number), "")

        return text()

    monkeypatch.setattr(self_generated._Author, "row", counted)
    tokenizer = Tokenizer.from_file(str(tiny_llama / "tokenizer.json"))
    texts = [tokenizer.decode(ids.tolist()) for ids in prompts(tiny_llama, "Say {word}:")]
    assert texts == [str(number) for number in range(12)]


@pytest.mark.parametrize(
    ("template", "max_length", "changes", "message"),
    [
        ("{word}", 64, {}, r"does not show the full LLM what .* are like.*name a file as \[public\] like_task"),
        ("Go on:", 64, {}, "does not show the full LLM"),
        (
            "Say {word}:",
            2,
            {},
            r'has written 0 different prompts of at most 2 ids, but .* \[align\] border_map = "none"',
        ),
        ("Say {word}:", 64, {"eos_token_id": list(range(320))}, "has written 0 different prompts"),
        ("z" * 300 + "{word}", 64, {}, r"has 3\d\d ids before its last column, but the model has 256 positions"),
    ],
)
def test_prompts_that_cannot_be_are_refused(
    tiny_llama: Path, template: str, max_length: int, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageProblem, match=message):
        prompts(tiny_llama, template, max_length, **changes)


def test_a_full_llm_that_does_not_fit_is_not_loaded(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Checkpoint, "bytes", 10**15)
    monkeypatch.setattr(self_generated, "build", lambda *_, **__: pytest.fail("it is loaded"))
    with pytest.raises(UsageProblem, match=r"tiny needs \d+\.0 GB of memory to write text, but .* GB are free"):
        generate_blocks(Checkpoint.open(str(tiny_llama)), 1, 12, seed=0)


def test_without_bos_texts_begin_with_any_id_and_rows_on_a_new_line(tiny_llama: Path) -> None:
    source = Checkpoint.open(str(tiny_llama))
    source.fields["bos_token_id"] = None
    used, _ = generate_blocks(source, 6, 12, seed=0)
    assert len({int(block[0]) for block in used}) > 3
    assert {len(block) for block in used} == {12}
    tokenizer = Tokenizer.from_file(str(tiny_llama / "tokenizer.json"))
    for ids in prompts(tiny_llama, "{word}, {word}", bos_token_id=None):
        first, _, second = tokenizer.decode(ids.tolist()).rpartition(", ")
        assert first == second


def test_a_model_that_writes_nothing_is_named(tiny_llama: Path) -> None:
    source = Checkpoint.open(str(tiny_llama))
    source.fields["eos_token_id"] = list(range(320))
    with pytest.raises(
        UsageProblem, match=r"ends all of 20 texts before it has written anything; name a file as \[public\] text"
    ):
        generate_blocks(source, 1, 12, seed=0)
