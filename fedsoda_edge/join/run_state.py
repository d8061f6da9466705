"""Keep every file of one run on this device, and the order of their writes: a crash costs work, never a bit of an update.

    adapter.safetensors, emulator.safetensors   the views that this device holds, beside the number of each
    views.manifest                              the bundle that the views are of
    residual, residual.round                    error feedback of the last accepted update
    pending/update, pending/residual            a trained round: the coded delta, the feedback that follows from it
    pending/meta.json                           there: the update waits for the hub's answer
    checkpoint/                                 a round in its middle (`worker/checkpoint.py`)
    memory.json                                 the memory plan that was used last

What a view is: docs/protocol.md (p4-views). Computing views is left to the worker, fetching their bytes to the
conversation.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec

from fedsoda_edge.errors import BlobCorrupt, ProtocolViolation
from fedsoda_edge.ports.disk import sha256, sha256_file, write_durably
from fedsoda_edge.protocol.coded import of_alignment, safetensors_bytes
from fedsoda_edge.protocol.commands import Advance, Advanced, View
from fedsoda_edge.protocol.manifest import BundleManifest, TensorSpec
from fedsoda_edge.protocol.messages import BlobRef, Digest, UpdateStart, ViewRef
from fedsoda_edge.protocol.needs import MemoryPlan

FORGET_RESIDUAL_AFTER = 5  # missed rounds
ROOM_BYTES = 64 << 10  # that a coded tensor of few values may have beside them

Fetch = Callable[[BlobRef], Awaitable[bytes]]
Step = Callable[[Advance], Awaitable[Advanced]]


class RunState:
    """The files of one run in its directory.

    Args:
        codec: the form of the run's deltas (`protocol.coded.CODECS`).
    """

    def __init__(self, directory: Path, codec: str) -> None:
        self._directory = directory
        self._codec = codec
        self._most: dict[View, int] = {}  # bytes of a view, as far as its bundle is known

    # --- views -------------------------------------------------------------------------------------------------------

    def begin_bundle(self, manifest: Digest) -> None:
        """Forget the views of another bundle, which mean nothing to this one; the residual of shared layers stays."""
        mark = self._directory / "views.manifest"
        if mark.exists() and mark.read_text() != manifest:
            for which in ("adapter", "emulator"):
                # The number first: a kill in between leaves a view without a number, which gets a snapshot.
                for kind in ("number", "safetensors"):
                    (self._directory / f"{which}.{kind}").unlink(missing_ok=True)
        write_durably(mark, manifest.encode())

    def bound_views(self, manifest: BundleManifest) -> None:
        """Note how large views of this bundle are: no hub makes this device hold more than one in memory."""
        layouts: dict[View, tuple[TensorSpec, ...]] = {
            "adapter": manifest.lora.adapter,
            "emulator": manifest.lora.emulator,
        }
        for which, layout in layouts.items():
            shapes = {spec.name: ("F32", spec.shape) for spec in layout}
            self._most[which] = safetensors_bytes(shapes, {"codec": self._codec})  # a coded step is smaller

    def _check_size(self, which: View, *blobs: BlobRef) -> None:
        most = self._most.get(which)
        for blob in blobs:
            if most is not None and blob.bytes > most + ROOM_BYTES:
                raise ProtocolViolation(
                    f"the hub announces {blob.bytes} bytes for a view of the {which} LoRA, of which its manifest allows "
                    f"{most}; ask the hub's owner"
                )

    async def bring_up(self, which: View, wanted: ViewRef, number: int, fetch: Fetch, advance: Step) -> str | None:
        """Bring a view up to date, by delta from the previous one or by snapshot; return its file, None: the bundle's own.

        Args:
            number: the number of the round or of the alignment.
            fetch: asks the hub for a blob.
            advance: has the worker add a delta.

        Raises:
            BlobCorrupt: the hub's snapshot has another digest than the view.
            ProtocolViolation: the hub announces more bytes than the view can have.
        """
        path, mark = self._view(which), self._directory / f"{which}.number"
        if wanted.snapshot is None or wanted.delta is None:
            write_durably(mark, str(number).encode())
            return None
        if await self.held(which, wanted.digest):
            write_durably(mark, str(number).encode())
            return str(path)
        self._check_size(which, wanted.delta, wanted.snapshot)
        held = int(mark.read_text()) if mark.exists() else 0
        first = 1 if which == "emulator" else 2
        if held == number - 1 or (not path.exists() and number == first):
            coded = self._directory / f"{which}.delta"
            moved = self._directory / f"{which}.moved"
            write_durably(coded, await fetch(wanted.delta))
            answer = await advance(
                Advance(
                    which=which,
                    view=str(path) if path.exists() else None,
                    delta=str(coded),
                    moved=wanted.moved,
                    codec=of_alignment(self._codec) if which == "emulator" else self._codec,
                    out=str(moved),
                )
            )
            coded.unlink()
            if answer.digest == wanted.digest:
                # The view before its number: a kill in between leaves an old number, and the view's digest decides.
                os.replace(moved, path)
                write_durably(mark, str(number).encode())
                return str(path)
        data = await fetch(wanted.snapshot)
        if sha256(data) != wanted.digest:
            raise BlobCorrupt(
                f"the hub's snapshot of the {which} LoRA has digest {sha256(data)[:12]}, it was announced as "
                f"{wanted.digest[:12]}; ask the hub's owner to check the run's blobs"
            )
        write_durably(path, data)
        write_durably(mark, str(number).encode())
        return str(path)

    async def held(self, which: View, digest: Digest) -> str | None:
        """Return the file of the view with this digest; None where it is not here."""
        path = self._view(which)
        is_here = path.exists() and await asyncio.to_thread(sha256_file, path) == digest
        return str(path) if is_here else None

    def _view(self, which: View) -> Path:
        return self._directory / f"{which}.safetensors"

    # --- a round -----------------------------------------------------------------------------------------------------
    #
    # A pending update is written in this order, so that a power cut at any point leaves a state that the next join continues from:
    #   1. begin_round  meta.json goes: whatever lies in pending/ from now on is unfinished
    #   2. the worker   pending/update, pending/residual, each written durably
    #   3. commit       meta.json comes: the update is whole, and the next join would hand it in
    #   4. settle       on a receipt pending/residual becomes residual, then residual.round names its round
    #   5. settle       meta.json goes, last: until then the update is sent again, and the hub gives its first receipt

    @property
    def update(self) -> Path:
        """The file of the coded delta of the round that was trained last, until its answer."""
        return self._directory / "pending" / "update"

    @property
    def new_residual(self) -> Path:
        """The file of the error feedback that counts once the update is accepted."""
        return self._directory / "pending" / "residual"

    @property
    def checkpoint(self) -> Path:
        """The directory of the round's checkpoints."""
        return self._directory / "checkpoint"

    @property
    def has_checkpoint(self) -> bool:
        """Whether a round was left in its middle."""
        return any(self.checkpoint.glob("round.*"))

    def residual(self, round_number: int) -> str | None:
        """Return the file of the error feedback of the last accepted update; None where there is none, or it is too old."""
        path, mark = self._directory / "residual", self._directory / "residual.round"
        if not path.exists():
            return None
        # Without a mark: the first receipt had come, and a crash came before its round was written down.
        is_old = mark.exists() and round_number - int(mark.read_text()) > FORGET_RESIDUAL_AFTER
        return None if is_old else str(path)

    def pending(self) -> UpdateStart | None:
        """Return what is to be announced to the hub; None where no update waits."""
        try:
            return msgspec.json.decode(self._meta.read_bytes(), type=UpdateStart)
        except FileNotFoundError:
            return None

    def begin_round(self) -> None:
        """Give up an update that waits, since another round is trained."""
        self._meta.parent.mkdir(exist_ok=True)
        self._meta.unlink(missing_ok=True)

    def commit(self, start: UpdateStart) -> None:
        """Keep the trained update until the hub's answer, over crashes too."""
        write_durably(self._meta, msgspec.json.encode(start))

    def settle(self, start: UpdateStart, accepted: bool) -> None:
        """Note the hub's answer: with a receipt the new residual counts, and no update waits any more."""
        if accepted:
            if self.new_residual.exists():  # a crash between this line and the next has moved it already
                os.replace(self.new_residual, self._directory / "residual")
            write_durably(self._directory / "residual.round", str(start.round).encode())
        self.forget_pending()

    def forget_pending(self) -> None:
        """Note that no update waits."""
        self._meta.unlink(missing_ok=True)

    @property
    def _meta(self) -> Path:
        return self._directory / "pending" / "meta.json"

    # --- how to train ------------------------------------------------------------------------------------------------

    def memory_plan(self) -> MemoryPlan | None:
        """Return the memory plan that was used last; None where there is none that this version can read."""
        try:
            return msgspec.json.decode((self._directory / "memory.json").read_bytes(), type=MemoryPlan)
        except (FileNotFoundError, msgspec.MsgspecError):
            return None

    def keep_memory_plan(self, plan: MemoryPlan) -> None:
        """Keep the memory plan for the next join, which may find a round in its middle."""
        write_durably(self._directory / "memory.json", msgspec.json.encode(plan))
