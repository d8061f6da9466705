"""Rounds leave nothing in memory: neither agent, worker nor hub grows while one edge takes part in fifty of them."""

from __future__ import annotations

import asyncio
import json
import statistics
from collections import defaultdict
from pathlib import Path

import psutil
import pytest

from fedsoda_hub.events import HubEvent, RoundClosed
from fedsoda_hub.local import processes
from fedsoda_hub.settings.run import read_settings
from tests.hub.runs import make_run, prepare

ROUNDS, SETTLED, LAST = 64, range(12, 18), range(58, 64)
MOST = 1.02


def role(process: psutil.Process) -> str:
    """hub, agent, or the child of one of them, by the process's command line."""
    words = process.cmdline()
    return next(word for word in words if word.startswith("fedsoda")) + (
        " child" if "serve" not in words and "join" not in words else ""
    )


@pytest.mark.slow
def test_fifty_rounds_do_not_grow_any_process(tmp_path: Path, tiny_llama: Path) -> None:
    make_run(
        tmp_path,
        tiny_llama,
        method={"realign_every": 0},
        rounds={"count": ROUNDS, "min_edges": 1},
        local={"max_length": 64, "max_steps": 1},
        task={"prompt": "Say {word}:", "completion": "{answer}", "eval_data": None},
        listen={"host": "127.0.0.1", "port": 0},
    )
    settings = read_settings(tmp_path / "RUN.toml")
    prepare(settings)
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"word": f"w{i}", "answer": "yes"}) + "\n" for i in range(40)))
    held: dict[str, dict[int, int]] = defaultdict(dict)

    def hear(event: HubEvent) -> None:
        if isinstance(event, RoundClosed) and event.round in {*SETTLED, *LAST}:
            for process in psutil.Process().children(recursive=True):
                held[role(process)][event.round] = process.memory_info().rss

    async def run() -> None:
        stop = asyncio.get_running_loop().create_future()
        given = {"FEDSODA_THREADS": "1", "OMP_NUM_THREADS": "1"}
        await processes.federate(
            settings, {"edge-0": data}, tmp_path / "homes", stop, hear, lambda _: lambda _: None, given, given
        )

    asyncio.run(run())
    assert set(held) >= {"fedsoda_hub", "fedsoda_edge"}
    for name, found in held.items():
        before, after = (
            statistics.median(found[number] for number in part if number in found) for part in (SETTLED, LAST)
        )
        assert after <= MOST * before, f"{name} grew from {before:,.0f} to {after:,.0f} bytes"
