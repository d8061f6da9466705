"""Let some edges of a comparison attack: between the worker that trained and the edge that hands in stands an attacker.

The edge itself is the honest code, and so is the hub. Only edges of this process can attack. What an attacker hands in is
`attacks.py`'s.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from fedsoda_edge.data.formats import DataRow
from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.model import delta
from fedsoda_edge.model.bundle import Bundle
from fedsoda_edge.ports import TorchPort
from fedsoda_edge.ports.disk import write_durably
from fedsoda_edge.protocol import commands as cmd
from fedsoda_edge.protocol.calls import Call, ProgressT, ResultT
from fedsoda_edge.protocol.coded import of_factor
from fedsoda_edge.protocol.manifest import TensorSpec
from fedsoda_edge.protocol.messages import Factor
from fedsoda_hub.compare.attacks import KNOW_ALL, attackers_among, flipped, forged
from fedsoda_hub.compare.settings import Attackers, Comparison
from fedsoda_hub.local.in_process import PortOf
from fedsoda_hub.run.directory import RunDirectory
from fedsoda_hub.serving.daemon import Daemon

LOOK_SECONDS = 0.05  # between looks at what the hub has accepted


@dataclass(frozen=True)
class Attack:
    """The attackers among the edges of a cell, and their work; with a share of 0 all edges are honest.

    label: the column of the labels, which only label-flip reads.
    """

    how: Attackers
    label: str

    @classmethod
    def of(cls, comparison: Comparison, transport: str) -> Attack:
        """Take what [compare] says.

        Raises:
            UsageProblem: edges have processes of their own, or labels have no column.
        """
        how = comparison.compare.attackers
        if how.share and transport != "memory":
            raise UsageProblem(
                f"[compare] attackers: share = {how.share} beside --transport {transport}: its edges are the real program, "
                "which has no attack; leave --transport out, or write share = 0"
            )
        is_read = how.share and how.kind == "label-flip"
        completion = comparison.settings[comparison.baseline_of].completion.columns
        return cls(how, _label(comparison.compare.label, completion) if is_read else "")

    def attackers(self, edges: Sequence[str]) -> tuple[str, ...]:
        """Choose the attackers among the edges of a cell; an edge alone is a baseline and honest."""
        return attackers_among(edges, self.how.share) if self.how.share and len(edges) > 1 else ()

    def rows(self, named: Mapping[str, Sequence[DataRow]]) -> dict[str, Sequence[DataRow]]:
        """Return what each edge of a cell holds: under label-flip attackers hold the next label in each row."""
        held = dict(named)
        if self.label:
            labels = sorted({str(row[self.label]) for rows in named.values() for row in rows})
            for edge in self.attackers(list(named)):
                held[edge] = [{**row, self.label: flipped(str(row[self.label]), labels)} for row in named[edge]]
        return held

    def fingerprint(self, edges: Sequence[str]) -> list[object]:
        """Return what a cell's result depends on beside settings and rows; nothing where all edges are honest."""
        return [msgspec.to_builtins(self.how)] if self.attackers(edges) else []

    def ports(self, edges: Sequence[str]) -> PortOf:
        """Return what gives each edge of a cell its worker: to an attacker, one that forges."""
        attackers = self.attackers(edges)

        def port_of(edge: str, worker: TorchPort, daemon: Daemon) -> TorchPort:
            is_forger = edge in attackers and self.how.kind != "label-flip"
            return ForgingWorker(worker, edge, self.how, attackers, daemon) if is_forger else worker

        return port_of


def _label(label: str | None, completion: Sequence[str]) -> str:
    if label is not None:
        return label
    if len(completion) != 1:
        raise UsageProblem(
            f'[compare] attackers: kind = "label-flip" needs the column of the labels, and [task] completion has '
            f"{', '.join(completion) or 'none'}; name it in [compare] label"
        )
    return completion[0]


class ForgingWorker:
    """A `TorchPort` that changes what was trained before the edge sees it: the coded update, not its error feedback."""

    def __init__(self, worker: TorchPort, edge: str, how: Attackers, attackers: Sequence[str], daemon: Daemon) -> None:
        self._worker, self._edge, self._how, self._attackers = worker, edge, how, attackers
        self._daemon = daemon

    @property
    def pid(self) -> int | None:
        """The worker's."""
        return self._worker.pid

    @property
    def rss_bytes(self) -> int | None:
        """The worker's."""
        return self._worker.rss_bytes

    @property
    def peak_rss_bytes(self) -> int:
        """The worker's."""
        return self._worker.peak_rss_bytes

    async def start(self) -> None:
        """Start the worker."""
        await self._worker.start()

    async def close(self) -> None:
        """Close the worker."""
        await self._worker.close()

    async def call(
        self, call: Call[ResultT, ProgressT], on_progress: Callable[[ProgressT], None] | None = None
    ) -> ResultT:
        """Have the worker do a call; forge the update of a round that it trained."""
        result = await self._worker.call(call, on_progress)
        if isinstance(call, cmd.Train):
            others = await self._honest(call.round) if self._how.kind in KNOW_ALL else []
            await asyncio.to_thread(self._forge, call, others)
        return result

    async def _honest(self, number: int) -> list[str]:
        """Wait for the honest edges of the round, and return the digests of their updates, which the hub has accepted."""
        while True:
            state = self._daemon.machine.state
            others = [edge for edge in state.cohort if edge not in self._attackers]
            if state.round != number or all(edge in state.accepted or edge in state.answered for edge in others):
                return [state.accepted[edge].digest for edge in others if edge in state.accepted]
            await asyncio.sleep(LOOK_SECONDS)

    def _forge(self, call: cmd.Train, others: Sequence[str]) -> None:
        directory = RunDirectory(self._daemon.settings.run_dir)
        layout = _layout(directory, call.trains)
        own = delta.decode(Path(call.update).read_bytes(), layout, call.codec)
        honest = [delta.decode(directory.blobs.get(digest), layout, call.codec) for digest in others]
        about = f"{call.seed}/{call.round}/{self._edge}".encode()
        drawn = int.from_bytes(hashlib.sha256(about).digest()[:7], "big")
        made = forged(self._how.kind, own, honest, len(self._attackers), drawn)
        write_durably(Path(call.update), delta.encode(made, call.codec))


def _layout(directory: RunDirectory, trains: Factor) -> tuple[TensorSpec, ...]:
    return of_factor(Bundle.open(directory.bundle).manifest.lora.adapter, trains)
