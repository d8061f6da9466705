"""A run that an older version recorded opens, continues where it stopped and ends: tests/golden/run, by the commands alone.

What is compared is what no CPU computes: records, blobs that are there, what was counted. The bits of later rounds differ
between kinds of CPU; scripts/bench_before_after compares them on one.
"""

from __future__ import annotations

import json
import tarfile
from contextlib import closing
from pathlib import Path
from sqlite3 import connect
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.commands import Commands, small_disk

GOLDEN = Path(__file__).resolve().parent / "golden" / "run"
SAID_THEN: dict[str, Any] = json.loads((GOLDEN / "expected.json").read_text(encoding="utf-8"))
STOPPED = SAID_THEN["stopped"]


@pytest.fixture
def directory(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """Unpack a recorded run: run.toml and golden.run; of the stopped one also homes, tokens, rows and the full model."""
    with tarfile.open(GOLDEN / "run.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    found = tmp_path / getattr(request, "param", "stopped")
    text = (found / "run.toml").read_text(encoding="utf-8")
    for table, key in (("method", 'distance = "angular"'), ("align", "heal = false")):  # defaults that changed since
        text = text.replace(f"[{table}]\n", f"[{table}]\n{key}\n")
    (found / "run.toml").write_text(text, encoding="utf-8")
    return found


def is_kept(then: Any, now: Any) -> bool:
    """Compare what was said then with what is said now; keys may have been added."""
    if isinstance(then, dict):
        return isinstance(now, dict) and all(key in now and is_kept(value, now[key]) for key, value in then.items())
    if isinstance(then, list):
        return isinstance(now, list) and len(then) == len(now) and all(map(is_kept, then, now))
    return bool(then == now)


def rows(directory: Path) -> list[bytes | str]:
    """Return the ledger's records as they are written."""
    with closing(connect(directory / "golden.run" / "ledger.sqlite")) as ledger:
        return [row for (row,) in ledger.execute("SELECT record FROM log ORDER BY seq")]


def contents(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


every_run = pytest.mark.parametrize("directory", SAID_THEN, indirect=True)


@every_run
def test_a_recorded_run_says_of_itself_what_it_said_then(directory: Path) -> None:
    with Commands(directory) as commands:
        assert is_kept(SAID_THEN[directory.name]["status"], commands.ask("fedsoda_hub", "status", "run.toml"))


@every_run
def test_replaying_every_record_gives_what_the_snapshots_say(directory: Path) -> None:
    with closing(connect(directory / "golden.run" / "ledger.sqlite")) as ledger:
        assert ledger.execute("DELETE FROM snapshot").rowcount == SAID_THEN[directory.name]["status"]["rounds_closed"]
        ledger.commit()
    with Commands(directory) as commands:
        assert is_kept(SAID_THEN[directory.name]["status"], commands.ask("fedsoda_hub", "status", "run.toml"))


def test_tokens_and_home_are_read_as_they_were(directory: Path) -> None:
    home = {"FEDSODA_HOME": str(directory / "home-a")}
    with Commands(directory) as commands:
        assert is_kept(STOPPED["tokens"], commands.ask("fedsoda_hub", "token", "list", "run.toml")["tokens"])
        assert is_kept(STOPPED["join"], commands.ask("fedsoda_edge", "status", environment=home)["join"])


@pytest.mark.slow
def test_preparing_the_run_again_finds_all_of_it_made(directory: Path) -> None:
    before = contents(directory / "golden.run")
    with Commands(directory) as commands:
        assert is_kept(STOPPED["prepared"], commands.ask("fedsoda_hub", "prepare", "run.toml"))
    assert before.items() <= contents(directory / "golden.run").items()


@pytest.mark.slow
def test_the_run_goes_on_where_it_stopped_and_ends(directory: Path) -> None:
    """a hands in what it had trained; b, whose disk is as small as it was, trains the smaller sub-LLM again."""
    written, run_id = rows(directory), STOPPED["status"]["run_id"]
    pending = json.loads((directory / "home-a" / "runs" / run_id / "pending" / "meta.json").read_text())
    assert pending["round"] == 3
    with Commands(directory) as commands:
        said = _resume(commands)
        status = commands.ask("fedsoda_hub", "status", "run.toml")
        tokens = commands.ask("fedsoda_hub", "token", "list", "run.toml")["tokens"]
        exported = commands.ask("fedsoda_hub", "export", "run.toml", "--to", "adapter")

    assert rows(directory)[: len(written)] == written  # a ledger grows at its end alone
    added = [json.loads(row) for row in rows(directory)[len(written) :]]
    accepted = [record for record in added if record["record"] == "update_accepted"]
    assert [(one["round"], one["edge"], one["size_class"]) for one in accepted[:1]] == [(3, "a", 0)]
    assert sorted((one["round"], one["edge"], one["size_class"]) for one in accepted[1:]) == [(4, "a", 0), (4, "b", 1)]
    for key in ("digest", "num_examples", "loss"):
        assert accepted[0][key] == pending[key]
    assert [(record["record"], record.get("round")) for record in added if record not in accepted] == [
        ("round_closed", 3),
        ("realigned", 4),
        ("round_opened", 4),
        ("round_closed", 4),
        ("evaluated", 4),
        ("run_ended", None),
    ]
    assert [(one["version"], len(one["smaller"])) for one in added if one["record"] == "realigned"] == [(2, 1)]

    assert (status["phase"], status["rounds_closed"], status["run_id"]) == ("ended", 4, run_id)
    assert status["losses"][:2] == STOPPED["status"]["losses"]
    assert is_kept(STOPPED["tokens"], tokens)
    for edge, trained in (("a", [4]), ("b", [4])):  # round 3 was trained by both before they stopped
        assert said[edge][-1]["status"] == "ok"
        assert [event["round"] for event in said[edge] if event["event"] == "trained"] == trained
        assert [path.name for path in (directory / f"home-{edge}" / "runs").iterdir()] == [run_id]
    assert [event["round"] for event in said["a"] if event["event"] == "accepted"] == [3, 4]
    assert [event["round"] for event in said["b"] if event["event"] == "accepted"] == [4]

    assert exported["rounds"] == 4
    master = load_file(directory / "golden.run" / "blobs" / added[-3]["master"])
    adapter = load_file(directory / "adapter" / "adapter_model.safetensors")
    assert adapter.keys() == {f"base_model.model.model.{name}.weight" for name in master}
    assert all(bool((adapter[f"base_model.model.model.{name}.weight"] == master[name]).all()) for name in master)


def _resume(commands: Commands) -> dict[str, list[dict[str, Any]]]:
    """Start hub and edges again, to the end of the run; return what each of them said."""
    directory = commands.directory
    manifests = [directory / "golden.run" / "bundle" / name for name in ("manifest.json", "manifest.1.json")]
    large, small = (json.loads(path.read_text())["needs"]["disk_bytes"] for path in manifests)
    hub = commands.start("hub", "fedsoda_hub", "serve", "run.toml", "--exit-when-done")
    url = commands.wait_for("hub", event="listening")["url"]
    joins = [
        commands.start(
            edge,
            *("fedsoda_edge", "join", url, "--device", "cpu", "--cache-key", "keep"),
            *("--token-file", f"{edge}.token", "--data", f"{edge}.jsonl"),
            environment={"FEDSODA_HOME": str(directory / f"home-{edge}"), **disk},
        )
        for edge, disk in (("a", {}), ("b", small_disk(directory / "small_disk", (small + large) // 2)))
    ]
    commands.finish(hub, *joins)
    return {name: commands.events(name) for name in ("hub", "a", "b")}
