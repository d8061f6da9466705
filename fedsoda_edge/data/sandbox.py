"""Compile chat templates as Transformers does, so that nothing they write or compute becomes large.

Jinja templates are programs, and these come from strangers. The sandbox keeps them from files, code and private names; this
one also measures every value before it is joined, repeated, padded or written. Time is left to `chat.py`.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes, pass_eval_context
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MAX_CHARACTERS = 64 << 10  # of a rendered conversation
MAX_VALUE = 1 << 20  # characters and members of any value in between
MAX_PRODUCT = 1 << 25  # of the sizes of the two largest arguments: no filter or method makes more of them
# The date that Llama 3 writes where it is told none, by the letters of strftime: a clock would change samples daily.
_WORDS = (
    "Y=2024 y=24 C=20 G=2024 m=07 -m=7 B=July b=Jul h=Jul d=26 -d=26 e=26 j=208 A=Friday a=Fri u=5 w=5 U=29 V=30 W=30 "
    "F=2024-07-26 D=07/26/24 x=07/26/24 H=00 -H=0 I=12 -I=12 M=00 -M=0 S=00 -S=0 p=AM f=000000 T=00:00:00 X=00:00:00 "
    "R=00:00 Z= z= %=%"
)
TODAY = {name: text for name, _, text in (word.partition("=") for word in _WORDS.split())}
TODAY |= {"c": "Fri Jul 26 00:00:00 2024", "r": "12:00:00 AM", "n": "\n", "t": "\t"}
_WIDTH = re.compile(r"%[^a-zA-Z%]*(\d{5}|\*)|[:.][^{}]*(\d{5}|\{)")  # of % and of str.format
_UNPREDICTABLE = ("lipsum", "random")  # with them two edges would train on different texts


def size_of(value: object, most: int = MAX_VALUE) -> int:
    """Count the characters and members of a value, at any depth.

    Raises:
        TemplateError: there are more than `most`, or an integer has more than 128 bits.
    """
    total, rest = 0, [value]
    while rest:
        one = rest.pop()
        if isinstance(one, str | bytes):
            total += len(one)
        elif isinstance(one, Mapping):
            rest += [*one.keys(), *one.values()]
            total += len(one)
        elif isinstance(one, list | tuple | set | frozenset):
            rest += one
            total += len(one)
        elif isinstance(one, int) and one.bit_length() > 128:
            raise TemplateError("a number of more than 128 bits is not allowed")
        if total > most:
            raise TemplateError(f"a value of more than {most} characters is not allowed")
    return total


def _check_arguments(values: Iterable[object], first: object) -> None:
    """Refuse arguments of which a filter or method could make something large."""
    sizes = [size_of(first)]
    for value in values:
        if isinstance(value, int) and abs(value) > MAX_CHARACTERS:
            raise TemplateError(f"{value} is not allowed here; at most {MAX_CHARACTERS}")
        sizes.append(abs(value) if isinstance(value, int) else size_of(value))  # a width, a number of repetitions
    sizes.sort()
    if len(sizes) > 1 and sizes[-1] * sizes[-2] > MAX_PRODUCT:
        raise TemplateError("values of this size are not allowed together")


def _check_format(text: str) -> None:
    if _WIDTH.search(text):
        raise TemplateError("widths in a format are not allowed to be this large, or to be computed")


def _bounded(filter_: Callable[..., Any]) -> Callable[..., Any]:
    """Make a filter that refuses what could become large. What the filter asks Jinja for stays as it is."""
    skipped = 1 if getattr(filter_, "jinja_pass_arg", None) else 0  # a context or an environment comes first

    @functools.wraps(filter_)
    def bounded(*args: Any, **options: Any) -> Any:
        value, *others = args[skipped:] or (None,)
        _check_arguments([*others, *options.values()], value)
        if filter_.__name__ == "do_format" and isinstance(value, str):
            _check_format(value)
        if isinstance(value, Iterator):
            value = _metered(value)
        return filter_(*args[:skipped], value, *others, **options)

    return bounded


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:  # the name that templates may give it
    return re.sub(r"%(-?.)", lambda found: TODAY.get(found[1], found[0]), format)


class _Dict:
    """The `dict` that templates may call, without the attributes of the type."""

    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """A namespace without private names."""

    def __init__(*args: Any, **values: Any) -> None:
        self, *given = args  # so that namespace(self=...) is a name like another
        found = dict(*given, **values)
        for name in found:
            _Namespace._check(name)
        Namespace.__init__(self, found)

    def __setitem__(self, name: str, value: Any) -> None:
        _Namespace._check(name)
        Namespace.__setitem__(self, name, value)

    @staticmethod
    def _check(name: object) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"the name {name!r} in a namespace is not allowed")


class _Generation(Extension):
    """The tag `generation`, around what the assistant writes. Each part goes to `Sandbox.mark`."""

    tags = {"generation"}  # noqa: RUF012  # Jinja reads it from the class

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_written"), [], [], body).set_lineno(line)

    @pass_eval_context
    def _written(self, context: nodes.EvalContext, caller: Macro) -> str:
        text = str(caller())
        assert isinstance(self.environment, Sandbox)
        self.environment.mark(text)
        return text


class _Generator(CodeGenerator):
    """Jinja's compiler, which joins texts (`~`) through `Sandbox.joined`."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.joined((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja with the globals, filters and extensions that Transformers gives chat templates.

    Attributes:
        mark: called with each text that the template marks as generated, when all before it has been yielded.
    """

    intercepted_binops = frozenset({"+", "*", "**", "%"})
    code_generator_class = _Generator

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, LoopControlExtension], finalize=_measured
        )
        self.mark: Callable[[str], None] = lambda text: None
        self.filters["tojson"] = _tojson
        self.filters = {name: _bounded(one) for name, one in self.filters.items() if name not in _UNPREDICTABLE}
        for name in _UNPREDICTABLE:
            self.globals.pop(name, None)
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
            "dict": _Dict(),
            "namespace": _Namespace,
        }

    def joined(self, parts: tuple[object, ...]) -> str:
        """Join values as text."""
        size_of(parts)
        return "".join(str(part) for part in parts)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute a sum, a product or a format; refuse powers and what could become large."""
        sizes = size_of(left), size_of(right)
        if operator == "**":
            raise TemplateError("** is not allowed on these values")
        if operator == "*" and (isinstance(left, str | list | tuple) or isinstance(right, str | list | tuple)):
            times = right if isinstance(right, int) else left
            if not isinstance(times, int) or max(sizes) * times > MAX_VALUE:
                raise TemplateError("* is not allowed on these values")
        if operator == "+" and sum(sizes) > MAX_VALUE:
            raise TemplateError("+ is not allowed on values of this size")
        if operator == "%" and isinstance(left, str):
            _check_format(left)
            _check_arguments([right], left)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, called: Any, *args: Any, **options: Any) -> Any:
        """Call what a template calls; the methods of texts only where they make nothing large."""
        owner = getattr(getattr(called, "__wrapped__", called), "__self__", None)  # Jinja wraps str.format
        if isinstance(owner, str):
            args = tuple(list(_metered(value)) if isinstance(value, Iterator) else value for value in args)
            given = [value for name, value in options.items() if not name.startswith("_")]  # the others are Jinja's own
            _check_arguments([*args, *given], owner)
            _check_format(owner if called.__name__.startswith("format") else "")
        return super().call(context, called, *args, **options)


def _metered(values: Iterator[Any]) -> Iterator[Any]:
    """Yield values as long as all of them together are not large."""
    total = 0
    for value in values:
        total += 1 + size_of(value)
        if total > MAX_VALUE:
            raise TemplateError(f"a list of more than {MAX_VALUE} characters is not allowed")
        yield value


def _measured(value: object) -> object:
    """Measure what is about to be written."""
    size_of(value)
    return value
