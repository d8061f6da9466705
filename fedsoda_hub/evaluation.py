"""Accuracy and loss of full / sub-LLM / plug-in, as contract.md "Accuracy" reads them.

LoRA sits only in the adapter, so models that share an emulator share its border states: one sweep serves the
untouched model, the plug-in and any other adapter LoRA. Which adapters to judge is the caller's business.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedsoda_edge.data import (
    DEFAULT_COMPLETION,
    DEFAULT_PROMPT,
    LocalData,
    Sample,
    SampleTokenizer,
    TextTemplate,
    join_text,
)
from fedsoda_edge.errors import DataProblem
from fedsoda_edge.model import lora, loss
from fedsoda_edge.model.streaming import LayerSource, stream
from fedsoda_edge.model.sub_llm import SubLLM, build
from fedsoda_edge.protocol.manifest import LoRASpec

MAX_CHOICES = 20
MAX_NEW_TOKENS = 64
_NUMBER = re.compile(r"-?\d[\d,]*\.?\d*")


@dataclass(frozen=True)
class Question:
    prompt: str
    completion: str


@dataclass(frozen=True)
class Answers:
    """One model's answers. chosen: its completion per question. nll: mean over all completion ids of the data.

    scores: (questions, choices) total log-likelihood with eos; None without choices.
    """

    chosen: list[str]
    nll: float
    scores: Tensor | None


@dataclass(frozen=True)
class Judged:
    """A model to judge: `emulator` layers of `source` with emulator_lora, `adapter` layers with adapter_lora."""

    source: LayerSource
    emulator: Sequence[int]
    adapter: Sequence[int]
    spec: LoRASpec
    emulator_lora: Mapping[str, Tensor]
    adapter_lora: Mapping[str, Tensor]


def read_questions(
    path: Path, prompt: TextTemplate, completion: TextTemplate, shots: int = 0, seed: int = 0
) -> list[Question]:
    """Rows by the template, or by their own `prompt` and `completion` columns where the template's are missing.

    Args:
        shots: so many other rows of the file stand answered before each question, drawn by (seed, row).

    Raises:
        DataProblem: a row has neither, or there are too few rows to draw from.
    """
    data = LocalData(path)
    _, first = next(iter(data.rows()))
    columns = {*prompt.columns, *completion.columns}
    if not columns <= set(first) and {"prompt", "completion"} <= set(first):
        prompt, completion = TextTemplate(DEFAULT_PROMPT), TextTemplate(DEFAULT_COMPLETION)
    data.check(prompt, completion)
    bare = [Question(prompt.render(row), completion.render(row)) for _, row in data.rows()]
    if shots >= len(bare):
        raise DataProblem(f"[task] shots = {shots}, and {path} has {len(bare)} rows; {shots + 1} are needed")
    return [_with_examples(bare, at, shots, seed) for at in range(len(bare))] if shots else bare


def _with_examples(questions: Sequence[Question], at: int, shots: int, seed: int) -> Question:
    """The question after `shots` others with their answers, a blank line between them."""
    others = [*questions[:at], *questions[at + 1 :]]
    chosen = random.Random(f"{seed}/{at}").sample(others, shots)
    examples = [join_text(question.prompt, question.completion) for question in chosen]
    return Question("\n\n".join([*examples, questions[at].prompt]), questions[at].completion)


def choices_of(questions: Sequence[Question], wanted: str = "auto") -> list[str]:
    """The distinct completions, sorted, if at most 20; else none."""
    distinct = sorted({question.completion for question in questions})
    return distinct if wanted == "auto" and len(distinct) <= MAX_CHOICES else []


class Evaluator:
    """Judges models on one set of questions, sharing border states between models with the same emulator."""

    def __init__(
        self,
        questions: Sequence[Question],
        tokenizer: SampleTokenizer,
        *,
        choices: str = "auto",
        compute_dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        report: Callable[[int, int], None] | None = None,
    ) -> None:
        self.questions = questions
        self.choices = choices_of(questions, choices)
        self._tokenizer = tokenizer
        self._compute_dtype = compute_dtype
        self._device = device
        self._report = report
        self._samples: list[Sample] = []
        self._gold: list[int] = []  # index of each question's own completion among _samples
        for question in questions:
            candidates = self.choices or [question.completion]
            self._gold.append(len(self._samples) + candidates.index(question.completion))
            for completion in candidates:
                sample = tokenizer.sample(question.prompt, completion)
                if sample is None:
                    raise DataProblem(f"the completion {completion!r} has no ids after {question.prompt[-40:]!r}")
                self._samples.append(sample)
        # The model is kept beside its states: the id of a freed object could be given to another one.
        self._borders: dict[tuple[int, int], tuple[Judged, list[Tensor]]] = {}

    def border(self, model: Judged) -> list[Tensor]:
        """States below the adapter, swept once for each (source, emulator LoRA)."""
        key = (id(model.source), id(model.emulator_lora))
        if key not in self._borders:
            states = stream(
                model.source,
                model.emulator,
                [torch.tensor(sample.ids) for sample in self._samples],
                lora=dict(model.emulator_lora),
                lora_scale=model.spec.scale,
                compute_dtype=self._compute_dtype,
                device=self._device,
                progress=self._report,
            )
            self._borders[key] = model, states
        return self._borders[key][1]

    def forget(self, model: Judged) -> None:
        """Free the border states of a model's emulator."""
        self._borders.pop((id(model.source), id(model.emulator_lora)), None)

    def supervised_ids(self) -> list[int]:
        """Completion ids of each question's own completion, eos included."""
        return [self._samples[i].num_supervised for i in self._gold]

    def answers(self, model: Judged) -> Answers:
        states = self.border(model)
        tail = build(model.source, model.adapter, compute_dtype=self._compute_dtype, device=self._device)
        lora.attach(tail, model.spec, dict(model.adapter_lora))
        scores = log_likelihoods(tail, self._samples, states)
        nll = -float(scores[self._gold].sum()) / sum(self.supervised_ids())
        if not self.choices:
            return Answers(self._generate(model), nll, None)
        table = scores.reshape(len(self.questions), len(self.choices))
        # argmax takes the first of equals, and choices are sorted: ties go to the first in sorted order.
        return Answers([self.choices[int(i)] for i in table.argmax(dim=1)], nll, table)

    def _generate(self, model: Judged) -> list[str]:
        whole = build(
            model.source,
            [*model.emulator, *model.adapter],
            compute_dtype=self._compute_dtype,
            device=self._device,
            embedding=True,
        )
        lora.attach(whole, model.spec, {**model.emulator_lora, **model.adapter_lora})
        eos = model.source.fields.get("eos_token_id")
        pad = eos[0] if isinstance(eos, list) else eos  # one row at a time: nothing is padded, but it wants to be told
        longest = max(MAX_NEW_TOKENS, *self.supervised_ids())  # a right answer must have room to end
        made = []
        for done, question in enumerate(self.questions):
            ids = torch.tensor([self._tokenizer.encode(question.prompt)], device=self._device)
            with torch.no_grad():
                out = whole.model.generate(
                    ids, do_sample=False, max_new_tokens=longest, eos_token_id=eos, pad_token_id=pad
                )
            made.append(self._tokenizer.decode(out[0, ids.shape[1] :].tolist()).strip())
            if self._report is not None:
                self._report(done + 1, len(self.questions))
        return made

    def accuracy(self, answers: Answers) -> float:
        """Share of questions answered as the data says; a generated number counts by its value's digits.

        Among choices only the very one is right: "grade 1" and "level 1" may both be choices.
        """
        same = is_right if answers.scores is None else str.__eq__
        right = [same(made, q.completion) for made, q in zip(answers.chosen, self.questions, strict=True)]
        return sum(right) / len(right)

    def auc(self, answers: Answers) -> float | None:
        """Area under the ROC curve of the score difference, where there are two choices."""
        if answers.scores is None or len(self.choices) != 2:
            return None
        positive = torch.tensor([q.completion == self.choices[1] for q in self.questions])
        return auc(answers.scores[:, 1] - answers.scores[:, 0], positive)


def log_likelihoods(sub_llm: SubLLM, samples: Sequence[Sample], states: Sequence[Tensor]) -> Tensor:
    """Total log-likelihood of each sample's completion ids, eos included, float64 (samples,)."""
    totals = torch.zeros(len(samples), dtype=torch.float64)
    order = sorted(range(len(samples)), key=lambda i: (len(samples[i].ids), i))
    with torch.no_grad():
        for at in range(0, len(order), 32):
            batch = order[at : at + 32]
            longest = max(len(samples[i].ids) for i in batch)
            padded = torch.zeros(len(batch), longest, states[batch[0]].shape[1], dtype=sub_llm.dtype)
            for row, i in enumerate(batch):
                padded[row, : len(states[i])] = states[i]
            hidden = sub_llm.hidden(states=padded.to(sub_llm.device))
            starts = [max(samples[i].start, 1) for i in batch]
            counts = [len(samples[i].ids) - start for i, start in zip(batch, starts, strict=True)]
            rows = torch.arange(len(batch)).repeat_interleave(torch.tensor(counts))
            columns = torch.cat([torch.arange(s - 1, s - 1 + n) for s, n in zip(starts, counts, strict=True)])
            labels = torch.tensor([label for i, s in zip(batch, starts, strict=True) for label in samples[i].ids[s:]])
            device = sub_llm.device
            found = loss.log_likelihoods(hidden[rows.to(device), columns.to(device)], sub_llm.head, labels.to(device))
            totals[torch.tensor(batch)] = torch.zeros(len(batch), dtype=torch.float64).index_add_(
                0, rows, found.double().cpu()
            )
    return totals


def auc(scores: Tensor, positive: Tensor) -> float | None:
    """P(score of a positive > score of a negative), ties half (Mann-Whitney); None without both kinds."""
    high, low = scores[positive].double(), scores[~positive].double()
    if not len(high) or not len(low):
        return None
    ordered = low.sort().values
    below = torch.searchsorted(ordered, high, right=False).double()
    upto = torch.searchsorted(ordered, high, right=True).double()
    return float((below + upto).mean() / (2 * len(low)))


def is_right(made: str, wanted: str) -> bool:
    """Equal text; where the wanted answer is or ends in a number, its last number against the last made."""
    if made.strip() == wanted.strip():
        return True
    theirs = _NUMBER.findall(wanted)
    if not theirs or not wanted.strip().endswith(theirs[-1]):
        return False
    ours = _NUMBER.findall(made)
    return bool(ours) and ours[-1].replace(",", "").rstrip(".") == theirs[-1].replace(",", "").rstrip(".")


def summary(evaluator: Evaluator, models: Mapping[str, Judged], samples: int = 0) -> dict[str, Any]:
    """{accuracy, loss, auc: {name: value}, num_examples} for `--json` and the ledger.

    Args:
        samples: add so many questions with each model's answer, from the first on.
    """
    result: dict[str, Any] = {"accuracy": {}, "loss": {}, "auc": {}, "num_examples": len(evaluator.questions)}
    shown = [{"prompt": q.prompt, "completion": q.completion} for q in evaluator.questions[:samples]]
    for name, model in models.items():
        answers = evaluator.answers(model)
        for sample, made in zip(shown, answers.chosen, strict=False):
            sample[name] = made
        result["accuracy"][name] = evaluator.accuracy(answers)
        result["loss"][name] = answers.nll
        result["auc"][name] = evaluator.auc(answers)
    return result | ({"samples": shown} if samples else {})
