"""Tell how this fedsoda was installed, and the one command that brings a newer one. Nothing here runs it.

The files that tell are read where they are documented: uv-receipt.toml of `uv tool`, pipx_metadata.json of pipx,
INSTALLER and direct_url.json in the package's own directory, and what container engines leave in the root.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from urllib.parse import unquote, urlsplit

CONTAINER_MARKS = ("/.dockerenv", "/run/.containerenv")
IMAGE_VARIABLE = "FEDSODA_IMAGE"  # set in the images of scripts/deploy to their own name
_UV_RUNS = ("archive-v", "environments-v")  # directories in uv's cache in which `uvx` runs a program


@dataclass(frozen=True)
class Installation:
    """The way in which this fedsoda came here.

    kind: of the installer. update: the command for a newer release. extra: the command for a part that is left out, with
    {extra} in place of its name.
    """

    kind: str
    update: str
    extra: str


def found(prefix: Path | None = None, root: Path = Path("/"), python: str | None = None) -> Installation:
    """Find out how fedsoda was installed.

    Args:
        prefix: the environment; None: that of this process. root: the root directory. python: the interpreter's path.
    """
    prefix, python = prefix or Path(sys.prefix), shlex.quote(python or sys.executable or "python3")
    image = shlex.quote(os.environ.get(IMAGE_VARIABLE, ""))
    if image != "''" and any((root / mark.lstrip("/")).exists() for mark in CONTAINER_MARKS):
        pull = f"{'docker' if (root / '.dockerenv').exists() else 'podman'} pull {image}"
        return Installation("container", pull, pull)
    if (prefix / "uv-receipt.toml").is_file():
        return Installation("uv tool", "uv tool upgrade fedsoda", "uv tool install 'fedsoda[{extra}]'")
    if (prefix / "pipx_metadata.json").is_file():
        return Installation("pipx", "pipx upgrade fedsoda", "pipx install --force 'fedsoda[{extra}]'")
    if any(part.startswith(_UV_RUNS) for part in prefix.parts):
        return Installation(
            "uvx", "uvx --refresh --from fedsoda fedsoda-edge", "uvx --from 'fedsoda[{extra}]' fedsoda-hub"
        )
    try:
        package: Distribution | None = distribution("fedsoda")
    except PackageNotFoundError:
        package = None
    if clone := _clone(package):
        where = shlex.quote(clone)
        return Installation("clone", f"git -C {where} pull", f"{python} -m pip install -e {where}'[{{extra}}]'")
    if package is not None and _text(package, "INSTALLER") == "uv":
        by_uv = f"uv pip install --python {python}"
        return Installation("uv", f"{by_uv} --upgrade fedsoda", f"{by_uv} 'fedsoda[{{extra}}]'")
    by_pip = f"{python} -m pip install"
    return Installation("pip", f"{by_pip} --upgrade fedsoda", f"{by_pip} 'fedsoda[{{extra}}]'")


def _clone(package: Distribution | None) -> str:
    """Return the directory of the clone that an editable installation points to; "" where it is none."""
    try:
        told = json.loads((package and _text(package, "direct_url.json")) or "{}")
        is_editable = told.get("dir_info", {}).get("editable", False)
        return unquote(urlsplit(told["url"]).path) if is_editable else ""
    except (ValueError, KeyError, AttributeError):  # written by an installer that does it in another way
        return ""


def _text(package: Distribution, name: str) -> str:
    try:
        return (package.read_text(name) or "").strip()
    except (OSError, UnicodeDecodeError):
        return ""
