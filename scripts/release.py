"""Build the release: wheel and sdist with the same bits wherever and whenever they are built, and their bill of materials.

What is built is the committed tree, never what lies beside it. The version is that of pyproject.toml; where the commit has a
tag `vX.Y.Z` it must say the same, so that a tree without git builds the same release. Installing it is
`release_install.py`'s, the bill of materials `release_parts.py`'s.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path

from release_install import check_installs
from release_parts import Materials, Part, bill_of_materials, parts_of, validate

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = ROOT / "scripts" / "constraints.txt"


class ReleaseProblem(Exception):
    """What keeps the tree from being released, and what to do about it."""


@dataclass(frozen=True)
class Built:
    """What one build left."""

    wheel: Path
    sdist: Path


def told(*words: str | Path, cwd: Path = ROOT, **environment: str) -> str:
    """Run a command and return what it prints.

    Raises:
        ReleaseProblem: it failed; its last words are the problem.
    """
    ran = subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if ran.returncode:
        raise ReleaseProblem(f"{' '.join(map(str, words))} failed:\n{ran.stdout[-3000:]}")
    return ran.stdout.strip()


def version_of(tree: Path) -> str:
    """Read the version of a tree's pyproject.toml."""
    found: str = tomllib.loads((tree / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    return found


def tag_of(commit: str, version: str) -> str | None:
    """Return the release's tag on the commit; None: it has none.

    Raises:
        ReleaseProblem: a tag of another version is on it.
    """
    tags = [tag for tag in told("git", "tag", "--points-at", commit).split() if tag.startswith("v")]
    if tags and f"v{version}" not in tags:
        raise ReleaseProblem(
            f"the commit has the tag {', '.join(tags)}, and pyproject.toml says {version}; write the version there, commit, and "
            "tag that commit"
        )
    return f"v{version}" if tags else None


def tools(directory: Path) -> Path:
    """Make the environment of the release's tools, in the pinned versions; return its interpreter."""
    python = directory / "bin" / "python"
    if not python.exists():
        told(sys.executable, "-m", "venv", directory)
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    told(python, "-m", "pip", "install", "--quiet", "--constraint", CONSTRAINTS, *extra["release"])
    return python


def tree_of(commit: str, to: Path, mask: int) -> Path:
    """Write the commit's files to a directory, as a checkout with this umask would."""
    to.mkdir(parents=True)
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(to, filter="data")
    for path in to.rglob("*"):
        path.chmod((0o777 if path.is_dir() or os.access(path, os.X_OK) else 0o666) & ~mask)
    return to


def build(python: Path, tree: Path, out: Path, epoch: int, **environment: str) -> Built:
    """Write the man pages, build the sdist, write it again without what belongs to this machine, and build the wheel from that."""
    out.mkdir(parents=True)
    environment = {"SOURCE_DATE_EPOCH": str(epoch), "PYTHONHASHSEED": "0", **environment}
    told(sys.executable, tree / "scripts" / "man.py", tree / "man", cwd=tree, **environment)
    told(python, "-m", "build", "--no-isolation", "--sdist", "--outdir", out, cwd=tree, **environment)
    [sdist] = out.glob("*.tar.gz")
    write_again(sdist, epoch)
    with tempfile.TemporaryDirectory(dir=out.parent) as unpacked:
        with tarfile.open(sdist) as files:
            files.extractall(unpacked, filter="data")
        [source] = Path(unpacked).iterdir()
        told(python, "-m", "build", "--no-isolation", "--wheel", "--outdir", out, cwd=source, **environment)
    [wheel] = out.glob("*.whl")
    return Built(wheel, sdist)


def write_again(sdist: Path, epoch: int) -> None:
    """Write an sdist with its files in order, of nobody, of one time and with plain modes: setuptools leaves that open."""
    with tarfile.open(sdist) as files:
        held = [(member, files.extractfile(member)) for member in sorted(files, key=lambda one: one.name)]
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as again:
            for member, data in held:
                plain = tarfile.TarInfo(member.name)
                plain.type, plain.size, plain.mtime = member.type, member.size, epoch
                plain.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
                again.addfile(plain, data)
    with sdist.open("wb") as file, gzip.GzipFile("", "wb", 9, file, mtime=epoch) as compressed:
        compressed.write(packed.getvalue())


def sha256(path: Path) -> str:
    """Return the digest of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def differing(first: Built, second: Built) -> list[str]:
    """Name the files whose bits differ between two builds, and what in the wheels does."""
    wrong = [
        one.name
        for one, other in ((first.wheel, second.wheel), (first.sdist, second.sdist))
        if sha256(one) != sha256(other)
    ]
    with zipfile.ZipFile(first.wheel) as one, zipfile.ZipFile(second.wheel) as other:
        names = sorted({*one.namelist(), *other.namelist()})
        both = {*one.namelist()} & {*other.namelist()}
        wrong += [name for name in names if name not in both or one.read(name) != other.read(name)]
    return wrong


def contents(wheel: Path) -> list[str]:
    """Return the names of the files in a wheel, but for those of its own metadata.

    Raises:
        ReleaseProblem: there is something in it that is no part of the two packages.
    """
    with zipfile.ZipFile(wheel) as files:
        names = [name for name in files.namelist() if ".dist-info/" not in name and ".data/" not in name]
    strange = [name for name in names if not name.startswith(("fedsoda_edge/", "fedsoda_hub/"))]
    if strange:
        raise ReleaseProblem(f"the wheel holds {', '.join(strange[:5])}; only the two packages belong there")
    return names


def release(out: Path, commit: str, work: Path) -> dict[str, object]:
    """Build, compare, check and describe; return what was made."""
    began = time.monotonic()
    python = tools(work / "tools")
    epoch = int(told("git", "show", "--no-patch", "--format=%ct", commit))
    with tempfile.TemporaryDirectory(prefix="fedsoda-release-") as elsewhere:
        shutil.rmtree(work / "first", ignore_errors=True)
        here, there = work / "first", Path(elsewhere) / "a" / "longer way"
        first_tree = tree_of(commit, here / "tree", 0o022)
        version = version_of(first_tree)
        tag = tag_of(commit, version)
        first = build(python, first_tree, here / "dist", epoch, TZ="UTC", LC_ALL="C.UTF-8")
        time.sleep(2.0)  # zip files count in steps of two seconds
        second = build(
            python, tree_of(commit, there / "tree", 0o027), there / "dist", epoch, TZ="Asia/Tokyo", LC_ALL="C"
        )
        if wrong := differing(first, second):
            raise ReleaseProblem(f"two builds of one commit differ in {', '.join(wrong[:8])}")
        told(python, "-m", "twine", "check", "--strict", first.wheel, first.sdist)
        parts = parts_of(first_tree / "scripts" / "vendored.toml", contents(first.wheel), first.wheel)
        made = Materials(version, epoch, sha256(first.wheel), first.wheel.name)
        bill = bill_of_materials(made, first.wheel, [part for part in parts if part.name != "fedsoda"])
        out.mkdir(parents=True, exist_ok=True)
        for path in (first.wheel, first.sdist):
            shutil.copy2(path, out / path.name)
        described = out / f"fedsoda-{version}.cdx.json"
        described.write_text(bill, encoding="utf-8")
        validate(python, described)
    files = [out / first.wheel.name, out / first.sdist.name, described]
    return {
        "version": version,
        "tag": tag,
        "commit": told("git", "rev-parse", commit),
        "epoch": epoch,
        "files": [{"path": str(path), "bytes": path.stat().st_size, "sha256": sha256(path)} for path in files],
        "vendored": [one_line(part) for part in parts if part.name != "fedsoda"],
        "components": len(json.loads(bill)["components"]),
        "seconds": round(time.monotonic() - began, 1),
    }


def one_line(part: Part) -> dict[str, str]:
    """Describe what others made, for the report."""
    return {"name": part.name, "version": part.version, "licence": part.licence, "origin": part.origin}


def main() -> int:
    """Print the report, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "release" / "dist", help="directory for the files")
    parser.add_argument("--commit", default="HEAD", help="what to build")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "release", help="directory for environments")
    parser.add_argument("--check", action="store_true", help="install in fresh environments too (minutes)")
    given = parser.parse_args()
    try:
        report = release(given.out.resolve(), given.commit, given.work.resolve())
        if given.check:
            wheel = Path(next(str(one["path"]) for one in report["files"] if str(one["path"]).endswith(".whl")))  # type: ignore[attr-defined]
            report["installs"] = check_installs(wheel, given.work.resolve() / "tools", CONSTRAINTS)
    except ReleaseProblem as problem:
        print(json.dumps({"status": "error", "message": str(problem)}))
        print(f"scripts/release: {problem}", file=sys.stderr)
        return 1
    failed = [one for one in report.get("installs", []) if not one["passed"]]  # type: ignore[attr-defined]
    print(json.dumps({"status": "error" if failed else "ok", **report}, indent=1))
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
