"""Forged frames lead to what the document says, on either side; planted defects are seen."""

from __future__ import annotations

import asyncio
from pathlib import Path

import bench_trust_frames as bench
import pytest
import trust_frames_edge
import trust_frames_hub
import trust_frames_payloads
from trust_frames_corpus import replay


def test_what_was_once_found_stays_mended() -> None:
    wrong, count = replay()
    assert wrong == []
    assert count >= 13


def test_a_hub_takes_no_forged_frame(tmp_path: Path) -> None:
    found = asyncio.run(trust_frames_hub.run(tmp_path, 7, 600))
    assert found["wrong"] == []
    assert found["right"] == found["tried"] >= 600


def test_an_edge_takes_no_forged_frame() -> None:
    found = asyncio.run(trust_frames_edge.run(7, 600))
    assert found["wrong"] == []
    assert found["right"] == found["tried"] >= 600


def test_no_forged_payload_is_taken_or_raises() -> None:
    found = trust_frames_payloads.run(7, 3000)
    assert found["wrong"] == []
    assert found["right"] == found["tried"] >= 3000


@pytest.mark.parametrize(
    "name", ["frames: chunks are taken in any order", "frames: an edge may send two updates in a round"]
)
def test_a_planted_defect_of_a_hub_is_seen(tmp_path: Path, name: str) -> None:
    with bench.DEFECTS[name]():
        assert asyncio.run(trust_frames_hub.run(tmp_path, 7, 1500))["wrong"] != []


@pytest.mark.parametrize(
    "name", ["frames: the bits of klt are not counted", "frames: values that are not finite are taken"]
)
def test_a_planted_defect_of_payloads_is_seen(name: str) -> None:
    with bench.DEFECTS[name]():
        assert trust_frames_payloads.run(7, 3000)["wrong"] != []
