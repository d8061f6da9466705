"""Compare what a run can be, on real input: SST-2 with the demo's 24-layer model, through `fedsoda-hub compare`.

Each set is one COMPARE.toml (`SETS`), written below --out and run there; a second call goes on where the first stopped.
`--planted-defect` trains with learning rate 0: the set must then show no ordering among its variants, and every one must
be the untouched model; the script fails (exit 1) where the harness still sees a difference.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "fedsoda_hub" / "demo" / "model"
LIKE_TASK_ROWS = 2000  # unlabelled, of rows that no edge is dealt
UNMAPPED: dict[str, Any] = {"border_map": "none"}

BASE: dict[str, dict[str, Any]] = {
    "compare": {
        "rows": 8000,
        "edges": 8,
        "seeds": [0, 1, 2],
        "splits": ["iid", "dirichlet-0.5"],
        "eval_rows": 2000,
        "eval_every": 2,
        "baselines": [],
    },
    "public": {"sequences": 128, "length": 128},
    "align": {"steps": 120, "realign_steps": 30, "learning_rate": 3e-3},
    "rounds": {"count": 10},
    "local": {"epochs": 100, "max_steps": 50, "learning_rate": 2e-3, "max_length": 96},
    "task": {"prompt": "Review: {sentence}\nSentiment:", "completion": "{label}"},
}
QUICK: dict[str, dict[str, Any]] = {
    "compare": {"rows": 1600, "seeds": [0], "splits": ["dirichlet-0.5"], "eval_rows": 500},
    "align": {"steps": 30, "realign_steps": 10, "learning_rate": 3e-3},
    "rounds": {"count": 4},
    "local": {**BASE["local"], "max_steps": 40},
}
NO_ALIGNMENT = {"align": {"steps": 0}, "method": {"realign_every": 0}}


def mapped(like_task: str, **align: Any) -> dict[str, Any]:
    return {"public": {"like_task": like_task}, "align": {"border_map": "ridge", **align}}


def variants(which: str, like_task: str) -> dict[str, dict[str, Any]]:
    """What is compared, as COMPARE.toml has it. like_task: a file of unlabelled rows."""
    return {
        "border-map": {
            "aligned": {"align": UNMAPPED},
            "mapped": {**NO_ALIGNMENT, **mapped(like_task, steps=0)},
            "aligned-mapped": mapped(like_task),
            "aligned-mapped-self": mapped("self-generated"),
            "exact": {"method": {"name": "exact"}},
        },
        "methods": {
            "fedsoda": mapped("self-generated"),
            "fedbiot": {"method": {"name": "fedbiot"}, "align": {**UNMAPPED, "steps": 120, "realign_steps": 10}},
            "fedot": {"method": {"name": "fedot"}, "align": {"steps": 120}},
            "fedpetuning": {"method": {"name": "fedpetuning"}},
            "exact": {"method": {"name": "exact"}},
        },
        "ablation": {
            "neither": {"align": {**UNMAPPED, "steps": 0}, "method": {"realign_every": 0}},
            "realign": {"align": {**UNMAPPED, "steps": 0}},
            "pre-align": {"align": UNMAPPED, "method": {"realign_every": 0}},
            "both": {"align": UNMAPPED},
        },
        "groups": {f"n{n}-p{p}": {"method": {"layers_per_group": n, "groups": p}} for n, p in ((2, 6), (3, 4), (4, 3))},
        "codecs": {codec: {"wire": {"codec": codec}} for codec in ("nf4", "int8", "bf16")},
    }[which]


SETS = ("border-map", "methods", "ablation", "groups", "codecs")


def as_toml(tables: dict[str, Any]) -> str:
    """Values at the top first, then tables; JSON's scalars and lists are TOML's."""
    plain = [f"{key} = {json.dumps(value)}" for key, value in tables.items() if not isinstance(value, dict)]
    for name, table in tables.items():
        if isinstance(table, dict):
            plain += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    return "\n".join(plain) + "\n"


def write(directory: Path, options: argparse.Namespace) -> Path:
    """COMPARE.toml of a set and the rows that it names."""
    directory.mkdir(parents=True, exist_ok=True)
    data = Path(options.shared).resolve() / "data"
    rows = (data / "sst2" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    random.Random(0).shuffle(rows)
    (directory / "train.jsonl").write_text("\n".join(rows[LIKE_TASK_ROWS:]) + "\n")
    unlabelled = [json.dumps({"sentence": json.loads(row)["sentence"]}) for row in rows[:LIKE_TASK_ROWS]]
    (directory / "like_task.jsonl").write_text("\n".join(unlabelled) + "\n")
    changes = QUICK if options.quick else {}
    tables = {name: {**table, **changes.get(name, {})} for name, table in BASE.items()}
    tables["compare"] |= {"data": ["train.jsonl"]}
    tables["compare"] |= {"seeds": options.seeds} if options.seeds else {}
    tables["compare"] |= {"splits": options.splits} if options.splits else {}
    tables["public"]["text"] = str(data / "wikitext2" / "test.txt")
    tables["task"]["eval_data"] = str(data / "sst2" / "dev.jsonl")
    if options.planted_defect:
        tables["local"]["learning_rate"] = 0.0
        tables["compare"]["baselines"] = ["untouched"]
    chosen = variants(options.set, "like_task.jsonl")
    unknown = set(options.variants) - set(chosen)
    if unknown:
        raise SystemExit(f"the set {options.set} has no variant {sorted(unknown)[0]}; it has {', '.join(chosen)}")
    text = as_toml({"model": str(MODEL), **tables})
    for name in options.variants or chosen:
        text += as_toml({f"variants.{name}.{table}": values for table, values in chosen[name].items()})
    path = directory / "compare.toml"
    path.write_text(text, encoding="utf-8")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog="About 4 minutes a cell on 2 cores; methods without a border cache take several times as long.",
    )
    parser.add_argument("--set", choices=SETS, default="methods")
    parser.add_argument("--quick", action="store_true", help="one seed, one split, fewer rows and steps: 10 minutes")
    parser.add_argument("--seeds", type=int, nargs="*", default=[])
    parser.add_argument("--splits", nargs="*", default=[])
    parser.add_argument("--variants", nargs="*", default=[], help="of the set; none: all")
    parser.add_argument(
        "--shared", default=str(ROOT.parent / "shared"), help="directory with data/sst2, data/wikitext2"
    )
    parser.add_argument("--out", default=str(ROOT / "bench-out" / "compare"))
    parser.add_argument("--planted-defect", action="store_true", help="learning rate 0: no variant may differ")
    options = parser.parse_args()
    if not (Path(options.shared) / "data" / "sst2").is_dir():
        raise SystemExit(f"{options.shared}/data/sst2 is not there; name the data with --shared")
    kind = options.set + ("-quick" if options.quick else "") + ("-defect" if options.planted_defect else "")
    path = write(Path(options.out).resolve() / kind, options)
    command = [sys.executable, "-m", "fedsoda_hub", "compare", str(path), "--json"]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    print(ended.stdout, end="")
    if ended.returncode != 0:
        raise SystemExit(ended.returncode)
    found = [one for split in json.loads(ended.stdout)["splits"].values() for one in split["differences"]]
    if options.planted_defect and any(one["points"] != 0 for one in found):
        raise SystemExit("learning rate 0 and yet variants differ from the untouched model: the harness is wrong")


if __name__ == "__main__":
    main()
