"""Search for marked private text in all that a join leaves and sends: files, what is printed, processes, bytes on the wire.

Rows carry words that exist nowhere else. They are searched for as text, as token ids and coded in the usual ways, after a
run, after kill -9 of each process, after a full disk and after crashes whose exceptions quote a row. What the search finds
of hits that are planted shows that it would find others. `bench_trust.py` runs it with the other parts.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from unittest import mock

from canary_federation import federation_with_kills
from canary_search import CRASH, PLANTED, SENTENCE, Search, environment_of
from tokenizers import Tokenizer

from fedsoda_edge.data.local_data import LocalData
from fedsoda_edge.edge import Edge, agent_of
from fedsoda_edge.edge import Participation as Joined
from fedsoda_edge.errors import FedSODAError, WorkerFailed
from fedsoda_edge.events import AnyEvent, Training, as_json
from fedsoda_edge.join import status
from fedsoda_edge.join.trainer import WORKER_MODULE, worker_environment
from fedsoda_edge.ports.child import Child
from fedsoda_edge.ports.confine import Reach
from fedsoda_edge.ports.disk import sha256_file
from fedsoda_edge.protocol import commands as cmd
from fedsoda_edge.protocol.messages import Digest
from fedsoda_edge.testing import ScriptedHub

NUM_ROWS = 8

# --- scenes ----------------------------------------------------------------------------------------------------------


def measure(quick: bool) -> dict[str, object]:
    """Count the places that were searched, and those where a marked word was found.

    Args:
        quick: whether nothing is killed, and the federation of real processes is left out.
    """
    with tempfile.TemporaryDirectory(prefix="bench-canaries-") as made:
        top = Path(made).resolve()
        model, space = top / "model", top / "space"
        space.mkdir()
        _without_output([sys.executable, "-m", "fedsoda_edge.testing", str(model)], {})
        search = Search(Tokenizer.from_file(str(model / "tokenizer.json")))
        missed = planted_hits_missed(search, top / "planted")
        rows = write_rows(space / "rows.jsonl")
        shared = _shared()
        stages = crashes_of_the_worker(search, space, rows, model)
        stages += _crash_of_the_agent(search, space, rows)
        stages += _refused_row(search, space, model)
        stages += _run_with_a_scripted_hub(search, space, rows, model, is_killed=not quick)
        if not quick:
            stages += federation_with_kills(search, space, rows)
        search.look_below(space, [rows, *space.glob("*.private")])
        for path in _shared() - shared:
            search.look(f"shared memory, {path.name}", path.read_bytes())
        wrong = sorted(set(search.hits)) + [f"a planted hit is not found: {form}" for form in missed]
        tried = search.places + len(search.forms)
        return {
            "tried": tried,
            "right": max(0, tried - len(wrong)),
            "wrong": wrong[:20],
            "places": search.places,
            "forms": len(search.forms),
            "crashes_and_kills": stages,
        }


def planted_hits_missed(search: Search, top: Path) -> list[str]:
    """Plant each form in a file of its own, and list those that the search does not find there."""
    top.mkdir()
    missed = []
    for number, (form, needle) in enumerate(search.forms.items()):
        (top / f"{number}.bin").write_bytes(b"\0\xff before " + needle + b" after")
        looked = Search.__new__(Search)
        looked.forms, looked.places, looked.hits = search.forms, 0, []
        looked.look_below(top, [])
        if not any(hit.startswith(form) for hit in looked.hits):
            missed.append(form)
        (top / f"{number}.bin").unlink()
    return missed


def write_rows(path: Path) -> Path:
    """Write rows of the marked words, with letters beyond ASCII as they are and escaped."""
    lines = [
        {"prompt": f"{at} {SENTENCE}", "completion": f"{SENTENCE} {'yes' if at % 2 else 'no'}"}
        for at in range(NUM_ROWS)
    ]
    path.write_text("".join(json.dumps(line, ensure_ascii=bool(at % 2)) + "\n" for at, line in enumerate(lines)))
    return path


def _shared() -> set[Path]:
    return {path for path in Path("/dev/shm").glob("*") if path.is_file()}


def _without_output(command: list[str], environment: Mapping[str, str]) -> None:
    subprocess.run(command, env={**os.environ, **environment}, check=True, capture_output=True, timeout=600)


def crashes_of_the_worker(search: Search, space: Path, rows: Path, model: Path) -> int:
    """Let the worker meet exceptions of all kinds that quote a row, then print one and abort; return how many it met."""
    temporary = space / "home" / "tmp"
    temporary.mkdir(parents=True, exist_ok=True)
    reach = Reach(reads=(str(rows), str(space / "store")), may_use_gpu=False)
    environment = environment_of(space, **{CRASH: "worker"}) | worker_environment(temporary, reach)

    async def meet() -> int:
        worker, count = Child(WORKER_MODULE, environment), 0
        opening = _opening(space / "store", rows, model)
        try:
            while True:
                count += 1
                try:
                    await worker.call(opening)
                except WorkerFailed as error:
                    search.look("an error of the worker", f"{error} {error.details} {error.fields()}".encode())
                    if "ended with status" in str(error):
                        return count
                except FedSODAError as error:
                    search.look("an error of the worker", f"{error} {error.fields()}".encode())
        finally:
            await worker.close()

    return asyncio.run(meet())


def _opening(store: Path, rows: Path, model: Path) -> cmd.Open:
    """Put the model's bundle into a store, and return the call that opens it with the rows."""
    store.mkdir(exist_ok=True)
    for path in model.iterdir():
        shutil.copy(path, store / sha256_file(path))
    return cmd.Open(
        store=str(store),
        manifest=Digest(sha256_file(model / "manifest.json")),
        rows=cmd.Rows(path=str(rows), columns={}, prompt="{prompt}", completion="{completion}"),
        max_length=64,
    )


def _crash_of_the_agent(search: Search, space: Path, rows: Path) -> int:
    """Let the agent's own look at the rows raise an exception that quotes one, with and without --debug."""
    for number, options in enumerate(([], ["--debug", "--json"])):
        command = [sys.executable, "-m", "fedsoda_edge", "join", "http://127.0.0.1:9", "--data", str(rows), *options]
        ended = subprocess.run(
            command,
            env={**os.environ, **environment_of(space, **{CRASH: "agent", "FEDSODA_TOKEN": "t"})},
            cwd=space,
            capture_output=True,
            timeout=300,
            check=False,
        )
        if b"ValueError" not in ended.stderr:
            search.hits.append(f"the agent's planted crash did not happen: {ended.stderr[-300:]!r}")
        (space / f"agent-{number}.log").write_bytes(ended.stdout + ended.stderr)
    return 2


def _refused_row(search: Search, space: Path, model: Path) -> int:
    """Join with a row that is refused after the hub's greeting: its sentence is for the terminal alone."""
    bad = space / "bad.private"
    bad.write_text(json.dumps({"prompt": f"1 {SENTENCE}", "completion": [SENTENCE]}) + "\n")
    hub = Recorded(model)
    with mock.patch.dict(os.environ, environment_of(space)):
        agent = agent_of(Edge(hub, home=space / "home"), LocalData.from_jsonl(bad), lambda event: None)
    with contextlib.suppress(FedSODAError), Joined(agent, 0):
        pass
    search.look("bytes on the wire", hub.wire())
    search.look_below(space / "home", [])
    return 1


class Recorded(ScriptedHub):
    """A scripted hub that keeps every byte of both directions."""

    def __init__(self, model: Path) -> None:
        super().__init__(1, bundle=model)
        self._said: list[bytes] = []

    async def send(self, frame: bytes) -> None:
        """Take a message of the edge."""
        self._said.append(frame)
        await super().send(frame)

    def wire(self) -> bytes:
        """Return what the edge sent."""
        return b"".join(self._said)


def _run_with_a_scripted_hub(search: Search, space: Path, rows: Path, model: Path, *, is_killed: bool) -> int:
    """Join with a real worker, which may be killed in the middle of its round and then trains it to its end."""
    hub, said, killed = Recorded(model), list[bytes](), list[int]()

    def heard(event: AnyEvent) -> None:
        said.append(json.dumps(as_json(event)).encode())
        if isinstance(event, Training):
            search.look_at_processes(os.getpid())
        if isinstance(event, Training) and is_killed and not killed and agent.worker.pid is not None:
            killed.append(agent.worker.pid)
            os.kill(agent.worker.pid, signal.SIGKILL)

    with mock.patch.dict(os.environ, environment_of(space)):
        agent = agent_of(Edge(hub, home=space / "home", device="cpu", threads=1), LocalData.from_jsonl(rows), heard)
        with Joined(agent, 0) as participation:
            for offer in participation:
                update = offer.train()
                search.look("the update", update.path.read_bytes())
                search.look_below(space / "home", [])  # while the encrypted cache is there
                offer.submit(update)
    search.look("bytes on the wire", hub.wire())
    search.look("events", b"\n".join(said))
    return 1 + len(killed)


# --- planted defects ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _planted(**statements: str) -> Iterator[None]:
    """Make all children defective: {module, with _ for .: statement that runs once it is imported}."""
    named = {name.replace("__", "."): statement for name, statement in statements.items()}
    with mock.patch.dict(os.environ, {PLANTED: json.dumps(named)}):
        yield


@contextlib.contextmanager
def _patched(target: object, name: str, value: object) -> Iterator[None]:
    with mock.patch.object(target, name, value):
        yield


DEFECTS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "the worker says the words of a defect": lambda: _planted(fedsoda_edge__ports__child="sentence_of = str"),
    "the worker does not fall silent": lambda: _planted(fedsoda_edge__ports__child="_fall_silent = lambda: None"),
    "the command says the words of a defect": lambda: _planted(fedsoda_edge__ports__console="sentence_of = str"),
    "the status file quotes rows": lambda: _patched(status, "_unquoted", str),
}
