"""Where a token may come from, and what is refused before it goes into a header."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.join.token import read_token


@pytest.mark.parametrize("written", ["fs1-abc", "fs1-abc\n", "  fs1-abc \r\n", "\ufefffs1-abc\r\n"])
def test_a_token_comes_from_a_file_whatever_editor_wrote_it(tmp_path: Path, written: str) -> None:
    (tmp_path / "me.token").write_bytes(written.encode())
    assert read_token(tmp_path / "me.token") == "fs1-abc"
    assert read_token(str(tmp_path / "me.token")) == "fs1-abc"


def test_a_token_comes_from_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("fs1-abc\nmore\n"))
    assert read_token("-") == "fs1-abc"
    assert sys.stdin.read() == "more\n"


def test_a_token_comes_from_the_environment_when_no_file_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FEDSODA_TOKEN", " fs1-environment\n")
    assert read_token(None) == "fs1-environment"
    (tmp_path / "me.token").write_text("fs1-file")
    assert read_token(tmp_path / "me.token") == "fs1-file"


@pytest.mark.parametrize("value", [None, "", "  \n"])
def test_without_a_token_all_three_ways_are_named(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    monkeypatch.delenv("FEDSODA_TOKEN", raising=False)
    if value is not None:
        monkeypatch.setenv("FEDSODA_TOKEN", value)
    with pytest.raises(UsageProblem) as failure:
        read_token(None)
    assert (
        str(failure.value) == "there is no token; name its file with token_file (- reads stdin), or set FEDSODA_TOKEN"
    )
    assert failure.value.exit_status == 2


def test_a_token_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageProblem) as failure:
        read_token(tmp_path / "me.token")
    assert str(failure.value) == (
        f"the token file {tmp_path / 'me.token'} cannot be read: No such file or directory; "
        "check the path, or ask the hub's owner"
    )
    with pytest.raises(UsageProblem, match="cannot be read: Is a directory"):
        read_token(tmp_path)


def test_an_empty_token_is_told_with_where_it_came_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "me.token").write_text(" \n")
    with pytest.raises(UsageProblem) as failure:
        read_token(tmp_path / "me.token")
    assert str(failure.value) == (f"the token from {tmp_path / 'me.token'} is empty; ask the hub's owner for one")
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    with pytest.raises(UsageProblem, match="the token from stdin is empty"):
        read_token("-")


@pytest.mark.parametrize("written", [b"\xff\xfe\x00", b"fs1-abc\nfs1-def\n", b"fs1 abc", "fs1-äbc".encode(), b"a\0b"])
def test_what_is_not_a_token_is_refused_here_and_not_shown(tmp_path: Path, written: bytes) -> None:
    (tmp_path / "me.token").write_bytes(written)
    with pytest.raises(UsageProblem) as failure:
        read_token(tmp_path / "me.token")
    assert str(failure.value) == (
        f"the token from {tmp_path / 'me.token'} is not one word of ASCII characters, as tokens are; "
        "check that it is the right one"
    )


def test_a_token_in_the_environment_is_checked_like_one_in_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSODA_TOKEN", "fs1-abc\r\nX-Header: 1")
    with pytest.raises(UsageProblem, match="the token from FEDSODA_TOKEN is not one word"):
        read_token(None)
