"""Install a wheel in fresh environments as its users do, and run what they run first.

By pip on the oldest and the newest Python here, by `uv tool` and by pipx; the edge alone and with [hub]. Versions are those of
constraints.txt. torch without CUDA is fetched once, as pip finds it; where there is none for a Python, what needs torch is left
out there and the report says so, since the index's own torch brings gigabytes.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

OLDEST = (3, 11)
WITH_TORCH = ("torch", "peft", "bitsandbytes", "accelerate")  # what cannot be imported without torch
ROWS = '{"prompt": "a visit", "completion": "home"}\n' * 4
# Of the edge alone; [hub] brings them.
OF_THE_HUB = ("starlette", "uvicorn", "matplotlib", "scipy")


@dataclass(frozen=True)
class Environment:
    """Where a wheel was installed. torch: its version; "": without."""

    python: Path
    programs: Path
    torch: str


class InstallFailed(Exception):
    """What did not work of an installation."""


def _run(*words: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command outside of the project, without what leads into it."""
    clean = {
        key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV", "FEDSODA_HOME")
    }
    return subprocess.run(
        [str(word) for word in words], cwd="/", env=clean | environment, capture_output=True, text=True, check=False
    )


def _ok(*words: str | Path, **environment: str) -> str:
    ran = _run(*words, **environment)
    if ran.returncode:
        raise InstallFailed(
            f"{' '.join(map(str, words))} exits with {ran.returncode}: {(ran.stderr or ran.stdout)[-600:]}"
        )
    return ran.stdout


def pythons(uv: Path) -> list[tuple[str, Path]]:
    """Return the (version, path) of the oldest and of the newest Python on this machine that fedsoda runs on."""
    listed = json.loads(_ok(uv, "python", "list", "--only-installed", "--output-format", "json"))
    places = [Path(one["path"]) for one in listed if one["implementation"] == "cpython"]
    places += Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv").glob("versions/*/bin/python3")
    found: dict[tuple[int, int], tuple[str, Path]] = {}
    for path in places:
        told = _run(path, "-c", "import sys, ensurepip; print(*sys.version_info[:3])")
        if told.returncode == 0:
            major, minor, patch = map(int, told.stdout.split())
            found.setdefault((major, minor), (f"{major}.{minor}.{patch}", path))
    fit = sorted(version for version in found if version >= OLDEST)
    if not fit:
        raise InstallFailed(f"there is no Python {'.'.join(map(str, OLDEST))} or newer here")
    return [found[version] for version in sorted({fit[0], fit[-1]})]


def torch_of(python: Path, constraints: Path, to: Path) -> Path | None:
    """Fetch the torch of constraints.txt without CUDA for a Python; None: what pip finds for it brings CUDA."""
    pinned = next(line for line in constraints.read_text().splitlines() if line.startswith("torch=="))
    told = _run(
        python,
        "-m",
        "pip",
        "install",
        "--dry-run",
        "--quiet",
        "--ignore-installed",
        "--no-deps",
        "--report",
        "-",
        pinned,
    )
    if told.returncode:
        return None
    metadata = json.loads(told.stdout)["install"][0]["metadata"]
    if any(one.startswith("nvidia") for one in metadata.get("requires_dist", ())) and "+cpu" not in metadata["version"]:
        return None
    _ok(python, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", to, pinned)
    return next(to.glob("torch-*.whl"))


@contextmanager
def _made(directory: Path) -> Iterator[Path]:
    """Make a directory for the block, in place of what is there."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


def _pinned(constraints: Path, directory: Path, torch: Path | None) -> Path:
    """Write the constraints of an installation, whose torch is this file."""
    lines = [line for line in constraints.read_text().splitlines() if not line.startswith("torch==")]
    pins = directory / "constraints.txt"
    pins.write_text("\n".join([*lines, f"torch @ {torch.as_uri()}"] if torch else lines) + "\n")
    return pins


def by_pip(
    wheel: Path, extra: str, python: Path, constraints: Path, torch: Path | None, directory: Path
) -> Environment:
    """Install with pip in an environment of the standard library."""
    _ok(python, "-m", "venv", directory / "venv")
    inner = directory / "venv" / "bin" / "python"
    pins = _pinned(constraints, directory, torch)
    install = (inner, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--constraint", pins)
    wanted = f"fedsoda[{extra}] @ {wheel.as_uri()}" if extra else str(wheel)
    if torch is not None:
        _ok(*install, wanted)
    else:
        _ok(*install, "--no-deps", wanted)
        told = json.loads(_ok(inner, "-c", _REQUIRES, extra))
        _ok(*install, *[one for one in told if not one.startswith(WITH_TORCH)])
    return Environment(inner, inner.parent, torch.name.split("-")[1] if torch else "")


_REQUIRES = """
import json, sys
from importlib.metadata import requires
from pip._vendor.packaging.requirements import Requirement
all = [Requirement(one) for one in requires("fedsoda")]
extras = {"", *filter(None, sys.argv[1:])}
wanted = [one for one in all if one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in extras)]
for one in wanted:
    one.marker = None
print(json.dumps([str(one) for one in wanted]))
"""


def by_uv_tool(tools: Path, wheel: Path, python: Path, constraints: Path, torch: Path, directory: Path) -> Environment:
    """Install with `uv tool install`."""
    override = directory / "override.txt"
    override.write_text(f"torch @ {torch.as_uri()}\n")
    places = {"UV_TOOL_DIR": str(directory / "tools"), "UV_TOOL_BIN_DIR": str(directory / "bin")}
    pins = _pinned(constraints, directory, None)
    _ok(
        tools / "bin" / "uv", "tool", "install", "--quiet", "--python", python, "--constraints", pins, "--overrides", override, wheel,
        **places, SSL_CERT_FILE=os.environ.get("SSL_CERT_FILE") or os.environ.get("PIP_CERT") or "",
    )  # fmt: skip
    return Environment(directory / "tools" / "fedsoda" / "bin" / "python", directory / "bin", torch.name.split("-")[1])


def by_pipx(tools: Path, wheel: Path, python: Path, constraints: Path, torch: Path, directory: Path) -> Environment:
    """Install with `pipx install`."""
    pins = _pinned(constraints, directory, torch)
    places = {"PIPX_HOME": str(directory / "home"), "PIPX_BIN_DIR": str(directory / "bin"), "USE_EMOJI": "0"}
    _ok(
        tools / "bin" / "pipx", "install", "--backend", "pip", "--python", python, f"--pip-args=--constraint {pins}", wheel, **places
    )  # fmt: skip
    venv = directory / "home" / "venvs" / "fedsoda"
    return Environment(venv / "bin" / "python", directory / "bin", torch.name.split("-")[1])


def looked_at(made: Environment, extra: str, kind: str, directory: Path) -> None:
    """Run what a user runs first.

    Raises:
        InstallFailed: something of it does not work, or something is there that the user did not ask for.
    """
    home = {"FEDSODA_HOME": str(directory / "home-of-edge")}
    edge, hub = made.programs / "fedsoda-edge", made.programs / "fedsoda-hub"
    if "join" not in _ok(edge, "--help", **home):
        raise InstallFailed("fedsoda-edge --help does not name join")
    rows = directory / "rows.jsonl"
    rows.write_text(ROWS)
    checked = json.loads(_ok(edge, "data", "check", rows, "--json", **home))
    if checked["status"] != "ok":
        raise InstallFailed(f"fedsoda-edge data check says {checked}")
    json.loads(_ok(edge, "join", "--schema", **home))
    _ok(made.python, "-c", "import fedsoda_edge; fedsoda_edge.Edge" if made.torch else "import fedsoda_edge.errors")
    told = _ok(
        made.python, "-c", "from fedsoda_edge.ports.installer import found; print(found().kind, '|', found().update)"
    )
    if told.partition(" |")[0].strip() != kind:
        raise InstallFailed(f"an installation by {kind} takes itself for {told}")
    present = set(json.loads(_ok(made.python, "-c", _THERE, *OF_THE_HUB)))
    if present != (set(OF_THE_HUB) if extra == "hub" else set()):
        raise InstallFailed(f"with the extra {extra!r} there are {sorted(present)} of {OF_THE_HUB}")
    helped = _run(hub, "status", "run.toml", "--json", **home)
    answer = json.loads(helped.stdout)
    if extra == "hub":
        if "run.toml is not there" not in answer["message"]:
            raise InstallFailed(f"fedsoda-hub status says {answer}")
    elif helped.returncode != 2 or "fedsoda[hub]" not in answer["message"]:
        raise InstallFailed(f"without its extra fedsoda-hub says {answer}")


_THERE = """
import importlib.util, json, sys
print(json.dumps([name for name in sys.argv[1:] if importlib.util.find_spec(name)]))
"""


def check_installs(wheel: Path, tools: Path, constraints: Path) -> list[dict[str, object]]:
    """Install in every way, one after the other, and report each.

    Args:
        tools: the environment of uv and pipx.
    """
    report: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory(prefix="fedsoda-install-") as elsewhere:
        place = Path(elsewhere)

        def attempt(name: str, version: str, kind: str, extra: str, make: Callable[[Path], Environment]) -> None:
            began = time.monotonic()
            one: dict[str, object] = {"way": name, "python": version, "torch": "", "passed": True, "why": ""}
            with _made(place / "one") as directory:
                try:
                    made = make(directory)
                    one["torch"] = made.torch or "left out: what pip finds for this Python brings CUDA"
                    looked_at(made, extra, kind, directory)
                except InstallFailed as failed:
                    one |= {"passed": False, "why": str(failed)}
            report.append(one | {"seconds": round(time.monotonic() - began, 1)})

        ends = pythons(tools / "bin" / "uv")
        for version, python in ends:
            torch = torch_of(python, constraints, place / version)
            for extra in ("", "hub"):
                name = f"pip install fedsoda[{extra}]" if extra else "pip install fedsoda"
                attempt(
                    name, version, "pip", extra,
                    partial(by_pip, wheel, extra, python, constraints, torch),
                )  # fmt: skip
            if torch is not None and python == ends[0][1]:
                attempt(
                    "uv tool install", version, "uv tool", "",
                    partial(by_uv_tool, tools, wheel, python, constraints, torch),
                )  # fmt: skip
                attempt(
                    "pipx install", version, "pipx", "",
                    partial(by_pipx, tools, wheel, python, constraints, torch),
                )  # fmt: skip
    return report
