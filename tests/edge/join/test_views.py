"""The views that an edge holds, brought up by delta where one leads there from what it has, else by snapshot."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from fedsoda_edge.join.views import Views
from fedsoda_edge.ports.disk import sha256
from fedsoda_edge.protocol import messages as ms
from fedsoda_edge.protocol.commands import Advance, Advanced


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
    """Answers `Advance`: the view after a step is named by the step's number, whatever it began with."""

    def __init__(self) -> None:
        self.began_with: list[str | None] = []

    async def call(self, call: Advance, _: Any = None) -> Advanced:
        self.began_with.append(call.view)
        number = Path(call.delta).read_text().removeprefix("step ")
        Path(call.out).write_text(f"view {number}")
        return Advanced(ms.Digest(sha256(f"view {number}".encode())))


@pytest.fixture
def held(tmp_path: Path) -> tuple[Views, Hub, Any]:
    hub, worker = Hub(), Worker()
    spoken: Any = worker
    return Views(tmp_path, "bf16", spoken, hub.fetch), hub, worker


def test_after_a_draw_the_view_is_the_new_bundles_own_and_a_delta_leads_on(held: tuple[Views, Hub, Any]) -> None:
    async def run() -> None:
        views, hub, worker = held
        views.begin(ms.Digest("first"))
        assert await views.bring_up("adapter", hub.view(1, is_first=True), 1) is None
        assert await views.bring_up("adapter", hub.view(2), 2) is not None
        views.begin(ms.Digest("drawn"))
        assert await views.bring_up("adapter", hub.view(3, is_first=True), 3) is None
        path = await views.bring_up("adapter", hub.view(4), 4)
        assert path is not None
        assert Path(path).read_text() == "view 4"
        assert hub.fetched == ["step 2", "step 4"]
        assert worker.began_with == [None, None]  # each from its bundle's own
        views.begin(ms.Digest("drawn"))  # a join that begins again with the same bundle keeps what it has
        assert await views.bring_up("adapter", hub.view(4), 4) == path
        assert hub.fetched == ["step 2", "step 4"]

    asyncio.run(run())


def test_who_was_not_asked_in_the_first_round_of_a_draw_takes_the_snapshot(held: tuple[Views, Hub, Any]) -> None:
    async def run() -> None:
        views, hub, _ = held
        views.begin(ms.Digest("first"))
        await views.bring_up("adapter", hub.view(7, is_first=True), 7)
        views.begin(ms.Digest("drawn"))
        await views.bring_up("adapter", hub.view(9), 9)
        assert hub.fetched == ["snapshot"]

    asyncio.run(run())
