"""Compare settings of a run on real input: SST-2, Dolly and BoolQ with the demo's 24-layer model.

A set is some of VARIANTS on a task's splits, written as COMPARE.toml in --out and run there; a second call continues
where the first stopped, and sets share the cells they have in common.
`--planted-defect` trains with learning rate 0: then all variants of the set must equal the untouched model, and the script
fails (exit 1) where the harness still sees a difference. Running and judging are left to `fedsoda-hub compare`.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedsoda_edge.data.local_data import LocalData
from fedsoda_edge.data.samples import Sample, SampleTokenizer, read_samples
from fedsoda_edge.model import lora
from fedsoda_edge.model.bundle import Bundle
from fedsoda_edge.model.source import Checkpoint, LayerSource
from fedsoda_edge.model.sub_llm import build
from fedsoda_edge.ports.disk import write_durably
from fedsoda_edge.worker.batches import SweptSamples
from fedsoda_edge.worker.training import accumulate
from fedsoda_hub.algorithms.alignment import drift
from fedsoda_hub.compare.settings import read_comparison

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "fedsoda_hub" / "demo" / "model"
LIKE_TASK_ROWS = 500  # unlabelled rows, which no edge is dealt
DOLLY_EVAL_ROWS = 400
GRADIENT_SAMPLES = 256
DOLLY_USERS = 4
DOLLY_LENGTH = 200  # characters; longer instructions are left out
BOOLQ_LENGTH = 400  # characters; longer passages are left out
BOOLQ_EVAL_ROWS, BOOLQ_LIKE_TASK_ROWS = 300, 150
BOOLQ_IDS = 192  # longest row

BASE: dict[str, dict[str, Any]] = {
    "compare": {
        "rows": 1600,
        "edges": 4,
        "seeds": [0, 1, 2],
        "eval_rows": 1000,
        "eval_every": 8,
        "baselines": ["untouched"],
    },
    "method": {"realign_every": 8},
    "public": {"sequences": 96, "length": 96},
    "align": {"border_map": "none", "steps": 60, "realign_steps": 15, "learning_rate": 3e-3},
    "rounds": {"count": 16},
    "local": {"epochs": 100, "max_steps": 50, "learning_rate": 2e-3, "max_length": 96},
}
QUICK: dict[str, dict[str, Any]] = {
    "compare": {"rows": 1200, "seeds": [0], "eval_rows": 400, "eval_every": 0},
    "public": {"sequences": 48, "length": 64},
    "align": {**BASE["align"], "steps": 20, "realign_steps": 5},
    "rounds": {"count": 3},
    "local": {"max_steps": 15},
}
TASKS: dict[str, dict[str, Any]] = {
    "sst2": {"prompt": "Review: {sentence}\nSentiment:", "completion": "{label}"},
    "dolly": {"prompt": "Instruction: {instruction}\nCategory:", "completion": "{category}"},
    "boolq": {"prompt": "{passage}\nQuestion: {question}\nAnswer:", "completion": "{answer}"},
}
OF_TASK: dict[str, dict[str, Any]] = {
    "sst2": {},
    "dolly": {"local": {"max_steps": 25}},  # it is learned in half the steps
    "boolq": {"compare": {"rows": 0}, "local": {"max_steps": 4, "max_length": BOOLQ_IDS}},  # more steps overfit
}
LIKE_TASK = "like_task.jsonl"
NEVER = {"method": {"realign_every": 0}}
# What is compared, by what differs in COMPARE.toml. "aligned" is FedSODA as in the paper.
VARIANTS: dict[str, dict[str, Any]] = {
    "aligned": {},
    "neither": {**NEVER, "align": {"steps": 0}},
    "realign": {"align": {"steps": 0}},
    "pre-align": NEVER,
    "closed-form": {**NEVER, "align": {"steps": 0, "closed_form": True}},
    "closed-form-pre-align": {**NEVER, "align": {"closed_form": True}},
    "mapped": {**NEVER, "align": {"steps": 0, "border_map": "ridge"}, "public": {"like_task": LIKE_TASK}},
    "aligned-mapped": {"align": {"border_map": "ridge"}, "public": {"like_task": LIKE_TASK}},
    "aligned-mapped-self": {"align": {"border_map": "ridge"}, "public": {"like_task": "self-generated"}},
    "exact": {"method": {"name": "exact"}},
    "n2-p6": {"method": {"layers_per_group": 2, "groups": 6}},
    "n4-p3": {"method": {"layers_per_group": 4, "groups": 3}},
    "int8": {"wire": {"codec": "int8"}},
    "bf16": {"wire": {"codec": "bf16"}},
    "klt": {"wire": {"codec": "klt"}},
    "klt-fine": {"wire": {"codec": "klt-fine"}},
    "bf16-rolora": {"wire": {"codec": "bf16"}, "aggregation": {"rule": "rolora"}},
    "klt-rolora": {"wire": {"codec": "klt"}, "aggregation": {"rule": "rolora"}},
    "public-like-task": {"public": {"text": "like_task.txt"}},
    "public-self": {"public": {"text": "self-generated"}},
    "fedbiot": {"method": {"name": "fedbiot", "realign_every": 1}, "align": {"steps": 60, "realign_steps": 5}},
    "fedot": {"method": {"name": "fedot"}},
    "fedpetuning": {"method": {"name": "fedpetuning"}},
    "fedpruner": {"method": {"name": "fedpruner"}},
    "fedpruner-once": {"method": {"name": "fedpruner", "reprune_every": 0}},
    "fedpruner+": {"method": {"name": "fedpruner+"}},
    "fedpruner-uniform": {"method": {"name": "fedpruner", "layer_choice": "uniform"}},
    "fedpruner-random": {"method": {"name": "fedpruner", "layer_choice": "random"}},
    "fedpruner-top": {"method": {"name": "fedpruner", "layer_choice": "top"}},
}
for name in ("n2-p6", "n4-p3", "public-like-task", "public-self"):  # also with the border map that is the default
    public = {**VARIANTS[name].get("public", {}), "like_task": "self-generated"}
    VARIANTS[f"{name}-mapped"] = {**VARIANTS[name], "align": {"border_map": "ridge"}, "public": public}
SETS: dict[str, tuple[str, ...]] = {
    "methods": ("aligned-mapped-self", "aligned", "fedbiot", "fedot", "fedpetuning", "exact"),
    "border-map": ("aligned", "mapped", "aligned-mapped", "aligned-mapped-self", "exact"),
    "ablation": ("neither", "closed-form", "pre-align", "closed-form-pre-align", "realign", "aligned"),
    "groups": ("n2-p6", "aligned", "n4-p3", "n2-p6-mapped", "aligned-mapped-self", "n4-p3-mapped"),
    "codecs": ("aligned", "int8", "bf16", "klt", "klt-fine", "bf16-rolora", "klt-rolora"),
    "public": (
        *("aligned", "public-like-task", "public-self"),
        *("aligned-mapped-self", "public-like-task-mapped", "public-self-mapped"),
    ),
    "pruning": (
        *("fedpruner", "fedpruner-once", "fedpruner+"),
        *("fedpruner-uniform", "fedpruner-random", "fedpruner-top"),
    ),
}


def as_toml(tables: dict[str, Any]) -> str:
    """Write TOML: values at the top first, then tables. JSON's scalars and lists are TOML's too."""
    plain = [f"{key} = {json.dumps(value)}" for key, value in tables.items() if not isinstance(value, dict)]
    for name, table in tables.items():
        if isinstance(table, dict):
            plain += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    return "\n".join(plain) + "\n"


def write_sst2(directory: Path, data: Path, like_task: int = LIKE_TASK_ROWS) -> tuple[list[str], str]:
    """Write the rows of SST-2, shuffled: the first ones are like the task, the others are dealt.

    Args:
        data: the directory with sst2.
        like_task: how many rows are like the task.

    Returns:
        ([compare] data, eval_data).
    """
    rows = (data / "sst2" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    random.Random(0).shuffle(rows)
    write_lines(directory / "train.jsonl", rows[like_task:])
    write_like_task(directory, "sst2", ({"sentence": json.loads(row)["sentence"]} for row in rows[:like_task]))
    return ["train.jsonl"], str(data / "sst2" / "dev.jsonl")


def write_dolly(
    directory: Path, data: Path, judged: int = DOLLY_EVAL_ROWS, like_task: int = LIKE_TASK_ROWS
) -> tuple[list[str], str]:
    """Write the rows of Dolly by user, each with a few of eight categories, as `write_sst2` does.

    Questions to judge on are drawn from all users.
    """
    users = [data / "dolly_federated" / f"local_training_{user}.json" for user in range(DOLLY_USERS)]
    found = {
        row["instruction"]: {"user": user.stem, "instruction": row["instruction"], "category": row["category"]}
        for user in users
        for row in json.loads(user.read_text(encoding="utf-8"))
        if len(row["instruction"]) <= DOLLY_LENGTH
    }
    rows = list(found.values())
    random.Random(0).shuffle(rows)
    like, dealt = rows[judged:][:like_task], rows[judged + like_task :]
    write_rows(directory / "eval_rows.jsonl", rows[:judged])
    write_like_task(directory, "dolly", ({"instruction": row["instruction"]} for row in like))
    for user in users:
        write_rows(directory / f"{user.stem}.jsonl", (row for row in dealt if row["user"] == user.stem))
    return [f"{user.stem}.jsonl" for user in users], "eval_rows.jsonl"


def write_boolq(
    directory: Path, data: Path, judged: int = BOOLQ_EVAL_ROWS, like_task: int = BOOLQ_LIKE_TASK_ROWS
) -> tuple[list[str], str]:
    """Write the rows of BoolQ with short passages, as `write_sst2` does.

    Both of its files are used. They are few rows, so that mostly losses can be compared.
    """
    files = [data / "boolq" / name for name in ("train.jsonl", "dev.jsonl")]
    rows = [json.loads(row) for file in files for row in file.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if len(row["passage"]) <= BOOLQ_LENGTH]
    random.Random(0).shuffle(rows)
    write_rows(directory / "eval_rows.jsonl", rows[:judged])
    like, dealt = rows[judged:][:like_task], rows[judged + like_task :]
    write_like_task(directory, "boolq", ({name: row[name] for name in ("passage", "question")} for row in like))
    write_rows(directory / "train.jsonl", dealt)
    return ["train.jsonl"], "eval_rows.jsonl"


def write_like_task(directory: Path, task: str, rows: Iterable[dict[str, str]]) -> None:
    """Write unlabelled rows, and the task's prompts with them as public text."""
    rows = list(rows)
    write_rows(directory / LIKE_TASK, rows)
    write_lines(directory / "like_task.txt", (TASKS[task]["prompt"].format(**row) for row in rows))


def write_rows(path: Path, rows: Iterable[dict[str, str]]) -> None:
    """Write rows as JSON Lines."""
    write_lines(path, map(json.dumps, rows))


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write a file as a whole, since another call may be reading the same one."""
    write_durably(path, "".join(f"{line}\n" for line in lines).encode())


WRITERS: dict[str, Callable[[Path, Path], tuple[list[str], str]]] = {
    "sst2": write_sst2,
    "dolly": write_dolly,
    "boolq": write_boolq,
}


def write(directory: Path, options: argparse.Namespace) -> Path:
    """Write the COMPARE.toml of a set and the rows that it names, and return its path."""
    directory.mkdir(parents=True, exist_ok=True)
    data = Path(options.shared).resolve() / "data"
    dealt, judged = WRITERS[options.task](directory, data)
    quick, of_task = QUICK if options.quick else {}, OF_TASK[options.task]
    tables = {name: {**table, **quick.get(name, {}), **of_task.get(name, {})} for name, table in BASE.items()}
    splits = ["files"] if options.task == "dolly" else ["dirichlet-0.5"]
    if (options.task, options.set, options.quick) == ("sst2", "methods", False):
        splits.insert(0, "iid")
    tables["compare"] |= {"data": dealt, "splits": options.splits or splits}
    tables["compare"] |= {"seeds": options.seeds} if options.seeds else {}
    tables["public"]["text"] = str(data / "wikitext2" / "test.txt")
    tables["task"] = {**TASKS[options.task], "eval_data": judged}
    if options.planted_defect:
        tables["local"]["learning_rate"] = 0.0
    names = options.variants or SETS[options.set]
    if unknown := set(names) - set(VARIANTS):
        raise SystemExit(f"--variants {sorted(unknown)[0]} is unknown; choose from {', '.join(VARIANTS)}")
    text = as_toml({"model": str(MODEL), **tables})
    for name in names:
        header = f"variants.{json.dumps(name)}"  # TOML has no + in a bare name
        text += as_toml({f"{header}.{table}": values for table, values in VARIANTS[name].items()} or {header: {}})
    some = "".join(f"-{seed}" for seed in options.seeds)  # calls with other seeds may run beside this one
    path = directory / f"{options.set}{some}.toml"
    path.write_text(text, encoding="utf-8")
    return path


def gradient_agreement(path: Path) -> dict[str, list[float]]:
    """Measure, before round 1, how near the adapter's gradient on edges is to that on the full LLM's border states.

    Returns:
        the cosine of the two on rows of the task, by variant, for each split and seed.
    """
    comparison = read_comparison(path)
    source = Checkpoint.open(str(MODEL), relative_to=ROOT)
    found: dict[str, list[float]] = {}
    for cell in comparison.cells():
        settings = comparison.settings[cell.variant]
        bundle = Bundle.open(path.parent / "cells" / "memory" / cell.directory / "run.run" / "bundle")
        tokenizer = SampleTokenizer(MODEL / "tokenizer.json", source.fields.get("eos_token_id"))
        samples = [
            sample
            for name in comparison.compare.data  # each of Dolly's users has a few categories
            for sample in read_samples(
                LocalData(path.parent / name),
                settings.prompt,
                settings.completion,
                tokenizer,
                settings.local.max_length,
            ).samples[: GRADIENT_SAMPLES // len(comparison.compare.data)]
        ]
        made = adapter_gradient(bundle, bundle.plan.swept, bundle.emulator_lora(), bundle, samples)
        wanted = adapter_gradient(source, bundle.plan.emulator, {}, bundle, samples)
        found.setdefault(cell.variant, []).append(drift.cosine(made, wanted))
    return found


def adapter_gradient(
    source: LayerSource,
    layers: Sequence[int],
    emulator_lora: dict[str, Tensor],
    bundle: Bundle,
    samples: Sequence[Sample],
) -> Tensor:
    """Compute the gradient of the completion loss by the bundle's adapter LoRA above these layers of `source`: (P,)."""
    spec = bundle.manifest.lora
    swept = SweptSamples.sweep(source, layers, samples, emulator=emulator_lora, lora_scale=spec.scale)
    tail = build(source, bundle.plan.adapter)
    lora.attach(tail, spec, bundle.adapter_lora())
    trained = [value.requires_grad_(True) for _, value in sorted(lora.parameters(tail).items())]
    accumulate(tail, swept, range(len(samples)), 8, trained)
    return torch.cat([value.grad.flatten() for value in trained if value.grad is not None])


def main() -> None:
    """Run a set, print its report, and exit with 1 where a planted defect is not seen."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog="A cell takes two to six minutes of one core; methods without a border cache take several times as long.",
    )
    parser.add_argument("--set", choices=SETS, default="methods")
    parser.add_argument("--task", choices=TASKS, default="sst2")
    parser.add_argument("--quick", action="store_true", help="one seed, fewer rows and steps: 10 minutes")
    parser.add_argument("--seeds", type=int, nargs="*", default=[])
    parser.add_argument("--splits", nargs="*", default=[])
    parser.add_argument("--variants", nargs="*", default=[], help="variants instead of the set's")
    parser.add_argument(
        "--shared",
        default=str(ROOT.parent / "shared"),
        help="directory with data/sst2, data/dolly_federated, data/boolq, data/wikitext2",
    )
    parser.add_argument("--out", default=str(ROOT / "bench-out" / "compare"))
    parser.add_argument("--planted-defect", action="store_true", help="learning rate 0: no variant may differ")
    options = parser.parse_args()
    if not (Path(options.shared) / "data" / "sst2").is_dir():
        raise SystemExit(f"{options.shared}/data/sst2 does not exist; name the directory of the data with --shared")
    kind = options.task + ("-quick" if options.quick else "") + ("-defect" if options.planted_defect else "")
    path = write(Path(options.out).resolve() / kind, options)
    command = [sys.executable, "-m", "fedsoda_hub", "compare", str(path), "--out", str(path.parent / "cells"), "--json"]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if ended.returncode != 0:
        raise SystemExit(ended.returncode)
    report = json.loads(ended.stdout)
    if options.set == "border-map":
        report["gradient_agreement"] = gradient_agreement(path)
    print(json.dumps(report))
    path.with_suffix(".json").write_text(json.dumps(report), encoding="utf-8")
    found = [one for split in report["splits"].values() for one in split["differences"]]
    if options.planted_defect and any(one["points"] != 0 or one["loss"]["nats"] != 0 for one in found):
        raise SystemExit("with learning rate 0 variants differ from the untouched model: the harness is wrong")


if __name__ == "__main__":
    main()
