"""What is said of a defect names its place and never its words, which may quote a row."""

from __future__ import annotations

import errno
import json

import msgspec
import pytest

from fedsoda_edge.ports.defects import machine_words, sentence_of, trace_of

ROW = "the patient of room seven has a fever"


def raised(error: BaseException) -> BaseException:
    try:
        try:
            try:
                raise KeyError(ROW)
            except KeyError:
                raise LookupError(f"no {ROW}")  # noqa: B904
        except LookupError as before:
            raise error from before
    except BaseException as caught:
        return caught


class Panic(BaseException):
    """As what a library in Rust raises."""


WITH_A_NOTE = ValueError("short")
WITH_A_NOTE.add_note(ROW)
KINDS = [
    ValueError(ROW),
    RuntimeError(ROW),
    RuntimeError(f"expected scalar type, got {ROW}"),
    KeyError(ROW),
    OSError(ROW),
    ImportError(ROW),
    UnicodeEncodeError("utf-8", ROW, 0, 1, ROW),
    json.JSONDecodeError(ROW, ROW, 1),
    msgspec.ValidationError(ROW),
    ExceptionGroup(ROW, [ValueError(ROW)]),
    AssertionError(ROW),
    Panic(f"byte index 1 is not a char boundary of `{ROW}`"),
    WITH_A_NOTE,
]


@pytest.mark.parametrize("error", KINDS, ids=lambda error: type(error).__name__)
def test_no_word_of_it_is_said(error: BaseException) -> None:
    caught = raised(error)
    for said in (sentence_of(caught), trace_of(caught)):
        assert not any(word in said for word in ("patient", "room seven", "fever"))
        assert type(error).__name__ in said
    assert sentence_of(caught).startswith(f"{type(error).__name__} in test_defects.py, line ")
    assert "KeyError" in trace_of(caught)  # the first cause
    assert 'test_defects.py", line' in trace_of(caught)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.EACCES, ROW, "/data/x"), "Permission denied: '/data/x'"),
        (OSError(errno.ENOSPC, ROW), "No space left on device"),
        (RuntimeError("CUDA error: no kernel image is available\nCompile with ..."), "CUDA error: no kernel image is available"),
        (ModuleNotFoundError(ROW, name="pyarrow"), "the module pyarrow cannot be imported"),
    ],
)  # fmt: skip
def test_what_the_machine_says_is_said(error: Exception, words: str) -> None:
    assert machine_words(error) == words
    assert words in sentence_of(error)
