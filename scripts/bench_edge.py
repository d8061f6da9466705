"""Bench one edge: speed and memory of local training beside the recipes that people use, on the same sub-LLM and data.

Arms, each in a child process of its own, interleaved ABBA:

    first        ours: sweep and first epoch, everything dense
    cached       ours: an epoch on cached border states, everything dense
    packed       the same as a memory plan has it where memory is short: adapter in NF4, head as it is stored
    recomputed   the same with activations made again as well, which needs least
    plain        HF + PEFT, LoRA on the adapter only, dense, no checkpointing, the model's own loss
    recipe_sub   PEFT's QLoRA recipe (LoRA everywhere, gradient checkpointing, HF Trainer) on the sub-LLM
    recipe_full  the recipe on the full model

Figures are ratios of tokens a second, medians over the repeats with a 95 % bootstrap interval; memory is a child's
high-water mark less that after its imports. What ran is kept under --out, so that a second call goes on there; delete
it to begin anew. Exit status 1 when a target is missed; `--planted-defect` makes ours
compute the border anew for every sample and must make it fail.

`--geometry llama3-8b`, `qwen2-7b` and `mistral-7b` are models of that shape with random weights and need a GPU: all in
bf16, everything in the bundle quantized, and memory is what torch had allocated there at most, from the first byte for
ours, from the first step for the recipes. `--quick` shrinks a geometry to a stand-in that also runs without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import random_bundle  # beside this file
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from fedsoda_edge.data.samples import Sample
from fedsoda_edge.model import lora
from fedsoda_edge.model.bundle import Bundle
from fedsoda_edge.model.bundle_writer import BundleSettings, shard_sizes
from fedsoda_edge.model.families import allowed_fields, family_of, layer_on_meta
from fedsoda_edge.model.sub_llm import build
from fedsoda_edge.ports.system import peak_rss_bytes, return_memory_at_once
from fedsoda_edge.protocol.manifest import LayerPlan
from fedsoda_edge.protocol.messages import LocalSettings
from fedsoda_edge.protocol.needs import MemoryPlan, SampleSizes, plans, shape_of
from fedsoda_edge.worker.batches import SweptSamples
from fedsoda_edge.worker.border_cache import CachedStates, CacheSettings
from fedsoda_edge.worker.checkpoint import RoundCheckpoint
from fedsoda_edge.worker.training import TrainedDelta, fine_tune, probe
from fedsoda_hub.plan import likely_plan
from fedsoda_hub.settings.tables import Method

ROOT = Path(__file__).resolve().parent.parent
TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
ADAPTER_LAYERS, LAYERS_PER_GROUP, SUPERVISED = 3, 3, 0.2
KEY = bytes(32)  # the data is random: nothing to hide


SPEEDUPS = {"cached_over_recipe_sub": 6.0, "cached_over_plain": 2.5, "first_over_recipe_sub": 2.0}
MEMORY = {"recipe_sub": 0.30, "recipe_full": 0.15}  # of theirs


@dataclass(frozen=True)
class Geometry:
    """samples: of ours in a child; steps: of a recipe in a child, after one that is not counted.

    device: of all arms. everything_quantized: embedding and head are in NF4 too. own_targets: by claim, where they
    are not those of all. most_bytes: that packed training may take.
    """

    shape: random_bundle.Shape
    groups: int
    samples: int
    steps: int = 2
    repeats: int = 7
    device: str = "cpu"
    everything_quantized: bool = False
    own_targets: Mapping[str, float] = field(default_factory=dict)
    most_bytes: int | None = None

    @property
    def length(self) -> int:
        return self.shape.length

    @property
    def plan(self) -> LayerPlan:
        return likely_plan(
            self.shape.layers,
            Method(adapter_layers=ADAPTER_LAYERS, layers_per_group=LAYERS_PER_GROUP, groups=self.groups),
        )

    @property
    def compute_dtype(self) -> torch.dtype:
        return torch.float32 if self.device == "cpu" else torch.bfloat16

    @property
    def small(self) -> Geometry:
        """A stand-in of the same kind, on a GPU only where there is one."""
        shape, width, heads = self.shape, 256, 4
        small = replace(
            shape,
            width=width,
            layers=16,
            vocab=4000,
            length=256,
            mlp=shape.config.intermediate_size * width // shape.width // 64 * 64,
            head=width // heads,
            key_heads=max(1, heads * shape.config.num_key_value_heads // shape.config.num_attention_heads),
        )
        device = self.device if torch.cuda.is_available() else "cpu"
        return replace(self, shape=small, groups=2, samples=8, steps=3, repeats=3, device=device)


def on_gpu(model_type: str, width: int, mlp: int, layers: int, vocab: int, key_heads: int, **targets: Any) -> Geometry:
    """A sample of 512 ids at a time, heads of 128, 4 groups of 3 removed (paper, 6.1.2)."""
    shape = random_bundle.Shape(width, layers, vocab, 512, model_type, mlp, 128, key_heads)
    return Geometry(shape, 4, 128, 16, 5, "cuda", everything_quantized=True, **targets)


GEOMETRIES = {
    "cpu": Geometry(random_bundle.Shape(1024, 32, 32000, 512), 4, 8),
    "llama3-8b": on_gpu("llama", 4096, 14336, 32, 128256, 8, most_bytes=3 << 29),
    "qwen2-7b": on_gpu("qwen2", 3584, 18944, 28, 152064, 4, own_targets={"cached_over_recipe_sub": 5.5}),
    "mistral-7b": on_gpu(
        "mistral", 4096, 14336, 32, 32000, 8,
        own_targets={"packed_over_recipe_full_memory": 0.18, "recomputed_over_recipe_full_memory": 0.18},
    ),
}  # fmt: skip


def make(directory: Path, geometry: Geometry) -> None:
    """A random full model, its bundle and the bundle as a plain checkpoint."""
    random_bundle.make(
        directory / "model",
        geometry.shape,
        geometry.plan,
        TARGETS,
        quantize_embedding=geometry.everything_quantized,
        device=geometry.device,
    )
    plain = directory / "model" / "plain"
    if plain.exists():
        return
    part = plain.with_suffix(".part")
    Bundle.open(directory / "model" / "bundle").materialize(part)
    config = json.loads((part / "config.json").read_text())
    config["quantization_config"]["bnb_4bit_compute_dtype"] = _name(geometry.compute_dtype)
    (part / "config.json").write_text(json.dumps(config))
    part.rename(plain)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def samples(geometry: Geometry) -> list[Sample]:
    chance = random.Random(0)
    start = round(geometry.length * (1 - SUPERVISED))
    return [
        Sample((1, *(chance.randrange(3, geometry.shape.vocab) for _ in range(geometry.length - 1))), start)
        for _ in range(geometry.samples)
    ]


# --- arms: (tokens, seconds, cpu seconds) ------------------------------------------------------------------

Arm = Callable[[Path, Geometry, bool], tuple[int, float, float]]


def way(bundle: Bundle, geometry: Geometry, *, packed: bool = False, recompute: bool = False) -> MemoryPlan:
    """Of training one sample at a time."""
    labels = geometry.length - round(geometry.length * (1 - SUPERVISED))
    found = plans(shape_of(bundle.manifest), geometry.device, SampleSizes(1, geometry.length, labels))
    return next(plan for plan in found if (plan.packed, plan.recompute) == (packed, recompute))


def states_of(
    bundle: Bundle, geometry: Geometry, at: Path, plan: MemoryPlan, max_bytes: int | None = None
) -> CachedStates:
    return CachedStates(
        bundle,
        [sample.ids for sample in samples(geometry)],
        emulator=bundle.emulator_lora(),
        emulator_name="initial",
        settings=CacheSettings(at, KEY, "bf16", max_bytes, plan.slice_bytes, not plan.packed),
        compute_dtype=geometry.compute_dtype,
        device=geometry.device,
    )


def wake(geometry: Geometry) -> None:
    """A GPU's first product takes a second, of whichever arm it is."""
    if geometry.device != "cpu":
        one = torch.ones(64, 64, device=geometry.device, dtype=geometry.compute_dtype)
        torch.mm(one, one)
        torch.cuda.synchronize()


def train_ours(
    bundle: Bundle,
    geometry: Geometry,
    states: CachedStates,
    plan: MemoryPlan,
    checkpoint: RoundCheckpoint | None = None,
) -> Callable[[], TrainedDelta]:
    """The adapter built and one step run, as recipes are not timed in their first either; call it to train one epoch."""
    spec, view = bundle.manifest.lora, bundle.adapter_lora()
    sub_llm = build(
        bundle,
        bundle.plan.adapter,
        compute_dtype=geometry.compute_dtype,
        device=geometry.device,
        dense=not plan.packed,
        dense_head=not plan.packed,
        recompute=plan.recompute,
    )
    lora.attach(sub_llm, spec, view)
    settings = LocalSettings(
        epochs=1,
        max_steps=0,
        batch_size=plan.batch_size,
        learning_rate=1e-4,
        weight_decay=0.01,
        max_grad_norm=1.0,
        proximal_mu=0.01,
        max_length=geometry.length,
    )
    swept, at_once = SweptSamples(samples(geometry), states), plan.micro_batch
    probe(sub_llm, swept, view, [0], at_once)
    return lambda: fine_tune(
        sub_llm,
        swept,
        view,
        settings,
        seed=0,
        round_number=1,
        edge="bench",
        micro_batch=at_once,
        checkpoint=checkpoint,
    )


def first(directory: Path, geometry: Geometry, is_broken: bool) -> tuple[int, float, float]:
    bundle = Bundle.open(directory / "model" / "bundle")
    shutil.rmtree(directory / "fresh", ignore_errors=True)
    plan = way(bundle, geometry)
    states = states_of(bundle, geometry, directory / "fresh", plan, 0 if is_broken else None)
    wake(geometry)
    began, cpu = time.perf_counter(), time.process_time()
    states.sweep()
    swept, swept_cpu = time.perf_counter() - began, time.process_time() - cpu
    train = train_ours(bundle, geometry, states, plan)
    began, cpu = time.perf_counter(), time.process_time()
    trained = train()
    return trained.num_tokens, swept + time.perf_counter() - began, swept_cpu + time.process_time() - cpu


def cached(
    directory: Path, geometry: Geometry, is_broken: bool, *, packed: bool = False, recompute: bool = False
) -> tuple[int, float, float]:
    bundle = Bundle.open(directory / "model" / "bundle")
    plan = way(bundle, geometry, packed=packed, recompute=recompute)
    if plan.frugal:
        return_memory_at_once()
    # What is read was swept dense: the arms differ in training alone.
    where = directory / ("none" if is_broken else "cache")
    states = states_of(bundle, geometry, where, way(bundle, geometry), 0 if is_broken else None)
    train = train_ours(bundle, geometry, states, plan)
    began, cpu = time.perf_counter(), time.process_time()
    trained = train()
    return trained.num_tokens, time.perf_counter() - began, time.process_time() - cpu


def packed(directory: Path, geometry: Geometry, is_broken: bool) -> tuple[int, float, float]:
    return cached(directory, geometry, is_broken, packed=True)


def recomputed(directory: Path, geometry: Geometry, is_broken: bool) -> tuple[int, float, float]:
    return cached(directory, geometry, is_broken, packed=True, recompute=True)


def _rows(geometry: Geometry) -> list[dict[str, Any]]:
    rows = []
    for sample in samples(geometry):
        ids = torch.tensor(sample.ids)
        labels = ids.clone()
        labels[: sample.start] = -100
        rows.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return rows


class _Clock(TrainerCallback):
    """From the end of the first step, which is not counted, to the end of the last."""

    def __init__(self, geometry: Geometry) -> None:
        self._geometry = geometry
        self._step = 0
        self._marks: list[tuple[float, float]] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if self._step in (0, self._geometry.steps):
            if self._geometry.device != "cpu":
                torch.cuda.synchronize()  # what it was told may not be done yet
            self._marks.append((time.perf_counter(), time.process_time()))
        self._step += 1

    @property
    def spent(self) -> tuple[int, float, float]:
        (began, cpu), (ended, cpu_ended) = self._marks
        return self._geometry.steps * self._geometry.length, ended - began, cpu_ended - cpu


def _recipe(model: Any, directory: Path, geometry: Geometry) -> tuple[int, float, float]:
    """PEFT's documented QLoRA recipe, as it stands in its guides."""
    model = prepare_model_for_kbit_training(model)
    model = get_peft_model(
        model, LoraConfig(r=random_bundle.RANK, lora_alpha=16, target_modules=list(TARGETS), task_type="CAUSAL_LM")
    )
    if geometry.device != "cpu":
        torch.cuda.reset_peak_memory_stats()  # what loading took is not held against it
    clock = _Clock(geometry)
    arguments = TrainingArguments(
        output_dir=str(directory / "trainer"),
        per_device_train_batch_size=1,
        max_steps=geometry.steps + 1,
        use_cpu=geometry.device == "cpu",
        bf16=geometry.device != "cpu",
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=True,
        learning_rate=1e-4,
    )
    Trainer(model=model, args=arguments, train_dataset=_rows(geometry), callbacks=[clock]).train()
    _assert_trained(model)
    return clock.spent


def _assert_trained(model: Any) -> None:
    """Stock Linear4bit can lose its gradient without a word (docs/decisions.md (d5-nf4-layer)): such an arm would be quick and wrong."""
    moved = [float(p.detach().norm()) for name, p in model.named_parameters() if "lora_B" in name]
    assert any(moved), "no LoRA tensor moved: the baseline trains nothing"


def _load(directory: Path, geometry: Geometry, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, device_map={"": geometry.device}, **options)


def recipe_sub(directory: Path, geometry: Geometry, _: bool) -> tuple[int, float, float]:
    return _recipe(_load(directory / "model" / "plain", geometry), directory, geometry)


def recipe_full(directory: Path, geometry: Geometry, _: bool) -> tuple[int, float, float]:
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=geometry.compute_dtype,
    )
    return _recipe(_load(directory / "model" / "full", geometry, quantization_config=config), directory, geometry)


def plain(directory: Path, geometry: Geometry, _: bool) -> tuple[int, float, float]:
    # Dense, and on a CPU in fp32: below the adapter nothing has a gradient, and there bitsandbytes takes a kernel that is
    # five times as slow on CPUs without AVX512; bf16 is slower still. Its memory is not compared.
    dtype = geometry.compute_dtype
    model = _load(directory / "model" / "plain", geometry, dtype=dtype).dequantize().to(dtype)
    kept = len(geometry.plan.kept)
    adapter = range(kept - ADAPTER_LAYERS, kept)
    names = [
        name
        for name, _ in model.named_modules()
        if name.split(".")[-1] in TARGETS and int(name.split(".")[2]) in adapter
    ]
    model = get_peft_model(
        model, LoraConfig(r=random_bundle.RANK, lora_alpha=16, target_modules=names, task_type="CAUSAL_LM")
    )
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    rows, clock = _rows(geometry), _Clock(geometry)
    for step in range(geometry.steps + 1):
        row = {name: value[None].to(geometry.device) for name, value in rows[step % len(rows)].items()}
        model(**row).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        clock.on_step_end()
    _assert_trained(model)
    return clock.spent


ARMS: dict[str, Arm] = {
    "first": first,
    "cached": cached,
    "packed": packed,
    "recomputed": recomputed,
    "recipe_sub": recipe_sub,
    "recipe_full": recipe_full,
    "plain": plain,
}


# --- figures -----------------------------------------------------------------------------------------------


def run_arm(name: str, options: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, __file__, "--geometry", options.geometry, "--out", options.out, "--arm", name]
    command += ["--quick"] if options.quick else []
    command += ["--planted-defect"] if options.planted_defect else []
    # Threads that spin at barriers starve each other on a machine that does anything else; so for every arm.
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if ended.returncode:
        raise SystemExit(f"the arm {name} failed:\n{ended.stderr[-2000:]}")
    found: dict[str, float] = json.loads(ended.stdout.splitlines()[-1])
    return found


def ratio(ours: list[float], theirs: list[float]) -> dict[str, Any]:
    """Median of the repeats' ratios, with a 95 % bootstrap interval."""
    each = [a / b for a, b in zip(ours, theirs, strict=True)]
    chance = random.Random(0)
    drawn = sorted(statistics.median(chance.choices(each, k=len(each))) for _ in range(2000))
    return {"median": statistics.median(each), "interval_95": [drawn[50], drawn[1949]]}


def is_bit_identical(directory: Path, geometry: Geometry) -> bool:
    """The delta of cached states against that of states computed anew for every batch."""
    bundle = Bundle.open(directory / "model" / "bundle")
    deltas = []
    plan = way(bundle, geometry)
    for name, most in (("cache", None), ("none", 0)):
        states = states_of(bundle, geometry, directory / name, plan, most)
        deltas.append(train_ours(bundle, geometry, states, plan)().delta)
    return all(torch.equal(deltas[0][name], deltas[1][name]) for name in deltas[0])


def checkpoint_share(directory: Path, geometry: Geometry) -> float:
    """Of a step's time that a save takes where every step is saved; longer rounds save every fiftieth part."""
    bundle = Bundle.open(directory / "model" / "bundle")
    plan = way(bundle, geometry)
    spent = 0.0

    class Timed(RoundCheckpoint):
        def is_due(self, step: int, steps: int) -> bool:
            return step < steps

        def save(self, step: int, tokens: int, micro_batch: int, tensors: dict[str, torch.Tensor]) -> None:
            nonlocal spent
            began = time.perf_counter()
            super().save(step, tokens, micro_batch, tensors)
            spent += time.perf_counter() - began

    checkpoint = Timed(directory / "checkpoint", {})
    states = states_of(bundle, geometry, directory / "cache", plan)
    trained = train_ours(bundle, geometry, states, plan, checkpoint)()
    checkpoint.forget()
    return spent / trained.seconds


def bits_per_parameter(geometry: Geometry) -> float:
    """Of the shards of the sub-LLM, embedding and head in NF4 too; from shapes alone."""
    shape, plan = geometry.shape, geometry.plan
    family = family_of(shape.model_type)
    fields = allowed_fields(family, shape.config)
    spec = random_bundle.lora_spec(shape, plan, TARGETS)
    sizes = shard_sizes(family, fields, plan, BundleSettings(spec, "nf4", True), "bfloat16")
    weights = sum(size for name, size in sizes.items() if not name.endswith("_lora"))
    layer = sum(parameter.numel() for parameter in layer_on_meta(family, fields, 0).parameters())
    return 8 * weights / (layer * len(plan.kept) + (2 * shape.vocab + 1) * shape.width)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    geometry, directory = geometry_of(options), Path(options.out)
    make(directory, geometry)
    for name in ("cache", "none"):
        shutil.rmtree(directory / name, ignore_errors=True)
    bundle = Bundle.open(directory / "model" / "bundle")
    states_of(bundle, geometry, directory / "cache", way(bundle, geometry)).sweep()
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ARMS}
    repeats = options.repeats or geometry.repeats
    order = [name for repeat in range(repeats) for name in (list(ARMS) if repeat % 2 == 0 else reversed(ARMS))]
    done = directory / ("runs-defect.jsonl" if options.planted_defect else "runs.jsonl")
    kept = done.read_text().splitlines() if done.exists() else []
    for number, name in enumerate(order):
        if number == len(kept):
            kept.append(json.dumps({"arm": name, **run_arm(name, options)}))
            done.write_text("\n".join(kept) + "\n")
            print(f"{number + 1} of {len(order)}: {kept[-1]}", file=sys.stderr, flush=True)
        run = json.loads(kept[number])
        assert run["arm"] == name, f"{done} is of another bench; delete it"
        found[name].append(run)
    speed = {name: [run["tokens"] / run["seconds"] for run in runs] for name, runs in found.items()}
    work = {name: [run["tokens"] / run["cpu_seconds"] for run in runs] for name, runs in found.items()}
    peak = {name: statistics.median(run["peak_bytes"] for run in runs) for name, runs in found.items()}
    checks: list[dict[str, Any]] = []
    for name, target in SPEEDUPS.items():
        ours, _, theirs = name.partition("_over_")
        value, target = ratio(speed[ours], speed[theirs]), geometry.own_targets.get(name, target)
        checks.append({"claim": name, **value, "target": target, "holds": value["median"] >= target})
    for ours in ("packed", "recomputed"):
        for theirs, target in MEMORY.items():
            name = f"{ours}_over_{theirs}_memory"
            share, target = peak[ours] / peak[theirs], geometry.own_targets.get(name, target)
            checks.append({"claim": name, "ratio": share, "target": target, "holds": share <= target})
        if (most := geometry.most_bytes) is not None:
            checks.append({"claim": f"{ours}_peak", "bytes": peak[ours], "target": most, "holds": peak[ours] <= most})
    same, saving = is_bit_identical(directory, geometry), checkpoint_share(directory, geometry)
    bits = bits_per_parameter(GEOMETRIES["llama3-8b"])
    if geometry.everything_quantized:
        bits = bundle.manifest.bits_per_parameter
    checks += [
        {"claim": "cached and recomputed deltas are bit-identical", "holds": same},
        {
            "claim": "share of a step that its checkpoint takes",
            "share": saving,
            "target": 0.01,
            "holds": saving <= 0.01,
        },
        {
            "claim": "bits per parameter, everything quantized (of cpu: an 8B shape)",
            "bits": bits,
            "target": 4.2,
            "holds": bits <= 4.2,
        },
    ]
    return {
        "bench": "edge",
        "geometry": {"name": options.geometry, "quick": options.quick, **asdict(geometry), "repeats": repeats},
        "accelerator": None if geometry.device == "cpu" else torch.cuda.get_device_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "tokens_per_second": {name: statistics.median(values) for name, values in speed.items()},
        "tokens_per_cpu_second": {name: statistics.median(values) for name, values in work.items()},
        "peak_bytes_above_imports" if geometry.device == "cpu" else "peak_bytes_allocated": peak,
        "checks": checks,
    }


def geometry_of(options: argparse.Namespace) -> Geometry:
    geometry = GEOMETRIES[options.geometry]
    return geometry.small if options.quick else geometry


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--geometry", choices=sorted(GEOMETRIES), default="cpu")
    parser.add_argument("--quick", action="store_true", help="a small stand-in for the geometry, on a GPU or without")
    parser.add_argument("--out", help="where models and caches lie; else bench-out/edge-GEOMETRY[-quick]")
    parser.add_argument("--repeats", type=int, default=0, help="of every arm; 0: as many as the geometry asks for")
    parser.add_argument("--planted-defect", action="store_true", help="ours keeps no border states: it must fail")
    parser.add_argument("--arm", choices=sorted(ARMS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    geometry = geometry_of(options)
    if geometry.device != "cpu" and not torch.cuda.is_available():
        parser.exit(
            2,
            f"--geometry {options.geometry} needs a GPU and torch {torch.__version__} sees none here; "
            "--geometry cpu runs without one, and --quick a small stand-in for this one\n",
        )
    options.out = options.out or str(ROOT / "bench-out" / f"edge-{options.geometry}{'-quick' * options.quick}")
    if options.arm:
        before = peak_rss_bytes()
        tokens, seconds, cpu = ARMS[options.arm](Path(options.out), geometry, options.planted_defect)
        peak = peak_rss_bytes() - before if geometry.device == "cpu" else torch.cuda.max_memory_allocated()
        print(json.dumps({"tokens": tokens, "seconds": seconds, "cpu_seconds": cpu, "peak_bytes": peak}))
        return
    result = measure(options)
    print(json.dumps(result, indent=1))
    if not all(check["holds"] for check in result["checks"]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
