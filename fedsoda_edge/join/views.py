"""The views and the residual that an edge holds of a run: brought up to the hub's, by delta or by snapshot.

What a view is, is federation.md's; the numbers are the worker's, the bytes come by the agent's conversation.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

from fedsoda_edge.errors import BlobCorrupt
from fedsoda_edge.ports import TorchPort
from fedsoda_edge.ports.disk import sha256, sha256_file, write_durably
from fedsoda_edge.protocol import messages as ms
from fedsoda_edge.protocol.commands import Advance, View

FORGET_RESIDUAL_AFTER = 5  # missed rounds


class Views:
    """Those in one run's directory. `fetch` asks the hub for a blob of the round."""

    def __init__(
        self, directory: Path, codec: str, worker: TorchPort, fetch: Callable[[ms.BlobRef], Awaitable[bytes]]
    ) -> None:
        self._directory = directory
        self._codec = codec
        self._worker = worker
        self._fetch = fetch

    def begin(self, manifest: ms.Digest) -> None:
        """The views of another bundle mean nothing to this one; the residual of a layer that both have does."""
        mark = self._directory / "views.manifest"
        if mark.exists() and mark.read_text() != manifest:
            for which in ("adapter", "emulator"):
                for kind in ("number", "safetensors"):  # a kill in between leaves a view that is too old for its delta
                    (self._directory / f"{which}.{kind}").unlink(missing_ok=True)
        write_durably(mark, manifest.encode())

    async def bring_up(self, which: View, wanted: ms.ViewRef, number: int) -> str | None:
        """The file of a view; None for the bundle's own. By delta from the one before, else by snapshot.

        Args:
            which: "adapter" or "emulator". number: the round's or the alignment's.

        Raises:
            BlobCorrupt: the hub's snapshot has another digest than the view.
        """
        path = self._directory / f"{which}.safetensors"
        mark = self._directory / f"{which}.number"
        if wanted.snapshot is None or wanted.delta is None:
            write_durably(mark, str(number).encode())
            return None
        if await self.held(which, wanted.digest):
            write_durably(mark, str(number).encode())
            return str(path)
        held = int(mark.read_text()) if mark.exists() else 0
        first = 1 if which == "emulator" else 2
        if held == number - 1 or (not path.exists() and number == first):
            coded = self._directory / f"{which}.delta"
            moved = self._directory / f"{which}.moved"
            write_durably(coded, await self._fetch(wanted.delta))
            answer = await self._worker.call(
                Advance(
                    which=which,
                    view=str(path) if path.exists() else None,
                    delta=str(coded),
                    moved=wanted.moved,
                    codec=self._codec,
                    out=str(moved),
                )
            )
            coded.unlink()
            if answer.digest == wanted.digest:
                os.replace(moved, path)
                write_durably(mark, str(number).encode())
                return str(path)
        data = await self._fetch(wanted.snapshot)
        if sha256(data) != wanted.digest:
            raise BlobCorrupt(f"the hub's snapshot of the {which} LoRA has digest {sha256(data)[:12]}, not its own")
        write_durably(path, data)
        write_durably(mark, str(number).encode())
        return str(path)

    async def held(self, which: View, digest: ms.Digest) -> str | None:
        """The file of a view that is here already."""
        path = self._directory / f"{which}.safetensors"
        is_here = path.exists() and await asyncio.to_thread(sha256_file, path) == digest
        return str(path) if is_here else None

    def residual(self, round_number: int) -> str | None:
        """The error feedback of the last receipt; dropped after five missed rounds."""
        path, mark = self._directory / "residual", self._directory / "residual.round"
        if not path.exists() or round_number - int(mark.read_text()) > FORGET_RESIDUAL_AFTER:
            return None
        return str(path)

    def keep_residual(self, trained: Path, round_number: int) -> None:
        """From its receipt on, what a round left counts."""
        if trained.exists():  # gone when a crash came between this line and the next
            os.replace(trained, self._directory / "residual")
        write_durably(self._directory / "residual.round", str(round_number).encode())
