"""A whole join notes what leaves before it leaves, waits where it cannot, and hands in all the same."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from fedsoda_edge.data.local_data import LocalData
from fedsoda_edge.edge import Edge
from fedsoda_edge.join.home import Home
from fedsoda_edge.join.receipts import ReceiptLog, departures
from fedsoda_edge.protocol import messages as ms
from fedsoda_edge.protocol.codec import decode
from fedsoda_edge.testing import ScriptedHub
from tests.hurried_clock import HurriedClock
from tests.joins import joining
from tests.test_schemas import ROWS
from tests.worker_here import WorkerHere


class Reader(ScriptedHub):
    """Reads the device's file whenever something comes: `early` is what came without a line there."""

    def __init__(self, bundle: Path) -> None:
        super().__init__(2, bundle=bundle)
        self.early: list[str] = []
        self.came: list[str] = []

    async def send(self, frame: bytes) -> None:
        message = decode(frame)[0]
        if not isinstance(message, ms.UpdateChunk):
            self.came.append(type(message).__name__)
            text = Home().receipts.read_text() if Home().receipts.exists() else ""
            kind = message.__struct_config__.tag
            if f'"type":"{kind}"' not in text or (isinstance(message, ms.UpdateStart) and message.digest not in text):
                self.early.append(type(message).__name__)
        await super().send(frame)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "visits.jsonl"
    path.write_text(ROWS)
    return path


def take_part(hub: Reader, data: Path) -> list[dict[str, Any]]:
    events = list[dict[str, Any]]()
    with joining(
        Edge(hub, device="cpu"), LocalData(data), events.append, worker=WorkerHere(), clock=HurriedClock()
    ) as participation:
        for offer in participation:
            offer.submit(offer.train())
    return events


def test_nothing_leaves_before_it_is_noted(scripted: Path, data: Path) -> None:
    hub = Reader(scripted)
    take_part(hub, data)
    assert hub.came.count("UpdateStart") == 2
    assert hub.early == []
    found = departures(ReceiptLog(Home().receipts).lines()[0])
    kinds = [one.what for one in found]
    assert [kind for kind in kinds if kind not in ("progress", "download")] == ["hello", "ready", "update", "update"]
    assert kinds.count("download") == 1
    assert kinds.count("progress") <= 2
    assert [one.answer for one in found if one.what == "update"] == ["verified", "verified"]
    assert [one.digest for one in found if one.what == "update"] == [update.digest for update in hub.updates]


def test_where_the_file_has_no_room_the_update_waits_and_is_handed_in(scripted: Path, data: Path) -> None:
    hub, write, failed = Reader(scripted), os.write, list[bytes]()

    def full(handle: int, text: bytes) -> int:
        if b"update_start" in text and len(failed) < 3:
            failed.append(text)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(handle, text)

    with mock.patch.object(os, "write", full):
        events = take_part(hub, data)
    assert ([event["event"] for event in events].count("accepted"), len(failed)) == (2, 3)
    retried = [event["reason"] for event in events if event["event"] == "retrying"]
    assert ["nothing leaves that is not noted" in reason for reason in retried] == [True] * 3
    assert hub.early == []
    updates = [one for one in departures(ReceiptLog(Home().receipts).lines()[0]) if one.what == "update"]
    assert len(updates) == 2  # of the tries that were not made there is no line
