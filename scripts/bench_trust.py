"""Count what strangers can and cannot do to an edge, to a hub and to what they make together. Prints JSON.

Each part is a file bench_trust_NAME.py: `measure(quick)` counts over the product's own code, `DEFECTS` takes one of its
checks away at a time. With `--planted-defects` each of those has to be seen: the script fails where one is not. Without, it
fails where anything is wrong.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Protocol, cast

PARTS = ("tls", "identity", "bundles", "resources", "frames", "artifacts", "worker", "canaries", "robust")


class Part(Protocol):
    """A file of the bench.

    DEFECTS: by name, what takes one check out of the product for as long as it is entered.
    """

    DEFECTS: Mapping[str, Callable[[], AbstractContextManager[None]]]

    def measure(self, quick: bool) -> dict[str, object]:
        """Count; returns at least `tried`, `right` and `wrong`, a list of sentences."""
        ...


def part(name: str) -> Part:
    """Load a part."""
    return cast(Part, importlib.import_module(f"bench_trust_{name}"))


def counted(name: str, quick: bool) -> dict[str, object]:
    """Count a part as it is; seconds: how long that took."""
    started = time.monotonic()
    found = part(name).measure(quick)
    return {**found, "seconds": round(time.monotonic() - started, 1)}


def unseen_defects(name: str) -> list[str]:
    """Plant each defect of a part, and list those under which nothing is counted as wrong."""
    unseen = []
    for defect, planted in part(name).DEFECTS.items():
        with planted():
            found = part(name).measure(True)
        print(f"{name}: {defect}: {'seen' if found['wrong'] else 'NOT SEEN'}", file=sys.stderr, flush=True)
        if not found["wrong"]:
            unseen.append(f"{name}: {defect}")
    return unseen


def main() -> None:
    """Count all parts, or plant their defects, and exit with 1 where that is not as it should be."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=PARTS, default=PARTS, help="parts to count instead of all")
    parser.add_argument("--quick", action="store_true", help="smaller numbers: three minutes instead of an hour")
    parser.add_argument(
        "--planted-defects", action="store_true", help="take one check away at a time; each must be seen"
    )
    options = parser.parse_args()
    if options.planted_defects:
        planted = {name: len(part(name).DEFECTS) for name in options.only}
        unseen = [defect for name in options.only for defect in unseen_defects(name)]
        print(json.dumps({"planted": planted, "unseen": unseen}, indent=1))
        if unseen:
            raise SystemExit(f"{len(unseen)} planted defects were not seen")
        return
    found = {}
    for name in options.only:
        found[name] = counted(name, options.quick)
        wrong = cast(list[str], found[name]["wrong"])
        print(f"{name}: {found[name]['tried']} tried, {len(wrong)} wrong", file=sys.stderr, flush=True)
    print(json.dumps(found, indent=1))
    if any(one["wrong"] for one in found.values()):
        raise SystemExit("some of it is wrong")


if __name__ == "__main__":
    main()
