"""A whole join takes its bundle from a plain HTTP server, and the hub is asked for none of its files."""

from __future__ import annotations

import shutil
import threading
from collections.abc import AsyncIterator, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import msgspec
import pytest

from fedsoda_edge.data.local_data import LocalData
from fedsoda_edge.edge import Edge
from fedsoda_edge.join.home import Home
from fedsoda_edge.join.receipts import ReceiptLog, departures
from fedsoda_edge.ports.disk import sha256_file
from fedsoda_edge.protocol import messages as ms
from fedsoda_edge.protocol.statements import BundleStatement, sign
from fedsoda_edge.testing import KEY, ScriptedHub
from tests.hurried_clock import HurriedClock
from tests.joins import joining
from tests.test_schemas import ROWS
from tests.worker_here import WorkerHere


class Mirrored(ScriptedHub):
    """A hub that signs a mirror, and counts the files that it is asked for all the same."""

    def __init__(self, bundle: Path, mirror: str) -> None:
        super().__init__(1, bundle=bundle)
        self._mirror = mirror
        self.asked: list[str] = []

    def _say(self, message: ms.HubMessage) -> None:
        super()._say(message)
        if isinstance(message, ms.Welcome):
            self._out.get_nowait()
            said = BundleStatement(
                run_id=message.run_id,
                version=1,
                signed_at=0,
                expires=2**40,
                manifests=(message.manifest,),
                mirrors=(self._mirror,),
            )
            self._session.state = "greeted"
            welcome = msgspec.structs.replace(message, signed=sign(KEY, said))
            self._out.put_nowait(self._session.send(welcome))

    async def fetch(self, digest: str, offset: int) -> AsyncIterator[bytes]:
        self.asked.append(digest)
        async for piece in super().fetch(digest, offset):
            yield piece


class Quiet(SimpleHTTPRequestHandler):
    """The standard library's server, which knows no ranges."""

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def mirror(scripted: Path, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The URL of a server with the bundle's files by digest, and its directory."""
    directory = tmp_path / "cdn"
    directory.mkdir()
    for path in scripted.iterdir():
        shutil.copy(path, directory / sha256_file(path))
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(directory))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", directory
        server.shutdown()


def join(hub: Mirrored, tmp_path: Path) -> list[str]:
    """Take part to the end; the sentences that people saw."""
    data, events = tmp_path / "visits.jsonl", list[dict[str, object]]()
    data.write_text(ROWS)
    with joining(
        Edge(hub, device="cpu"), LocalData(data), events.append, worker=WorkerHere(), clock=HurriedClock()
    ) as participation:
        for offer in participation:
            assert offer.submit(offer.train())
    return [str(event["message"]) for event in events if event["event"] == "notice"]


def test_all_files_come_from_a_plain_server(
    scripted: Path, mirror: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "*")
    url, _ = mirror
    hub = Mirrored(scripted, url)
    assert not any("mirror" in said for said in join(hub, tmp_path))
    assert hub.asked == []
    found = departures(ReceiptLog(Home().receipts).lines()[0])
    assert [one.hub for one in found if one.what == "download"] == [url]


def test_a_file_that_is_missing_or_wrong_there_comes_from_the_hub(
    scripted: Path, mirror: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "*")
    url, directory = mirror
    missing, wrong = (sha256_file(scripted / name) for name in ("embedding.safetensors", "norm.safetensors"))
    (directory / missing).unlink()
    (directory / wrong).write_bytes(b"?" * (directory / wrong).stat().st_size)
    hub = Mirrored(scripted, url)
    said = [sentence for sentence in join(hub, tmp_path) if "mirror" in sentence]
    assert len(said) == 2
    assert "HTTP 404" in said[0]
    assert "asks it no more" in said[1]
    assert hub.asked[:2] == [missing, wrong]
