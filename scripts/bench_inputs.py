"""Try what users really bring, kind by kind, and count what is answered rightly.

Each case runs in a folder of its own, which is removed. `--expect-failures FILE` names the cases, one a line, that are wrong
with the code that is tried: the script then fails where another one is wrong, or one of these is right. Without it any
wrong case fails the script.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
import traceback
from collections import Counter, defaultdict
from pathlib import Path

from bench_inputs_case import Case

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("rows", "tokens", "models", "network", "machine")  # a file bench_inputs_NAME.py each


def all_cases(shared: Path) -> list[Case]:
    """List the cases of all parts; no two have one name."""
    cases = [case for part in PARTS for case in importlib.import_module(f"bench_inputs_{part}").cases(shared)]
    twice = [name for name, count in Counter(map(full_name, cases)).items() if count > 1]
    assert not twice, f"two cases have one name: {twice}"
    return cases


def full_name(case: Case) -> str:
    """Return the name by which `--only` and `--expect-failures` know a case."""
    return f"{case.part}: {case.kind}: {case.name}"


def tried(case: Case) -> str:
    """Try a case in an empty folder; return what was wrong."""
    with tempfile.TemporaryDirectory(prefix="fedsoda-case-") as directory:
        try:
            return case.wrong(Path(directory))
        except Exception:
            return traceback.format_exc(limit=-2)


def main() -> None:
    """Try all cases, print the counts, and exit with 1 where they are not as expected."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shared", default=str(ROOT.parent / "shared"), help="directory with cases/")
    parser.add_argument("--only", default="", help="try the cases whose name has this in it")
    parser.add_argument("--expect-failures", type=Path, help="file with the names of cases that are wrong")
    options = parser.parse_args()
    expected = set(options.expect_failures.read_text().split("\n")) - {""} if options.expect_failures else set()
    counts: dict[str, dict[str, int]] = defaultdict(lambda: {"tried": 0, "right": 0, "wrong": 0})
    wrong: dict[str, str] = {}
    names: set[str] = set()
    for case in all_cases(Path(options.shared)):
        name = full_name(case)
        if options.only not in name:
            continue
        names.add(name)
        found = tried(case)
        count = counts[f"{case.part}: {case.kind}"]
        count["tried"] += 1
        count["wrong" if found else "right"] += 1
        if found:
            wrong[name] = found
        print(f"{'wrong' if found else 'right'}  {name}", file=sys.stderr, flush=True)
    total = {key: sum(count[key] for count in counts.values()) for key in ("tried", "right", "wrong")}
    print(json.dumps({"total": total, "kinds": counts, "wrong": wrong}, indent=1))
    if set(wrong) != expected & names:
        raise SystemExit(f"{len(set(wrong) ^ (expected & names))} cases are not as expected")


if __name__ == "__main__":
    main()
