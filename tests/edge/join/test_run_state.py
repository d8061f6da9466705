"""What a device holds of a run: views that are brought up to the hub's, and an update that waits for its answer."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import msgspec
import pytest

from fedsoda_edge.errors import BlobCorrupt, DiskFull, ProtocolViolation
from fedsoda_edge.join.run_state import RunState
from fedsoda_edge.ports.disk import sha256, write_durably
from fedsoda_edge.protocol import messages as ms
from fedsoda_edge.protocol.commands import Advance, Advanced, View
from fedsoda_edge.protocol.manifest import BundleManifest, TensorSpec
from tests.full_disk import full_disk_for


class Hub:
    """Snapshots and steps of each round; a view is its round's name, and a step adds to it."""

    def __init__(self) -> None:
        self.fetched: list[str] = []

    def view(self, number: int, *, is_first: bool = False) -> ms.ViewRef:
        data = f"view {number}".encode()
        ref = ms.BlobRef(digest=ms.Digest(sha256(data)), bytes=len(data))
        step = ms.BlobRef(digest=ms.Digest(f"step {number}"), bytes=1)
        return ms.ViewRef(digest=ref.digest, delta=None if is_first else step, snapshot=None if is_first else ref)

    async def fetch(self, blob: ms.BlobRef) -> bytes:
        name = blob.digest if blob.digest.startswith("step") else "snapshot"
        self.fetched.append(name)
        return name.encode() if name != "snapshot" else b"view 9"


class Worker:
    """Adds a delta: the view after a step is named by the step's number, whatever it began with."""

    def __init__(self) -> None:
        self.began_with: list[str | None] = []
        self.codecs: list[str] = []

    async def advance(self, call: Advance) -> Advanced:
        self.codecs.append(call.codec)
        self.began_with.append(call.view)
        number = Path(call.delta).read_text().removeprefix("step ")
        Path(call.out).write_text(f"view {number}")
        return Advanced(ms.Digest(sha256(f"view {number}".encode())))


class Held:
    """What a device holds of a run, with its hub and its worker."""

    def __init__(self, directory: Path, codec: str = "bf16") -> None:
        self.state, self.hub, self.worker = RunState(directory, codec), Hub(), Worker()

    async def bring_up(self, view: ms.ViewRef, number: int) -> str | None:
        return await self.state.bring_up("adapter", view, number, self.hub.fetch, self.worker.advance)


@pytest.fixture
def held(tmp_path: Path) -> Held:
    return Held(tmp_path)


@pytest.mark.parametrize(("codec", "of_alignments"), [("bf16", "bf16"), ("klt", "nf4"), ("klt-fine", "nf4")])
def test_alignments_are_decoded_as_the_hub_codes_them(tmp_path: Path, codec: str, of_alignments: str) -> None:
    held = Held(tmp_path, codec)

    async def run() -> None:
        asked: list[tuple[View, int]] = [("adapter", 2), ("emulator", 1)]
        for which, number in asked:
            view = held.hub.view(number)
            assert await held.state.bring_up(which, view, number, held.hub.fetch, held.worker.advance) is not None

    asyncio.run(run())
    assert held.worker.codecs == [codec, of_alignments]


def test_after_a_draw_the_view_is_the_new_bundles_own_and_a_delta_leads_on(held: Held) -> None:
    async def run() -> None:
        hub = held.hub
        held.state.begin_bundle(ms.Digest("first"))
        assert await held.bring_up(hub.view(1, is_first=True), 1) is None
        assert await held.bring_up(hub.view(2), 2) is not None
        held.state.begin_bundle(ms.Digest("drawn"))
        assert await held.bring_up(hub.view(3, is_first=True), 3) is None
        path = await held.bring_up(hub.view(4), 4)
        assert path is not None
        assert Path(path).read_text() == "view 4"
        assert hub.fetched == ["step 2", "step 4"]
        assert held.worker.began_with == [None, None]  # each from its bundle's own
        held.state.begin_bundle(ms.Digest("drawn"))  # a join that begins again with the same bundle keeps what it has
        assert await held.bring_up(hub.view(4), 4) == path
        assert hub.fetched == ["step 2", "step 4"]

    asyncio.run(run())


def test_who_was_not_asked_in_the_first_round_of_a_draw_takes_the_snapshot(held: Held) -> None:
    async def run() -> None:
        held.state.begin_bundle(ms.Digest("first"))
        await held.bring_up(held.hub.view(7, is_first=True), 7)
        held.state.begin_bundle(ms.Digest("drawn"))
        await held.bring_up(held.hub.view(9), 9)
        assert held.hub.fetched == ["snapshot"]

    asyncio.run(run())


def test_a_snapshot_that_is_not_the_view_it_was_announced_as_is_not_kept(held: Held) -> None:
    async def run() -> None:
        held.state.begin_bundle(ms.Digest("first"))
        with pytest.raises(
            BlobCorrupt, match=r"the hub's snapshot of the adapter LoRA has digest .*, it was announced as"
        ):
            await held.bring_up(held.hub.view(8), 8)  # the hub sends view 9
        assert held.hub.fetched == ["snapshot"]
        assert await held.state.held("adapter", held.hub.view(8).digest) is None
        assert await held.state.held("adapter", held.hub.view(9).digest) is None
        await held.bring_up(held.hub.view(9), 9)  # nor does anything trip over it
        assert held.hub.fetched == ["snapshot"] * 2

    asyncio.run(run())


# --- an update that waits --------------------------------------------------------------------------------------------


def trained(state: RunState, number: int) -> ms.UpdateStart:
    """A round as the worker and the agent leave it."""
    state.begin_round()
    write_durably(state.update, f"update {number}".encode())
    write_durably(state.new_residual, f"residual {number}".encode())
    start = ms.UpdateStart(
        round=number,
        base=ms.Digest("0" * 64),
        alignment=0,
        digest=ms.Digest(sha256(state.update.read_bytes())),
        bytes=8,
        codec="int8",
        num_examples=1,
        loss=0.5,
    )
    state.commit(start)
    return start


def contents(state: RunState, number: int) -> str | None:
    path = state.residual(number)
    return path and Path(path).read_text()


def test_a_residual_counts_from_its_receipt_on_and_not_after_a_refusal(tmp_path: Path) -> None:
    state = RunState(tmp_path, "bf16")
    assert (state.pending(), state.residual(1)) == (None, None)
    first = trained(state, 1)
    assert (state.pending(), contents(state, 2)) == (first, None)
    state.settle(first, accepted=True)
    assert (state.pending(), contents(state, 2)) == (None, "residual 1")
    state.settle(trained(state, 2), accepted=False)
    assert (state.pending(), contents(state, 3)) == (None, "residual 1")
    assert contents(state, 6) == "residual 1"
    assert state.residual(7) is None  # too many rounds were missed


def test_a_crash_after_any_write_of_an_answer_leaves_an_update_that_is_sent_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub gives its first receipt again, and the second time all writes are done."""
    state = RunState(tmp_path, "bf16")
    start = trained(state, 1)

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    for broken in ("os.replace", "write_durably", "RunState.forget_pending"):
        with monkeypatch.context() as patch:
            patch.setattr(f"fedsoda_edge.join.run_state.{broken}", crash)
            with pytest.raises(KeyboardInterrupt):
                state.settle(start, accepted=True)
        assert RunState(tmp_path, "bf16").pending() == start
    state.settle(start, accepted=True)
    assert (state.pending(), contents(state, 2)) == (None, "residual 1")


@pytest.mark.parametrize("gives_up", ["settle", "begin_round"])
def test_a_first_residual_counts_where_its_round_could_not_be_written_down_any_more(
    tmp_path: Path, gives_up: str
) -> None:
    """The receipt had come; after the crash the hub refuses the update, which is too late by now, or asks for another."""
    state = RunState(tmp_path, "bf16")
    start = trained(state, 1)
    with full_disk_for("residual.round"), pytest.raises(DiskFull):
        state.settle(start, accepted=True)
    if gives_up == "settle":
        state.settle(start, accepted=False)
    else:
        state.begin_round()
    assert contents(state, 2) == "residual 1"
    state.settle(trained(state, 2), accepted=True)
    assert (contents(state, 7), contents(state, 8)) == ("residual 2", None)


def test_a_round_that_is_begun_gives_the_update_up_that_waited(tmp_path: Path) -> None:
    state = RunState(tmp_path, "bf16")
    trained(state, 1)
    state.begin_round()
    assert RunState(tmp_path, "bf16").pending() is None


def test_a_view_that_is_larger_than_its_manifest_allows_is_not_fetched(held: Held) -> None:
    layout = (TensorSpec("layers.1.q.lora_A", (8, 64)),)
    held.state.bound_views(cast(BundleManifest, SimpleNamespace(lora=SimpleNamespace(adapter=layout, emulator=layout))))
    view = held.hub.view(9)
    assert view.snapshot is not None

    snapshot = view.snapshot

    async def run() -> None:
        huge = msgspec.structs.replace(snapshot, bytes=1 << 30)
        with pytest.raises(ProtocolViolation, match="announces 1073741824 bytes for a view of the adapter LoRA"):
            await held.bring_up(msgspec.structs.replace(view, snapshot=huge), 9)
        assert held.hub.fetched == []
        assert await held.bring_up(view, 9) is not None

    asyncio.run(run())
