"""Compare settings of a run on real input: SST-2, Dolly, BoolQ and GSM8K, with SmolLM2-135M or the demo's model.

A set is some of the variants on a task's splits, written as COMPARE.toml in --out and run there; a second call continues
where the first stopped, and sets share the cells they have in common.
`--planted-defect` trains with learning rate 0: then all variants of the set must equal the untouched model, and the script
fails (exit 1) where the harness still sees a difference. Running and judging are left to `fedsoda-hub compare`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from bench_tasks import WRITERS
from bench_variants import PROMPTS, ROOT, SETS, SETUPS, Tables, quick, variants
from torch import Tensor

from fedsoda_edge.data.local_data import LocalData
from fedsoda_edge.data.samples import Sample, SampleTokenizer, read_samples
from fedsoda_edge.model import lora
from fedsoda_edge.model.bundle import Bundle
from fedsoda_edge.model.source import Checkpoint, LayerSource
from fedsoda_edge.model.sub_llm import build
from fedsoda_edge.worker.batches import SweptSamples
from fedsoda_edge.worker.training import accumulate
from fedsoda_hub.algorithms.alignment import drift
from fedsoda_hub.compare.settings import read_comparison

GRADIENT_SAMPLES = 256


def as_toml(tables: Tables) -> str:
    """Write tables as TOML. JSON's scalars and lists are TOML's too."""
    return "".join(
        f"[{name}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in table.items())
        for name, table in tables.items()
    )


def write(directory: Path, options: argparse.Namespace) -> Path:
    """Write the COMPARE.toml of a set and the rows that it names, and return its path."""
    setup = quick(SETUPS[options.model]) if options.quick else SETUPS[options.model]
    if options.task not in setup.tasks:
        raise SystemExit(f"--task {options.task} is not measured with {options.model}; take {', '.join(setup.tasks)}")
    task, known = setup.tasks[options.task], variants(setup)
    names = options.variants or SETS[options.set]
    if unknown := set(names) - set(known):
        raise SystemExit(f"--variants {sorted(unknown)[0]} is unknown; choose from {', '.join(known)}")
    directory.mkdir(parents=True, exist_ok=True)
    data, prompts = Path(options.shared).resolve() / "data", PROMPTS[options.task]
    rows = WRITERS[options.task](directory, data, prompts["prompt"], task.sizes)
    tables = {name: {**table, **task.tables.get(name, {})} for name, table in setup.tables.items()}
    tables["compare"] |= {"data": rows.data, "splits": options.splits or list(task.splits)}
    tables["compare"] |= {"seeds": options.seeds} if options.seeds else {}
    tables["public"]["text"] = str(data / "wikitext2" / "test.txt")
    tables["task"] = {**prompts, "eval_data": rows.eval_data}
    if options.planted_defect:
        tables["local"]["learning_rate"] = 0.0
    for name in names:
        header = f"variants.{json.dumps(name)}"  # TOML has no + in a bare name
        tables |= {f"{header}.{table}": values for table, values in known[name].items()} or {header: {}}
    some = "".join(f"-{seed}" for seed in options.seeds)  # calls with other seeds may run beside this one
    path = directory / f"{options.set}{some}.toml"
    path.write_text(f"model = {json.dumps(str(setup.model))}\n{as_toml(tables)}", encoding="utf-8")
    return path


def gradient_agreement(path: Path) -> dict[str, list[float]]:
    """Measure, before round 1, how near the adapter's gradient on edges is to that on the full LLM's border states.

    Returns:
        the cosine of the two on rows of the task, by variant, for each split and seed.
    """
    comparison = read_comparison(path)
    found: dict[str, list[float]] = {}
    for cell in comparison.cells():
        settings = comparison.settings[cell.variant]
        source = Checkpoint.open(settings.model)
        bundle = Bundle.open(path.parent / "cells" / "memory" / cell.directory / "run.run" / "bundle")
        tokenizer = SampleTokenizer(source.path / "tokenizer.json", source.fields.get("eos_token_id"))
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
        epilog="A cell takes two to ten minutes of one core; methods without a border cache take several times as long.",
    )
    parser.add_argument("--model", choices=SETUPS, default="ref24")
    parser.add_argument("--set", choices=SETS, default="methods")
    parser.add_argument("--task", choices=PROMPTS, default="sst2")
    parser.add_argument("--quick", action="store_true", help="one seed, fewer rows and steps: 10 minutes")
    parser.add_argument("--seeds", type=int, nargs="*", default=[])
    parser.add_argument("--splits", nargs="*", default=[])
    parser.add_argument("--variants", nargs="*", default=[], help="variants instead of the set's")
    parser.add_argument(
        "--shared",
        default=str(ROOT.parent / "shared"),
        help="directory with data/sst2, data/dolly_federated, data/boolq, data/gsm8k, data/wikitext2",
    )
    parser.add_argument("--out", default=str(ROOT / "bench-out" / "compare"))
    parser.add_argument("--planted-defect", action="store_true", help="learning rate 0: no variant may differ")
    options = parser.parse_args()
    if not (Path(options.shared) / "data" / "sst2").is_dir():
        raise SystemExit(f"{options.shared}/data/sst2 does not exist; name the directory of the data with --shared")
    kind = options.task + ("-quick" if options.quick else "") + ("-defect" if options.planted_defect else "")
    path = write(Path(options.out).resolve() / options.model / kind, options)
    command = [sys.executable, "-m", "fedsoda_hub", "compare", str(path), "--out", str(path.parent / "cells"), "--json"]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if ended.returncode != 0:
        raise SystemExit(ended.returncode)
    report = json.loads(ended.stdout)
    if "stopped" in report:  # a signal came, which is no failure; an earlier report stays as it is
        print(ended.stdout, end="")
        return
    if options.set == "border-map":
        report["gradient_agreement"] = gradient_agreement(path)
    print(json.dumps(report))
    path.with_suffix(".json").write_text(json.dumps(report), encoding="utf-8")
    found = [one for split in report["splits"].values() for one in split["differences"]]
    if options.planted_defect and any(one["points"] != 0 or one["loss"]["nats"] != 0 for one in found):
        raise SystemExit("with learning rate 0 variants differ from the untouched model: the harness is wrong")


if __name__ == "__main__":
    main()
