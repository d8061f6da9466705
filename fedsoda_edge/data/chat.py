"""Render `messages` with a model's own chat template, which comes from the hub: sandboxed, bounded, no files.

Jinja templates are programs. They run in Jinja's immutable sandbox, in the worker, with at most MAX_CHARACTERS of
output and RENDER_SECONDS of time each; they get no clock, so that a run can be repeated. Turning the text into samples
is left to `samples.py`.
"""

from __future__ import annotations

import ctypes
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.ext import LoopControlExtension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fedsoda_edge.errors import DataProblem, UsageProblem

MAX_CHARACTERS = 64 << 10
RENDER_SECONDS = 2.0
ChatMessage = Mapping[str, str]


class _TooSlow(Exception):
    """The end of a rendering that takes too long, raised in its thread by the timer."""


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja as Transformers sets it up, without products that use up memory ("x" * 10**9)."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute a product of numbers; refuse powers and repeated texts and lists."""
        if operator == "**" or isinstance(left, str | list | tuple) or isinstance(right, str | list | tuple):
            raise TemplateError(f"{operator} is not allowed on these values")
        return super().call_binop(context, operator, left, right)


class ChatTemplate:
    """A compiled chat template and the special tokens that it may name.

    Args:
        source: the template.
        tokens: the text of each special token by its name ("eos_token", ...).
        render_seconds: the time that one conversation may take.

    Raises:
        UsageProblem: on construction, when the source is not a template.
    """

    def __init__(self, source: str, tokens: Mapping[str, str], render_seconds: float = RENDER_SECONDS) -> None:
        environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[LoopControlExtension])

        def raise_exception(message: str) -> NoReturn:
            raise TemplateError(message)

        environment.globals["raise_exception"] = raise_exception
        environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise UsageProblem(
                f"the model's chat template cannot be read ({error}); ask the hub's owner to correct it"
            ) from error
        self._tokens = dict(tokens)
        self._render_seconds = render_seconds

    @classmethod
    def read(cls, files: Mapping[str, Path]) -> ChatTemplate | None:
        """Read the chat template from a model's tokenizer files, by name; None where the model has none."""
        config: dict[str, Any] = {}
        if "tokenizer_config.json" in files:
            config = json.loads(files["tokenizer_config.json"].read_text(encoding="utf-8"))
        source: Any = config.get("chat_template")
        if "chat_template.jinja" in files:
            source = files["chat_template.jinja"].read_text(encoding="utf-8")
        if isinstance(source, list):  # several by name; "default" is the one without tools
            source = next((entry["template"] for entry in source if entry.get("name") == "default"), None)
        if not isinstance(source, str):
            return None
        tokens = {}
        for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
            token = config.get(name)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                tokens[name] = token
        return cls(source, tokens)

    def render(self, messages: Sequence[ChatMessage], *, add_generation_prompt: bool) -> str:
        """Write a conversation as the text that the model was trained to read.

        Args:
            add_generation_prompt: whether to add what comes before the assistant's answer.

        Raises:
            DataProblem: the template refuses these messages, writes too much or takes too long.
        """
        pieces, size = [], 0
        try:
            with _at_most(self._render_seconds):
                for piece in self._template.generate(
                    messages=[dict(message) for message in messages],
                    add_generation_prompt=add_generation_prompt,
                    **self._tokens,
                ):
                    pieces.append(piece)
                    size += len(piece)
                    if size > MAX_CHARACTERS:
                        raise DataProblem(
                            f"the chat template wrote more than {MAX_CHARACTERS} characters; shorten the messages"
                        )
        except _TooSlow:
            raise DataProblem(
                f"the chat template took more than {self._render_seconds:g} s for one row; shorten the row, or ask the "
                "hub's owner"
            ) from None
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise DataProblem(
                f"the chat template refuses these messages ({error}); write them as the model expects them"
            ) from error
        return "".join(pieces)


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raise _TooSlow in this thread after `seconds`; without signals, so that it works in any thread and system."""
    thread, lock, is_over = threading.get_ident(), threading.Lock(), False

    def interrupt() -> None:
        with lock:
            if not is_over:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(_TooSlow))

    timer = threading.Timer(seconds, interrupt)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        with lock:
            is_over = True
        timer.cancel()
