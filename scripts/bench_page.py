"""Measure the page of the hub's owner with many edges and rounds: how long its data takes, and how large it is.

The ledger is filled as a hub leaves it; the hub that serves it is the real one, without torch. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fedsoda_hub.serving.feed import BUSY_SHARE
from tests.hub.serving import scenes
from tests.hub.serving.test_daemon import serving

MOST_SECONDS, MOST_BYTES = 0.3, 2_000_000


async def measured(
    directory: Path, edges: int, rounds: int, cohort: int, repeats: int, settle: float
) -> dict[str, object]:
    """Return the seconds and bytes of the page's data, first and later answers apart."""
    settings = scenes.a_run(directory, count=rounds + 10)
    names = [f"clinic-{number:04d}" for number in range(edges)]
    scenes.fill(settings, edges=names, closed=rounds, cohort=cohort, eval_every=10)
    scenes.let_in_at_once(settings, names)
    async with serving(settings) as hub, httpx.AsyncClient(base_url=hub.url, trust_env=False, timeout=120) as client:
        await client.get("/page/session")
        await asyncio.sleep(settle)
        took: list[float] = []
        size = 0
        for at in range(repeats + 1):
            if at:
                hub.daemon.desk.feed.touch()
                await asyncio.sleep(max(0.6, 1.2 * took[-1] / BUSY_SHARE))  # until it is made again
            began = time.perf_counter()
            answer = await client.get("/page/state")
            took.append(time.perf_counter() - began)
            size = len(answer.content)
        files = 0
        for name in ("page.css", "page.js", "run.js", "edges.js", "do.js", "hub.js", "dom.js", "theme.js", "icon.svg"):
            files += len((await client.get(f"/page/static/{name}")).content)
        for name in ("uPlot.iife.min.js", "uPlot.min.css"):
            files += len((await client.get(f"/page/static/{name}")).content)
        files += len((await client.get("/")).content)
    return {
        "edges": edges,
        "rounds": rounds,
        "cohort": cohort,
        "first_seconds": round(took[0], 3),
        "median_seconds": round(statistics.median(took[1:]), 3),
        "worst_seconds": round(max(took[1:]), 3),
        "data_bytes": size,
        "file_bytes": files,
        "is_within": max(took) <= MOST_SECONDS and size + files <= MOST_BYTES,
    }


def main() -> int:
    """Measure, print, and return 1 where a bound is broken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--edges", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument("--cohort", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--settle", type=float, default=3.0, help="seconds after the start of the hub, before anyone looks"
    )
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        found = asyncio.run(
            measured(Path(directory), asked.edges, asked.rounds, asked.cohort, asked.repeats, asked.settle)
        )
    print(json.dumps(found))
    return 0 if found["is_within"] else 1


if __name__ == "__main__":
    sys.exit(main())
