"""How the run stands: who may ask, and how long a round still is."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path

import pytest

from fedsoda_edge.ports import SystemClock
from fedsoda_edge.protocol.messages import EdgeId, Progress
from fedsoda_hub.federation.rounds import RoundMachine
from fedsoda_hub.federation.state import LedgerState
from fedsoda_hub.run.ledger import Ledger
from fedsoda_hub.run.process import ProcessNote
from fedsoda_hub.serving.metrics import Metrics
from fedsoda_hub.serving.monitoring import Monitoring
from fedsoda_hub.serving.resume import rules_of
from tests.hub.serving.test_daemon import write_run


class Noon(SystemClock):
    """1000 seconds since 1970."""

    def wall(self) -> float:
        return 1000.0


class Present:
    """a is here, in the second step of five."""

    @property
    def connected(self) -> set[EdgeId]:
        return {EdgeId("a")}

    @property
    def progress(self) -> Mapping[EdgeId, Progress]:
        return {EdgeId("a"): Progress(round=3, step=2, steps=5)}

    def why_idle(self, edge: EdgeId) -> str | None:
        return {"a": "paused: on battery"}.get(edge)

    async def flush_traffic(self) -> None: ...


def monitoring(directory: Path, state: LedgerState) -> Monitoring:
    settings, ledger = write_run(directory), Ledger(None)
    for name in "ab":
        ledger.tokens.create(name)
    note = ProcessNote(directory / "hub.json", Noon(), "serving")
    made = Monitoring(
        settings, RoundMachine(rules_of(settings), state), ledger, Noon(), Present(), "the owner's", Metrics(), note
    )
    made.url = "http://h:1"
    return made


def collecting(deadline_at: float) -> LedgerState:
    cohort = [EdgeId("a"), EdgeId("b")]
    return LedgerState(run_id="r", phase="collecting", round=3, cohort=cohort, invited=2, deadline_at=deadline_at)


def test_only_who_holds_the_owners_secret_may_ask(tmp_path: Path) -> None:
    made = monitoring(tmp_path, LedgerState())
    assert [made.is_admin(secret) for secret in ("", "the owner", "the owner's ", "the owner's")] == [False] * 3 + [
        True
    ]


@pytest.mark.parametrize(("deadline_at", "due"), [(1007.5, 7.5), (1000.0, 0.0), (900.0, 0.0)])
def test_a_round_is_due_in_no_less_than_no_time(tmp_path: Path, deadline_at: float, due: float) -> None:
    made = monitoring(tmp_path, collecting(deadline_at))
    assert made.due_seconds() == due
    assert asyncio.run(made.status()).due_seconds == due


def test_a_run_between_two_rounds_has_nothing_due(tmp_path: Path) -> None:
    assert (
        asyncio.run(
            monitoring(tmp_path, LedgerState(run_id="r", phase="idle", deadline_at=1007.5)).status()
        ).due_seconds
        is None
    )


def test_every_edge_with_a_token_is_told_with_the_step_of_its_local_round(tmp_path: Path) -> None:
    told = asyncio.run(monitoring(tmp_path, collecting(1007.5)).status())
    assert [(edge.edge, edge.connected, edge.step, edge.steps) for edge in told.edges] == [
        ("a", True, 2, 5), ("b", False, None, None),
    ]  # fmt: skip
