"""What `bench_inputs` tries of part E is right: hub and edge as real processes on a machine that fails them.

And every long command says within 5 s what it does, into a file too, where something in it is slow.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from bench_inputs_case import Case
from bench_inputs_machine import cases

CASES = cases(Path())
SLOW_IMPORT = """
import os, sys, time
class Slow:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["SLOW_MODULE"]:
            sys.meta_path.remove(self)
            time.sleep(7)
sys.meta_path.insert(0, Slow())
"""
# By command: the module that is slow to load, which its work begins with.
LONG = {
    "fedsoda_hub demo --dir demo": "fedsoda_hub.demo.run",
    "fedsoda_hub plan model": "fedsoda_hub.plan",
    "fedsoda_hub prepare run.toml": "fedsoda_hub.settings.run",
    "fedsoda_hub serve run.toml": "fedsoda_hub.settings.run",
    "fedsoda_hub export run.toml --to export": "fedsoda_hub.settings.run",
    "fedsoda_hub evaluate run.toml --data eval.jsonl": "fedsoda_hub.evaluation.judge",
    "fedsoda_hub report run.toml": "fedsoda_hub.settings.run",
    "fedsoda_hub compare compare.toml": "fedsoda_hub.compare.settings",
    "fedsoda_edge join http://127.0.0.1:1 --data rows.jsonl": "fedsoda_edge.data.local_data",
    "fedsoda_edge plan http://127.0.0.1:1": "fedsoda_edge.edge",
    "fedsoda_edge doctor": "fedsoda_edge.join.doctor",
    "fedsoda_edge data check rows.jsonl": "fedsoda_edge.data.inspection",
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=[f"{case.kind}: {case.name}" for case in CASES])
def test_a_case_of_the_machine_is_answered_rightly(case: Case, tmp_path: Path) -> None:
    assert case.wrong(tmp_path) == ""


@pytest.mark.slow
@pytest.mark.parametrize("command", LONG)
def test_a_long_command_says_what_it_does_in_a_log(tmp_path: Path, command: str) -> None:
    (tmp_path / "sitecustomize.py").write_text(SLOW_IMPORT)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]),
        "SLOW_MODULE": LONG[command],
        "FEDSODA_HOME": str(tmp_path / "home"),
    }
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *command.split()], env=environment, cwd=tmp_path, stdout=log, stderr=log
        )
    try:
        until = time.monotonic() + 60
        while " so far" not in (tmp_path / "log").read_text():
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < until
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    assert "4 s so far" in (tmp_path / "log").read_text()
