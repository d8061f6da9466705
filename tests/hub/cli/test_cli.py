"""`fedsoda-hub` as scripts see it: exit statuses, one sentence or one JSON object, files only their owner reads.

Every command runs where importing torch is an error, so what is refused is refused before torch would load.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.protocol.messages import Digest, EdgeId
from fedsoda_hub.cli.commands import app
from fedsoda_hub.federation import records as rec
from fedsoda_hub.run.directory import RunDirectory
from fedsoda_hub.run.ledger import Ledger
from fedsoda_hub.run.tokens import write_secret
from tests.hub.serving.test_daemon import serving, write_run
from tests.said import for_people

A = Digest("a" * 64)
ENDED: list[rec.AnyRecord] = [
    rec.RunStarted(run_id="1234", fixed={}),
    rec.RunPrepared(manifest=A, adapter_view=A, emulator_view=A, public_kl={"pruned": 0.1}),
    rec.RoundOpened(round=1, cohort=(EdgeId("alice"),), view=A, alignment=0, deadline_at=1e9),
    rec.UpdateAccepted(round=1, edge=EdgeId("alice"), digest=A, num_examples=8, loss=0.25),
    rec.RoundClosed(round=1, master=A, view=A, delta=A),
    rec.RunEnded(rounds=1),
]


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    """Settings of a run that nobody has begun. Where its commands run there is no torch."""
    (tmp_path / "no-torch").mkdir()
    (tmp_path / "no-torch" / "torch.py").write_text('raise ImportError("torch was loaded")')
    return Path(write_run(tmp_path / "run").path)


@pytest.fixture
def _sigterm_as_it_was() -> Iterator[None]:
    """For commands that run in this process."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def environment(run_file: Path) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("FEDSODA_")}
    return kept | {"PYTHONPATH": str(run_file.parent.parent / "no-torch"), "COLUMNS": "120"}


def hub(run_file: Path, *arguments: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
    """One command; RUN stands for the run's file."""
    command = [str(run_file) if argument == "RUN" else str(argument) for argument in arguments]
    ended = subprocess.run(
        [sys.executable, "-m", "fedsoda_hub", *command],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=environment(run_file) | more,
    )
    ended.stderr = for_people(ended.stderr)
    return ended


def the_object(ended: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The one JSON object on stdout, and nothing else there."""
    [line] = ended.stdout.splitlines()
    found: dict[str, Any] = json.loads(line, parse_constant=lambda constant: pytest.fail(f"{constant} in JSON"))
    assert found["schema"] == 1
    return found


def assert_refused(ended: subprocess.CompletedProcess[str], *words: str) -> None:
    """Exit status 2, one sentence with these words, nothing on stdout."""
    assert (ended.returncode, ended.stdout) == (2, ""), ended.stderr
    assert ended.stderr.startswith("error: ")
    assert len(ended.stderr.splitlines()) == 1  # and so no traceback
    for word in words:
        assert word in ended.stderr


# --- tokens ----------------------------------------------------------------------------------------------------------


def test_token_create_prints_the_token_alone_and_list_and_revoke_follow_it(run_file: Path) -> None:
    created = hub(run_file, "token", "create", "RUN", "--name", "clinic-7")
    assert created.returncode == 0
    [token] = created.stdout.splitlines()
    assert token.startswith("fs1-")
    ledger = Ledger(run_file.parent / "small.run" / "ledger.sqlite")
    found = ledger.tokens.find(token)
    assert found is not None
    assert found.edge == "clinic-7"

    assert_refused(hub(run_file, "token", "create", "RUN", "--name", "clinic-7"), "'clinic-7'", "revoke it first")
    as_json = the_object(hub(run_file, "token", "create", "RUN", "--name", "clinic-8", "--json"))
    assert (as_json["status"], as_json["edge"]) == ("ok", "clinic-8")
    assert ledger.tokens.find(as_json["token"]) is not None

    assert_refused(
        hub(run_file, "token", "revoke", "RUN", "clinic-9"),
        "'clinic-9'",
        "name one of those that have: clinic-7, clinic-8",
    )
    assert hub(run_file, "token", "revoke", "RUN", "clinic-7").returncode == 0
    revoked = ledger.tokens.find(token)
    assert revoked is not None
    assert revoked.revoked
    ledger.tokens.bind(EdgeId("clinic-8"), "laptop")
    ledger.close()

    listed = hub(run_file, "token", "list", "RUN", "--json")
    assert the_object(listed)["tokens"] == [
        {"edge": "clinic-7", "device": None, "revoked": True},
        {"edge": "clinic-8", "device": "laptop", "revoked": False},
    ]
    assert [line.split(maxsplit=1) for line in listed.stderr.splitlines()] == [
        ["clinic-7", "revoked"],
        ["clinic-8", "in use"],
    ]


def test_token_create_out_writes_the_token_to_a_file_of_mode_0600_and_nowhere_else(run_file: Path) -> None:
    out = run_file.parent / "clinic-7.token"
    out.write_text("an older token")
    out.chmod(0o644)
    with out.open() as reader:  # somebody watches the file
        created = hub(run_file, "token", "create", "RUN", "--name", "clinic-7", "--out", out, "--json")
        assert reader.read() == "an older token"
    assert created.returncode == 0
    assert out.stat().st_mode & 0o777 == 0o600
    ledger = Ledger(run_file.parent / "small.run" / "ledger.sqlite")
    assert ledger.tokens.find(out.read_text().strip()) is not None
    ledger.close()
    assert "token" not in the_object(created)
    assert "fs1-" not in created.stderr
    assert sorted(path.name for path in run_file.parent.iterdir()) == [
        "clinic-7.token", "public.txt", "run.toml", "small.run"
    ]  # fmt: skip


def test_a_token_that_could_not_be_written_does_not_take_its_name(run_file: Path) -> None:
    (run_file.parent / "file").touch()
    nowhere = run_file.parent / "file" / "clinic-7.token"
    assert_refused(hub(run_file, "token", "create", "RUN", "--name", "clinic-7", "--out", nowhere), str(nowhere))
    assert hub(run_file, "token", "create", "RUN", "--name", "clinic-7").returncode == 0


def test_a_secret_file_is_created_so_that_nobody_else_can_read_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: list[int] = []
    real = os.open

    def watched(path: Any, flags: int, mode: int = 0o777, **more: Any) -> int:
        handle = real(path, flags, mode, **more)
        if flags & os.O_CREAT:
            modes.append(os.fstat(handle).st_mode & 0o777)
        return handle

    before = os.umask(0)
    try:
        monkeypatch.setattr(os, "open", watched)
        write_secret(tmp_path / "admin.token", "secret")
        monkeypatch.undo()
    finally:
        os.umask(before)
    assert modes == [0o600]
    assert (tmp_path / "admin.token").read_text() == "secret"
    assert [path.name for path in tmp_path.iterdir()] == ["admin.token"]


def test_a_secret_never_replaces_what_is_no_file(tmp_path: Path) -> None:
    for place in (tmp_path, Path("/dev/null")):
        with pytest.raises(UsageProblem, match="it is there and is not a file"):
            write_secret(place, "secret")
    assert Path("/dev/null").is_char_device()


@pytest.mark.usefixtures("_sigterm_as_it_was")
@pytest.mark.parametrize("command", ["list", "revoke nobody", "revoke alice", "create --name alice"])
def test_a_token_command_closes_its_ledger_also_where_it_fails(
    run_file: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    ledger = Ledger(run_file.parent / "small.run" / "ledger.sqlite")
    ledger.tokens.create("alice")
    ledger.close()
    closed: list[Ledger] = []

    def close(ledger: Ledger) -> None:
        closed.append(ledger)

    monkeypatch.setattr(Ledger, "close", close)
    name, *options = command.split()
    CliRunner().invoke(app, ["token", name, str(run_file), *options])
    assert len(closed) == 1


# --- status and edges ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_sigterm_as_it_was")
def test_a_run_that_was_not_started_is_said_in_one_sentence_by_all_that_need_it_started(run_file: Path) -> None:
    """Also when there are tokens alone, which `edges` lists. In this process: `report` and `evaluate` load what `hub` forbids."""
    needing = ["status", "edges", "export --to adapter", "report", "evaluate --data eval.jsonl"]
    said = f"error: {run_file.name} has not been started; run `fedsoda-hub serve {run_file}`\n"
    for command in needing:
        name, *options = command.split()
        shown = CliRunner().invoke(app, [name, str(run_file), *options])
        assert (shown.exit_code, shown.stderr) == (2, said), command
    assert not (run_file.parent / "small.run").exists()  # asking leaves nothing behind
    ledger = Ledger(run_file.parent / "small.run" / "ledger.sqlite")
    ledger.tokens.create("alice")
    ledger.close()
    for command in [one for one in needing if one != "edges"]:
        name, *options = command.split()
        shown = CliRunner().invoke(app, [name, str(run_file), *options])
        assert (shown.exit_code, shown.stderr) == (2, said), command
    assert_refused(hub(run_file, "status", "RUN"), said)  # before torch would load
    assert hub(run_file, "edges", "RUN").stderr.split() == ["alice", "token", "not", "used"]


def test_status_and_edges_of_an_ended_run_come_from_its_ledger(run_file: Path) -> None:
    ledger = Ledger(run_file.parent / "small.run" / "ledger.sqlite")
    for record in ENDED:
        ledger.append(record)
    ledger.tokens.create("alice")
    ledger.add_traffic(EdgeId("alice"), 1, 300, 500)
    ledger.close()
    asked = hub(run_file, "status", "RUN", "--json")
    assert asked.returncode == 0
    found = the_object(asked)
    assert {key: found[key] for key in ("status", "running", "run", "run_id", "phase", "rounds_closed", "losses")} == {
        "status": "ok",
        "running": False,
        "run": "small",
        "run_id": "1234",
        "phase": "ended",
        "rounds_closed": 1,
        "losses": [0.25],
    }
    assert found["bytes"] == {"up_per_edge_round": 300, "down_per_edge_round": 500}
    assert "small: ended, round 1 of 2, 1 closed, hub not running" in asked.stderr
    edges = hub(run_file, "edges", "RUN", "--json")
    assert the_object(edges)["edges"] == [
        {
            "edge": "alice",
            "kind": "token",
            "used": False,
            "fingerprint": None,
            "expires": None,
            "first_seen": None,
            "last_seen": None,
            "connected": False,
            "eligible": False,
            "revoked": False,
            "size_class": None,
            "step": None,
            "steps": None,
            "standing": None,
            "why": None,
        },
    ]
    assert edges.stderr.split() == ["alice", "token", "not", "used"]


def test_before_the_first_round_closed_nothing_is_said_of_an_edge_and_round(run_file: Path) -> None:
    """What travelled until then is greetings."""
    ledger = Ledger(run_file.parent / "small.run" / "ledger.sqlite")
    for record in ENDED[:2]:
        ledger.append(record)
    ledger.add_traffic(EdgeId("alice"), 1, 1100, 300)
    shown = hub(run_file, "status", "RUN")
    assert shown.stderr == (
        "small: idle, round 0 of 2, 0 closed, hub not running\nnow: no hub serves it; 0 of 2 rounds are closed\n"
    )
    for record in ENDED[2:]:
        ledger.append(record)
    ledger.close()
    assert "an edge and round: 1.07 KiB up, 300 B down\n" in hub(run_file, "status", "RUN").stderr


def test_status_of_a_running_hub_is_what_it_says_and_another_runs_hub_is_not_taken_for_it(
    run_file: Path, tmp_path: Path
) -> None:
    other_file = Path(write_run(tmp_path / "other").path)
    other_dir = other_file.parent / "small.run"
    ledger = Ledger(other_dir / "ledger.sqlite")
    ledger.append(ENDED[0])
    ledger.close()

    async def talk() -> None:
        async with serving(write_run(run_file.parent)) as running:
            running.token("alice")
            asked = await asyncio.to_thread(hub, run_file, "status", "RUN", "--json")
            found = the_object(asked)
            assert (found["running"], found["phase"], found["url"]) == (True, "idle", running.url)
            assert [edge["edge"] for edge in found["edges"]] == ["alice"]
            # A hub that was killed leaves its address, and the next hub on this machine may get the port.
            (other_dir / "address").write_text(running.url)
            (other_dir / "admin.token").write_text("other")
            found = the_object(await asyncio.to_thread(hub, run_file, "status", other_file, "--json"))
            assert (found["running"], found["run_id"]) == (False, "1234")

    asyncio.run(talk())


# --- settings that cannot be -----------------------------------------------------------------------------------------


def test_serve_refuses_settings_that_cannot_be_before_it_leaves_anything(run_file: Path) -> None:
    good = run_file.read_text()
    run_file.write_text(good.replace("quorum", "quorun"))
    assert_refused(hub(run_file, "serve", "RUN"), "run.toml has no key [rounds] quorun; the nearest is [rounds] quorum")
    run_file.write_text(good + '\n[task]\neval_data = "eval.jsonl"\n')
    assert_refused(hub(run_file, "serve", "RUN"), "[task] eval_data", f"{run_file.parent / 'eval.jsonl'} is not there")
    run_file.write_text(good)
    (run_file.parent / "public.txt").unlink()
    assert_refused(hub(run_file, "serve", "RUN"), "[public] text", f"{run_file.parent / 'public.txt'} is not there")
    assert list(run_file.parent.iterdir()) == [run_file]


def test_serve_and_prepare_refuse_a_run_that_another_hub_has(run_file: Path) -> None:
    lock = RunDirectory(run_file.parent / "small.run").lock()
    for command in ("serve", "prepare"):
        assert_refused(hub(run_file, command, "RUN"), f"in use by another hub (pid {os.getpid()}); stop that one first")
    lock.release()


def test_a_changed_setting_of_the_method_ends_serve_with_both_values(run_file: Path) -> None:
    ledger = Ledger(run_file.parent / "small.run" / "ledger.sqlite")
    fixed = write_run(run_file.parent, lora={"rank": 8}).fixed()
    ledger.append(rec.RunStarted(run_id="1234", fixed=fixed))
    ledger.append(ENDED[1])
    secret = ledger.tokens.create("clinic-7")
    ledger.close()
    (run_file.parent / "small.run" / "bundle").mkdir()
    (run_file.parent / "small.run" / "bundle" / "manifest.json").write_text("{}")
    write_run(run_file.parent)
    refused = hub(run_file, "serve", "RUN")
    assert_refused(
        refused, "run.toml has changed", "[lora] rank: 8 when the run was prepared, 2 now", "keep and metric"
    )
    # What the refusal names is the way out, and leaves who may join as it was.
    assert f"`fedsoda-hub reset {run_file}`" in refused.stderr
    assert_refused(
        hub(run_file, "reset", "RUN"), "0 closed rounds", "1 token kept", "no terminal to ask at; give --yes"
    )
    found = the_object(hub(run_file, "reset", "RUN", "--yes", "--json"))
    assert (found["rounds_closed"], found["tokens"], found["bytes"]) == (0, 1, 2)
    assert not (run_file.parent / "small.run" / "bundle").exists()
    ledger = Ledger(run_file.parent / "small.run" / "ledger.sqlite")
    assert (ledger.records(), ledger.tokens.find(secret) is not None) == ([], True)
    ledger.close()
    lock = RunDirectory(run_file.parent / "small.run").lock()
    assert_refused(hub(run_file, "reset", "RUN", "--yes"), "in use by another hub")
    lock.release()


def test_a_damaged_ledger_can_be_reset_and_every_command_says_so(run_file: Path) -> None:
    path = run_file.parent / "small.run" / "ledger.sqlite"
    Ledger(path).close()
    (path.parent / "blobs").mkdir()
    whole = path.read_bytes()
    for damage in (b"", whole[:100], b"not a database at all, but long enough to be one" * 40):
        for beside in path.parent.glob("ledger.sqlite-*"):
            beside.unlink()
        path.write_bytes(damage)
        for command in (("status", "RUN"), ("serve", "RUN"), ("token", "create", "RUN", "--name", "a")):
            assert_refused(hub(run_file, *command), str(path), "fedsoda-hub reset")
    assert "its tokens are lost" in hub(run_file, "reset", "RUN", "--yes").stderr
    assert hub(run_file, "token", "create", "RUN", "--name", "a").returncode == 0


def test_a_token_is_let_go_of_a_lost_device_alone(run_file: Path) -> None:
    ledger = Ledger(run_file.parent / "small.run" / "ledger.sqlite")
    secret = ledger.tokens.create("clinic-7")
    assert ledger.tokens.bind(EdgeId("clinic-7"), "old")
    assert not ledger.tokens.bind(EdgeId("clinic-7"), "new")
    assert_refused(hub(run_file, "token", "rebind", "RUN", "clinic-8"), "'clinic-8' has no token", "clinic-7")
    assert hub(run_file, "token", "rebind", "RUN", "clinic-7").returncode == 0
    assert ledger.tokens.bind(EdgeId("clinic-7"), "new")
    assert ledger.tokens.find(secret) is not None
    ledger.tokens.revoke("clinic-7")
    assert_refused(hub(run_file, "token", "rebind", "RUN", "clinic-7"), "is revoked", "token create")
    ledger.close()


def test_export_before_any_round_closed_is_refused_before_torch_loads(run_file: Path) -> None:
    to = run_file.parent / "adapter"
    assert_refused(hub(run_file, "export", "RUN", "--to", to), "run.toml has not been started", "fedsoda-hub serve")
    ledger = Ledger(run_file.parent / "small.run" / "ledger.sqlite")
    for record in ENDED[:3]:
        ledger.append(record)
    ledger.close()
    assert_refused(hub(run_file, "export", "RUN", "--to", to), "no round of small.run has closed yet")
    assert not to.exists()


# --- the demo --------------------------------------------------------------------------------------------------------


def test_a_demo_of_no_rounds_or_in_no_directory_is_wrong_usage(run_file: Path) -> None:
    ended = hub(run_file, "demo", "--rounds", "0", "--dir", run_file.parent / "demo")
    assert_refused(ended, "'--rounds'", "greater than or equal to 1")
    assert not (run_file.parent / "demo").exists()
    for there, why in ((run_file, "File exists"), (run_file / "below", "Not a directory")):
        ended = hub(run_file, "demo", "--dir", there)
        assert_refused(ended, f"--dir {there} cannot be made ({why}); name a directory that you may write to")
    assert run_file.is_file()


# --- errors, for people and for scripts ------------------------------------------------------------------------------


@pytest.mark.usefixtures("_sigterm_as_it_was")
@pytest.mark.parametrize(
    "command",
    [
        "serve",
        "prepare",
        "status",
        "edges",
        "export --to adapter",
        "token list",
        "token create --name alice",
        "token revoke alice",
    ],
)
def test_json_prints_exactly_one_object_also_on_errors(run_file: Path, command: str) -> None:
    """In this process, but for `serve`: a process each would take long."""
    run_file.unlink()
    name, *options = command.replace("token ", "token-").split()
    arguments = [*name.split("-"), str(run_file), *options, "--json"]
    message = f"{run_file} is not there; write a RUN.toml (README, A run of your own)"
    expected = {"schema": 1, "status": "error", "error": "UsageProblem", "message": message, "exit_status": 2}
    expected |= {"code": "usage", "recovery": "fix-input"}
    if command == "serve":
        ended = hub(run_file, *arguments)
        assert the_object(ended) == expected | {"helps": "fedsoda-hub serve --help"}
        assert (ended.returncode, ended.stderr) == (2, f"error: {message}\n")
        return
    shown = CliRunner().invoke(app, arguments)
    [found] = [json.loads(line) for line in shown.stdout.splitlines()]
    assert found.pop("helps") == f"fedsoda-hub {' '.join(name.split('-'))} --help"
    assert found == expected
    assert (shown.exit_code, shown.stderr) == (2, f"error: {message}\n")


def test_jsonl_ends_with_a_terminal_event_also_on_errors(run_file: Path) -> None:
    run_file.write_text("name = 3")
    [line] = hub(run_file, "serve", "RUN", "--jsonl").stdout.splitlines()
    event = json.loads(line)
    assert (event["schema"], event["terminal"], event["status"], event["exit_status"]) == (1, True, "error", 2)


def test_debug_adds_the_traceback_as_an_option_and_by_the_environment(run_file: Path) -> None:
    run_file.unlink()
    for ended in (hub(run_file, "status", "RUN", "--debug"), hub(run_file, "status", "RUN", FEDSODA_DEBUG="1")):
        assert ended.returncode == 2
        assert ended.stderr.splitlines()[0].startswith("error: ")
        assert "Traceback (most recent call last)" in ended.stderr


def test_a_compute_child_that_cannot_start_is_one_sentence_and_its_last_words_with_debug(run_file: Path) -> None:
    """Here torch is what cannot be imported."""
    ended = hub(run_file, "serve", "RUN", "--json", "--debug")
    assert (ended.returncode, the_object(ended)["error"]) == (1, "WorkerFailed")
    assert "ended with status 1 during OpenRun" in ended.stderr
    assert "ImportError: torch was loaded" in ended.stderr


def test_help_prints_the_exit_statuses_and_loads_no_torch(run_file: Path) -> None:
    ended = hub(run_file, "--help")
    assert ended.returncode == 0
    said = " ".join(ended.stdout.split())
    for status in ("0 done", "1 failed, do not retry", "2 wrong usage, settings or data", "3 temporary"):
        assert status in said
    for status in ("4 this device cannot hold the model", "5 refused by the hub", "130 Ctrl+C"):
        assert status in said


def commands(group: Any = None, *path: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(words, command) of all commands, those of groups too."""
    root: Any = group or typer.main.get_command(app)
    for name, command in root.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, *path, name)
        else:
            yield (*path, name), command


def test_every_option_of_every_command_is_also_an_environment_variable() -> None:
    options = [
        (words, option) for words, command in commands() for option in command.params if option.opts[0][0] == "-"
    ]
    assert len(options) > 20
    assert [
        (*words, option.opts[0])
        for words, option in options
        if option.opts[0] not in ("--help", "--schema") and not str(option.envvar).startswith("FEDSODA_")
    ] == []


def test_every_command_explains_itself() -> None:
    for words, _ in commands():
        shown = CliRunner(env={"COLUMNS": "120"}).invoke(app, [*words, "--help"])
        assert shown.exit_code == 0, words
        assert f"{' '.join(words)} [OPTIONS]" in shown.stdout
