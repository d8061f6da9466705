"""Conversations are judged by their last answers: the loss and scores of whole models by hand, or exact match."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fedsoda_hub.evaluation.evaluator as evaluation_module
from fedsoda_edge.data.chat import ChatTemplate
from fedsoda_edge.data.samples import SampleTokenizer
from fedsoda_edge.errors import DataProblem
from fedsoda_edge.model.source import Checkpoint
from fedsoda_edge.protocol.manifest import LoRASpec
from fedsoda_edge.protocol.template import TextTemplate
from fedsoda_hub.evaluation.evaluator import Evaluator, JudgedModel
from fedsoda_hub.evaluation.questions import Question, read_questions
from fedsoda_hub.preparation.writing import Text

CHAT = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{% for call in m.tool_calls or [] %} {{ call.name }}{% endfor %} "
    "{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
BY_RUN = TextTemplate("Report: {text}\nDepartment:"), TextTemplate("{department}")


def talk(asked: str, answer: str | None, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer, **more}]}


TALKS = [talk(f"where is room {n}?", answer) for n, answer in enumerate(["left", "right", "up", "left"])]


def questions_of(directory: Path, *rows: dict[str, Any], source: str = CHAT, **options: Any) -> list[Question]:
    file = directory / "eval.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    chat = ChatTemplate.read(written(directory, source))
    return read_questions(file, *BY_RUN, chat=chat, **options)


def written(directory: Path, source: str) -> dict[str, Path]:
    config = directory / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": source, "bos_token": "<s>", "eos_token": "</s>"}))
    return {config.name: config}


def whole(model: Path) -> JudgedModel:
    source = Checkpoint.open(str(model))
    return JudgedModel(source, range(3), range(3, source.num_layers), LoRASpec(2, 4, (), (), ()), {}, {})


def judge_of(model: Path, questions: list[Question], choices: str = "auto") -> Evaluator:
    return Evaluator(questions, SampleTokenizer(model / "tokenizer.json", 2), choices=choices)


def test_scores_and_loss_are_those_of_transformers_by_hand(tmp_path: Path, tiny_llama: Path) -> None:
    asked = judge_of(tiny_llama, questions_of(tmp_path, *TALKS))
    assert asked.choices == ["left", "right", "up"]
    answers = asked.answers(whole(tiny_llama))
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)

    def score(row: dict[str, Any], answer: str) -> tuple[float, int]:
        messages = [row["messages"][0], {"role": "assistant", "content": answer}]

        def ids(told: Any, begins: bool) -> list[int]:
            text = tokenizer.apply_chat_template(
                told, chat_template=CHAT, tokenize=False, add_generation_prompt=begins
            ).rstrip("\n")
            return list(tokenizer(text, add_special_tokens=False).input_ids)

        sample, start = ids(messages, False), len(ids(messages[:1], True))
        with torch.no_grad():
            logs = model(torch.tensor([sample])).logits[0].double().log_softmax(-1)
        return sum(logs[at - 1, sample[at]].item() for at in range(start, len(sample))), len(sample) - start

    table = [[score(row, answer) for answer in asked.choices] for row in TALKS]
    assert answers.scores is not None
    expected = torch.tensor([[one for one, _ in row] for row in table], dtype=torch.float64)
    torch.testing.assert_close(answers.scores, expected, rtol=1e-5, atol=1e-4)
    own = [row[asked.choices.index(told["messages"][1]["content"])] for row, told in zip(table, TALKS, strict=True)]
    assert answers.nll == pytest.approx(-sum(s for s, _ in own) / sum(n for _, n in own), rel=1e-5)
    verdict = asked.verdict(whole(tiny_llama))
    assert 0 <= verdict.accuracy <= 1
    assert verdict.loss == pytest.approx(answers.nll)


@pytest.mark.parametrize(
    ("source", "made", "right"),
    [
        (CHAT, " left", [True, False]),
        (CHAT, " up", [False, False]),
        # A template that knows no generation prompt: the model writes what stands before an answer too.
        ("{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}", "[assistant] left", [True, False]),
    ],
)
def test_without_choices_the_generated_answer_must_be_the_same(
    tmp_path: Path, tiny_llama: Path, source: str, made: str, right: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = judge_of(tiny_llama, questions_of(tmp_path, *TALKS[:2], source=source), "none")
    tokenizer, begun = SampleTokenizer(tiny_llama / "tokenizer.json", 2), []

    def written(prompt: list[int], *_: object, ends: set[int], **__: object) -> Text[list[int]]:
        begun.append(tokenizer.decode(prompt))
        assert ends == {2}
        yield from ()
        return tokenizer.bare(made)

    monkeypatch.setattr(evaluation_module, "continuation", written)
    answers = asked.answers(whole(tiny_llama))
    assert asked.right(answers) == right
    assert sorted(begun) == sorted(tokenizer.plain(question.prompt) for question in asked.questions)


def test_an_answer_that_is_a_call_is_compared_as_it_is_written(tmp_path: Path, tiny_llama: Path) -> None:
    rows = [talk("sun?", None, tool_calls=[{"name": "weather"}]), talk("and now?", "no")]
    asked = judge_of(tiny_llama, questions_of(tmp_path, *rows))
    assert asked.choices == []
    assert "weather" in asked.questions[0].completion
    answers = asked.answers(whole(tiny_llama))
    assert answers.nll > 0
    answers.chosen[:] = ["weather", "no"]
    assert asked.right(answers) == [True, True]


def test_what_a_template_writes_behind_an_answer_ends_it(tmp_path: Path) -> None:
    source = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
    [question] = questions_of(tmp_path, TALKS[0], source=source)
    assert question.around == ("<|assistant|>", "<|end|>\n")


def test_what_cannot_be_judged_is_told_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(DataProblem, match=r"eval\.jsonl:1: .* \[task\] shots = 2 cannot precede"):
        questions_of(tmp_path, *TALKS, shots=2)
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}x"
    row = {"messages": [{"role": "system", "content": "be brief"}, *TALKS[0]["messages"]]}
    with pytest.raises(
        DataProblem, match=r"eval\.jsonl:2: the chat template refuses these messages \(no system role\)"
    ):
        questions_of(tmp_path, TALKS[0], row, source=strict)
    with pytest.raises(DataProblem, match=r"eval\.jsonl:1: .* this model has no chat template"):
        read_questions(tmp_path / "eval.jsonl", *BY_RUN)


@pytest.mark.parametrize("choices", ["auto", "none"])
def test_a_figure_does_not_depend_on_what_is_judged_together(
    tmp_path: Path, tiny_llama: Path, choices: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [talk("where is " + "room " * n + "?", "left " * (1 + n % 3) + "x") for n in range(9)]
    questions = questions_of(tmp_path, *rows)
    found = []
    for rows_together in (32, 4, 1):
        monkeypatch.setattr(evaluation_module, "BATCH_ROWS", rows_together)
        monkeypatch.setattr("fedsoda_hub.preparation.writing.TEXTS", rows_together)
        asked = judge_of(tiny_llama, questions, choices)
        found.append(asked.answers(whole(tiny_llama)))
    for other in found[1:]:
        assert other.chosen == found[0].chosen
        torch.testing.assert_close(other.losses, found[0].losses, rtol=1e-5, atol=1e-6)
