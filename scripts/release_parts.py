"""List what a release is made of: the files of others in the wheel with their licences, and the packages that it needs.

The bill of materials is CycloneDX 1.6, written from the metadata of the pinned packages in this environment, and held
against the official JSON schema by another program's validator. Its bits depend on the release alone.
"""

from __future__ import annotations

import email
import fnmatch
import hashlib
import json
import re
import subprocess
import tomllib
import uuid
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, Protocol

from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

EXTRAS = ("", "hub", "datasets", "gguf")  # what people install


class Headers(Protocol):
    """What a package says of itself, by header."""

    def get_all(self, name: str, /) -> list[Any] | None: ...
    def __getitem__(self, name: str, /) -> Any: ...


@dataclass(frozen=True)
class Part:
    """Files of one origin in the wheel. digests: sha256 by name. licence: as SPDX writes it."""

    name: str
    version: str
    licence: str
    origin: str
    digests: dict[str, str]


@dataclass(frozen=True)
class Materials:
    """The release that a bill is of. epoch: seconds since 1970. digest, wheel: of its wheel."""

    version: str
    epoch: int
    digest: str
    wheel: str


@dataclass(frozen=True)
class Needed:
    """A package that the release needs, and the packages that this one needs."""

    name: str
    version: str
    licence: str
    needs: tuple[str, ...]


def parts_of(table: Path, names: Sequence[str], wheel: Path) -> list[Part]:
    """Find the part that each file of the wheel belongs to, the last that names it; parts without files are left out.

    Raises:
        ValueError: a file that is not Python belongs to no part, or the licence of a part is not in the wheel.
    """
    written = tomllib.loads(table.read_text(encoding="utf-8"))["part"]
    of: dict[str, list[str]] = {part["name"]: [] for part in written}
    for name in names:
        if name.endswith((".py", "/")):
            continue
        whose = [part["name"] for part in written if any(fnmatch.fnmatch(name, one) for one in part["files"])]
        if not whose:
            raise ValueError(f"{name} is in no part of {table.name}; say there whose it is, and under which licence")
        of[whose[-1]].append(name)
    found = []
    with zipfile.ZipFile(wheel) as files:
        for part in written:
            mine = of[part["name"]]
            if not mine:
                continue
            licence_file = part.get("licence_file")
            if licence_file is not None and licence_file not in names:
                raise ValueError(f"the licence of {part['name']} is to be in {licence_file}, which is not in the wheel")
            digests = {name: hashlib.sha256(files.read(name)).hexdigest() for name in mine}
            found.append(Part(part["name"], part.get("version", ""), part["licence"], part.get("origin", ""), digests))
    return found


def needed_by(wheel: Path, extras: Iterable[str]) -> list[Needed]:
    """List what a wheel needs on this system, with all that this needs, in the versions that are installed here."""
    root = _metadata(wheel)
    name = canonicalize_name(str(root["Name"]))
    found: dict[str, Needed] = {}
    left = [(name, frozenset(extras))]
    seen: set[tuple[str, frozenset[str]]] = set()
    while left:
        name, wanted = left.pop()
        if (name, wanted) in seen:
            continue
        seen.add((name, wanted))
        try:
            metadata = root if name == canonicalize_name(str(root["Name"])) else distribution(name).metadata
        except PackageNotFoundError:  # an extra that was not installed here: its parts are named, without a version
            found.setdefault(name, Needed(name, "", "", ()))
            continue
        needs = []
        for requirement in map(Requirement, metadata.get_all("Requires-Dist") or ()):
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": one}) for one in {"", *wanted}):
                child = canonicalize_name(requirement.name)
                needs.append(child)
                left.append((child, frozenset(requirement.extras)))
        before = found.get(name)
        everything = tuple(sorted({*needs, *(before.needs if before else ())} - {name}))
        found[name] = Needed(name, str(metadata["Version"]), licence_of(metadata), everything)
    return [found[name] for name in sorted(found)]


def _metadata(wheel: Path) -> Headers:
    with zipfile.ZipFile(wheel) as files:
        [name] = [name for name in files.namelist() if name.endswith(".dist-info/METADATA")]
        return email.message_from_bytes(files.read(name))


def licence_of(metadata: Headers) -> str:
    """Return the licence of a package as an SPDX expression, else in its own words; "" where it says none."""
    lines = metadata.get_all("Classifier") or []
    classified = [str(one).rpartition(" :: ")[2] for one in lines if str(one).startswith("License ::")]
    told = [str((metadata.get_all(field) or [""])[0]).strip() for field in ("License-Expression", "License")]
    return told[0] or told[1].partition("\n")[0][:100] or ", ".join(classified)


def _licences(told: str) -> list[dict[str, object]]:
    try:
        return [{"expression": str(canonicalize_license_expression(told))}] if told else []
    except InvalidLicenseExpression:
        return [{"license": {"name": told}}]


def bill_of_materials(made: Materials, wheel: Path, parts: Sequence[Part]) -> str:
    """Write the bill of materials of a release.

    Args:
        parts: what others made of the wheel's files.
    """
    packages = needed_by(wheel, EXTRAS)
    root = f"pkg:pypi/fedsoda@{made.version}"
    reference = {
        one.name: f"pkg:pypi/{one.name}@{one.version}" if one.version else f"pkg:pypi/{one.name}" for one in packages
    }
    reference["fedsoda"] = root
    others = [one for one in packages if one.name != "fedsoda"]
    document = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, made.digest)}",
        "version": 1,
        "metadata": {
            "timestamp": datetime.fromtimestamp(made.epoch, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "component": {
                "type": "application",
                "bom-ref": root,
                "name": "fedsoda",
                "version": made.version,
                "purl": root,
                "licenses": _licences("Apache-2.0"),
                "hashes": [{"alg": "SHA-256", "content": made.digest}],
                "properties": [{"name": "fedsoda:wheel", "value": made.wheel}],
            },
        },
        "components": [*(_package(one, reference[one.name]) for one in others), *map(_vendored, parts)],
        "dependencies": [
            *({"ref": reference[one.name], "dependsOn": [reference[name] for name in one.needs]} for one in packages),
            *({"ref": f"vendored:{part.name}"} for part in parts),
        ],
    }
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


def _package(one: Needed, reference: str) -> dict[str, object]:
    found: dict[str, object] = {"type": "library", "bom-ref": reference, "name": one.name, "purl": reference}
    found |= {"version": one.version} if one.version else {}
    licences = _licences(one.licence)
    return found | ({"licenses": licences} if licences else {})


def _vendored(part: Part) -> dict[str, object]:
    return {
        "type": "data" if part.name == "ref24" else "library",
        "bom-ref": f"vendored:{part.name}",
        "name": part.name,
        "version": part.version,
        "description": part.origin,
        "licenses": _licences(part.licence),
        "components": [
            {
                "type": "file",
                "bom-ref": f"vendored:{part.name}/{re.sub('[^A-Za-z0-9_.-]', '-', name)}",
                "name": name,
                "hashes": [{"alg": "SHA-256", "content": digest}],
            }
            for name, digest in sorted(part.digests.items())
        ],
    }


_VALIDATE = """
import sys
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
wrong = JsonStrictValidator(SchemaVersion.V1_6).validate_str(open(sys.argv[1], encoding="utf-8").read())
sys.exit(f"{sys.argv[1]}: {wrong}" if wrong else 0)
"""


def validate(python: Path, bill: Path) -> None:
    """Hold a bill against the schema of CycloneDX, in the environment of the release's tools.

    Raises:
        ValueError: it does not follow the schema.
    """
    ran = subprocess.run([python, "-c", _VALIDATE, bill], capture_output=True, text=True, check=False)
    if ran.returncode:
        raise ValueError(f"the bill of materials is not CycloneDX 1.6: {ran.stderr.strip()[-600:]}")
