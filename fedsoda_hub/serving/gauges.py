"""Read off a serving hub what its gauges show: on the event loop a look at numbers that are there, in a thread the rest.

What is counted since the hub started is `metrics.py`'s.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, get_args

from fedsoda_edge.device.sensors import vram_bytes
from fedsoda_edge.protocol.messages import EdgeId
from fedsoda_hub.federation.rounds import RoundMachine
from fedsoda_hub.federation.state import Phase
from fedsoda_hub.settings.run import RunSettings

PHASES: tuple[str, ...] = get_args(Phase)


class Here(Protocol):
    """The roster as far as the gauges need it. bytes_now: up and down of all edges since the run began."""

    @property
    def connected(self) -> set[EdgeId]: ...
    def bytes_now(self) -> tuple[int, int]: ...


class Computes(Protocol):
    """The process that owns torch."""

    @property
    def pid(self) -> int | None: ...
    @property
    def rss_bytes(self) -> int | None: ...


@dataclass(frozen=True)
class Seen:
    """The numbers of a hub at one moment. Times are seconds since 1970, None: there is none.

    needed: updates that close the open round at its
    deadline. edges: by state, each edge in one. queues: what waits, by queue. accuracy: by model, of the last evaluation.
    """

    phase: str
    round: int
    rounds: int
    rounds_closed: int
    invited: int
    accepted: int
    needed: int
    deadline_at: float | None
    edges: Mapping[str, int]
    queues: Mapping[str, int]
    uploading_bytes: int
    bytes_up: int
    bytes_down: int
    loss: float | None
    accuracy: Mapping[str, float]


@dataclass(frozen=True)
class HostMemory:
    """The disk and memory of the hub's machine. None: it cannot be read, or no such process runs."""

    disk_free: int | None
    disk_size: int | None
    compute_rss: int | None
    compute_vram: int | None


@dataclass
class Gauges:
    """The parts of a hub that gauges are read off. queues, uploading_bytes: how long, how much, now."""

    settings: RunSettings
    machine: RoundMachine
    here: Here
    compute: Computes
    directory: Path
    queues: Mapping[str, Callable[[], int]] = field(default_factory=dict)
    uploading_bytes: Callable[[], int] = int

    def look(self) -> Seen:
        """Look at what is there; call it on the event loop. It scans no table and reads no file."""
        machine, state = self.machine, self.machine.state
        is_open = state.phase == "collecting"
        up, down = self.here.bytes_now()
        return Seen(
            phase=state.phase,
            round=state.round,
            rounds=machine.rules.count,
            rounds_closed=len(state.losses),
            invited=state.invited if is_open else 0,
            accepted=len(state.accepted) if is_open else 0,
            needed=machine.quorum if is_open else 0,
            deadline_at=state.deadline_at if is_open else None,
            edges=machine.edges_by_state(self.here.connected),
            queues={name: length() for name, length in self.queues.items()},
            uploading_bytes=self.uploading_bytes(),
            bytes_up=up,
            bytes_down=down,
            loss=state.losses[-1] if state.losses else None,
            accuracy={} if state.evaluation is None else state.evaluation.accuracy,
        )

    def measure(self) -> HostMemory:
        """Ask the system for disk and memory; call it in a thread."""
        try:
            disk = shutil.disk_usage(self.directory)
        except OSError:
            disk = None
        pid = self.compute.pid
        return HostMemory(
            disk_free=None if disk is None else disk.free,
            disk_size=None if disk is None else disk.total,
            compute_rss=None if pid is None else self.compute.rss_bytes,
            compute_vram=None if pid is None else vram_bytes(pid),
        )
