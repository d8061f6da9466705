"""Accuracy, loss and AUC are those of plain Transformers and PEFT, one sample at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import fedsoda_hub.evaluation.evaluator as evaluation_module
from fedsoda_edge.data.samples import SampleTokenizer
from fedsoda_edge.errors import DataProblem
from fedsoda_edge.model.bundle import Bundle
from fedsoda_edge.model.source import Checkpoint, LayerSource
from fedsoda_edge.protocol.manifest import LoRASpec
from fedsoda_hub.evaluation.evaluator import Answers, Evaluator, JudgedModel, auc
from fedsoda_hub.evaluation.judge import judge, judged_models
from fedsoda_hub.evaluation.questions import Question
from fedsoda_hub.preparation.writing import continuation
from fedsoda_hub.settings.run import RunSettings
from tests.edge.model.test_bundle import pruned_by_hand, random_lora
from tests.hub.algorithms.alignment.test_oda import with_peft
from tests.tiny import FAMILY_CONFIGS, make_tiny

QUESTIONS = [Question(f"Say {word}:", answer) for word, answer in [("the", "yes"), ("an inn", "no"), ("rain", "yes")]]


@pytest.fixture(scope="module")
def bundle(prepared: RunSettings) -> Bundle:
    return Bundle.open(prepared.run_dir / "bundle")


@pytest.fixture(scope="module")
def tensors(bundle: Bundle) -> dict[str, Tensor]:
    return random_lora(bundle.manifest.lora, 11)


@pytest.fixture(scope="module")
def models(prepared: RunSettings, bundle: Bundle, tensors: dict[str, Tensor]) -> Mapping[str, JudgedModel]:
    spec = bundle.manifest.lora
    adapter = {item.name: tensors[item.name] for item in spec.adapter}
    emulator = {item.name: tensors[item.name] for item in spec.emulator}
    return judged_models(bundle, Checkpoint.open(prepared.model), adapter, emulator)


def evaluator(tiny_llama: Path, questions: list[Question] = QUESTIONS, choices: str = "auto") -> Evaluator:
    return Evaluator(questions, SampleTokenizer(tiny_llama / "tokenizer.json", 2), choices=choices)


def score_by_hand(model: Any, tokenizer: Any, prompt: str, completion: str) -> tuple[float, int]:
    """(log-likelihood of " completion" and eos after the prompt, ids counted), from one whole forward."""
    ids = [*tokenizer(f"{prompt} {completion}").input_ids, 2]
    start = len(tokenizer(prompt).input_ids)
    with torch.no_grad():
        logs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(logs[at - 1, ids[at]].item() for at in range(start, len(ids))), len(ids) - start


def test_scores_loss_and_answers_are_those_of_whole_models_by_hand(
    tiny_llama: Path, bundle: Bundle, tensors: dict[str, Tensor], models: Mapping[str, JudgedModel]
) -> None:
    spec, plan = bundle.manifest.lora, bundle.plan
    adapter = {item.name: tensors[item.name] for item in spec.adapter}

    def full() -> Any:
        return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)

    by_hand = {
        "full": full(),
        "plug_in": with_peft(full(), {n: n for n in plan.adapter}, adapter, spec.rank, spec.alpha),
        "sub_llm": with_peft(
            pruned_by_hand(tiny_llama, plan, quantized=True),
            {number: position for position, number in enumerate(plan.kept)},
            tensors,
            spec.rank,
            spec.alpha,
        ),
    }
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    asked = evaluator(tiny_llama)
    for name, model in by_hand.items():
        answers = asked.answers(models[name])
        table = [[score_by_hand(model, tokenizer, q.prompt, c) for c in ("no", "yes")] for q in QUESTIONS]
        assert answers.scores is not None
        expected = torch.tensor([[score for score, _ in row] for row in table], dtype=torch.float64)
        torch.testing.assert_close(answers.scores, expected, rtol=1e-5, atol=1e-4)
        own = [row[("no", "yes").index(q.completion)] for row, q in zip(table, QUESTIONS, strict=True)]
        assert answers.nll == pytest.approx(-sum(s for s, _ in own) / sum(n for _, n in own), rel=1e-5)
        assert answers.chosen == [("no", "yes")[int(row.argmax())] for row in expected]


def swept_sources(monkeypatch: pytest.MonkeyPatch) -> list[LayerSource]:
    """Note from here on which sources are swept, or built from layer 0 on."""
    swept: list[LayerSource] = []
    for kind in (Checkpoint, Bundle):
        real: Any = kind.stored_layer

        def counted(self: LayerSource, number: int, real: Any = real) -> Any:
            if number == 0:
                swept.append(self)
            return real(self, number)

        monkeypatch.setattr(kind, "stored_layer", counted)
    return swept


def test_models_with_the_same_emulator_share_one_sweep(
    tiny_llama: Path, models: Mapping[str, JudgedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    swept = swept_sources(monkeypatch)
    found = judge(evaluator(tiny_llama), models).result
    assert swept == [models["full"].source, models["sub_llm"].source]
    for figures in (found.accuracy, found.loss, found.auc, found.mean_rank, found.shares):
        assert set(figures) == {"full", "sub_llm", "plug_in"}
    assert found.right_shares == {"no": pytest.approx(1 / 3), "yes": pytest.approx(2 / 3)}
    assert found.num_examples == 3
    json.dumps(msgspec.to_builtins(found), allow_nan=False)


def test_a_later_round_sweeps_only_what_an_alignment_has_changed(
    models: Mapping[str, JudgedModel], tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, full, sub_llm = evaluator(tiny_llama), models["full"], models["sub_llm"]
    judge(asked, models)
    swept = swept_sources(monkeypatch)

    def with_emulator(change: float) -> dict[str, JudgedModel]:
        lora = {name: tensor + change for name, tensor in sub_llm.emulator_lora.items()}
        return {**models, "sub_llm": replace(sub_llm, emulator_lora=lora)}

    judge(asked, with_emulator(0))
    assert swept == []
    judge(asked, with_emulator(0.01))
    assert swept == [sub_llm.source]
    judge(asked, with_emulator(0))
    assert swept == [sub_llm.source], "both are kept"
    asked.keep(0)
    judge(asked, models)
    assert swept == [sub_llm.source, full.source, sub_llm.source]


def test_states_that_were_used_longest_ago_are_freed_first(
    models: Mapping[str, JudgedModel], tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, full, sub_llm = evaluator(tiny_llama), models["full"], models["sub_llm"]
    _, states = asked.border(full)
    asked.border(sub_llm)
    asked.border(full)
    asked.keep(sum(state.nbytes for state in states))
    swept = swept_sources(monkeypatch)
    asked.border(full)
    assert swept == []
    asked.border(sub_llm)
    assert swept == [sub_llm.source]


def test_the_choices_of_a_question_share_its_prompt(tiny_llama: Path, models: Mapping[str, JudgedModel]) -> None:
    rows, _ = evaluator(tiny_llama).border(models["full"])
    swept = [len(row.ids) for row in rows]
    tokenizer = SampleTokenizer(tiny_llama / "tokenizer.json", 2)
    both = [sum(len(tokenizer.encode(f"{q.prompt} {choice}")) + 1 for choice in ("no", "yes")) for q in QUESTIONS]
    shared = [len(tokenizer.encode(f"{q.prompt} ")) for q in QUESTIONS]  # the space is an id of its own here
    assert swept == [ids - once for ids, once in zip(both, shared, strict=True)]


@pytest.mark.parametrize("window", [40, 100], ids=["beyond the window", "within it"])
@pytest.mark.parametrize("family", ["mistral", "gemma3_text", "phi3"])
def test_scores_are_those_of_whole_models_whatever_their_attention(family: str, window: int, tmp_path: Path) -> None:
    """Choices of one and of many ids, one the beginning of another; the longest question has 80 ids with its choices."""
    questions = [
        Question("A", "no"),
        Question("rain", "no way"),
        Question("Is there an inn at the end of the road to the sea?", "yes, by all means"),
    ]
    directory = make_tiny(tmp_path, family)
    config = json.loads((directory / "config.json").read_text())
    if config.get("sliding_window"):
        (directory / "config.json").write_text(json.dumps(config | {"sliding_window": window}))
    source = Checkpoint.open(str(directory))
    asked, tokenizer = evaluator(directory, questions), AutoTokenizer.from_pretrained(directory)
    untouched = JudgedModel(source, range(5), range(5, source.num_layers), LoRASpec(4, 8, (), (), ()), {}, {})
    by_hand = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    scores = asked.answers(untouched).scores
    assert scores is not None
    for row, question in zip(scores.tolist(), questions, strict=True):
        expected = [score_by_hand(by_hand, tokenizer, question.prompt, choice)[0] for choice in asked.choices]
        assert row == pytest.approx(expected, rel=1e-5, abs=1e-4)
    _, states = asked.border(untouched)
    assert len(states) == (9 if config.get("sliding_window") and window == 40 else 3)


def test_a_freed_emulator_lora_never_lends_its_states_to_the_next(
    tiny_llama: Path, models: Mapping[str, JudgedModel]
) -> None:
    asked, model = evaluator(tiny_llama), models["sub_llm"]
    losses = []
    for size in (0.0, 1.0, 2.0, 3.0):  # each dict is freed before the next is made, so ids may repeat
        scaled = {name: size * tensor for name, tensor in model.emulator_lora.items()}
        losses.append(asked.answers(JudgedModel(model.source, model.below, model.above, model.spec, scaled, {})).nll)
        del scaled
    assert len(set(losses)) == 4


def test_auc_is_the_share_of_pairs_in_order_ties_half() -> None:
    scores = torch.tensor([0.1, 0.4, 0.4, 0.9, -1.0, 0.4])
    positive = torch.tensor([True, False, True, True, False, False])
    pairs = [(p > n) + 0.5 * (p == n) for p in scores[positive].tolist() for n in scores[~positive].tolist()]
    assert auc(scores, positive) == pytest.approx(sum(pairs) / len(pairs))
    assert auc(scores, torch.ones(6, dtype=torch.bool)) is None


def test_ties_go_to_the_first_choice_in_sorted_order(
    tiny_llama: Path, models: Mapping[str, JudgedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        evaluation_module,
        "log_likelihoods",
        lambda _, rows, __: torch.zeros(sum(len(row.samples) for row in rows)).double(),
    )
    assert evaluator(tiny_llama).answers(models["full"]).chosen == ["no", "no", "no"]


def test_among_choices_only_the_very_one_is_right(tiny_llama: Path) -> None:
    asked = evaluator(tiny_llama, [Question("p", "grade 1"), Question("p", "level 1")])
    assert asked.accuracy(Answers(["grade 1", "grade 1"], torch.zeros(2), torch.zeros(2, 2))) == 0.5
    assert asked.accuracy(Answers(["grade 1", "grade 1"], torch.zeros(2), None)) == 1.0


def test_ranks_and_shares_of_more_than_two_choices(tiny_llama: Path) -> None:
    asked = evaluator(tiny_llama, [Question("p", answer) for answer in ("a", "b", "c", "a")])
    scores = torch.tensor([[3.0, 2, 1], [3, 2, 1], [2, 2, 2], [1, 2, 2]], dtype=torch.float64)
    answers = Answers(["a", "a", "a", "b"], torch.zeros(4), scores)
    ranks = asked.ranks(answers)
    assert ranks is not None
    assert ranks.tolist() == [1, 2, 2, 3]  # of three equal ones each is the second
    assert asked.shares(answers) == {"a": 0.75, "b": 0.25, "c": 0.0}
    assert asked.right_shares == {"a": 0.5, "b": 0.25, "c": 0.25}
    assert asked.margins(answers) is None
    broken = asked.ranks(Answers(answers.chosen, answers.losses, scores * torch.nan))
    assert broken is not None
    assert broken.tolist() == [2, 2, 2, 2]


def test_of_two_choices_there_are_margins_and_no_ranks(tiny_llama: Path) -> None:
    asked = evaluator(tiny_llama)
    answers = Answers(["no", "yes", "no"], torch.zeros(3), torch.tensor([[-1.0, -3], [-3, -1], [-2, torch.nan]]))
    margins = asked.margins(answers)
    assert margins is not None
    assert margins[:2].tolist() == [-2, 2]
    assert margins[2] < -1e5  # what is not a number is no answer
    assert asked.ranks(answers) is None
    assert asked.auc(answers) == 0  # gold: yes, no, yes


@pytest.mark.parametrize("gold", ["yes", "a right answer longer than the usual room"])
def test_without_choices_the_greedy_generation_is_the_answer(
    tiny_llama: Path, models: Mapping[str, JudgedModel], gold: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation_module, "MAX_NEW_TOKENS", 8)
    asked = evaluator(tiny_llama, [Question(q.prompt, gold) for q in QUESTIONS[:2]], "none")
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    expected = []
    for question in QUESTIONS[:2]:
        whole, alone = (len(tokenizer(text).input_ids) for text in (f"{question.prompt} {gold}", question.prompt))
        expected.append(greedily(model, tokenizer, question.prompt, max(8, whole + 1 - alone)).strip())
    answers = asked.answers(models["full"])
    assert answers.chosen == expected
    assert answers.scores is None
    assert asked.auc(answers) is asked.ranks(answers) is None
    assert asked.shares(answers) == asked.right_shares == {}
    assert asked.accuracy(Answers([gold, "other"], torch.zeros(2), None)) == 0.5


def greedily(model: Any, tokenizer: Any, prompt: str, room: int) -> str:
    """What plain Transformers writes after the prompt alone in its batch."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        out = model.generate(ids, do_sample=False, max_new_tokens=room, eos_token_id=2, pad_token_id=2)
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


# Those with sliding windows, layers without positions and routed experts; --all takes every family.
@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=() if name in ("gemma3_text", "smollm3", "qwen3_moe") else pytest.mark.slow)
        for name in sorted(FAMILY_CONFIGS)
    ],
)
def test_questions_are_answered_together_as_alone(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation_module, "MAX_NEW_TOKENS", 12)
    directory = make_tiny(tmp_path, family)
    plain: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    questions = [Question("Say " + "the rain " * length + ":", "yes") for length in (1, 9, 4)]
    model = JudgedModel(Checkpoint.open(str(directory)), range(6), (6, 7), LoRASpec(4, 8, (), (), ()), {}, {})
    assert evaluator(directory, questions, "none").answers(model).chosen == [
        greedily(plain, tokenizer, question.prompt, 12).strip() for question in questions
    ]


def test_a_generation_ends_at_a_stop_and_at_the_models_last_position(
    tiny_llama: Path, models: Mapping[str, JudgedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: dict[int, list[int]] = {}

    def counted(start: list[int], most: int, **options: Any) -> Any:
        made[most] = []
        return continuation(start, most, made=made[most], **options)

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    plain: Any = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    prompts = ["Say the:", "Say " + "rain " * 50 + ":"]
    fits = 256 - len(tokenizer(prompts[1]).input_ids)
    assert fits < 64
    texts = [greedily(plain, tokenizer, prompts[0], 64), greedily(plain, tokenizer, prompts[1], fits)]
    stop = texts[0][10:12]
    questions = [Question(prompt, "yes", stops=("no such", stop)) for prompt in prompts]
    monkeypatch.setattr(evaluation_module, "continuation", counted)
    answers = evaluator(tiny_llama, questions, "none").answers(models["full"])
    assert answers.chosen == [text.partition(stop)[0].strip() for text in texts]
    assert set(made) == {64, fits}
    assert len(made[64]) < 64


def test_a_question_longer_than_the_model_is_refused_before_anything_runs(
    tiny_llama: Path, models: Mapping[str, JudgedModel]
) -> None:
    questions = [*QUESTIONS, *(Question("Say " + "rain " * n, "yes") for n in (65, 70))]
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    longest = len(tokenizer("Say " + "rain " * 70 + "yes").input_ids) + 1
    for choices in ("auto", "none"):
        with pytest.raises(DataProblem) as caught:
            evaluator(tiny_llama, questions, choices).answers(models["sub_llm"])
        assert str(caught.value) == (
            f"2 of 5 questions are longer than the model's 256 positions; the longest is question 5 with {longest} "
            "ids, its answer included: lower [task] shots, or shorten the questions"
        )
