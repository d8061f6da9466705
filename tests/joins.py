"""Let joins take part here, with ports of the test's: a worker in this process, a clock that does not wait."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from fedsoda_edge.data.local_data import LocalData
from fedsoda_edge.edge import Edge, Participation, agent_of
from fedsoda_edge.events import as_json
from fedsoda_edge.ports import Clock, SystemClock, TorchPort, Transport
from fedsoda_edge.protocol import messages as ms
from tests.worker_here import WorkerHere


def joining(
    edge: Edge,
    data: LocalData,
    on_event: Callable[[dict[str, Any]], None] = lambda _: None,
    *,
    worker: TorchPort | None = None,
    clock: Clock | None = None,
    max_rounds: int = 0,
    **options: Any,
) -> Participation:
    """Join as `Edge.join` does. worker: None: `WorkerHere`."""
    say = lambda event: on_event(as_json(event))  # noqa: E731
    agent = agent_of(edge, data, say, worker=worker or WorkerHere(), clock=clock, **options)
    return Participation(agent, max_rounds)


class Deaf:
    """A witness of a conversation that believes all and notes nothing."""

    def hears(self, message: ms.HubMessage) -> None: ...
    def sends(self, message: ms.EdgeMessage) -> None: ...


@contextlib.contextmanager
def ports_of_commands(
    hub: Transport | None = None, worker: TorchPort | None = None, clock: Clock | None = None
) -> Iterator[None]:
    """Let a command that runs here have these ports: it makes its own, so here alone their classes are patched.

    Args:
        hub: None: the one of its URL. worker: None: `WorkerHere`. clock: None: the system's.
    """
    worker, clock = worker or WorkerHere(), clock or SystemClock()
    with (
        mock.patch("fedsoda_edge.edge.Child", return_value=worker),
        mock.patch("fedsoda_edge.join.doctor.Child", return_value=worker),
        mock.patch("fedsoda_edge.edge.SystemClock", return_value=clock),
        mock.patch("fedsoda_edge.edge.HubTransport", return_value=hub) if hub else contextlib.nullcontext(),
    ):
        yield
