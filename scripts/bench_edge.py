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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from fedsoda_edge.border import Border
from fedsoda_edge.border_cache import CachedStates, CacheSettings
from fedsoda_edge.checkpoint import RoundCheckpoint
from fedsoda_edge.data import Sample
from fedsoda_edge.model import lora
from fedsoda_edge.model.bundle import Bundle, BundleSettings, shard_sizes, write_bundle
from fedsoda_edge.model.families import allowed_fields, family_of, layer_on_meta
from fedsoda_edge.model.memory import MemoryPlan, Samples, plans, shape_of
from fedsoda_edge.model.streaming import Checkpoint
from fedsoda_edge.model.sub_llm import build
from fedsoda_edge.ports.system import peak_rss_bytes, return_memory_at_once
from fedsoda_edge.protocol.manifest import LoRASpec
from fedsoda_edge.protocol.messages import LocalSettings
from fedsoda_edge.training import Trained, fine_tune
from fedsoda_hub.config import Method
from fedsoda_hub.plan import likely_plan

ROOT = Path(__file__).resolve().parent.parent
TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
ADAPTER_LAYERS, RANK, SUPERVISED = 3, 8, 0.2
KEY = bytes(32)  # the data is random: nothing to hide


@dataclass(frozen=True)
class Geometry:
    """samples: of ours in a child; steps: of a recipe in a child, after one that is not counted."""

    width: int
    layers: int
    groups: int
    vocab: int
    length: int
    samples: int
    steps: int
    repeats: int


GEOMETRIES = {
    "cpu": Geometry(1024, 32, 4, 32000, 512, 8, 2, 7),
    "quick": Geometry(256, 16, 2, 4000, 256, 8, 3, 3),
}


def make(directory: Path, geometry: Geometry) -> None:
    """A random full model, its bundle and the bundle as a plain checkpoint."""
    if (directory / "ready").exists():
        return
    shutil.rmtree(directory, ignore_errors=True)
    full = directory / "full"
    full.mkdir(parents=True)
    config = LlamaConfig(
        vocab_size=geometry.vocab,
        hidden_size=geometry.width,
        intermediate_size=geometry.width * 11 // 4,
        num_hidden_layers=geometry.layers,
        num_attention_heads=geometry.width // 64,
        num_key_value_heads=geometry.width // 64,
        max_position_embeddings=geometry.length,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(full)
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(geometry.vocab)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(full / "tokenizer.json"))
    source = Checkpoint.open(str(full))
    plan = likely_plan(geometry.layers, Method(adapter_layers=ADAPTER_LAYERS, groups=geometry.groups))
    spec = LoRASpec(
        RANK,
        16,
        TARGETS,
        lora.specs(source.family, source.fields, plan.adapter, TARGETS, RANK),
        lora.specs(source.family, source.fields, plan.retained, TARGETS, RANK),
    )
    write_bundle(
        directory / "bundle",
        source,
        plan,
        BundleSettings(spec, "nf4", False),
        name="random",
        revision="0",
        adapter_lora=lora.initial(spec.adapter, 0),
        emulator_lora=lora.initial(spec.emulator, 0),
        tokenizer_files=[full / "tokenizer.json"],
    )
    Bundle.open(directory / "bundle").materialize(directory / "plain")
    (directory / "ready").touch()


def samples(geometry: Geometry) -> list[Sample]:
    chance = random.Random(0)
    start = round(geometry.length * (1 - SUPERVISED))
    return [
        Sample((1, *(chance.randrange(3, geometry.vocab) for _ in range(geometry.length - 1))), start)
        for _ in range(geometry.samples)
    ]


# --- arms: (tokens, seconds, cpu seconds) ------------------------------------------------------------------

Arm = Callable[[Path, Geometry, bool], tuple[int, float, float]]


def way(bundle: Bundle, geometry: Geometry, *, packed: bool = False, recompute: bool = False) -> MemoryPlan:
    """Of training one sample at a time."""
    labels = geometry.length - round(geometry.length * (1 - SUPERVISED))
    found = plans(shape_of(bundle.manifest), "cpu", Samples(1, geometry.length, labels))
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
        compute_dtype=torch.float32,
        device="cpu",
    )


def train_ours(
    bundle: Bundle,
    geometry: Geometry,
    states: CachedStates,
    plan: MemoryPlan,
    checkpoint: RoundCheckpoint | None = None,
) -> Callable[[], Trained]:
    """The adapter built; call it to train one epoch."""
    spec, view = bundle.manifest.lora, bundle.adapter_lora()
    sub_llm = build(
        bundle,
        bundle.plan.adapter,
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
    border, at_once = Border(samples(geometry), states), plan.micro_batch
    return lambda: fine_tune(
        sub_llm,
        border,
        view,
        settings,
        seed=0,
        round_number=1,
        edge="bench",
        micro_batch=at_once,
        checkpoint=checkpoint,
    )


def first(directory: Path, geometry: Geometry, is_broken: bool) -> tuple[int, float, float]:
    bundle = Bundle.open(directory / "bundle")
    shutil.rmtree(directory / "fresh", ignore_errors=True)
    plan = way(bundle, geometry)
    states = states_of(bundle, geometry, directory / "fresh", plan, 0 if is_broken else None)
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
    bundle = Bundle.open(directory / "bundle")
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
    """When the first step ended and when the last did."""

    def __init__(self) -> None:
        self.marks: list[tuple[float, float]] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.marks.append((time.perf_counter(), time.process_time()))


def _recipe(model: Any, directory: Path, geometry: Geometry) -> tuple[int, float, float]:
    """PEFT's documented QLoRA recipe, as it stands in its guides."""
    model = prepare_model_for_kbit_training(model)
    model = get_peft_model(
        model, LoraConfig(r=RANK, lora_alpha=16, target_modules=list(TARGETS), task_type="CAUSAL_LM")
    )
    clock = _Clock()
    arguments = TrainingArguments(
        output_dir=str(directory / "trainer"),
        per_device_train_batch_size=1,
        max_steps=geometry.steps + 1,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=True,
        learning_rate=1e-4,
    )
    Trainer(model=model, args=arguments, train_dataset=_rows(geometry), callbacks=[clock]).train()
    _assert_trained(model)
    (began, cpu), (ended, cpu_ended) = clock.marks[0], clock.marks[-1]
    return geometry.steps * geometry.length, ended - began, cpu_ended - cpu


def _assert_trained(model: Any) -> None:
    """Stock Linear4bit can lose its gradient without a word (facts.md 0.1): such an arm would be quick and wrong."""
    moved = [float(p.detach().norm()) for name, p in model.named_parameters() if "lora_B" in name]
    assert any(moved), "no LoRA tensor moved: the baseline trains nothing"


def recipe_sub(directory: Path, geometry: Geometry, _: bool) -> tuple[int, float, float]:
    return _recipe(AutoModelForCausalLM.from_pretrained(directory / "plain"), directory, geometry)


def recipe_full(directory: Path, geometry: Geometry, _: bool) -> tuple[int, float, float]:
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(directory / "full", quantization_config=config)
    return _recipe(model, directory, geometry)


def plain(directory: Path, geometry: Geometry, _: bool) -> tuple[int, float, float]:
    # Dense and in fp32: below the adapter nothing has a gradient, and there bitsandbytes takes a kernel that is five times
    # as slow on CPUs without AVX512; bf16 is slower still. Its memory is not compared.
    model = AutoModelForCausalLM.from_pretrained(directory / "plain", dtype=torch.float32).dequantize().float()
    kept = AutoConfig.from_pretrained(directory / "plain").num_hidden_layers
    adapter = range(kept - ADAPTER_LAYERS, kept)
    names = [
        name
        for name, _ in model.named_modules()
        if name.split(".")[-1] in TARGETS and int(name.split(".")[2]) in adapter
    ]
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=16, target_modules=names, task_type="CAUSAL_LM"))
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    rows = _rows(geometry)
    began = cpu = 0.0
    for step in range(geometry.steps + 1):
        row = {name: value[None] for name, value in rows[step % len(rows)].items()}
        model(**row).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 0:
            began, cpu = time.perf_counter(), time.process_time()
    _assert_trained(model)
    return geometry.steps * geometry.length, time.perf_counter() - began, time.process_time() - cpu


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
    bundle = Bundle.open(directory / "bundle")
    deltas = []
    plan = way(bundle, geometry)
    for name, most in (("cache", None), ("none", 0)):
        states = states_of(bundle, geometry, directory / name, plan, most)
        deltas.append(train_ours(bundle, geometry, states, plan)().delta)
    return all(torch.equal(deltas[0][name], deltas[1][name]) for name in deltas[0])


def checkpoint_share(directory: Path, geometry: Geometry) -> float:
    """Of a step's time that a save takes where every step is saved; longer rounds save every fiftieth part."""
    bundle = Bundle.open(directory / "bundle")
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


def bits_of_8b() -> float:
    """Bits per parameter of the shards of a Llama-3-8B sub-LLM, embedding and head in NF4 too; from shapes alone."""
    family = family_of("llama")
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    )
    fields = allowed_fields(family, config)
    plan = likely_plan(32, Method(adapter_layers=ADAPTER_LAYERS))
    spec = LoRASpec(RANK, 16, TARGETS, lora.specs(family, fields, plan.adapter, TARGETS, RANK), ())
    sizes = shard_sizes(family, fields, plan, BundleSettings(spec, "nf4", True), "bfloat16")
    weights = sum(size for name, size in sizes.items() if not name.endswith("_lora"))
    layer = sum(parameter.numel() for parameter in layer_on_meta(family, fields, 0).parameters())
    return 8 * weights / (layer * len(plan.kept) + 2 * 128256 * 4096 + 4096)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    geometry, directory = GEOMETRIES[options.geometry], Path(options.out)
    make(directory, geometry)
    for name in ("cache", "none"):
        shutil.rmtree(directory / name, ignore_errors=True)
    bundle = Bundle.open(directory / "bundle")
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
    speedups = {
        "cached_over_recipe_sub": (ratio(speed["cached"], speed["recipe_sub"]), 6.0),
        "cached_over_plain": (ratio(speed["cached"], speed["plain"]), 2.5),
        "first_over_recipe_sub": (ratio(speed["first"], speed["recipe_sub"]), 2.0),
    }
    memory = {
        f"{ours}_over_{theirs}_memory": (peak[ours] / peak[theirs], target)
        for ours in ("packed", "recomputed")
        for theirs, target in (("recipe_sub", 0.30), ("recipe_full", 0.15))
    }
    same, bits, saving = is_bit_identical(directory, geometry), bits_of_8b(), checkpoint_share(directory, geometry)
    checks = [
        *(
            {"claim": name, **value, "target": target, "holds": value["median"] >= target}
            for name, (value, target) in speedups.items()
        ),
        *(
            {"claim": name, "ratio": value, "target": target, "holds": value <= target}
            for name, (value, target) in memory.items()
        ),
        {"claim": "cached and recomputed deltas are bit-identical", "holds": same},
        {
            "claim": "share of a step that its checkpoint takes",
            "share": saving,
            "target": 0.01,
            "holds": saving <= 0.01,
        },
        {"claim": "bits per parameter, 8B, everything quantized", "bits": bits, "target": 4.2, "holds": bits <= 4.2},
    ]
    return {
        "bench": "edge",
        "geometry": {"name": options.geometry, **vars(geometry), "repeats": repeats},
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "tokens_per_second": {name: statistics.median(values) for name, values in speed.items()},
        "tokens_per_cpu_second": {name: statistics.median(values) for name, values in work.items()},
        "peak_bytes_above_imports": peak,
        "checks": checks,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--geometry", choices=sorted(GEOMETRIES), default="cpu")
    parser.add_argument("--quick", action="store_const", const="quick", dest="geometry", help="a small geometry")
    parser.add_argument("--out", help="where models and caches lie; else bench-out/edge-GEOMETRY")
    parser.add_argument("--repeats", type=int, default=0, help="of every arm; 0: as many as the geometry asks for")
    parser.add_argument("--planted-defect", action="store_true", help="ours keeps no border states: it must fail")
    parser.add_argument("--arm", choices=sorted(ARMS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out = options.out or str(ROOT / "bench-out" / f"edge-{options.geometry}")
    if options.arm:
        before = peak_rss_bytes()
        tokens, seconds, cpu = ARMS[options.arm](
            Path(options.out), GEOMETRIES[options.geometry], options.planted_defect
        )
        peak = peak_rss_bytes() - before
        print(json.dumps({"tokens": tokens, "seconds": seconds, "cpu_seconds": cpu, "peak_bytes": peak}))
        return
    result = measure(options)
    print(json.dumps(result, indent=1))
    if not all(check["holds"] for check in result["checks"]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
