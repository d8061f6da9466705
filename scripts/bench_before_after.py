"""Compare this checkout with an older one: equal deltas bit for bit, and no figure worse by more than 3 %.

    deltas   a federation of real commands, two edges of different size classes, and `fedsoda-hub compare` over every
             method and way to aggregate: every record of every ledger, every blob that they name, every view and
             residual on the edges
    demo     `fedsoda-hub demo`: seconds, CPU seconds of all its processes, peak memory, bytes, accuracy
    edge     the arms of `scripts/bench_edge.py --quick` that are ours: speed and memory

Demo and edge run with both checkouts, one after the other, in `--pairs` pairs whose order alternates. A figure is the
median of the pairs' ratios with a 95 % bootstrap interval, above 1 where this checkout is worse. One above 1.03 is
undecided where the interval reaches 1 or there are fewer than 5 pairs, since noise may be all there is: take more pairs,
and a machine that does nothing else. Figures that repeat exactly, such as sizes, have no interval. Only commands are
driven, with PYTHONPATH at the checkout.

Exit status 1 when a ratio is above 1.03, decided or not, or a bit differs. `--planted-defect` gives this checkout a
learning rate that differs in its fourth digit, one more round in the demo, and border states that are computed for every
sample; each of the three must make it fail. What the figures should be in themselves is the other benches' matter.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage
from sqlite3 import connect
from typing import Any

from tests.commands import Commands, small_disk

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "fedsoda_hub" / "demo" / "model"  # of both checkouts
LIMIT = 1.03
LEAST_PAIRS = 5  # fewer decide nothing: too often all of them are on one side by chance
EDGE_TIMES = 4  # times as many pairs as of the demo, since an arm of bench_edge --quick trains for 0.25 s
DEMO_ROUNDS = 2
SHOWN_DIFFERENCES = 20

Tables = dict[str, dict[str, Any]]

RUN: Tables = {
    "method": {"adapter_layers": 3, "layers_per_group": 3, "groups": 3, "realign_every": 2},
    "lora": {"rank": 4, "alpha": 8},
    "public": {"text": "public.txt", "sequences": 6, "length": 48},
    "align": {"border_map": "none", "steps": 3, "realign_steps": 2, "batch_size": 4, "learning_rate": 1e-3},
    "rounds": {"count": 3},
    "local": {"max_steps": 6, "epochs": 9, "batch_size": 4, "learning_rate": 5e-3, "max_length": 48},
    "task": {"prompt": "Say {word}:", "completion": "{answer}", "eval_data": "eval.jsonl"},
}
# Defaults that have changed: what runs had before, for a checkout that has the key.
AS_BEFORE: Tables = {"method": {"distance": "angular"}, "align": {"heal": False}}
KEYS_OF = """
import json
try:
    from fedsoda_hub.settings.tables import Align, Method
    print(json.dumps({"method": Method.__struct_fields__, "align": Align.__struct_fields__}))
except ImportError:  # the tables stood elsewhere before there were these keys
    print("{}")
"""
OF_THE_FEDERATION: Tables = {
    "method": {"classes": [4]},
    "public": {"like_task": "prompts.jsonl"},
    "align": {"border_map": "ridge", "border_rank": 16},
    "rounds": {"min_edges": 2, "quorum": 1.0, "deadline_seconds": 86400},
    "listen": {"port": 0},
}
DEFECT: Tables = {"local": {"learning_rate": 5.001e-3}}
COMPARE = {
    "data": ["a.jsonl", "b.jsonl"],
    "seeds": [0],
    "edges": 2,
    "least_rows": 2,
    "splits": ["files"],
    "baselines": ["alone"],
}
VARIANTS: dict[str, Tables] = {
    "fedsoda": {},
    "int8": {"wire": {"codec": "int8"}},
    "nf4-weight": {"wire": {"codec": "nf4-weight"}},
    "drift": {"method": {"realign_every": "auto"}},
    "own-prompts": {"public": {"like_task": "prompts.jsonl"}, "align": {"border_map": "ridge", "border_rank": 16}},
    "ffa": {"aggregation": {"rule": "ffa"}},
    "rolora": {"aggregation": {"rule": "rolora"}},
    "flexlora": {"aggregation": {"rule": "flexlora"}, "wire": {"codec": "bf16"}},
    "fedavgm": {"aggregation": {"optimizer": "fedavgm"}},
    "fedadam": {"aggregation": {"optimizer": "fedadam"}},
    "fedyogi": {"aggregation": {"optimizer": "fedyogi"}},
    "exact": {"method": {"name": "exact"}},
    "fedbiot": {"method": {"name": "fedbiot"}},
    "fedot": {"method": {"name": "fedot"}},
    "fedpetuning": {"method": {"name": "fedpetuning"}},
    "fedpruner": {"method": {"name": "fedpruner", "reprune_every": 1}},
    "fedpruner+": {"method": {"name": "fedpruner+"}},
}
WORDS = [
    "the",
    "cat",
    "on",
    "a",
    "mat",
    "an",
    "inn",
    "in",
    "rain",
    "one",
    "other",
    "than",
    "then",
    "tan",
    "tin",
    "ton",
    "cow",
    "hen",
    "bus",
    "car",
    "rice",
    "soup",
]
VOLATILE = ("run_id", "fixed", "values", "deadline_at")  # of records: chance, paths, clock
KEPT_ON_EDGES = ("adapter.safetensors", "emulator.safetensors", "residual")

# The figures of `demo --json` that are compared.
DEMO = (
    *("seconds prepare", "seconds rounds", "seconds total", "edge_peak_rss_bytes", "agent_peak_rss_bytes"),
    *("bytes bundle", "bytes up_per_edge_round", "bytes down_per_edge_round", "bits_per_parameter"),
    *("public_kl aligned", "accuracy full", "accuracy sub_llm", "accuracy plug_in", "accuracy local_only"),
)
WAYS = ("first", "cached", "packed", "recomputed")  # arms of bench_edge that are ours
MORE_IS_BETTER = ("tokens_per", "accuracy")  # beginnings of the names of such figures


@dataclass(frozen=True)
class Arm:
    """A checkout, with the directory of its runs."""

    name: str
    checkout: Path
    work: Path
    has_defect: bool = False

    @property
    def environment(self) -> dict[str, str]:
        """The environment of this process with the checkout's packages, without options of the commands."""
        ours = {name: value for name, value in os.environ.items() if not name.startswith("FEDSODA_")}
        return {**ours, "PYTHONPATH": str(self.checkout), "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}

    def run(self, *command: str | Path, threads: int = 0, may_fail: bool = False) -> str:
        """Run Python with this checkout's packages, and return what it prints.

        Args:
            threads: how many torch computes with; 0: as it likes.
            may_fail: accept exit status 1 with output.
        """
        environment = self.environment | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
        self.work.mkdir(parents=True, exist_ok=True)
        ended = subprocess.run(
            [sys.executable, *map(str, command)],
            capture_output=True,
            text=True,
            check=False,
            env=environment,
            cwd=self.work,
        )
        if ended.returncode and not (may_fail and ended.returncode == 1 and ended.stdout):
            raise SystemExit(
                f"{self.name}: {' '.join(map(str, command))} ended with {ended.returncode}:\n{ended.stderr[-3000:]}"
            )
        return ended.stdout

    @cached_property
    def settings(self) -> Tables:
        """The settings of all runs, by which both checkouts do the same."""
        keys = json.loads(self.run("-c", KEYS_OF))
        as_before = {
            table: {key: value for key, value in values.items() if key in keys.get(table, ())}
            for table, values in AS_BEFORE.items()
        }
        return {table: {**values, **as_before.get(table, {})} for table, values in RUN.items()}

    def be_ready(self) -> None:
        """Compile once, so that compiling is never timed, and check that no installed package hides the checkout."""
        self.run("-m", "compileall", "-q", self.checkout / "fedsoda_edge", self.checkout / "fedsoda_hub")
        for package in ("fedsoda_edge", "fedsoda_hub"):
            found = self.run("-c", f"import {package}; print({package}.__file__)").strip()
            assert Path(found).is_relative_to(self.checkout), f"{self.name} runs {found}, not {self.checkout}"


# --- deltas ----------------------------------------------------------------------------------------------------


def write_inputs(directory: Path) -> None:
    """Write text and rows that are the same every time."""
    directory.mkdir(parents=True)
    chance = random.Random(0)
    (directory / "public.txt").write_text(" ".join(chance.choices(WORDS, k=1500)))
    for name, count in (("a", 20), ("b", 14), ("eval", 8), ("prompts", 60)):
        rows = [
            {"word": " ".join(chance.choices(WORDS, k=3)), "answer": chance.choice(["yes", "no"])} for _ in range(count)
        ]
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def toml(top: dict[str, Any], *changes: Tables, prefix: str = "") -> str:
    """Write the tables of all `changes` together; a later one replaces the keys of an earlier one."""
    tables: Tables = {}
    for change in changes:
        for table, values in change.items():
            tables[table] = tables.get(table, {}) | values
    lines = [f"{key} = {json.dumps(value)}" for key, value in top.items()]
    for table, values in tables.items():
        lines += [f"[{prefix}{table}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
    return "\n".join(lines) + "\n"


def federate(arm: Arm) -> Path:
    """Run two edges of different size classes as processes over loopback, and return the directory of all files."""
    directory = arm.work / "federation"
    write_inputs(directory)
    top = {"name": "fixed", "model": str(MODEL), "device": "cpu"}
    (directory / "run.toml").write_text(toml(top, arm.settings, OF_THE_FEDERATION, DEFECT if arm.has_defect else {}))
    with Commands(directory, arm.environment) as commands:
        for edge in "ab":
            commands.ask("fedsoda_hub", "token", "create", "run.toml", "--name", edge, "--out", f"{edge}.token")
        hub = commands.start("hub", "fedsoda_hub", "serve", "run.toml", "--exit-when-done")
        url = commands.wait_for("hub", event="listening")["url"]
        commands.wait_for("hub", event="prepared")
        bundle = directory / "fixed.run" / "bundle"
        needs = [json.loads((bundle / f"manifest{n}.json").read_text())["needs"]["disk_bytes"] for n in ("", ".1")]
        little = small_disk(directory / "small_disk", sum(needs) // 2, arm.environment["PYTHONPATH"])
        joins = [
            commands.start(
                edge,
                *("fedsoda_edge", "join", url, "--device", "cpu"),
                *("--token-file", f"{edge}.token", "--data", f"{edge}.jsonl"),
                environment={"FEDSODA_HOME": str(directory / f"home-{edge}"), **disk},
            )
            for edge, disk in (("a", {}), ("b", little))
        ]
        commands.finish(hub, *joins)
    return directory


def compare_methods(arm: Arm) -> Path:
    """Run every method and way to aggregate in one process, and return the directory of all files."""
    directory = arm.work / "methods"
    write_inputs(directory)
    top = {"model": str(MODEL), "device": "cpu"}
    file = toml(top, arm.settings, {"compare": COMPARE}, DEFECT if arm.has_defect else {})
    for name, tables in VARIANTS.items():
        file += f'[variants."{name}"]\n' + toml({}, tables, prefix=f'variants."{name}".')
    (directory / "compare.toml").write_text(file)
    arm.run(
        *("-m", "fedsoda_hub", "compare", directory / "compare.toml", "--out", directory / "out", "--json"), threads=1
    )
    return directory


def facts(directory: Path) -> dict[str, Any]:
    """Read all ledgers in a directory, by run, kind, round and edge, and digest what edges hold.

    Every blob must have the digest that is its name.
    """
    found: dict[str, Any] = {}
    for path in sorted(directory.rglob("ledger.sqlite")):
        run = path.parent.relative_to(directory)
        with closing(connect(path)) as ledger:
            records = [json.loads(row) for (row,) in ledger.execute("SELECT record FROM log ORDER BY seq")]
        for record in records:
            key = " ".join(str(record[name]) for name in ("record", "round", "edge") if name in record)
            values = {name: value for name, value in record.items() if name not in VOLATILE}
            found |= {f"{run}: {key} {name}": value for name, value in leaves(values)}
        for digest in {value for _, value in leaves(records) if is_digest(value)}:
            data = (path.parent / "blobs" / digest).read_bytes()
            assert hashlib.sha256(data).hexdigest() == digest, f"{path.parent}: blob {digest} has another digest"
    for name in KEPT_ON_EDGES:
        for path in sorted(directory.glob(f"home-*/runs/*/{name}")):
            home = path.relative_to(directory).parts[0]
            found[f"{home}: {name}"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def digests(found: dict[str, Any]) -> dict[str, str]:
    """Digest all facts of each run and home."""
    of_run: dict[str, list[Any]] = {}
    for key, value in sorted(found.items()):
        of_run.setdefault(key.partition(":")[0], []).append([key, value])
    return {run: hashlib.sha256(json.dumps(values).encode()).hexdigest() for run, values in of_run.items()}


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (path, value) of every value that is neither a table nor a list."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, f"{name} {key}".strip())
    else:
        yield name, value


def is_digest(value: object) -> bool:
    """Tell whether a value is a sha256 in hexadecimal."""
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def deltas(base: Arm, after: Arm) -> dict[str, Any]:
    """Compare what both checkouts make of the same inputs, bit for bit."""
    result: dict[str, Any] = {"identical": True, "facts": {}, "differences": [], "digests": {}}
    for name, run in (("federation", federate), ("methods", compare_methods)):
        before, now = (facts(run(arm)) for arm in (base, after))
        different = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
        result["identical"] &= bool(now) and not different
        result["facts"] |= {name: len(now)}
        result["differences"] += [
            {"fact": f"{name}/{key}", "base": before.get(key), "after": now.get(key)}
            for key in different[:SHOWN_DIFFERENCES]
        ]
        result["digests"][name] = digests(now)
        say(f"deltas, {name}: {len(now)} facts, {len(different)} differ")
    return result


# --- figures ---------------------------------------------------------------------------------------------------


def demo(arm: Arm) -> dict[str, float]:
    """Run one demo, and return its figures."""
    rounds = DEMO_ROUNDS + arm.has_defect
    spent = getrusage(RUSAGE_CHILDREN)
    said = arm.run(
        *("-m", "fedsoda_hub", "demo", "--rounds", str(rounds), "--dir", arm.work / "demo", "--json"), threads=1
    )
    found = {name: value for name, value in leaves(json.loads(said)) if name in DEMO}
    now = getrusage(RUSAGE_CHILDREN)
    return {"cpu_seconds": now.ru_utime + now.ru_stime - spent.ru_utime - spent.ru_stime, **found}


def make_ready(arm: Arm) -> None:
    """Run bench_edge once, so that its model, bundle and border states exist."""
    bench_edge(arm, "--repeats", "1")


def edge(way: str, arm: Arm) -> dict[str, float]:
    """Run one arm of bench_edge once, and return its figures."""
    run = json.loads(bench_edge(arm, "--arm", way))
    per = {"second": run["seconds"], "cpu_second": run["cpu_seconds"]}
    found = {f"tokens_per_{unit} {way}": run["tokens"] / seconds for unit, seconds in per.items()}
    return {**found, f"peak_bytes {way}": run["peak_bytes"]}


def bench_edge(arm: Arm, *options: str) -> str:
    """Run bench_edge with these options, and return what it prints."""
    defect = ["--planted-defect"] if arm.has_defect else []
    script = arm.checkout / "scripts" / "bench_edge.py"
    # It may fail, since its own targets are for larger models.
    return arm.run(script, "--quick", "--out", arm.work / "edge", *options, *defect, may_fail=True)


def side_by_side(
    base: Arm, after: Arm, measure: Callable[[Arm], dict[str, float]], pairs: int, name: str
) -> list[dict[str, Any]]:
    """Measure both checkouts in turn, and judge each figure."""
    found: dict[str, list[dict[str, float]]] = {base.name: [], after.name: []}
    for pair in range(pairs):
        for arm in (base, after) if pair % 2 == 0 else (after, base):
            found[arm.name].append(measure(arm))
            say(f"{name}, pair {pair + 1} of {pairs}, {arm.name}: {found[arm.name][-1]}")
    return [
        judged(figure, [one[figure] for one in found[base.name]], [one[figure] for one in found[after.name]])
        for figure in found[base.name][0]
    ]


def judged(figure: str, base: list[float], after: list[float]) -> dict[str, Any]:
    """Judge a figure by the median of the pairs' ratios, above 1 where `after` is worse, and its 95 % interval."""
    worse, better = (base, after) if figure.startswith(MORE_IS_BETTER) else (after, base)
    each = [a / b if b else (1.0 if a == b else math.inf) for a, b in zip(worse, better, strict=True)]
    chance, median = random.Random(0), statistics.median(each)
    drawn = sorted(statistics.median(chance.choices(each, k=len(each))) for _ in range(2000))
    repeats_exactly = len(base) > 1 and len({*base}) == len({*after}) == 1
    interval = {} if repeats_exactly else {"interval_95": [drawn[50], drawn[1949]] if len(each) > 1 else None}
    may_be_noise = not repeats_exactly and (len(each) < LEAST_PAIRS or drawn[50] <= 1)
    verdict = "holds" if median <= LIMIT else "undecided" if may_be_noise else "worse"
    figures = {"base": statistics.median(base), "after": statistics.median(after)}
    return {"figure": figure, **figures, "ratio": median, **interval, "verdict": verdict}


# --- both checkouts --------------------------------------------------------------------------------------------


def say(text: str) -> None:
    """Print a line on stderr."""
    print(text, file=sys.stderr, flush=True)


def git(*arguments: str) -> str:
    """Run git in this checkout, and return what it prints."""
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def default_base() -> str:
    """Find the commit at which this branch left main; on main, the commit before."""
    left = git("merge-base", "HEAD", "main")
    return git("rev-parse", "HEAD^") if left == git("rev-parse", "HEAD") else left


def main() -> None:
    """Measure both checkouts, print the result, and exit with 1 where a figure is worse."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", help="a commit; not given: where this branch left main, or on main the commit before")
    parser.add_argument("--only", choices=("deltas", "demo", "edge"), help="not given: all three")
    parser.add_argument("--pairs", type=int, default=5, help=f"pairs of demos; {EDGE_TIMES} times as many of edges")
    parser.add_argument("--planted-defect", action="store_true", help="worsen this checkout: the bench must fail")
    options = parser.parse_args()
    base = git("rev-parse", options.base or default_base())
    changed = " and what is not committed" if git("status", "--porcelain", "--untracked-files=no") else ""
    result: dict[str, Any] = {"bench": "before_after", "base": base, "after": git("rev-parse", "HEAD") + changed}
    work = Path(tempfile.mkdtemp(prefix="before-after-"))
    try:
        git("worktree", "add", "--detach", str(work / "checkout"), base)
        arms = (
            Arm("base", work / "checkout", work / "base"),
            Arm("after", ROOT, work / "after", has_defect=options.planted_defect),
        )
        for arm in arms:
            arm.be_ready()
        result |= {"limit": LIMIT, "pairs": options.pairs, "cpus": os.cpu_count(), "load_before": os.getloadavg()}
        if options.only in (None, "deltas"):
            result["deltas"] = deltas(*arms)
        if options.only in (None, "demo"):
            result["demo"] = side_by_side(*arms, demo, options.pairs, "demo")
        if options.only in (None, "edge"):
            for arm in arms:
                make_ready(arm)
            ways = (side_by_side(*arms, partial(edge, way), EDGE_TIMES * options.pairs, way) for way in WAYS)
            result["edge"] = [check for checks in ways for check in checks]
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", work / "checkout"], cwd=ROOT, check=False)
        shutil.rmtree(work, ignore_errors=True)
    checks = [*result.get("demo", []), *result.get("edge", [])]
    result["holds"] = result.get("deltas", {}).get("identical", True) and all(
        check["verdict"] == "holds" for check in checks
    )
    print(json.dumps(result, indent=1))
    if not result["holds"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
