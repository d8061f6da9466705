"""Whatever goes wrong is one sentence, one JSON object and one exit status."""

from __future__ import annotations

import json

import pytest
import typer

from fedsoda_edge.errors import DeviceTooSmall
from fedsoda_edge.ports.console import (
    ProgressLine,
    Pulse,
    finish,
    note,
    reporting,
    run,
)
from fedsoda_edge.ports.given_options import EffectiveOption, effective_settings, settings_lines


def command(failure: BaseException | None) -> typer.Typer:
    app = typer.Typer()

    @app.command()
    def work(
        data: str = typer.Option(...),
        as_json: bool = typer.Option(False, "--json", envvar="FEDSODA_JSON"),
        jsonl: bool = typer.Option(False, "--jsonl", envvar="FEDSODA_JSONL"),
        debug: bool = typer.Option(False, "--debug"),
    ) -> None:
        with reporting(as_json, jsonl, debug):
            if failure is not None:
                raise failure
            note(f"read {data}")
            finish({"status": "ok"}, as_json, jsonl)

    return app


@pytest.mark.parametrize(
    ("failure", "arguments", "status", "sentence"),
    [
        (None, ["--data", "x"], 0, "read x"),
        (DeviceTooSmall("needs 2 GiB"), ["--data", "x"], 4, "error: needs 2 GiB"),
        (None, [], 2, "error: Missing option '--data'; --help shows how to use it"),
        (
            None,
            ["--data", "x", "--jsonl"],
            2,
            "error: --json prints one object and --jsonl one event a line; give only one",
        ),
        (None, ["--dta", "x"], 2, "error: No such option: --dta"),
        (
            PermissionError(13, "no", "/x"),
            ["--data", "x"],
            2,
            "error: [Errno 13] no: '/x'; let this user read and write there, or name another place, then try again",
        ),
        (OSError(28, "full", "/x"), ["--data", "x"], 3, "error: [Errno 28] full: '/x'; free some space there"),
        (ConnectionResetError(104, "reset"), ["--data", "x"], 3, "error: [Errno 104] reset; check the network"),
        (MemoryError(), ["--data", "x"], 4, "error: memory ran out; end other programs, then try again"),
        (ZeroDivisionError("by 0"), ["--data", "x"], 1, "error: ZeroDivisionError: by 0; this is a defect of fedsoda"),
        (KeyboardInterrupt(), ["--data", "x"], 130, "stopped; the same command continues"),
    ],
)
def test_every_end_has_a_sentence_an_object_and_a_status(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    failure: BaseException | None,
    arguments: list[str],
    status: int,
    sentence: str,
) -> None:
    monkeypatch.setattr("sys.argv", ["work", *arguments, "--json"])
    with pytest.raises(SystemExit) as end:
        run(command(failure))
    assert end.value.code == status
    out, err = capsys.readouterr()
    assert err.startswith(sentence)
    assert err.count("\n") == 1
    found = json.loads(out)
    assert (found["schema"], found["status"]) == (1, "ok" if status == 0 else "error")
    assert found.get("exit_status", 0) == status


def test_wrong_usage_is_an_object_too_where_the_environment_asks_for_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["work"])
    for value, lines in (("1", 1), ("true", 1), ("0", 0)):
        monkeypatch.setenv("FEDSODA_JSON", value)
        with pytest.raises(SystemExit):
            run(command(None))
        assert len(capsys.readouterr().out.splitlines()) == lines, value


def test_a_traceback_is_for_those_who_ask(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["work", "--data", "x", "--debug"])
    with pytest.raises(SystemExit):
        run(command(ZeroDivisionError("by 0")))
    assert "Traceback" in capsys.readouterr().err


def test_every_setting_is_told_with_where_it_came_from(monkeypatch: pytest.MonkeyPatch) -> None:
    app = typer.Typer()
    seen: dict[str, EffectiveOption] = {}

    @app.command()
    def work(
        context: typer.Context,
        url: str = typer.Argument(...),
        device: str = typer.Option("auto", envvar="FEDSODA_DEVICE"),
        threads: int = typer.Option(0, envvar="FEDSODA_THREADS"),
        token_file: str | None = typer.Option(None, envvar="FEDSODA_TOKEN_FILE"),
    ) -> None:
        seen.update(effective_settings(context))

    monkeypatch.setenv("FEDSODA_DEVICE", "cpu")
    monkeypatch.setattr("sys.argv", ["work", "http://h", "--threads", "2"])
    with pytest.raises(SystemExit):
        run(app)
    assert {name: (s.value, s.source) for name, s in seen.items()} == {
        "url": ("http://h", "argument"),
        "device": ("cpu", "FEDSODA_DEVICE"),
        "threads": (2, "option"),
        "token_file": (None, "default"),
    }


def test_a_person_sees_what_was_given_and_where_a_line_each_and_the_defaults_with_details() -> None:
    settings = {
        "url": ("http://h", "argument"),
        "device": ("cpu", "FEDSODA_DEVICE"),
        "threads": (2, "option"),
        "cache": ("bf16", "default"),
        "token_file": (None, "default"),
    }
    given = [
        "settings from the command line:",
        '  url = "http://h"',
        "  threads = 2",
        "settings from FEDSODA_DEVICE:",
        '  device = "cpu"',
    ]
    brief, detailed = (settings_lines(settings, is_detailed=is_detailed) for is_detailed in (False, True))
    assert brief.splitlines() == [*given, "1 other setting at the default; --debug shows them"]
    assert detailed.splitlines() == [*given, "defaults:", '  cache = "bf16"']


def test_what_others_write_does_not_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    note("left: \x1b]0;gone\x07 bye\nnext\ttab \x9b2J \u00e9")
    assert capsys.readouterr().err == "left: \ufffd]0;gone\ufffd bye\nnext\ttab \ufffd2J \u00e9\n"


def test_a_log_gets_a_line_of_a_long_job_twice_a_minute_with_what_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    clock = [100.0]
    line = ProgressLine(is_live=False, pulse=Pulse(lambda: clock[0]))
    for second in range(0, 101, 5):
        clock[0] = 100.0 + second
        line.show("sweeping", 2 * second, 200)
    assert capsys.readouterr().err.splitlines() == [
        "sweeping: 10 of 200, about 95 s left",
        "sweeping: 60 of 200, about 70 s left",
        "sweeping: 110 of 200, about 45 s left",
        "sweeping: 160 of 200, about 20 s left",
        "sweeping: done in 100 s",
    ]


def test_work_that_reports_nothing_says_what_it_is_within_5_s_and_how_long_it_takes_twice_a_minute(
    capsys: pytest.CaptureFixture[str],
) -> None:
    clock = [0.0]
    pulse = Pulse(lambda: clock[0])
    line = ProgressLine(is_live=False, pulse=pulse)
    pulse.work("preparing the run")

    def wait(seconds: int) -> list[tuple[float, str]]:
        found = []
        for _ in range(2 * seconds):
            clock[0] += 0.5
            pulse.beat()
            if said := capsys.readouterr().err:
                found.append((clock[0], said.rstrip("\n")))
        return found

    assert wait(60) == [
        (4.0, "preparing the run: 4 s so far"),
        (29.0, "preparing the run: 29 s so far"),
        (54.0, "preparing the run: 54 s so far"),
    ]
    line.show("writing text", 0, 128)  # and then nothing for a minute
    assert wait(60) == [
        (64.0, "writing text: 0 of 128, 4 s so far"),
        (89.0, "writing text: 0 of 128, 29 s so far"),
        (114.0, "writing text: 0 of 128, 54 s so far"),
    ]
    line.end()
    assert wait(5) == [(124.0, "preparing the run: 2 min so far")]
    pulse.work("")
    assert wait(60) == []


def test_what_others_do_is_said_only_where_it_has_changed(capsys: pytest.CaptureFixture[str]) -> None:
    clock = [0.0]
    pulse = Pulse(lambda: clock[0])
    line = ProgressLine(is_live=False, pulse=pulse)
    line.show("round 1", 0, None, "0 of 2 answered", is_awaited=True)
    for _ in range(1000):
        clock[0] += 0.5
        pulse.beat()
    assert capsys.readouterr().err == ""
    line.show("round 1", 3, 9, "1 of 2 answered", is_awaited=True)
    assert capsys.readouterr().err.startswith("round 1: 1 of 2 answered")


def test_a_download_in_a_log_tells_its_rate_and_counts_only_what_came_now(capsys: pytest.CaptureFixture[str]) -> None:
    clock = [0.0]
    line = ProgressLine(is_live=False, pulse=Pulse(lambda: clock[0]))
    line.show("downloading", 90 << 20, 150 << 20, is_bytes=True)  # most of it was here
    clock[0] = 30.0
    line.show("downloading", 120 << 20, 150 << 20, is_bytes=True)
    assert capsys.readouterr().err == "downloading: 120 MiB of 150 MiB, 1.00 MiB/s, about 30 s left\n"


def test_a_terminal_has_one_bar_below_the_sentences(capsys: pytest.CaptureFixture[str]) -> None:
    line = ProgressLine(is_live=True)
    line.show("downloading [1]", 1 << 20, 4 << 20, is_bytes=True)
    line.say("clinic [bold]7[/bold] is here\x07")
    line.show("downloading [1]", 4 << 20, 4 << 20, is_bytes=True)
    line.end()
    line.say("done")
    shown = capsys.readouterr().err
    assert "clinic [bold]7[/bold] is here\ufffd\n" in shown  # others' words are no markup
    assert "downloading [1]" in shown
    assert shown.endswith("done\n")
