"""Options that are settings say what the settings' tables say, and nothing of it stands twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

from fedsoda_hub.cli.commands import app
from fedsoda_hub.compare.settings import Compare
from fedsoda_hub.settings.keys import keys_of
from fedsoda_hub.settings.tables import Tables
from tests.hub.test_plan import MODELS

KEYS = keys_of(Tables)


def options_of(command: str) -> dict[str, Any]:
    root: Any = typer.main.get_command(app)
    return {option.name: option for option in root.commands[command].params}


def test_an_option_that_is_a_setting_has_its_words_its_range_and_no_default_of_its_own() -> None:
    options = options_of("plan")
    for key in KEYS.values():
        option = options.get("method" if str(key) == "[method] name" else key.name)
        if option is None or key.table not in ("method", "lora", "wire"):
            continue
        assert option.help.startswith(key.number.description), key
        assert option.default is None, key
        least, most = key.bounds
        for outside in (None if least is None else least - 1, None if most is None else most + 1):
            if outside is not None:
                ended = CliRunner().invoke(app, ["plan", "m", option.opts[0], str(outside)])
                assert (ended.exit_code, f"Invalid value for '{option.opts[0]}'" in ended.stderr) == (2, True), key
    assert "[default: fedsoda: 0; fedbiot: 1]" in options["realign_every"].help.replace("\\", "")


def planned(tmp_path: Path, *options: str) -> Any:
    (tmp_path / "config.json").write_text(json.dumps(MODELS["LLaMA3-8B"]))
    return CliRunner().invoke(app, ["plan", str(tmp_path / "config.json"), "--json", *options])


def test_a_plan_without_options_has_the_defaults_of_the_tables(tmp_path: Path) -> None:
    settings = json.loads(planned(tmp_path).stdout)["settings"]
    said = {f"[method] {name}": value for name, value in settings["method"].items()}
    said |= {f"[lora] {name}": value for name, value in settings["lora"].items()} | {"[wire] codec": settings["codec"]}
    assert said == {name: KEYS[name].default for name in said}


@pytest.mark.parametrize(
    ("changes", "options", "sentence"),
    [
        (
            "",
            ["--groups", "2"],
            "[method] groups = 2 as an option beside --measure, which takes all settings from RUN.toml",
        ),
        (
            "[align]\nheal = false\n",
            [],
            'RUN.toml does not heal ([method] name = "fedsoda", [align] heal = false); write',
        ),
        (
            '[method]\nname = "fedbiot"\n',
            [],
            'RUN.toml does not heal ([method] name = "fedbiot", [align] heal = false)',
        ),
        ("[method]\ngruops = 2\n", [], "RUN.toml has no key [method] gruops; the nearest is [method] groups"),
    ],
)
def test_what_cannot_be_measured_is_refused(tmp_path: Path, changes: str, options: list[str], sentence: str) -> None:
    (tmp_path / "public.txt").write_text("text")
    run = tmp_path / "RUN.toml"
    run.write_text(f'name = "x"\nmodel = "m"\n[public]\ntext = "public.txt"\n{changes}')
    ended = CliRunner().invoke(app, ["plan", str(run), "--measure", *options])
    assert (ended.exit_code, sentence in ended.stderr) == (2, True), ended.stderr
    assert not (tmp_path / "x.run").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            ["--codec", "zip"],
            "[wire] codec = 'zip' in the options; it must be one of nf4, int8, bf16, klt, klt-fine, nf4-weight",
        ),
        (["--method", "fedavg"], "[method] name = 'fedavg' in the options; it must be one of fedsoda, exact, fedbiot"),
        (["--adapter-layers", "0"], "[method] adapter_layers = 0 in the options; it must be at least 1"),
    ],
)
def test_an_option_out_of_range_is_refused(tmp_path: Path, options: list[str], sentence: str) -> None:
    ended = planned(tmp_path, *options)
    assert ended.exit_code == 2
    assert sentence in ended.stderr


def test_compare_says_what_may_stand_in_its_file() -> None:
    shown = CliRunner(env={"COLUMNS": "120"}).invoke(app, ["compare", "--help"]).stdout
    said = " ".join(shown.replace("│", " ").split())
    panels = [
        "─ What to compare ─",
        "─ Output ─",
        *(f"[compare]: {name} ─" for name in ("data", "what to compare", "limits")),
    ]
    assert [said.count(panel) for panel in panels] == [1] * len(panels)
    for key in keys_of(Compare, "compare").values():
        assert f" {key.name} {key.description}" in said
    assert "data files of rows to deal to edges, relative to this one; required" in said
    assert "edges edges to deal to; with users or files, at most this many; at least 1; default: 10" in said
