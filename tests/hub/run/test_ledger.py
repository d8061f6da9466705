"""The ledger: append durably, replay exactly. One suite, in memory and on disk."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from fedsoda_edge.errors import DiskFull, UsageProblem
from fedsoda_edge.protocol.messages import Digest, EdgeId
from fedsoda_hub.federation import records as rec
from fedsoda_hub.federation.jobs import EvaluateResult
from fedsoda_hub.federation.state import HeldView, LedgerState
from fedsoda_hub.run.ledger import Ledger
from fedsoda_hub.run.outcome import Outcome, read_outcome

A, B, C, D = (Digest(letter * 64) for letter in "abcd")
ALICE = EdgeId("alice")

ROUND_1: list[rec.AnyRecord] = [
    rec.RunStarted(run_id="1234", fixed={"seed": 0, "[lora] rank": 8, "[align] learning_rate": 1e-4}),
    rec.SettingsChanged(values={"count": 2}),
    rec.RunPrepared(manifest=A, adapter_view=B, emulator_view=C, public_kl={"pruned": 0.1}),
    rec.RoundOpened(round=1, cohort=(ALICE, EdgeId("bob")), view=B, alignment=0, deadline_at=1e9 + 0.25),
    rec.DeadlinePassed(round=1),
    rec.CohortExtended(round=1, invited=(EdgeId("carol"),), deadline_at=2e9),
    rec.EdgeAnswered(round=1, edge=EdgeId("bob"), how="declined"),
    rec.UpdateAccepted(round=1, edge=ALICE, digest=D, num_examples=8, loss=0.1 + 0.2),
    rec.RoundClosed(round=1, master=A, view=C, delta=D),
]
AFTER: list[rec.AnyRecord] = [
    rec.RunPaused(),
    rec.RunResumed(),
    rec.RulesChanged(values={"count": 1.0}, instead_of={"count": 2.0}),
    rec.Realigned(round=2, version=1, view=A, delta=B, kl_before=0.3, kl_after=0.2),
    rec.Repruned(round=2, master=C, manifest=D, view=B),
    rec.Evaluated(round=1, result=EvaluateResult(accuracy={"full": 0.5}, loss={"full": None}, num_examples=4)),
    rec.RunEnded(rounds=1),
]


@pytest.fixture(params=["memory", "disk"])
def reopen(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], Ledger]]:
    """The ledger; called again, the same one as the next process finds it (in memory: as it is)."""
    opened: list[Ledger] = []

    def reopen() -> Ledger:
        if request.param == "disk" and opened:
            opened.pop().close()
        if not opened:
            opened.append(Ledger(tmp_path / "x.run" / "ledger.sqlite" if request.param == "disk" else None))
        return opened[0]

    yield reopen
    for ledger in opened:
        ledger.close()


def test_records_come_back_as_they_were_in_order(reopen: Callable[[], Ledger]) -> None:
    for record in ROUND_1 + AFTER:
        reopen().append(record)
    assert reopen().records() == ROUND_1 + AFTER


def test_an_empty_ledger_is_a_run_that_has_not_begun(reopen: Callable[[], Ledger]) -> None:
    assert reopen().replay() == LedgerState()


def test_replay_folds_the_records(reopen: Callable[[], Ledger]) -> None:
    for record in ROUND_1:
        reopen().append(record)
    state = reopen().replay()
    assert (state.phase, state.round, state.master) == ("idle", 1, A)
    assert state.largest.adapter == HeldView(C, D)
    assert state.losses == [0.1 + 0.2]
    assert state.receipts[ALICE].digest == D
    assert state.cohort == ["alice", "bob", "carol"]


def test_replay_from_a_snapshot_equals_replay_of_everything(reopen: Callable[[], Ledger]) -> None:
    plain = LedgerState()
    for record in ROUND_1 + AFTER:
        reopen().append(record)
        plain.apply(record)
        if record is ROUND_1[-1]:
            reopen().snapshot(plain)
    assert reopen().replay() == plain


def test_a_snapshot_bounds_replay(reopen: Callable[[], Ledger]) -> None:
    ledger = reopen()
    for record in ROUND_1:
        ledger.append(record)
    other = LedgerState(run_id="from the snapshot", phase="idle")
    ledger.snapshot(other)
    assert ledger.replay() == other


RECORDED = Path(__file__).resolve().parents[2] / "data"


def as_then(value: Any) -> Any:
    """The same without what an evaluation and a closed round say since."""
    if isinstance(value, dict):
        newer = {"mean_rank", "shares", "right_shares"} if "num_examples" in value and "accuracy" in value else set()
        if value.get("record") == "round_closed":
            assert not value["standings"]
            newer = {"standings"}
        return {key: as_then(inner) for key, inner in value.items() if key not in newer}
    return [as_then(inner) for inner in value] if isinstance(value, list | tuple) else value


@pytest.mark.parametrize("name", ["classes", "repruned"])
def test_a_ledger_of_an_earlier_release_replays_with_and_without_its_snapshot(name: str, tmp_path: Path) -> None:
    """Recorded when class 0 lay in ten loose fields: three size classes, one with a view of its own, in mid-round 3."""
    told = json.loads((RECORDED / f"ledger_{name}.json").read_text())
    path = tmp_path / "ledger.sqlite"
    Ledger(path).close()
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as old:
        old.executemany("INSERT INTO log (record) VALUES (?)", [(record.encode(),) for record in told["records"]])
        old.execute("INSERT INTO snapshot VALUES (?, ?)", (told["snapshot"][0], told["snapshot"][1].encode()))
    ledger = Ledger(path)
    state, want = ledger.replay(), told["state"]
    alike = want.keys() - {"accepted", "receipts", "manifests", "adapters", "emulators", "own_views", "cross_terms"}
    found = {key: msgspec.to_builtins(getattr(state, key), str_keys=True) for key in alike}
    assert as_then(found) == {key: want[key] for key in alike}
    assert {str(number): lost for number, lost in state.measured.cross_terms.items()} == want["cross_terms"]
    assert sorted(state.accepted) == want["accepted"]
    receipts = {edge: [one.round, one.digest, one.size_class] for edge, one in state.receipts.items()}
    assert receipts == want["receipts"]
    assert [one.manifest for one in state.sub_llms] == want["manifests"]
    for views, old_views in (("adapter", "adapters"), ("emulator", "emulators")):
        held = [getattr(one, views) for one in state.sub_llms]
        assert [[view.digest, view.delta] for view in held] == want[old_views]
    assert [not one.shares_adapter for one in state.sub_llms[1:]] == want["own_views"]
    again = [json.dumps(as_then(msgspec.to_builtins(record)), separators=(",", ":")) for record in ledger.records()]
    assert again == told["records"]  # not a byte moved
    ledger.snapshot(state)
    assert ledger.replay() == state
    ledger.close()


def test_every_prefix_of_the_log_can_be_replayed(reopen: Callable[[], Ledger]) -> None:
    plain = LedgerState()
    for record in ROUND_1 + AFTER:
        plain.apply(record)
        reopen().append(record)
        assert reopen().replay() == plain


# --- durability ---------------------------------------------------------------------------------------------------


def test_the_log_survives_a_kill_of_the_process_right_after_append(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    program = (
        "import os, signal; from pathlib import Path; from fedsoda_hub.run.ledger import Ledger\n"
        "from fedsoda_hub.federation import records as rec\n"
        f"ledger = Ledger(Path({str(path)!r}))\n"
        "for number in (1, 2, 3): ledger.append(rec.DeadlinePassed(round=number))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], check=False, env={**os.environ})
    assert ended.returncode == -signal.SIGKILL
    ledger = Ledger(path)
    assert ledger.records() == [rec.DeadlinePassed(round=number) for number in (1, 2, 3)]
    ledger.close()


def test_every_commit_is_synced(reopen: Callable[[], Ledger]) -> None:
    assert reopen().database.read("PRAGMA synchronous") == [(2,)]  # FULL


def test_a_full_disk_is_disk_full_and_writes_nothing(reopen: Callable[[], Ledger]) -> None:
    ledger = reopen()
    ledger.append(ROUND_1[0])
    [(pages,)] = ledger.database.read("PRAGMA page_count")
    ledger.database.write((f"PRAGMA max_page_count = {pages}", ()))
    large = rec.RunStarted(run_id="x" * 100_000, fixed={})
    with pytest.raises(DiskFull, match="the ledger's disk is full"):
        ledger.append(large)
    assert ledger.records() == [ROUND_1[0]]
    ledger.database.write((f"PRAGMA max_page_count = {pages + 1000}", ()))  # space is back
    ledger.append(large)
    assert ledger.records() == [ROUND_1[0], large]


# --- tokens -------------------------------------------------------------------------------------------------------


def test_a_token_is_one_edge_and_only_its_hash_is_kept(reopen: Callable[[], Ledger]) -> None:
    secret = reopen().tokens.create("clinic-7")
    found = reopen().tokens.find(secret)
    assert found is not None
    assert (found.edge, found.device, found.revoked) == ("clinic-7", None, False)
    assert reopen().tokens.find(secret + "x") is None
    database = reopen().database
    tables = [name for (name,) in database.read("SELECT name FROM sqlite_master WHERE type = 'table'")]
    assert "tokens" in tables
    dump = "\n".join(str(database.read(f"SELECT * FROM {table}")) for table in tables)
    assert "clinic-7" in dump
    assert secret not in dump
    assert secret.removeprefix("fs1-") not in dump


def test_a_token_is_bound_to_the_first_device_that_says_hello(reopen: Callable[[], Ledger]) -> None:
    reopen().tokens.create("alice")
    assert reopen().tokens.bind(ALICE, "laptop")
    assert reopen().tokens.bind(ALICE, "laptop")
    assert not reopen().tokens.bind(ALICE, "phone")


def test_a_name_in_use_is_refused_until_its_token_is_revoked(reopen: Callable[[], Ledger]) -> None:
    old = reopen().tokens.create("alice")
    reopen().tokens.bind(ALICE, "laptop")
    with pytest.raises(UsageProblem, match="'alice' has a token already; revoke it first"):
        reopen().tokens.create("alice")
    reopen().tokens.revoke("alice")
    revoked = reopen().tokens.find(old)
    assert revoked is not None
    assert revoked.revoked
    new = reopen().tokens.create("alice")
    assert reopen().tokens.find(old) is None
    fresh = reopen().tokens.find(new)
    assert fresh is not None
    assert (fresh.device, fresh.revoked) == (None, False)


@pytest.mark.parametrize("name", ["", "a b", "../x", "a" * 65, "a/b"])
def test_a_name_that_could_not_stand_in_a_file_name_is_refused(reopen: Callable[[], Ledger], name: str) -> None:
    with pytest.raises(UsageProblem, match="cannot be an edge's id"):
        reopen().tokens.create(name)


def test_revoking_an_unknown_name_says_which_there_are(reopen: Callable[[], Ledger]) -> None:
    reopen().tokens.create("alice")
    with pytest.raises(UsageProblem, match="'alcie' has no token; name one of those that have: alice"):
        reopen().tokens.revoke("alcie")


def test_tokens_can_be_made_while_the_hub_serves(tmp_path: Path) -> None:
    hub, command = Ledger(tmp_path / "l.sqlite"), Ledger(tmp_path / "l.sqlite")
    secret = command.tokens.create("alice")
    hub.append(ROUND_1[0])
    assert hub.tokens.find(secret) is not None
    hub.close()
    command.close()


# --- traffic and outcome -------------------------------------------------------------------------------------------


def test_traffic_adds_up_per_edge_and_round_and_is_no_part_of_replay(reopen: Callable[[], Ledger]) -> None:
    reopen().add_traffic(EdgeId("bob"), 1, 1, 2)
    reopen().add_traffic(ALICE, 2, 10, 20)
    reopen().add_traffic(ALICE, 1, 3, 4)
    reopen().add_traffic(ALICE, 1, 30, 40)
    assert reopen().traffic() == [("alice", 1, 33, 44), ("alice", 2, 10, 20), ("bob", 1, 1, 2)]
    assert reopen().replay() == LedgerState()


def test_the_outcome_of_a_run_is_its_master_and_the_emulators_view(tmp_path: Path) -> None:
    with pytest.raises(
        UsageProblem, match=r"triage\.toml has not been started; run `fedsoda-hub serve x/triage\.toml`"
    ):
        read_outcome(tmp_path, "x/triage.toml")
    assert not (tmp_path / "ledger.sqlite").exists()
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.tokens.create("alice")
    with pytest.raises(UsageProblem, match=r"RUN\.toml has not been started"):
        read_outcome(tmp_path)
    for record in ROUND_1[:-1]:
        ledger.append(record)
    with pytest.raises(UsageProblem, match=r"no round of .* has closed yet \(phase: collecting\)"):
        read_outcome(tmp_path)
    ledger.append(ROUND_1[-1])
    assert read_outcome(tmp_path) == Outcome(
        master=A, emulator_view=C, manifest=A, rounds=1, evaluation=None, evaluated_round=0
    )
    ledger.close()


def test_a_ledger_is_one_sqlite_file_that_others_can_read(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.append(rec.DeadlinePassed(round=3))
    other = sqlite3.connect(tmp_path / "ledger.sqlite")
    assert other.execute("SELECT record FROM log").fetchone() == (b'{"record":"deadline_passed","round":3}',)
    other.close()
    ledger.close()


def test_a_snapshot_gives_back_the_same_values_and_types() -> None:
    ledger = Ledger(None)
    records: list[rec.AnyRecord] = [
        rec.RunStarted(run_id="1", fixed={"seed": 0}),
        rec.RunPrepared(manifest=A, adapter_view=B, emulator_view=C, public_kl={"pruned": 0.1}),
        rec.Realigned(round=2, version=1, view=Digest("a"), delta=Digest("b"), kl_before=1.0, kl_after=0.5),
    ]
    for record in records:
        ledger.append(record)
    state = ledger.replay()
    ledger.snapshot(state)
    again = ledger.replay()
    assert again == state
    assert repr(again.realignments) == repr(state.realignments)  # 2 == 2.0, and --json shows which it is


def test_the_history_tells_when_each_record_was_written() -> None:
    ledger, before = Ledger(None), time.time()
    for number in (1, 2):
        ledger.append(rec.RunEnded(rounds=number))
    (first, one), (second, two) = ledger.history()
    assert (one, two) == (rec.RunEnded(rounds=1), rec.RunEnded(rounds=2))
    assert before - 1e-3 <= first <= second <= time.time() + 1e-3
