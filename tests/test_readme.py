"""What the README shows works: its script runs, its RUN.toml is accepted, its tree is the tree."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import msgspec
import pytest

from fedsoda_edge.testing import ScriptedHub
from fedsoda_hub.compare.settings import read_comparison
from fedsoda_hub.settings.run import RunSettings

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", README, re.DOTALL)
    assert found, f"the README has no {language} block"
    return found[1]


@pytest.mark.slow
def test_the_script_of_the_readme_runs_against_a_scripted_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"visit {i}", "completion": "home" if i % 2 else "ward"} for i in range(8)]
    (tmp_path / "visits.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    hub = ScriptedHub(rounds=2)
    script = block("python").replace('Edge("https://hub.example.org", token_file="clinic-7.token")', "Edge(hub)")
    assert "Edge(hub)" in script
    exec(compile(script, "README.md", "exec"), {"hub": hub})
    assert [start.round for start in hub.updates] == [1, 2]
    assert [start.num_examples for start in hub.updates] == [8, 8]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["1", "8"], ["2", "8"]]


def test_the_run_file_of_the_readme_is_one() -> None:
    raw = tomllib.loads(block("toml"))
    assert msgspec.convert(raw, RunSettings).method.groups == 4


def test_the_comparison_of_the_readme_is_one(tmp_path: Path) -> None:
    for name in ("train.jsonl", "dev.jsonl", "public.txt"):
        (tmp_path / name).touch()
    found = next(text for text in re.findall(r"```toml\n(.*?)```", README, re.DOTALL) if "[compare]" in text)
    (tmp_path / "compare.toml").write_text(found)
    comparison = read_comparison(tmp_path / "compare.toml")
    assert {name: settings.align.steps for name, settings in comparison.settings.items()} == {
        "fedsoda": 200, "unaligned": 0, "int8": 200
    }  # fmt: skip


def test_the_tree_of_the_readme_is_the_tree() -> None:
    tree = next(text for text in README.split("\n```")[1::2] if text.startswith("\nfedsoda_edge/"))
    named = set(re.findall(r"([\w.]+\.(?:py|toml|txt))", tree)) | set(re.findall(r"(\w+)\.py", tree))
    there = {path.name for package in ("fedsoda_edge", "fedsoda_hub") for path in (ROOT / package).rglob("*.py")}
    missing = {name for name in there if name not in named and not name.startswith("__")}
    assert not missing, f"the README's tree does not name {sorted(missing)}"
    rooms = [ROOT / room for room in ("fedsoda_edge", "fedsoda_hub", "scripts", "tests")]
    gone = {name for name in named if name.endswith(".py") and not any(list(room.rglob(name)) for room in rooms)}
    assert not gone, f"the README's tree names files that are not there: {sorted(gone)}"
