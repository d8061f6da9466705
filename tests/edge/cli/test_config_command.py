"""`fedsoda-edge config`: with which options a join would begin, and where each comes from. No secret is shown."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedsoda_edge.cli.commands import app
from fedsoda_edge.events import JoinSettings
from tests.schema import EDGE


def test_each_option_of_join_has_value_default_source_and_meaning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDSODA_DEVICE", "cpu")
    monkeypatch.delenv("FEDSODA_THREADS", raising=False)
    (tmp_path / "home").mkdir()
    link = "fedsoda://hub.example.org/#k=aaaa&s=secret"
    (tmp_path / "home" / "config.toml").write_text(f'max_rounds = 3\n[join]\nurl = "{link}"\n')
    done = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["config", "--json"])
    assert done.exit_code == 0, done.output
    found = {one["option"]: one for one in EDGE.report("config", done.stdout)["options"]}
    assert len(found) == len(JoinSettings.__struct_fields__)
    assert {name: found[name] | {"meaning": ""} for name in ("--device", "--max-rounds", "--cache")} == {
        "--device": {
            "option": "--device",
            "value": "cpu",
            "default": "auto",
            "source": "FEDSODA_DEVICE",
            "meaning": "",
        },
        "--max-rounds": {"option": "--max-rounds", "value": 3, "default": 0, "source": "config.toml", "meaning": ""},
        "--cache": {"option": "--cache", "value": "bf16", "default": "bf16", "source": "default", "meaning": ""},
    }
    assert all(one["meaning"] for one in found.values())
    assert found["LINK|URL"]["value"] == "fedsoda://hub.example.org/#..."
    assert "secret" not in done.output
    assert "3 options of 17 given" in done.stderr
