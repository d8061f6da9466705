"""Run a federation of real processes over loopback, kill each of them at each stage, and search what remains.

What is searched for is left to `canary_search.py`; `bench_trust_canaries.py` counts.
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import threading
from pathlib import Path

import psutil
from canary_search import PLANTED, Search, environment_of

STAGES = {"before the sweep": "data", "in the sweep": "sweep", "in training": "training", "at the upload": "trained"}
STAGES |= {"between rounds": "accepted"}
RUN = """
name = "t"
model = "{model}"
[method]
adapter_layers = 2
layers_per_group = 1
groups = 2
[lora]
rank = 4
alpha = 8
[public]
text = "public.txt"
sequences = 8
length = 32
[align]
steps = 2
[rounds]
count = 400
min_edges = 1
[local]
epochs = 8
max_steps = 12
batch_size = 4
max_length = 96
[listen]
port = {port}
"""


class Relay:
    """A way between edge and hub that keeps all bytes of both directions, each connection on its own."""

    def __init__(self, to_port: int) -> None:
        self._server = socket.create_server(("127.0.0.1", 0))
        self._to = to_port
        self.port = int(self._server.getsockname()[1])
        self.streams: list[bytearray] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                edge, _ = self._server.accept()
            except OSError:
                return
            try:
                hub = socket.create_connection(("127.0.0.1", self._to), 10)
            except OSError:
                edge.close()
                continue
            hub.settimeout(None)
            for one, other in ((edge, hub), (hub, edge)):
                kept = bytearray()
                self.streams.append(kept)
                threading.Thread(target=self._pass_on, args=(one, other, kept), daemon=True).start()

    @staticmethod
    def _pass_on(one: socket.socket, other: socket.socket, kept: bytearray) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(1 << 16):
                kept += data
                other.sendall(data)
        for end in (one, other):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Take no more connections."""
        self._server.close()


def unmasked(stream: bytes) -> bytes:
    """Return what a client of a websocket sent, RFC 6455: after the handshake each frame is masked by a key of its own."""
    head, mark, rest = stream.partition(b"\r\n\r\n")
    if not mark or b"websocket" not in head.lower():
        return stream
    found, at = [head], 0
    while at + 2 <= len(rest):
        length, at = rest[at + 1] & 0x7F, at + 2
        is_masked = bool(rest[at - 1] & 0x80)
        more = {126: 2, 127: 8}.get(length, 0)
        length = int.from_bytes(rest[at : at + more], "big") if more else length
        at += more
        key = rest[at : at + 4] if is_masked else bytes(4)
        at += 4 if is_masked else 0
        data = rest[at : at + length]
        whole = (key * (len(data) // 4 + 1))[: len(data)]
        found.append((int.from_bytes(data, "big") ^ int.from_bytes(whole, "big")).to_bytes(len(data), "big"))
        at += length
    return b"".join(found)


def federation_with_kills(search: Search, space: Path, rows: Path) -> int:
    """Run hub and edge as processes; kill agent, worker, hub and compute at each stage, and let it go on each time."""
    from tests.commands import Commands
    from tests.tiny import make_tiny_llama

    model = make_tiny_llama(space.parent / "tiny")
    search.look("the full model's files", b"".join(path.read_bytes() for path in model.iterdir()))
    (space / "public.txt").write_text("The cat sat on the mat and the dog ran in the rain. " * 60)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = int(free.getsockname()[1])
    (space / "run.toml").write_text(RUN.format(model=model, port=port))
    relay, count = Relay(port), 0
    try:
        with Commands(space, environment_of(space)) as commands:
            token = commands.ask("fedsoda_hub", "token", "create", "run.toml", "--name", "a")["token"]
            (space / "a.token").write_text(str(token))
            join = ["join", f"http://127.0.0.1:{relay.port}", "--data", str(rows), "--token-file", "a.token"]
            hub = commands.start("hub", "fedsoda_hub", "serve", "run.toml")
            commands.wait_for("hub", event="prepared")
            for event in STAGES.values():
                for target in ("agent", "worker", "hub", "compute"):
                    log = f"edge-{count}"
                    edge = commands.start(log, "fedsoda_edge", *join, "--unattended", "--debug")
                    commands.wait_for(log, event=event)
                    search.look_at_processes(edge.pid, hub.pid)
                    _kill(target, edge, hub)
                    if target == "agent":
                        commands.forget(edge)
                        log = f"edge-{count}-again"
                        edge = commands.start(log, "fedsoda_edge", *join, "--unattended")
                    if target == "hub":
                        commands.forget(hub)
                        hub = commands.start("hub", "fedsoda_hub", "serve", "run.toml")
                    commands.wait_for(log, event="accepted")
                    search.look_below(space / "home", [])  # with the cache
                    edge.kill()
                    edge.wait()
                    commands.forget(edge)
                    count += 1
            full = {"fedsoda_edge.ports.disk": _FULL_DISK}
            edge = commands.start("edge-full", "fedsoda_edge", *join, environment={PLANTED: json.dumps(full)})
            edge.wait(timeout=600)
            commands.forget(edge)
            if b"disk is full" not in (space / "edge-full.log").read_bytes():
                search.hits.append("the disk was not full")
            count += 1
    finally:
        relay.close()
    for number, stream in enumerate(relay.streams):
        search.look(f"stream {number}", bytes(stream))
        search.look(f"stream {number}, unmasked", unmasked(bytes(stream)))
    return count


_FULL_DISK = """
_replace = os.replace
def _full(one, other):
    if "update" in str(other):
        raise OSError(28, "No space left on device", str(other))
    _replace(one, other)
os.replace = _full
"""


def _kill(target: str, edge: subprocess.Popen[str], hub: subprocess.Popen[str]) -> None:
    """Kill a process -9: a command, or the one that a command owns."""
    owner = edge if target in ("agent", "worker") else hub
    if target in ("agent", "hub"):
        owner.kill()
        owner.wait()
        return
    for child in psutil.Process(owner.pid).children():
        child.kill()
