"""Every end of a hub has a state, a reason and an exit status that can be read afterwards, and an ended run stays ended."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from fedsoda_edge.errors import DiskFull, OutOfMemory, UsageProblem, WorkerFailed
from fedsoda_hub.cli.commands import app
from fedsoda_hub.federation import events as ev
from fedsoda_hub.federation import records as rec
from fedsoda_hub.run.directory import RunDirectory
from fedsoda_hub.run.process import read_note
from fedsoda_hub.run.status import HubProcess
from fedsoda_hub.settings.run import RunSettings
from tests.hub.federation.test_rounds import EVENTS, in_phase
from tests.hub.serving.test_daemon import joined, play, serving, serving_later, write_run

KILLED = WorkerFailed("the process ended with status -9", "", was_killed=True)
NO_CUDA = OutOfMemory("memory ran out during Prepare (CUDA out of memory)")


def ended(settings: RunSettings) -> HubProcess:
    noted = read_note(RunDirectory(settings.run_dir).process)
    assert noted is not None
    return noted.hub


@pytest.mark.parametrize(
    ("problems", "code", "status", "reason"),
    [
        ([WorkerFailed("a defect")] * 3, "WorkerFailed", 1, "a defect"),
        ([KILLED] * 3, "OutOfMemory", 4, "the process that computes was killed 3 times during prepare"),
        ([NO_CUDA] * 3, "OutOfMemory", 4, "memory ran out during Prepare (CUDA out of memory)"),
        ([WorkerFailed("a defect"), KILLED, NO_CUDA], "OutOfMemory", 4, "memory ran out during Prepare"),
        ([UsageProblem("the text is too short")], "UsageProblem", 2, "the text is too short"),
        ([DiskFull("the disk is full")], "DiskFull", 3, "the disk is full"),
        ([OSError(28, "No space left on device")], "OSError", 3, "[Errno 28] No space left on device"),
        ([MemoryError()], "MemoryError", 4, "MemoryError"),
        ([ZeroDivisionError("by 0")], "ZeroDivisionError", 1, "by 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_ends_a_hub_is_noted_with_its_status(
    tmp_path: Path, problems: list[Exception], code: str, status: int, reason: str
) -> None:
    settings = write_run(tmp_path)

    async def talk() -> None:
        async with serving_later(settings, problems=list(problems)) as hub:
            with pytest.raises(Exception) as failure:
                await hub.running
            assert type(failure.value).__name__ == code

    asyncio.run(talk())
    found = ended(settings)
    assert (found.state, found.code, found.status) == ("failed", code, status)
    assert (found.reason or "").startswith(reason)
    shown = CliRunner().invoke(app, ["status", settings.path, "--json"])
    assert shown.exit_code == 0
    answer = json.loads(shown.stdout)
    assert (answer["running"], answer["hub"]["state"], answer["hub"]["status"]) == (False, "failed", status)
    assert answer["sentence"].startswith(f"no hub serves it: the last one failed ({reason}")


def test_a_memory_that_ran_out_once_is_tried_again_by_a_new_process(tmp_path: Path) -> None:
    settings = write_run(tmp_path)

    async def talk() -> None:
        async with serving(settings, problems=[NO_CUDA]) as hub:
            await hub.until("prepared")
            assert hub.said("compute_failed", message=str(NO_CUDA))

    asyncio.run(talk())
    assert ended(settings).state == "stopped"


def test_a_run_that_is_over_and_a_hub_that_was_stopped_say_so(tmp_path: Path) -> None:
    settings = write_run(tmp_path, rounds={"min_edges": 1, "count": 1})

    async def stopped() -> None:
        async with serving_later(settings) as hub:
            await hub.until("waiting")

    async def over() -> None:
        async with serving(settings, exit_when_done=True) as hub:
            await play(hub, {"a": hub.token("a")}, {"a": 0.5}, 1)
            await asyncio.wait_for(hub.running, 10)

    asyncio.run(stopped())
    found = ended(settings)
    assert (found.state, found.status) == ("stopped", 130)
    asyncio.run(over())
    found = ended(settings)
    assert (found.state, found.status, found.reason) == ("over", 0, None)
    shown = json.loads(CliRunner().invoke(app, ["status", settings.path, "--json"]).stdout)
    assert shown["sentence"] == "over after 1 of 1 rounds"


def test_who_joins_an_ended_run_changes_nothing_of_it(tmp_path: Path) -> None:
    settings = write_run(tmp_path, rounds={"min_edges": 1, "count": 1})

    async def talk() -> None:
        async with serving(settings) as hub:
            await play(hub, {"a": hub.token("a")}, {"a": 0.5}, 1)
            await hub.until("run_ended")
            status = await hub.daemon.monitoring.status()
            assert (status.phase, hub.daemon.monitoring.health) == ("ended", "over")
            async with joined(hub.url, hub.token("b"), "phone") as late:
                assert late.heard
            assert hub.daemon.machine.state.phase == "ended"

    asyncio.run(talk())


RECORDS = st.builds(
    rec.SettingsChanged,
    values=st.fixed_dictionaries({"count": st.integers(1, 2), "port": st.integers(0, 9)}),
)


@given(st.lists(st.one_of(st.sampled_from(EVENTS), RECORDS), max_size=30))
def test_no_event_and_no_setting_but_a_larger_count_leaves_an_ended_run(deeds: list[object]) -> None:
    run = in_phase("ended")
    assert run.state.round == 2
    for deed in deeds:
        if isinstance(deed, rec.SettingsChanged):
            run.state.apply(deed)
        else:
            effects = run.machine.handle(deed)  # type: ignore[arg-type]
            assert not any(isinstance(effect, ev.Append | ev.StartJob) for effect in effects)
        assert run.state.phase == "ended"
        assert not any(isinstance(effect, ev.Append | ev.StartJob) for effect in run.machine.owed(0.0))
