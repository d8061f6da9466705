"""Torch in a thread answers calls as a child process does: types cross as JSON, errors keep their class."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from fedsoda_edge.errors import DataProblem, WorkerFailed
from fedsoda_edge.ports.child import ReportProgress
from fedsoda_edge.protocol.calls import Call
from fedsoda_hub.local.in_process import TorchThread


class Half(msgspec.Struct, frozen=True):
    value: float


class Step(msgspec.Struct, frozen=True):
    number: int


class Halve(Call[Half, Step], frozen=True, tag="halve"):
    value: float


def asked(
    answer: Callable[[Halve, ReportProgress], Half], value: float = 3.0, listen: Callable[[Step], None] | None = None
) -> Half:
    async def ask() -> Half:
        with TorchThread() as thread:
            port = thread.port(lambda: answer)
            try:
                return await port.call(Halve(value=value), listen)
            finally:
                await port.close()
                assert port.pid is None

    return asyncio.run(ask())


def test_a_call_is_answered_with_its_type_and_its_progress_on_the_way() -> None:
    def halve(call: Halve, report: ReportProgress) -> Half:
        for number in (1, 2):
            report(Step(number))
        return Half(call.value / 2)

    heard: list[Step] = []
    assert asked(halve, listen=heard.append) == Half(1.5)
    assert heard == [Step(1), Step(2)]


@pytest.mark.parametrize(
    ("raised", "expected"),
    [(DataProblem("no rows"), DataProblem), (ZeroDivisionError("a defect"), WorkerFailed)],
    ids=["ours", "a defect"],
)
def test_an_error_of_ours_comes_as_it_is_and_any_other_as_the_failure_of_a_worker(
    raised: Exception, expected: type[Exception]
) -> None:
    def fail(_: Halve, __: ReportProgress) -> Half:
        raise raised

    with pytest.raises(expected, match=str(raised)):
        asked(fail)


def test_what_fails_in_whoever_listens_is_not_said_to_be_the_calls_failure() -> None:
    def halve(call: Halve, report: ReportProgress) -> Half:
        report(Step(1))
        return Half(call.value / 2)

    def listen(_: Step) -> None:
        raise KeyError("of the listener")

    with pytest.raises(KeyError, match="of the listener"):
        asked(halve, listen=listen)


def test_a_port_that_was_closed_is_another_process_when_it_is_asked_again() -> None:
    async def ask() -> list[Any]:
        with TorchThread() as thread:
            port = thread.port(lambda: lambda call, _: Half(call.value / 2))
            pids = []
            for _ in range(2):
                await port.call(Halve(value=1.0))
                pids.append(port.pid)
                await port.close()
            return pids

    first, second = asyncio.run(ask())
    assert first is not None
    assert second is not None
    assert first != second
