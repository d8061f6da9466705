"""Read the questions of evaluation data, and decide which answers are right (docs/methods.md (m12-accuracy)).

Plain text. How models answer is `evaluator.py`'s.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path

from fedsoda_edge.data.chat import ChatTemplates, Rendered, TooLong
from fedsoda_edge.data.examples import ChatExample, Skipped, TextExample, alike_key, shown
from fedsoda_edge.data.local_data import LocalData, SkippedRows, remedy_for_columns
from fedsoda_edge.data.samples import Renderer, join_text
from fedsoda_edge.errors import DataProblem
from fedsoda_edge.protocol.template import DEFAULT_COMPLETION, DEFAULT_PROMPT, TextTemplate
from fedsoda_edge.units import counted

MAX_CHOICES = 20
# Commas only between thousands, and a minus only where nothing is before it to subtract from: 16-3 holds 16 and 3.
_NUMBER = re.compile(r"(?:(?<![\w)])-)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?")
_LAST_WORD_IS_NUMBER = re.compile(rf"(?:^|[\s#$€£=:])({_NUMBER.pattern})[.%]?$")


@dataclass(frozen=True)
class Question:
    """One row of evaluation data as text.

    prompt: all that a model reads. examples: the beginning of the prompt with other rows and their answers, if any.
    stops: texts that begin another row; what a model generates from there on is not part of its answer. talk: the
    conversation that the row is; None: the row is a prompt with its completion.
    """

    prompt: str
    completion: str
    examples: str = ""
    stops: tuple[str, ...] = ()
    talk: Talk | None = None

    @property
    def around(self) -> tuple[str, str]:
        """The texts that a chat template writes between prompt and answer, and behind the answer; "" without one."""
        if self.talk is None:
            return "", ""
        before, whole = self.talk.answered(None)
        lead, found, behind = whole.text.removeprefix(before).rpartition(self.completion)
        return (lead, behind) if found else ("", "")


@dataclass(frozen=True)
class Talk:
    """A conversation that is judged by its last answer, as the model's chat template writes it."""

    conversation: ChatExample
    renderer: Renderer

    @property
    def can_choose(self) -> bool:
        """Whether the answer is text alone, so that another one can stand in its place."""
        return not self.conversation.messages[-1].get("tool_calls")

    def answered(self, answer: str | None) -> tuple[str, Rendered]:
        """Write the conversation with another answer; None: with its own. What comes before the answer, and the whole.

        Raises:
            DataProblem: the model has no chat template, or one that refuses it.
        """
        told = self.conversation
        if answer is not None:
            messages = (*told.messages[:-1], {**told.messages[-1], "content": answer})
            told = replace(told, messages=messages)
        return self.renderer.conversation(told)


def read_questions(
    path: Path,
    prompt: TextTemplate,
    completion: TextTemplate,
    shots: int = 0,
    seed: int = 0,
    chat: ChatTemplates | None = None,
) -> list[Question]:
    """Read rows by the template, or by their own `prompt` and `completion` columns where the template's are missing.

    Rows that have no answer are left out. Of a conversation the last answer is asked for.

    Args:
        shots: how many other rows of the file precede each question with their answers, drawn by (seed, row).
        chat: the model's chat templates, for conversations; None: it has none.

    Raises:
        DataProblem: a row has neither columns, a value is not text, no row has an answer, or there are too few rows to draw
            from; a conversation cannot be rendered, or is not to be preceded by others.
    """
    data = LocalData(path)
    # The words before the first column, such as "Question:".
    head = prompt.render(dict.fromkeys(prompt.columns, "\0")).partition("\0")[0].rstrip()
    prompt, completion = templates_of(data, prompt, completion)
    rows: list[tuple[str, str]] = []
    talks: list[Question] = []
    skipped = SkippedRows()
    renderer = Renderer(prompt, completion, chat)
    with remedy_for_columns(
        "rename one in the file, use another in [task] prompt and completion, or write rows with the columns prompt "
        "and completion"
    ):
        for line, example in data.examples(prompt, completion):
            match example:
                case Skipped():
                    skipped.add(example.reason, line)
                case TextExample():
                    rows.append((example.prompt, example.completion))
                case ChatExample():
                    with data.at(line):
                        try:
                            talks.append(_question_of(Talk(example, renderer), shots))
                        except TooLong:
                            skipped.add("long", line)
    data.refuse_without(len(rows) + len(talks) + skipped.total, skipped)
    if talks and not rows:
        return talks
    if shots >= len(rows):
        raise DataProblem(
            f"[task] shots = {shots} needs {shots + 1} rows, but {path} has {len(rows)}; lower shots or add rows"
        )
    stops = _stops(rows, head, shots)
    examples = [_examples(rows, at, shots, seed) for at in range(len(rows))]
    asked = [Question(shown + row[0], row[1], shown, stops) for shown, row in zip(examples, rows, strict=True)]
    return [*asked, *talks]


def _question_of(talk: Talk, shots: int) -> Question:
    """Make the question of a conversation: its own last answer, or the call that the answer is, as it is written."""
    if shots:
        raise DataProblem(
            f"the row is a conversation, which [task] shots = {shots} cannot precede with others; write shots = 0"
        )
    before, whole = talk.answered(None)
    answer = str(talk.conversation.messages[-1]["content"]) if talk.can_choose else whole.text.removeprefix(before)
    return Question(before, answer, talk=talk)


def templates_of(data: LocalData, prompt: TextTemplate, completion: TextTemplate) -> tuple[TextTemplate, TextTemplate]:
    """Choose the templates that rows are judged by: the run's, or `prompt` and `completion` where its columns are missing.

    Raises:
        DataProblem: the file cannot be read, or has no rows.
    """
    _, first = next(iter(data.rows()))
    default = TextTemplate(DEFAULT_PROMPT), TextTemplate(DEFAULT_COMPLETION)
    if {*prompt.columns, *completion.columns} <= first.keys():
        return prompt, completion
    is_default = {"prompt", "completion"} <= first.keys() or data.reader(*default).is_conversation(first)
    return default if is_default else (prompt, completion)


def _examples(rows: Sequence[tuple[str, str]], at: int, shots: int, seed: int) -> str:
    """Join `shots` rows other than `at` with their answers, a blank line after each."""
    if not shots:
        return ""
    chosen = random.Random(f"{seed}/{at}").sample([*rows[:at], *rows[at + 1 :]], shots)
    return "".join(join_text(*row) + "\n\n" for row in chosen)


def _stops(rows: Sequence[tuple[str, str]], head: str, shots: int) -> tuple[str, ...]:
    """Find the texts that begin another row: a blank line after examples, and the words that begin every prompt, on a new
    line. A text that is part of an answer is left out.

    A model that was not trained to write eos continues with the next row, whose last number is not its answer.
    lm-evaluation-harness ends GSM8K at "Question:", many other tasks at a blank line.
    """
    found = ["\n\n"] if shots else []
    if head and all(prompt.startswith(head) for prompt, _ in rows):
        found.append(f"\n{head}")
    return tuple(stop for stop in found if not any(stop in completion for _, completion in rows))


def choices_of(questions: Sequence[Question], wanted: str = "auto") -> list[str]:
    """List the distinct completions, sorted; none where there are more than MAX_CHOICES or choices are not wanted.

    Raises:
        DataProblem: two of them differ by white space alone, so that no model could tell them apart.
    """
    counts = Counter(question.completion for question in questions)
    can_choose = all(question.talk is None or question.talk.can_choose for question in questions)
    if wanted != "auto" or len(counts) > MAX_CHOICES or not can_choose:
        return []
    seen: dict[str, str] = {}
    for choice in sorted(counts):
        other = seen.setdefault(alike_key(choice), choice)
        if other != choice:
            raise DataProblem(
                f"the completions {shown(other)} (of {counted(counts[other], 'row')}) and {shown(choice)} (of "
                f"{counted(counts[choice], 'row')}) of the evaluation data differ by white space alone; write one of them "
                "in all rows"
            )
    return sorted(counts)


def until_stop(text: str, stops: Sequence[str]) -> str:
    """Cut a generated text where the first stop begins."""
    for stop in stops:
        text = text.partition(stop)[0]
    return text


def is_right(made: str, wanted: str) -> bool:
    """Tell whether a generated answer is right: it is the same text or, where the wanted answer ends in a number, its last
    number has the same value.
    """
    if made.strip() == wanted.strip():
        return True
    theirs, ours = _LAST_WORD_IS_NUMBER.search(wanted.strip()), _NUMBER.findall(made)
    return theirs is not None and bool(ours) and _value(ours[-1]) == _value(theirs[1])


def _value(number: str) -> Decimal:
    return Decimal(number.replace(",", ""))
