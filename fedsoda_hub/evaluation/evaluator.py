"""Answer questions with models, and judge the answers: accuracy, loss, AUC, rank, shares (docs/methods.md (m12-accuracy)).

Nothing trains below the border, so models with the same layers there share border states: one sweep serves the
untouched model, the plug-in and any other adapter LoRA. Which models to judge is `judge.py`'s.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fedsoda_edge.data.samples import Sample, SampleTokenizer
from fedsoda_edge.errors import DataProblem
from fedsoda_edge.model import lora, loss
from fedsoda_edge.model.border import border_states
from fedsoda_edge.model.branches import Branches, attention, joined
from fedsoda_edge.model.families import build_config
from fedsoda_edge.model.source import LayerSource
from fedsoda_edge.model.sub_llm import SubLLM, build
from fedsoda_edge.protocol.manifest import LoRASpec
from fedsoda_hub.evaluation.questions import Question, choices_of, is_right, until_stop
from fedsoda_hub.preparation.writing import Text, Writer, continuation

MAX_NEW_TOKENS = 64
BATCH_ROWS = 32  # that are scored together
WORST_SCORE = -1e6  # nats, of a choice whose score is not a number

QuestionsDone = Callable[[int, int], None]  # (done, total)


@dataclass(frozen=True)
class Answers:
    """One model's answers.

    chosen: the model's completion of each question. losses: (questions,) nats of each question's own completion, eos
    included, divided by the data's mean number of completion ids. scores: (questions, choices) total log-likelihood with
    eos; None without choices.
    """

    chosen: list[str]
    losses: Tensor
    scores: Tensor | None

    @property
    def nll(self) -> float:
        """The mean loss over all questions, nats a completion id."""
        return float(self.losses.mean())


@dataclass(frozen=True)
class JoinedSamples:
    """Samples that run as one row, since they share a beginning.

    ids: (T,). branches: where in the ids each sample lies.
    """

    samples: Sequence[Sample]
    ids: Tensor
    branches: Branches

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> JoinedSamples:
        """Join samples into one row."""
        ids, branches = joined([sample.ids for sample in samples])
        return cls(samples, torch.tensor(ids), branches)

    def asked(self) -> list[tuple[int, int, int]]:
        """List the completion ids that have an id before them: (sample, column whose state predicts the id, id)."""
        return [
            (number, self.branches.column(number, at - 1), sample.ids[at])
            for number, sample in enumerate(self.samples)
            for at in range(max(sample.start, 1), len(sample.ids))
        ]


@dataclass(frozen=True)
class JudgedModel:
    """A model to judge: layers of `source`, those `below` the border and those `above`, with emulator and adapter LoRA.

    Adapter LoRA is only above the border; emulator LoRA may be on both sides.
    """

    source: LayerSource
    below: Sequence[int]
    above: Sequence[int]
    spec: LoRASpec
    emulator_lora: Mapping[str, Tensor]
    adapter_lora: Mapping[str, Tensor]


@dataclass(frozen=True)
class Verdict:
    """A model's answers, judged.

    chosen: the model's completion of each question. accuracy: the share that is right. loss: nats a completion id; None:
    it is not finite. auc: None unless there are two choices. mean_rank: of the right choice, 1 is best; None unless there
    are more than two. shares: how often each choice was chosen; empty without choices.
    """

    chosen: list[str]
    accuracy: float
    loss: float | None
    auc: float | None
    mean_rank: float | None
    shares: dict[str, float]


class Evaluator:
    """A judge of models on one set of questions, which shares border states between models with the same emulator.

    Args:
        choices: "auto" or "none", as [task] choices has it.

    Attributes:
        gold: the place of each question's own completion among its choices.

    Raises:
        DataProblem: a completion has no ids.
    """

    def __init__(
        self,
        questions: Sequence[Question],
        tokenizer: SampleTokenizer,
        *,
        choices: str = "auto",
        compute_dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> None:
        self.questions = questions
        self.choices = choices_of(questions, choices)
        self._tokenizer = tokenizer
        self._compute_dtype = compute_dtype
        self._device = device
        self._candidates: list[list[Sample]] = []  # by question
        self.gold: list[int] = []
        for question in questions:
            completions = self.choices or [question.completion]
            self.gold.append(completions.index(question.completion))
            self._candidates.append([self._sample(question, completion) for completion in completions])
        # The model is kept beside its states: the id of a freed object could be given to another one. The last used is last.
        self._borders: dict[_BorderKey, tuple[JudgedModel, list[JoinedSamples], list[Tensor]]] = {}

    def _sample(self, question: Question, completion: str) -> Sample:
        if question.talk is None:
            sample = self._tokenizer.sample(question.prompt, completion)
        else:
            before, whole = question.talk.answered(completion if question.talk.can_choose else None)
            sample = self._tokenizer.chat_sample(before, whole.text, generated=whole.generated)
        if sample is None:
            raise DataProblem(
                f"the completion {completion!r} has no ids after a prompt that ends in {question.prompt[-40:]!r}; "
                "write a completion that is not empty"
            )
        return sample

    def border(
        self, model: JudgedModel, report: QuestionsDone | None = None
    ) -> tuple[list[JoinedSamples], list[Tensor]]:
        """Compute all rows and their states at the border, once for each (source, layers, values of the emulator LoRA).

        Returns:
            rows, and for each its states (T, C).

        Raises:
            DataProblem: a question with its answer is longer than the model's positions.
        """
        key = _border_key(model)
        if key not in self._borders:
            self.check_lengths(_positions(model))
            rows = self._rows(model)
            states = border_states(
                model.source,
                model.below,
                [row.ids for row in rows],
                branches=[row.branches for row in rows],
                emulator=model.emulator_lora,
                lora_scale=model.spec.scale,
                compute_dtype=self._compute_dtype,
                device=self._device,
                progress=report,
            )
            self._borders[key] = model, rows, states
        self._borders[key] = self._borders.pop(key)
        _, rows, states = self._borders[key]
        return rows, states

    def _rows(self, model: JudgedModel) -> list[JoinedSamples]:
        """Join each question's candidates in one row, which runs their prompt once.

        Where a row would be longer than a sliding window, which counts columns and not positions, each candidate is a row
        of its own; for all questions alike, since a batch has one mask.
        """
        window = getattr(build_config(model.source.family, model.source.fields), "sliding_window", None)
        rows = [JoinedSamples.of(samples) for samples in self._candidates]
        if window is None or all(row.branches.length <= window for row in rows):
            return rows
        return [JoinedSamples.of([sample]) for samples in self._candidates for sample in samples]

    def check_lengths(self, positions: int) -> None:
        """Check that all questions fit: beyond its positions a model still computes, but its answers mean nothing.

        Raises:
            DataProblem: a question with its answer is longer than `positions` ids.
        """
        longest = torch.tensor([max(len(sample.ids) for sample in samples) for samples in self._candidates])
        if too_long := int((longest > positions).sum()):
            raise DataProblem(
                f"{too_long} of {len(longest)} questions are longer than the model's {positions} positions; the longest "
                f"is question {int(longest.argmax()) + 1} with {int(longest.max())} ids, its answer included: lower "
                "[task] shots, or shorten the questions"
            )

    def keep(self, max_bytes: int) -> None:
        """Free the border states that were used longest ago, until all that stay have `max_bytes` at most."""
        sizes = {key: sum(state.nbytes for state in states) for key, (_, _, states) in self._borders.items()}
        for key, size in list(sizes.items()):
            if sum(sizes.values()) <= max_bytes:
                break
            del self._borders[key]
            sizes[key] -= size

    def supervised_ids(self) -> list[int]:
        """Count the ids of each question's own completion, eos included, in the order of the questions."""
        return [samples[gold].num_supervised for samples, gold in zip(self._candidates, self.gold, strict=True)]

    def answers(self, model: JudgedModel, report: QuestionsDone | None = None) -> Answers:
        """Let a model answer all questions: by likelihood among choices, else by greedy generation.

        Args:
            report: called as report(done, total), for layers that were swept or questions that were answered.

        Raises:
            DataProblem: a question with its answer is longer than the model's positions.
        """
        rows, states = self.border(model, report)
        tail = build(model.source, model.above, compute_dtype=self._compute_dtype, device=self._device)
        lora.attach(tail, model.spec, {**lora.on(model.above, model.emulator_lora), **model.adapter_lora})
        table = log_likelihoods(tail, rows, states).reshape(len(self.questions), -1)
        own = table[torch.arange(len(table)), self.gold]
        losses = -own * (len(self.questions) / sum(self.supervised_ids()))
        if not self.choices:
            return Answers(self._generate(model, report), losses, None)
        # argmax takes the first of equals, and choices are sorted, so ties go to the first in sorted order.
        return Answers([self.choices[int(i)] for i in table.argmax(dim=1)], losses, table)

    def _generate(self, model: JudgedModel, report: QuestionsDone | None) -> list[str]:
        whole = build(
            model.source,
            [*model.below, *model.above],
            compute_dtype=self._compute_dtype,
            device=self._device,
            embedding=True,
        )
        lora.attach(whole, model.spec, {**model.emulator_lora, **model.adapter_lora})
        eos = model.source.fields.get("eos_token_id")
        ends = self._tokenizer.ends | (set() if eos is None else {eos} if isinstance(eos, int) else set(eos))
        prompts = [
            self._tokenizer.begun(question.prompt) if question.talk is None else self._tokenizer.bare(question.prompt)
            for question in self.questions
        ]
        room = max(MAX_NEW_TOKENS, *self.supervised_ids())  # a right answer must have room to end
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # texts of a step are of like lengths
        coming = iter(order)
        writer = Writer(whole, longest=len(prompts[order[0]]) + room, seed=0)

        def answer(i: int) -> Text[str]:
            stops = self.questions[i].stops
            lead, behind = self.questions[i].around
            closing = self._tokenizer.bare(behind.strip())[:1]  # a template may end an answer otherwise than the model

            def text(ids: Sequence[int]) -> tuple[str, bool]:
                written = self._tokenizer.decode(ids)
                cut = until_stop(written, stops)
                return cut, cut != written

            most = min(room, writer.positions - len(prompts[i]))
            ids = yield from continuation(
                prompts[i],
                most,
                ends=ends.union(one for one in closing if self._tokenizer.is_special(one)),
                among=1,
                is_over=(lambda ids: text(ids)[1]) if any(stops) else None,
            )
            return text(ids)[0].strip().removeprefix(lead.strip()).strip()

        made: list[str] = []
        for written in writer.write(lambda: next((answer(i) for i in coming), None)):
            made.append(written)
            if report is not None:
                report(len(made), len(prompts))
        return [text for _, text in sorted(zip(order, made, strict=True))]

    def accuracy(self, answers: Answers) -> float:
        """Compute the share of questions answered as the data says; a generated number counts by its value.

        Among choices only the identical text is right: "grade 1" and "level 1" may both be choices.
        """
        right = self.right(answers)
        return sum(right) / len(right)

    def right(self, answers: Answers) -> list[bool]:
        """Tell for each question whether it was answered as the data says."""
        same = is_right if answers.scores is None else str.__eq__
        wanted = [
            # A call is written with special tokens, which a generated text does not show.
            q.completion if q.talk is None or q.talk.can_choose else self._tokenizer.plain(q.completion).strip()
            for q in self.questions
        ]
        return [same(made, completion) for made, completion in zip(answers.chosen, wanted, strict=True)]

    def auc(self, answers: Answers) -> float | None:
        """Compute the area under the ROC curve of the score difference; None unless there are two choices."""
        margins = self.margins(answers)
        return None if margins is None else auc(margins, torch.tensor(self.gold) == 1)

    def margins(self, answers: Answers) -> Tensor | None:
        """Compute the score of the second choice less that of the first: (questions,); None unless there are two choices."""
        if answers.scores is None or len(self.choices) != 2:
            return None
        scores = _finite(answers.scores)
        return scores[:, 1] - scores[:, 0]

    def ranks(self, answers: Answers) -> Tensor | None:
        """Compute the rank of the right choice by its score, 1 the best, equal ones sharing theirs: (questions,).

        None unless there are more than two choices: of two it says what accuracy says.
        """
        if answers.scores is None or len(self.choices) <= 2:
            return None
        scores = _finite(answers.scores)
        own = scores.gather(1, torch.tensor(self.gold)[:, None])
        return 1 + (scores > own).sum(dim=1) + ((scores == own).sum(dim=1) - 1) / 2

    def shares(self, answers: Answers) -> dict[str, float]:
        """Compute how often each choice was chosen; none without choices."""
        return {choice: answers.chosen.count(choice) / len(answers.chosen) for choice in self.choices}

    @property
    def right_shares(self) -> dict[str, float]:
        """The share of questions of which each choice is the right one; none without choices."""
        return {choice: self.gold.count(at) / len(self.gold) for at, choice in enumerate(self.choices)}

    def verdict(self, model: JudgedModel, report: QuestionsDone | None = None) -> Verdict:
        """Let a model answer all questions, and judge its answers.

        Raises:
            DataProblem: a question with its answer is longer than the model's positions.
        """
        answers = self.answers(model, report)
        loss = answers.nll if math.isfinite(answers.nll) else None  # JSON has no NaN
        ranks = self.ranks(answers)
        return Verdict(
            chosen=answers.chosen,
            accuracy=self.accuracy(answers),
            loss=loss,
            auc=self.auc(answers),
            mean_rank=None if ranks is None else float(ranks.mean()),
            shares=self.shares(answers),
        )


_BorderKey = tuple[int, tuple[int, ...], bytes]


def _border_key(model: JudgedModel) -> _BorderKey:
    values = hashlib.sha256()
    for name, tensor in sorted(model.emulator_lora.items()):
        values.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        values.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return id(model.source), tuple(model.below), values.digest()


def _finite(scores: Tensor) -> Tensor:
    """Set scores that are not a number below all others, so that such a model is not the best at anything."""
    return scores.nan_to_num(nan=WORST_SCORE, neginf=WORST_SCORE, posinf=WORST_SCORE)


def _positions(model: JudgedModel) -> int:
    return int(model.source.fields["max_position_embeddings"])


def log_likelihoods(sub_llm: SubLLM, rows: Sequence[JoinedSamples], states: Sequence[Tensor]) -> Tensor:
    """Sum the log-likelihood of each sample's completion ids, eos included.

    Args:
        states: (T, C) of each row below the model's first layer.

    Returns:
        nats, float64 (samples,), row after row.
    """
    first = [0, *accumulate(len(row.samples) for row in rows)]
    totals = torch.zeros(first.pop(), dtype=torch.float64)
    order = sorted(range(len(rows)), key=lambda i: (rows[i].branches.length, i))
    device = sub_llm.device
    for at in range(0, len(order), BATCH_ROWS):
        batch = order[at : at + BATCH_ROWS]
        asked = [
            (place, first[i] + number, column, label)
            for place, i in enumerate(batch)
            for number, column, label in rows[i].asked()
        ]
        places, samples, columns, labels = torch.tensor(asked, dtype=torch.int64).reshape(-1, 4).unbind(dim=1)
        positions, mask = attention([rows[i].branches for i in batch], device)
        with torch.no_grad():
            hidden = sub_llm.hidden_at(
                places.to(device),
                columns.to(device),
                states=pad_sequence([states[i] for i in batch], batch_first=True).to(device, sub_llm.dtype),
                positions=positions,
                mask=mask,
            )
            found = loss.log_likelihoods(hidden, sub_llm.head, labels.to(device))
        totals.index_add_(0, samples, found.double().cpu())
    return totals


def auc(scores: Tensor, positive: Tensor) -> float | None:
    """Compute P(score of a positive > score of a negative), ties counted half (Mann-Whitney).

    Args:
        scores: (N,). positive: bool (N,).

    Returns:
        0 to 1; None unless there are both positives and negatives.
    """
    high, low = scores[positive].double(), scores[~positive].double()
    if not len(high) or not len(low):
        return None
    ordered = low.sort().values
    below = torch.searchsorted(ordered, high, right=False).double()
    upto = torch.searchsorted(ordered, high, right=True).double()
    return float((below + upto).mean() / (2 * len(low)))
