"""Hostile files are refused in words by the processes that read them, and load, start and write nothing."""

from __future__ import annotations

from pathlib import Path

import bench_trust_artifacts as bench
import pytest
from trust_artifacts_list import of_agent
from trust_artifacts_make import Artifact
from trust_frames_payloads import MANIFEST


def read(tmp_path: Path, *listed: Artifact) -> list[str]:
    """Let a child of the agent's kind read them; what was wrong."""
    watched, files = tmp_path / "watched", tmp_path / "files"
    for directory in (watched / "store", files):
        directory.mkdir(parents=True)
    before = bench.outside(watched)
    found = list(bench.read("agent", listed, files, watched))
    assert len(found) == len(listed)
    assert bench.outside(watched) == before
    return [problem for one, report in found if (problem := bench.problem_of(one, report))]


def test_an_agent_refuses_every_kind_in_words(tmp_path: Path) -> None:
    listed = [one for one in of_agent(MANIFEST) if one.kind != "view_size" and len(one.data) < 4096]
    few = [one for number, one in enumerate(listed) if number % 3 == 0 and one.with_.get("times", 1) < 1000]
    assert len(few) > 40
    assert read(tmp_path, *few) == []


def test_what_a_child_starts_or_writes_elsewhere_is_heard(tmp_path: Path) -> None:
    names = [Artifact("agent", "file_name", "a path out", with_={"name": "../../escaped"})]
    assert read(tmp_path / "sound", *names) == []
    with bench.DEFECTS["artifacts: names of blobs are not looked at"]():
        [problem] = read(tmp_path / "planted", *names)
    assert "writes" in problem


def test_a_file_that_ends_its_reader_is_counted_and_the_next_is_read(tmp_path: Path) -> None:
    bomb = Artifact("agent", "download", "no such reader", with_={})  # its arguments are missing: the reader raises
    good = Artifact("agent", "run_id", "a name", with_={"name": "../x"})
    [problem] = read(tmp_path, bomb, good)
    assert problem.startswith("raised")


@pytest.mark.slow
def test_all_of_the_quick_list_is_refused_in_words() -> None:
    found = bench.measure(quick=True)
    assert found["wrong"] == []
    assert found["right"] == found["tried"] >= 200
