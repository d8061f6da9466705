"""Count forged frames that are taken, raise or leave something behind: hub, edge, coded updates, manifests.

    cd scripts && python -c "import bench_trust_frames as b, json; print(json.dumps(b.measure(quick=False), indent=1))"

A million of them in the full mode, from one seed: every field of every message as any token of JSON, damaged frames, uploads
that overlap, go back, exceed or stop, frames of other connections, rounds, edges and sides. `trust_frames_judge` says what may
follow from docs/protocol.md alone. What was once found lies in tests/data/forged_frames.json, and is tried first.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import psutil
import trust_frames_edge
import trust_frames_hub
import trust_frames_payloads
from trust_frames_corpus import replay

from fedsoda_edge.protocol import codec, coded, klt, session
from fedsoda_hub.federation import collecting
from fedsoda_hub.serving import roster

SEED = 20260118
FULL, QUICK = 1_000_000, 8_000
SHARES = {"hub": 0.3, "edge": 0.3, "payloads": 0.4}
MOST_GROWTH = 24 << 20  # bytes of memory between the first part of a run, when all is imported and cached, and its end
PARTS = 8


def measure(quick: bool) -> dict[str, Any]:
    """Forge frames, and count those with which all was right.

    Returns:
        tried, right, wrong (sentences); by kind how many were tried; growth: bytes of memory that were not given back.
    """
    tries = QUICK if quick else FULL
    wrong, found = replay()
    counts: dict[str, Any] = {"tried": 0, "right": 0, "corpus": found}
    counts["tried"] += found
    counts["right"] += found - len(wrong)
    for kind, share in SHARES.items():
        before, growth, done = 0, 0, 0
        parts = 2 if quick else PARTS
        for part in range(parts):
            try:
                result = _run(kind, SEED + part, round(tries * share / parts))
            except Exception as error:  # a defect of the product ends its daemon; it is what is counted here
                result = {"tried": 1, "right": 0, "wrong": [f"{kind}: {error!r:.200}"]}
            counts["tried"] += result["tried"]
            counts["right"] += result["right"]
            done += result["tried"]
            wrong += [f"{kind}: {sentence}" for sentence in result["wrong"]]
            gc.collect()
            held = psutil.Process().memory_info().rss
            growth = held - before if part else 0
            before = before or held
        counts[kind] = done
        counts[f"{kind}_growth_bytes"] = growth
        if growth > MOST_GROWTH:
            wrong.append(f"{kind}: memory grew by {growth} bytes, at most {MOST_GROWTH} are allowed")
    return counts | {"wrong": wrong[:20]}


def _run(kind: str, seed: int, tries: int) -> dict[str, Any]:
    match kind:
        case "hub":
            with tempfile.TemporaryDirectory(prefix="forged-") as directory:
                return dict(asyncio.run(trust_frames_hub.run(Path(directory), seed, tries)))
        case "edge":
            return asyncio.run(trust_frames_edge.run(seed, tries))
        case _:
            return trust_frames_payloads.run(seed, tries)


# --- planted defects -----------------------------------------------------------------------------------------------------


def _chunks_anywhere() -> AbstractContextManager[Any]:
    """Take a chunk of an update or a blob wherever it says that it belongs."""

    def add(self: Any, digest: Any, offset: int, payload: bytes) -> bool:
        self.place.add(payload)
        return bool(self.place.size >= self.total)

    return mock.patch.object(session._Assembly, "add", add)


def _updates_unchecked() -> AbstractContextManager[Any]:
    """Look into no update before it is accepted."""
    return mock.patch.object(collecting, "_problem", return_value=None)


def _bytes_unchecked() -> AbstractContextManager[Any]:
    """Do not look for values that are not finite."""
    return mock.patch.object(coded, "_check_finite", return_value=None)


def _klt_unchecked() -> AbstractContextManager[Any]:
    """Do not count the bits of a coded tensor."""
    return mock.patch.object(klt, "check", klt.read)


def _accepted_twice() -> AbstractContextManager[Any]:
    """Forget that an edge has an update in the round."""

    def why_untimely(state: Any, here: Any, edge: Any, number: int, *, is_merging: bool) -> Any:
        held, state.accepted = state.accepted, {k: v for k, v in state.accepted.items() if k != edge}
        try:
            return original(state, here, edge, number, is_merging=is_merging)
        finally:
            state.accepted = held

    original = collecting.why_untimely
    return mock.patch.object(collecting, "why_untimely", why_untimely)


def _frames_of_any_size() -> AbstractContextManager[Any]:
    """Let any message carry a payload of any size."""

    def decode(frame: bytes) -> Any:
        size = int.from_bytes(frame[:4], "big")
        return codec._DECODER.decode(frame[4 : 4 + size]), frame[4 + size :]

    return mock.patch.object(session, "decode", decode)


@contextlib.contextmanager
def _words_as_they_are() -> Iterator[None]:
    """Print what an edge says as it is."""
    with mock.patch.object(roster, "one_line", lambda text: text):
        yield


DEFECTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "frames: chunks are taken in any order": _chunks_anywhere,
    "frames: base, alignment, number and loss of an update are not checked": _updates_unchecked,
    "frames: values that are not finite are taken": _bytes_unchecked,
    "frames: the bits of klt are not counted": _klt_unchecked,
    "frames: an edge may send two updates in a round": _accepted_twice,
    "frames: any message may carry any payload": _frames_of_any_size,
    "frames: an edge's words are printed as they are": _words_as_they_are,
}
