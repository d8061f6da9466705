"""config.toml: options that need not be given each time, and what goes before what."""

from __future__ import annotations

from pathlib import Path

import pytest

import fedsoda_edge.cli.commands
from fedsoda_edge.cli.config_file import Options, option_defaults
from fedsoda_edge.errors import UsageProblem
from tests.said import for_people

OPTIONS: Options = {"join": {"device", "data", "threads"}, "status": set(), "data": {"check": {"device", "column"}}}


def test_a_key_at_the_top_is_for_every_command_that_has_it_and_a_commands_own_goes_before(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    assert option_defaults(path, OPTIONS) == {}
    path.write_text('device = "cpu"\nthreads = 2\n[join]\nthreads = 1\n[data.check]\ncolumn = ["a=b"]\n')
    assert option_defaults(path, OPTIONS) == {
        "join": {"device": "cpu", "threads": 1},
        "status": {},
        "data": {"check": {"device": "cpu", "column": ["a=b"]}},
    }
    path.write_text('data = "rows.jsonl"\n')  # an option's name here, though a command has it too
    assert option_defaults(path, OPTIONS)["join"] == {"data": "rows.jsonl"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('devise = "cpu"', "a key devise that no command knows; the nearest is device"),
        ("[joyn]\nthreads = 1", "a key joyn that no command knows; the nearest is join"),
        ("[join]\nthread = 1", "a key join.thread that no command knows; the nearest is join.threads"),
        ("[status]\nthreads = 1", "a key status.threads that no command knows; status takes no options"),
        ("join = 1", "join = 1, but join is a command; write its options below [join]"),
        ("[data]\ncheck = 3", "data.check = 3, but data.check is a command; write its options below [data.check]"),
        ("device = ", "cannot be read as TOML"),
    ],
)
def test_a_key_that_no_command_knows_is_refused_with_the_nearest(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.toml").write_text(text)
    with pytest.raises(UsageProblem) as refused:
        option_defaults(tmp_path / "config.toml", OPTIONS)
    assert message in str(refused.value)


def test_an_option_goes_before_its_variable_and_that_before_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FEDSODA_HOME", str(tmp_path))
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "config.toml").write_text(
        'device = "cuda"\nthreads = 3\n[join]\nurl = "http://127.0.0.1:1"\nmax_rounds = 2\n'
        f'data = "{(tmp_path / "rows.jsonl").as_posix()}"\n'
    )
    monkeypatch.setenv("FEDSODA_DEVICE", "cpu")
    monkeypatch.setenv("FEDSODA_THREADS", "1")
    monkeypatch.delenv("FEDSODA_TOKEN", raising=False)
    monkeypatch.setattr("sys.argv", ["fedsoda-edge", "join", "--threads", "2"])
    with pytest.raises(SystemExit):
        fedsoda_edge.cli.commands.main()
    said = for_people(capsys.readouterr().err).splitlines()
    assert said[:-1] == [
        "settings from config.toml:",
        '  url = "http://127.0.0.1:1"',
        f'  data = "{tmp_path / "rows.jsonl"}"',
        "  max_rounds = 2",
        "settings from FEDSODA_DEVICE:",
        '  device = "cpu"',
        "settings from the command line:",
        "  threads = 2",
        "4 other settings at the default; fedsoda-edge config shows them",
        "next: connect to http://127.0.0.1:1, check which sub-LLM fits this device, and fetch it",
    ]
    assert said[-1].startswith("error: there is no token")


def test_a_wrong_value_is_told_with_where_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def said() -> str:
        with pytest.raises(SystemExit) as end:
            fedsoda_edge.cli.commands.main()
        assert end.value.code == 2
        return capsys.readouterr().err

    monkeypatch.setenv("FEDSODA_HOME", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["fedsoda-edge", "join", "http://h", "--data", "d"])
    (tmp_path / "config.toml").write_text('max_rounds = "many"\n')
    assert "(config.toml has max_rounds = 'many')" in said()
    monkeypatch.setenv("FEDSODA_MAX_ROUNDS", "few")
    assert "(FEDSODA_MAX_ROUNDS is 'few')" in said()
