"""A model and a tokenizer that do not go together are refused before anything is computed."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.model.source import Checkpoint
from fedsoda_hub.cli.advice import advice_on
from fedsoda_hub.evaluation.judge import check_evaluation
from fedsoda_hub.preparation.prepare import RunPreparation
from fedsoda_hub.preparation.tokenizing import check_tokenizer, tokenizer_of
from tests.hub.runs import FULL, make_run


def changed(tiny: Path, to: Path, config: dict[str, Any] | None = None, **tokenizer: Any) -> Path:
    """A copy of a model with other fields in config.json and tokenizer_config.json; None takes a field out."""
    shutil.copytree(tiny, to)
    for name, fields in (("config.json", config or {}), ("tokenizer_config.json", tokenizer)):
        file = to / name
        file.write_text(json.dumps({k: v for k, v in (json.loads(file.read_text()) | fields).items() if v is not None}))
    return to


def token(content: str) -> dict[str, Any]:
    flags = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    return {"content": content, **flags, "special": True}


def full(tiny: Path) -> int:
    return int(Checkpoint.open(str(tiny)).fields["vocab_size"])


def over(tiny: Path) -> dict[str, Any]:
    """Tokens that fill the vocabulary and two more, known to tokenizer_config.json alone."""
    used = len(tokenizer_of(Checkpoint.open(str(tiny))).tokens)
    return {str(number): token(f"<dept-{number}>") for number in range(used, full(tiny) + 2)}


def test_tokens_beyond_the_embedding_are_refused_before_any_work(tiny_llama: Path, tmp_path: Path) -> None:
    vocab = full(tiny_llama)
    model = changed(tiny_llama, tmp_path / "model", added_tokens_decoder=over(tiny_llama))
    said = re.escape(f"has 2 tokens beyond the {vocab} ids that the model has an embedding for (vocab_size), such as ")
    settings = make_run(tmp_path, model)
    with pytest.raises(UsageProblem, match=said + rf"'<dept-{vocab}>' with the id {vocab}; .*{vocab + 2} ids"):
        RunPreparation(settings)
    if settings.eval_data is not None:
        with pytest.raises(UsageProblem, match=said):
            check_evaluation(settings)


def test_tokens_of_images_that_a_model_of_text_lacks_are_not(tiny_llama: Path, tmp_path: Path) -> None:
    vocab = full(tiny_llama)
    tokens = {one: entry for one, entry in over(tiny_llama).items() if int(one) <= vocab}
    model = changed(
        tiny_llama, tmp_path / "model", added_tokens_decoder=tokens, image_token=tokens[str(vocab)]["content"]
    )
    check_tokenizer(Checkpoint.open(str(model)))


def test_an_end_that_is_no_id_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    model = changed(tiny_llama, tmp_path / "model", {"eos_token_id": [2, 40_000]})
    with pytest.raises(UsageProblem, match=r"the eos_token_id 40000 of model is not among the \d+ ids"):
        check_tokenizer(Checkpoint.open(str(model)))


@pytest.mark.parametrize("given", [{"eos_token_id": None}, {"eos_token_id": [1, 0]}, {"eos_token_id": [2, 0]}])
def test_the_end_is_the_models_own(tiny_llama: Path, tmp_path: Path, given: dict[str, Any]) -> None:
    model = changed(tiny_llama, tmp_path / "model", given, eos_token="<pad>")
    sample = tokenizer_of(Checkpoint.open(str(model))).sample("in", "rain")
    assert sample is not None
    assert sample.ids[-1] == 0  # a config without an end would have llama's, 2


@pytest.mark.parametrize(
    ("chat", "prompt", "said"),
    [
        (None, "{prompt}", []),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "{prompt}", []),
        ("{% for %}", "{prompt}", ["conversations will be refused: the model's chat template cannot be read"]),
        (
            "{{ raise_exception('no') }}",
            "{prompt}",
            [r"conversations will be refused: .*refuses these messages \(no\)"],
        ),
        ([{"name": "chat", "template": "x"}], "{prompt}", [r"has the chat templates chat, but none named default"]),
        ("{% for %}", "Say {prompt}: ", [r"write prompt = 'Say \{prompt\}:'"]),
    ],
)
def test_what_an_owner_may_not_expect_is_said(
    tiny_llama: Path, tmp_path: Path, chat: Any, prompt: str, said: list[str]
) -> None:
    model = changed(tiny_llama, tmp_path / "model", chat_template=chat)
    settings = make_run(tmp_path, model, task={"prompt": prompt, "completion": "{completion}"})
    found = advice_on(settings)
    assert len(found) == len(said)
    for sentence, pattern in zip(found, said, strict=True):
        assert re.search(pattern, sentence)


def test_rows_of_users_are_asked_for_where_healing_has_none(tiny_llama: Path, tmp_path: Path) -> None:
    healed = make_run(tmp_path / "healed", tiny_llama, align={"heal": True})
    assert re.search(r"name a file of them as \[public\] like_task", " ".join(advice_on(healed)))
    (tmp_path / "named").mkdir()
    (tmp_path / "named" / "rows.jsonl").write_text('{"word": "cat"}\n')
    named = make_run(
        tmp_path / "named",
        tiny_llama,
        align={"heal": True},
        public={"text": "public.txt", "sequences": 12, "length": 24, "like_task": "rows.jsonl"},
    )
    exact = make_run(
        tmp_path / "exact", tiny_llama, **(FULL | {"align": {"heal": True, "steps": None, "realign_steps": None}})
    )
    assert not advice_on(named)
    assert not advice_on(exact)
