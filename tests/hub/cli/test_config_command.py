"""`fedsoda-hub config`: every key of RUN.toml with its value, its method's default, its source and its meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
from typer.testing import CliRunner

from fedsoda_hub.cli.commands import app
from fedsoda_hub.settings.keys import keys_of
from fedsoda_hub.settings.run import defaults_of, effective, read_settings
from fedsoda_hub.settings.tables import MethodName, Tables
from tests.hub.serving.test_daemon import write_run
from tests.schema import HUB


def shown(path: Path | str) -> dict[str, dict[str, Any]]:
    done = CliRunner().invoke(app, ["config", str(path), "--json"])
    assert done.exit_code == 0, done.output
    return {one.pop("key"): one for one in HUB.report("config", done.stdout)["settings"]}


def test_every_key_has_its_value_default_source_and_meaning(tmp_path: Path) -> None:
    found = shown(write_run(tmp_path, rounds={"count": 2, "quorum": 0.8}).path)
    assert found.keys() == keys_of(Tables).keys()
    assert found["[lora] rank"] | {"meaning": ""} == {
        "value": 2,
        "default": 8,
        "is_changed": True,
        "source": "run.toml",
        "meaning": "",
        "allowed": "1 to 1024",
    }
    assert found["[lora] alpha"]["source"] == "default"
    assert not found["[lora] alpha"]["is_changed"]
    assert found["[method] realign_every"]["source"] == "run.toml"
    assert not found["[method] realign_every"]["is_changed"]  # written as it would be without
    assert (found["name"]["default"], found["name"]["is_changed"]) == (None, True)
    assert all(one["meaning"] for one in found.values())


def test_people_see_a_table_with_what_differs_marked(tmp_path: Path) -> None:
    done = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["config", write_run(tmp_path).path])
    assert done.exit_code == 0, done.output
    assert done.stdout == ""
    [rank] = [line for line in done.stderr.splitlines() if "[lora] rank " in line]
    assert [cell.strip() for cell in rank.strip("│").split("│")][:5] == ["*", "[lora] rank", "2", "8", "run.toml"]
    assert "differ from the defaults of fedsoda: marked *" in " ".join(done.stderr.split())


def test_a_narrow_terminal_cuts_no_key_and_no_meaning(tmp_path: Path) -> None:
    done = CliRunner(env={"COLUMNS": "60"}).invoke(app, ["config", write_run(tmp_path).path])
    lines = done.stderr.splitlines()
    assert "* [lora] rank = 2  (run.toml; default 8)" in [line.rstrip() for line in lines]
    [at] = [
        number for number, line in enumerate(lines) if line.startswith("  [notify] insecure_http = false  (default)")
    ]
    assert lines[at + 1].strip() == "post over plain http beyond this machine too"
    assert max(map(len, lines[:-1])) <= 60  # the last is a note, which the terminal breaks


@pytest.mark.parametrize(
    ("name", "more"), [*((name, "") for name in get_args(MethodName)), ("fedsoda", 'emulator = "full"')]
)
def test_a_run_that_gives_a_method_alone_differs_from_its_defaults_in_that_alone(
    tmp_path: Path, name: str, more: str
) -> None:
    (tmp_path / "public.txt").write_text("public")
    path = tmp_path / "run.toml"
    path.write_text(f'name = "a"\nmodel = "m"\n[public]\ntext = "public.txt"\n[method]\nname = "{name}"\n{more}\n')
    settings = read_settings(path)
    defaults = defaults_of(settings)
    differ = {key for key, one in effective(settings).items() if one.value != defaults[key]}
    given = {"[method] name"} if name != "fedsoda" else {"[method] emulator"} if more else set()
    assert differ == {"name", "model", "[public] text"} | given
