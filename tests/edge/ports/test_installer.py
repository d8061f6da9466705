"""The one command that brings a newer release, for the way in which this one was installed.

The files are as the installers write them: read of real ones by `scripts/release --check`, which installs in each way.
"""

from __future__ import annotations

import sys
from importlib.metadata import PathDistribution
from pathlib import Path
from unittest import mock

import pytest

from fedsoda_edge.ports import installer


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """The directory of an installed package's metadata."""
    directory = tmp_path / "fedsoda-0.1.0.dist-info"
    directory.mkdir()
    return directory


def found(tmp_path: Path, package: Path | None = None, **environment: str) -> installer.Installation:
    prefix = tmp_path / "venv"
    prefix.mkdir(exist_ok=True)
    named = PathDistribution(package) if package else None
    with (
        mock.patch.object(installer, "distribution", return_value=named),
        mock.patch.dict("os.environ", {"FEDSODA_IMAGE": "", **environment}),
    ):
        return installer.found(prefix, tmp_path, "/opt/my env/bin/python")


def test_pip_and_uv_are_told_apart_by_what_they_leave(tmp_path: Path, package: Path) -> None:
    for name, update, extra in (
        ("pip", "'/opt/my env/bin/python' -m pip install --upgrade fedsoda", "-m pip install 'fedsoda[hub]'"),
        ("uv", "uv pip install --python '/opt/my env/bin/python' --upgrade fedsoda", "'fedsoda[hub]'"),
    ):
        (package / "INSTALLER").write_text(f"{name}\n")
        one = found(tmp_path, package)
        assert (one.kind, one.update) == (name, update)
        assert one.extra.format(extra="hub").endswith(extra)


def test_what_nobody_installed_is_left_to_pip(tmp_path: Path, package: Path) -> None:
    assert found(tmp_path, package).kind == "pip"
    assert found(tmp_path).kind == "pip"


@pytest.mark.parametrize(
    ("mark", "kind", "update"),
    [
        ("uv-receipt.toml", "uv tool", "uv tool upgrade fedsoda"),
        ("pipx_metadata.json", "pipx", "pipx upgrade fedsoda"),
    ],
)
def test_a_tool_of_its_own_is_upgraded_by_what_made_it(
    tmp_path: Path, package: Path, mark: str, kind: str, update: str
) -> None:
    (package / "INSTALLER").write_text("uv\n")  # pipx may install by uv, too
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / mark).write_text("")
    one = found(tmp_path, package)
    assert (one.kind, one.update) == (kind, update)
    assert one.extra.format(extra="hub").startswith(kind)


def test_a_program_that_uvx_runs_is_fetched_again(tmp_path: Path, package: Path) -> None:
    with mock.patch.object(installer, "distribution", return_value=PathDistribution(package)):
        one = installer.found(tmp_path / "uv" / "archive-v0" / "Xk3", tmp_path, "python")
    assert (one.kind, one.update) == ("uvx", "uvx --refresh --from fedsoda fedsoda-edge")


@pytest.mark.parametrize(
    "told", ["", "{", "[]", '{"url": 3, "dir_info": {"editable": true}}', '{"dir_info": {"editable": true}}']
)
def test_a_strange_note_of_where_a_package_came_from_is_no_clone(tmp_path: Path, package: Path, told: str) -> None:
    (package / "direct_url.json").write_text(told)
    assert found(tmp_path, package).kind == "pip"


def test_a_clone_is_pulled(tmp_path: Path, package: Path) -> None:
    (package / "direct_url.json").write_text('{"url": "file:///srv/my%20clone", "dir_info": {"editable": true}}')
    assert found(tmp_path, package).update == "git -C '/srv/my clone' pull"
    (package / "direct_url.json").write_text('{"url": "file:///srv/wheel.whl", "archive_info": {}}')
    assert found(tmp_path, package).kind == "pip"


@pytest.mark.parametrize(("mark", "engine"), [(".dockerenv", "docker"), ("run/.containerenv", "podman")])
def test_an_image_is_pulled_where_it_runs_as_a_container(tmp_path: Path, package: Path, mark: str, engine: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / mark).touch()
    assert found(tmp_path, package).kind == "pip"  # a container of somebody's own, in which pip was run
    one = found(tmp_path, package, FEDSODA_IMAGE="example.org/fedsoda-edge:latest")
    assert (one.kind, one.update) == ("container", f"{engine} pull example.org/fedsoda-edge:latest")
    (tmp_path / mark).unlink()
    assert found(tmp_path, package, FEDSODA_IMAGE="fedsoda-edge").kind == "pip"


def test_this_very_process_has_a_command() -> None:
    one = installer.found()
    assert one.kind in ("clone", "pip", "uv", "container")
    assert "fedsoda" in one.update or "git -C" in one.update
    assert sys.executable in one.extra or one.kind in ("container", "uv")
