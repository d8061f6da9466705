"""What developers see with `--debug` or FEDSODA_LOG=debug: our loggers on stderr with the time, nobody else's."""

from __future__ import annotations

import logging
import re

import pytest
import typer

from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.ports.console import reporting, run
from fedsoda_edge.ports.logs import logs_shown


def work() -> None:
    logging.getLogger("fedsoda_edge.join").debug("= join %s -> %s", "connecting", "open")
    logging.getLogger("fedsoda_hub.serving").debug("< Hello protocol=1")
    logging.getLogger("httpx").debug("GET /blob?token=fs1-abc")
    logging.getLogger("websockets.client").info("< TEXT 'a patient'")


LINES = (
    r"\d\d:\d\d:\d\d\.\d{3} fedsoda_edge\.join = join connecting -> open\n"
    r"\d\d:\d\d:\d\d\.\d{3} fedsoda_hub\.serving < Hello protocol=1\n"
)


@pytest.fixture(autouse=True)
def _no_word_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDSODA_LOG", raising=False)


def test_without_asking_nothing_is_logged(capsys: pytest.CaptureFixture[str]) -> None:
    with logs_shown(is_debug=False):
        work()
    assert capsys.readouterr().err == ""


def test_debug_shows_a_line_with_time_and_room_and_no_library(capsys: pytest.CaptureFixture[str]) -> None:
    with logs_shown(is_debug=True):
        work()
    assert re.fullmatch(LINES, capsys.readouterr().err)
    work()  # afterwards it is quiet again
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("word", ["debug", "DEBUG"])
def test_the_environment_asks_for_the_same(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], word: str
) -> None:
    monkeypatch.setenv("FEDSODA_LOG", word)
    with logs_shown(is_debug=False):
        work()
    assert re.fullmatch(LINES, capsys.readouterr().err)


def test_another_word_in_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSODA_LOG", "trace")
    with pytest.raises(UsageProblem) as refused, logs_shown(is_debug=False):
        pass
    assert str(refused.value) == "FEDSODA_LOG is 'trace', and only debug is known; set it to debug, or unset it"


def test_what_is_logged_does_not_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with logs_shown(is_debug=True):
        logging.getLogger("fedsoda_hub.serving").debug("\x1b]0;gone\x07")
    assert capsys.readouterr().err.endswith(" fedsoda_hub.serving \ufffd]0;gone\ufffd\n")


@pytest.mark.parametrize("words", [["--debug"], []])
def test_a_command_with_debug_logs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    app = typer.Typer()

    @app.command()
    def join(debug: bool = typer.Option(False, "--debug")) -> None:
        with reporting(False, False, debug):
            work()

    monkeypatch.setattr("sys.argv", ["join", *words])
    with pytest.raises(SystemExit) as end:
        run(app)
    assert end.value.code == 0
    assert re.fullmatch(LINES if words else "", capsys.readouterr().err)
