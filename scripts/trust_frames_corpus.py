"""Replay what forged frames have found: each case is the frames of one conversation, or one payload, and what must follow.

The cases lie in tests/data/forged_frames.json. last: what the last frame of a conversation must lead to, "ends" or "stays".
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from pathlib import Path
from typing import Any

from trust_frames_hub import HubBench
from trust_frames_payloads import LAYOUT
from trust_frames_stage import FORGED, Line

from fedsoda_edge.errors import FedSODAError
from fedsoda_edge.protocol.coded import check
from fedsoda_edge.protocol.join_link import read_link
from fedsoda_edge.protocol.manifest import parse_manifest

CORPUS = Path(__file__).resolve().parent.parent / "tests" / "data" / "forged_frames.json"


def cases() -> list[dict[str, Any]]:
    """Read the corpus."""
    found: list[dict[str, Any]] = json.loads(CORPUS.read_text(encoding="utf-8"))
    return found


def replay() -> tuple[list[str], int]:
    """Try all cases; return what was wrong, in sentences, and how many cases there are."""
    found = cases()
    wrong = [problem for one in found if "frames" not in one and (problem := _payload(one))]
    with tempfile.TemporaryDirectory(prefix="forged-") as directory:
        wrong += asyncio.run(_conversations(Path(directory), [one for one in found if "frames" in one]))
    return wrong, len(found)


def _payload(case: dict[str, Any]) -> str:
    """Try one payload; all of them must be refused in a sentence."""
    try:
        match case["kind"]:
            case "update":
                check(bytes.fromhex(case["hex"]), LAYOUT, case["codec"])
            case "manifest":
                parse_manifest(case["text"].encode())
            case _:
                read_link(case["text"])
    except FedSODAError as error:
        is_line = len(str(error)) < 2000 and not any(one in str(error) for one in "\n\x1b\u202e")
        return "" if is_line else f"{case['name']}: a sentence that is endless, or steers a terminal"
    except Exception as error:
        return f"{case['name']}: {error!r:.200}"
    return f"{case['name']}: it was taken"


async def _conversations(directory: Path, found: list[dict[str, Any]]) -> list[str]:
    wrong = []
    async with HubBench(directory, 0) as bench:
        for case in found:
            line, stays = Line(bench.hub, FORGED), True
            for text in case["frames"]:
                header, payload = text["header"].encode(), bytes.fromhex(text.get("payload", ""))
                stays = await line.say(len(header).to_bytes(4, "big") + header + payload)
                if not stays:
                    break
            if stays != (case["last"] == "stays"):
                wrong.append(f"{case['name']}: the connection {'stays' if stays else 'ended'}")
            if "never" in case and any(one["type"] == case["never"] for one in line.heard):
                wrong.append(f"{case['name']}: the hub said {case['never']}")
            await line.hang_up()
        wrong += bench.wrong
    return wrong
