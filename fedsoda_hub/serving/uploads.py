"""Check and store updates between their last chunk and the machine's answer, and delete the blobs that nothing needs.

Needed are views and steps in force, the master, that of the best round where it is kept, moments, what the bundles of the last two draws hold, the updates of the
open round and the last of each edge (its receipt); docs/operations.md (o6-disk) says it for people. Whatever else lies
there is deleted after the record that made it needless is durable, so a hub killed in between deletes it at its next
start. Which update is accepted is `federation/collecting.py`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from fedsoda_edge.errors import ProtocolViolation
from fedsoda_edge.ports.disk import BlobStore
from fedsoda_edge.protocol.coded import check
from fedsoda_edge.protocol.manifest import TensorSpec
from fedsoda_edge.protocol.messages import Digest, EdgeId, UpdateStart
from fedsoda_edge.protocol.session import Upload
from fedsoda_hub.federation.best import Metric, best_of
from fedsoda_hub.federation.state import LedgerState
from fedsoda_hub.serving.spool import Spool, Spools


class Uploads:
    """The updates that arrived and are not judged yet, and the store that they go to.

    Args:
        spooled: the directory of what has not arrived whole.
        best_by: as `needed_blobs` takes it.
    """

    def __init__(self, blobs: BlobStore, codec: str, spooled: Path, best_by: Metric | None = None) -> None:
        self._blobs = blobs
        self._codec = codec
        self._best_by = best_by
        self._spools = Spools(spooled)
        self._arriving: Counter[Digest] = Counter()  # uploads by blob, from its writing until they are judged
        self._unkept: set[Digest] = set()  # blobs that an upload brought, until it is known that they are needed
        self._before: set[str] = set()  # what was needed when the store was last tidied: an export may still read it
        self._tidying = asyncio.Lock()
        self._deleting: frozenset[str] = frozenset()

    @property
    def num_unjudged(self) -> int:
        """The number of uploads that are stored and not judged yet."""
        return self._arriving.total()

    @property
    def spooled_bytes(self) -> int:
        """The bytes that uploads under way were announced with."""
        return self._spools.num_bytes

    def gather(self, start: UpdateStart, most_bytes: int, why_useless: str | None) -> Spool:
        """Make the place for an announced update.

        Args:
            most_bytes: those of the largest update of this run.
            why_useless: why its bytes are not needed; None: they are.
        """
        return self._spools.open(start, most_bytes, why_useless)

    async def take(self, upload: Upload, layout: tuple[TensorSpec, ...]) -> str | None:
        """Check an upload's structure and store its bytes durably.

        Returns:
            what is wrong with its structure, and then it is not stored; None: nothing.

        Raises:
            DiskFull: the disk has no space left; it is not stored.
            NoRoom: too many bytes were under way; it is not stored.
            Useless: it was useless when it was announced; it is not stored.
        """
        start, spool = upload.start, upload.place
        assert isinstance(spool, Spool), "`gather` made it"
        try:
            if spool.problem is not None:
                raise spool.problem
            if start.codec != self._codec:
                raise ProtocolViolation(
                    f"the update is coded as {start.codec}, but this run codes as {self._codec}; join again"
                )
            await asyncio.to_thread(check, upload.data, layout, self._codec)
            await self._store(start.digest, spool)
        except ProtocolViolation as error:
            return str(error)
        finally:
            await asyncio.to_thread(spool.drop)
        return None

    async def _store(self, digest: Digest, spool: Spool) -> None:
        while digest in self._deleting:  # the same bytes, which nobody needed a moment ago
            async with self._tidying:
                pass
        if not self._arriving[digest] and not self._blobs.has(digest):
            self._unkept.add(digest)
        self._arriving[digest] += 1
        try:
            await asyncio.to_thread(spool.keep, self._blobs)
        except BaseException:
            self._done(digest)
            raise

    def judged(self, edge: EdgeId, digest: Digest, state: LedgerState) -> None:
        """Note that an upload of this blob was accepted or refused."""
        self._done(digest)
        if digest in _digests_of(edge, state):
            self._unkept.discard(digest)

    def _done(self, digest: Digest) -> None:
        self._arriving[digest] -= 1
        if not self._arriving[digest]:
            del self._arriving[digest]

    async def forget_refused(self, state: LedgerState) -> None:
        """Delete the blobs of updates that were refused. A blob that existed before is not among them.

        Call it only while no job runs: a result may have the same bytes, which is not known until it is recorded.
        """
        if self._unkept:
            refused = {digest for digest in self._unkept if digest not in self._arriving}
            self._unkept -= refused
            await self._delete(refused - _of_run(state))

    async def tidy(self, state: LedgerState, lent: Iterable[str], *, is_start: bool = False) -> None:
        """Delete the blobs that nothing needs, and did not need at the last call either.

        Call it only while no job runs, before anything is started: what a job writes is needed when it is recorded.

        Args:
            lent: what the bundles hold that edges may ask for.
            is_start: nothing arrives yet; what a hub left that was killed is deleted too.
        """
        if is_start:
            await asyncio.to_thread(self._spools.clear)
            await asyncio.to_thread(self._blobs.delete_unfinished)
        there = await asyncio.to_thread(self._blobs.digests)
        needed = needed_blobs(state, self._best_by) | set(lent)
        await self._delete(set(there) - needed - self._before - set(self._arriving) - self._unkept)
        self._before = needed

    async def _delete(self, digests: set[str] | set[Digest]) -> None:
        if digests:
            async with self._tidying:
                self._deleting = frozenset(digests)
                try:
                    await asyncio.to_thread(_deleted, self._blobs, self._deleting)
                finally:
                    self._deleting = frozenset()


def _digests_of(edge: EdgeId, state: LedgerState) -> set[Digest]:
    return {one.digest for one in (state.accepted.get(edge), state.receipts.get(edge)) if one is not None}


def _of_run(state: LedgerState) -> set[str]:
    return {state.master, *state.views} | ({state.moments} if state.moments is not None else set())


def needed_blobs(state: LedgerState, best_by: Metric | None = None) -> set[str]:
    """Return the digests that a run in this state needs, besides those of its bundles.

    Args:
        best_by: [task] metric of a run that keeps the best round; None: of one that keeps the last.
    """
    best = None if best_by is None else best_of(state.judged, best_by)
    kept = set() if best is None else {best.master, best.emulator_view, best.manifest}
    updates = {update.digest for update in (*state.accepted.values(), *state.receipts.values())}
    return _of_run(state) | updates | kept | {one.manifest for one in state.sub_llms}


def _deleted(blobs: BlobStore, digests: frozenset[str]) -> None:
    for digest in digests:
        with contextlib.suppress(OSError):  # a blob that stays only takes space
            blobs.delete(digest)
