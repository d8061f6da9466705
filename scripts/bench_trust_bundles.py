"""Count what the edge refuses of The Update Framework's attacks, by their names, and of forged receipts.

A case is right when the edge refuses what it must, its store holds nothing but files that the run's hub signed for, and what
it remembers of the hub is as before. Part of scripts/bench_trust.py; the servers are small_hostile.py's.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest import mock

import attacks_on_files
import attacks_on_receipts
import attacks_on_statements
from attack_cases import CASE_SECONDS, CASES, GOOD, hub_with, tried
from small_hostile import Device, Server, digest_of, serving

PARTS = (attacks_on_statements, attacks_on_files, attacks_on_receipts)  # whose cases stand in CASES


@contextlib.contextmanager
def _no_proxy() -> Iterator[None]:
    with mock.patch.dict(os.environ, {"NO_PROXY": "*", "no_proxy": "*"}):
        yield


@functools.cache
def _warmed() -> None:
    """Fetch from an honest mirror once: what the libraries load at their first request must not count as a slow transfer."""
    with tempfile.TemporaryDirectory() as home, contextlib.suppress(Exception):
        asyncio.run(tried(Device(Path(home)), hub_with(None, GOOD), None, "", Server(serving(GOOD.files))))


def run_case(name: str, home: Path) -> str:
    """Try one case; return what went wrong, "": nothing."""

    async def timed() -> str:
        try:
            return await asyncio.wait_for(CASES[name](home), CASE_SECONDS)
        except TimeoutError:
            return f"it was not over after {CASE_SECONDS:.0f} s"

    with _no_proxy():
        _warmed()
        try:
            return asyncio.run(timed())
        except Exception as error:
            return f"{type(error).__name__}: {error}"


def measure(quick: bool) -> dict[str, object]:
    """Try all cases; quick: three times less of those that wait for a slow server. Returns counts."""
    wrong, by_attack, right = list[str](), Counter[str](), 0
    with tempfile.TemporaryDirectory(prefix="fedsoda-trust-") as made:
        for number in range(1 if quick else 3):
            for name in CASES:
                found = run_case(name, Path(made) / f"{number}-{digest_of(name.encode())[:12]}")
                by_attack[name.partition(":")[0]] += not found
                right += not found
                wrong += [f"{name}: {found}"] if found else []
    tried_cases = right + len(wrong)
    return {"tried": tried_cases, "right": right, "wrong": wrong[:20], "by_attack": dict(by_attack)}


def _signature() -> AbstractContextManager[Any]:
    """No signature is verified."""
    return mock.patch("fedsoda_edge.protocol.statements.verify", return_value=None)


def _memory() -> AbstractContextManager[Any]:
    """What was seen of a hub is forgotten."""
    return mock.patch("fedsoda_edge.join.trust._known", return_value=None)


def _expiry() -> AbstractContextManager[Any]:
    """Nothing expires."""
    return mock.patch("fedsoda_edge.join.trust.has_ended", return_value=False)


def _digest() -> AbstractContextManager[Any]:
    """What was fetched is taken for what was asked for."""
    return mock.patch("fedsoda_edge.join.download.sha256_file", lambda path: path.stem)


def _receipt() -> AbstractContextManager[Any]:
    """Every receipt is believed."""
    return mock.patch("fedsoda_edge.join.trust.receipt_problem", return_value="")


def _pace() -> AbstractContextManager[Any]:
    """A transfer may take as long as it likes."""

    async def unpaced(pieces: AsyncIterator[bytes], *_: object) -> AsyncIterator[bytes]:
        async for piece in pieces:
            yield piece

    return mock.patch("fedsoda_edge.join.download.paced", unpaced)


DEFECTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "a manifest's or receipt's signature is not verified": _signature,
    "the hub's key and version are not remembered": _memory,
    "an expired statement is accepted": _expiry,
    "a file's digest is not compared": _digest,
    "a receipt is not compared with what was sent": _receipt,
    "a slow transfer is not ended": _pace,
}
