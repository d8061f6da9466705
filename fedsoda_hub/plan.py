"""Compute from shapes alone what a run of this model costs: bytes, memory, arithmetic; the paper's figures beside ours.

It needs a config.json and no weights; only the curve of a run's qualities is measured (`preparation/curve.py`). What the paper counts, and its slips: docs/methods.md (m13-counts, m15-readings).
For FedSODA both emulators are shown, so that one sees what pruning saves an edge. Seconds are sizes divided by the rates
that `Rates` assumes. Comparing needs with a real device is left to `fedsoda-edge plan`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.model import lora
from fedsoda_edge.model.bundle import DTYPES
from fedsoda_edge.model.bundle_writer import BundleSettings, shard_sizes
from fedsoda_edge.model.config_file import ModelConfig, read_config_file
from fedsoda_edge.model.families import Family, build_config, layer_on_meta, skeleton
from fedsoda_edge.model.source import check_directory
from fedsoda_edge.model.weight_files import find_weights
from fedsoda_edge.protocol.coded import most_bytes, of_alignment
from fedsoda_edge.protocol.manifest import TOKENIZER_FILES, File, LayerPlan, TensorSpec
from fedsoda_edge.protocol.needs import edge_needs, make_shape
from fedsoda_hub.algorithms.methods.by_name import method_of
from fedsoda_hub.algorithms.pruning.uniform import evenly
from fedsoda_hub.federation.schedule import AUTO_ROUNDS
from fedsoda_hub.preparation.curve import CurvePoint, measure_curve
from fedsoda_hub.preparation.full_llm import StreamedLLM, lora_spec
from fedsoda_hub.settings.combine import with_full_emulator
from fedsoda_hub.settings.rates import Rates
from fedsoda_hub.settings.run import RunSettings
from fedsoda_hub.settings.tables import LoRA, Method


class PaperFigures(msgspec.Struct, frozen=True, kw_only=True):
    """The paper's counts: LoRA parameters, what travels in a round at 4 bits a parameter, and models at 16 bits."""

    trainable_parameters: int
    parameters_per_round: float
    mib_per_round: float
    full_gib_16bit: float
    sub_gib_16bit: float


class Arithmetic(msgspec.Struct, frozen=True, kw_only=True):
    """The GFLOP a token: LoRA on the full model; the sub-LLM, the first time; its sweep alone; with the border cached."""

    full_lora: float
    sub_llm: float
    sweep: float
    cached: float


class OurFigures(msgspec.Struct, frozen=True, kw_only=True):
    """This program's counts: what an edge holds, sends and computes."""

    bundle_bytes: int
    bits_per_parameter: float
    up_bytes_per_edge_round: int
    down_bytes_per_edge_round: float
    edge_memory_bytes: int
    edge_vram_bytes: int
    edge_disk_bytes: int
    gflop_per_token: Arithmetic


class Prediction(msgspec.Struct, frozen=True, kw_only=True):
    """The costs of a sub-LLM for the edges of its size class."""

    family: str
    num_layers: int
    kept_layers: int
    full_parameters: int
    sub_parameters: int
    paper: PaperFigures
    ours: OurFigures


class EmulatorCosts(msgspec.Struct, frozen=True, kw_only=True):
    """The costs of an emulator for an edge, before its first step and again after each realignment."""

    kept_layers: int
    bundle_bytes: int
    download_seconds: float
    sweep_gflop_per_token: float
    sweep_seconds: float
    realign_every: int
    edge_memory_bytes: int
    edge_vram_bytes: int
    edge_disk_bytes: int


class Emulators(msgspec.Struct, frozen=True, kw_only=True):
    """The costs of FedSODA's two emulators, and the rates that were assumed."""

    sub: EmulatorCosts
    full: EmulatorCosts
    assumed: Rates


class SmallerClass(msgspec.Struct, frozen=True, kw_only=True):
    """The costs of a smaller size class. groups None: the method has none."""

    groups: int | None
    kept_layers: int
    bundle_bytes: int
    up_bytes_per_edge_round: int
    down_bytes_per_edge_round: float
    edge_memory_bytes: int
    edge_vram_bytes: int
    edge_disk_bytes: int


class Planned(msgspec.Struct, frozen=True, kw_only=True):
    """The settings that were planned with."""

    method: Method
    lora: LoRA
    codec: str


class PlanReport(Prediction, frozen=True, kw_only=True, omit_defaults=True):
    """The report of `plan --json`. emulators None: the method has only one. curve: what --measure found, else left out."""

    model: str
    settings: Planned
    emulators: Emulators | None
    smaller: tuple[SmallerClass, ...]
    curve: tuple[CurvePoint, ...] | None = None


def read_config(model: str | Path) -> tuple[Family, dict[str, Any], str, Path | None]:
    """Read (family, allowed fields, dtype, directory) from a model directory or a bare config.json.

    The directory is None for a bare config.json. Where weights are there, they are checked too, and say the dtype and
    whether the head is tied.

    Raises:
        UsageProblem: `model` is neither, or of a family that is not supported; or its weights are not whole.
    """
    path = Path(model)
    try:
        directory = path if path.is_dir() else None
        if directory is None and not path.is_file():
            raise FileNotFoundError(f"there is no {path}")
        # Where there are none in a form that can be read, what preparation would refuse is told here.
        has_weights = directory is not None and any(
            path for pattern in ("*.safetensors", "pytorch_model*.bin", "*.gguf") for path in directory.glob(pattern)
        )
    except (OSError, ValueError) as error:
        raise UsageProblem(
            f"{model} is neither a model directory nor a config.json ({error}); download the model's config.json and "
            "name that"
        ) from error
    if directory is None:
        config = read_config_file(path)
        return config.family, config.fields, _dtype(config), None
    check_directory(directory, with_tokenizer=has_weights)
    config = read_config_file(directory / "config.json")
    if not has_weights:
        return config.family, config.fields, _dtype(config), directory
    weights = find_weights(directory, config)
    fields = config.fields | ({} if weights.is_tied == config.is_tied else {"tie_word_embeddings": weights.is_tied})
    return config.family, fields, str(weights.dtype).removeprefix("torch."), directory


def _dtype(config: ModelConfig) -> str:
    """Name the dtype in which weights would be held here, by the one that the config names, if it does."""
    return {"float64": "float32"}.get(config.dtype, config.dtype if config.dtype in DTYPES else "bfloat16")


@dataclass(frozen=True)
class Unmeasured:
    """A full LLM of which only the size is known, as a `methods.interface.FullLLM`."""

    num_layers: int

    def distances(self, num_layers: int) -> list[list[float]]:
        """Answer that all layers are alike."""
        return [[0.0] * (num_layers - 1 - layer) for layer in range(num_layers)]

    def healed_distances(self, num_layers: int, size: int) -> list[list[float]]:
        """Answer that all layers are alike."""
        return self.distances(num_layers)

    def representatives(self, count: int, grouping: str, drawn_by: int | None = None) -> list[int]:
        """Spread the layers evenly."""
        return evenly(self.num_layers, count)

    def fits(self, plan: LayerPlan) -> bool:
        """Answer that every sub-LLM is small enough."""
        return True

    def nearest(self, plans: Sequence[LayerPlan]) -> LayerPlan:
        """Choose the first plan."""
        return plans[0]

    def components(self, count: int, grouping: str) -> tuple[list[int], list[int]]:
        """Choose whole layers, which have the bytes that there is room for; measuring may divide them otherwise."""
        layers = evenly(self.num_layers, count)
        return layers, layers


def likely_plan(num_layers: int, settings: Method, seed: int = 0) -> LayerPlan:
    """Make the plan of the largest sub-LLM, which is the only one where the run has no size classes.

    Raises:
        UsageProblem: it does not fit; names what fits.
    """
    return likely_plans(num_layers, settings, seed)[0]


def likely_plans(num_layers: int, settings: Method, seed: int = 0) -> list[LayerPlan]:
    """Make a plan of this shape for each size class, the largest first.

    Which layers a method removes is known only after it has measured them. Sizes hardly depend on it: by the digits of
    layer numbers in the headers of two LoRA shards, and FedPruner+'s LoRA by how the bytes are divided.

    Raises:
        UsageProblem: it does not fit; names what fits.
    """
    plans = method_of(settings).plans(Unmeasured(num_layers), settings, seed)
    return [msgspec.structs.replace(one, distances=()) for one in plans]


def rounds_between(method: Method) -> int:
    """Return the least number of rounds from one realignment to the next; 0: the method never realigns."""
    return AUTO_ROUNDS if method.realign_every == "auto" else method.realign_every


def predict(
    family: Family,
    fields: dict[str, Any],
    dtype: str,
    plan: LayerPlan,
    settings: RunSettings,
    tokenizer_bytes: int = 0,
    size_class: int = 0,
) -> Prediction:
    """Predict what the edges of one size class need: the report of `plan --json` (docs/guide.md (g6-json)).

    Args:
        fields: the model's numeric config.
        dtype: that of the checkpoint.
        tokenizer_bytes: the size of the tokenizer's files.
    """
    method, targets, rank = settings.method, settings.lora.targets, settings.lora.rank
    spec = lora_spec(settings, family, fields, plan, size_class)
    on_all = lora.specs(family, fields, range(plan.num_layers), targets, rank)
    ends, head = _ends(family, fields)
    full = sum(_parameters(layer_on_meta(family, fields, number)) for number in range(plan.num_layers)) + ends
    layers = {
        number: _parameters(layer_on_meta(family, fields, number, plan.lacking.get(number))) for number in plan.kept
    }
    sub = sum(layers.values()) + ends
    bundle = BundleSettings(spec, method.adapter_base, method.quantize_embedding, method.emulator_base)
    sizes = shard_sizes(family, fields, plan, bundle, dtype)
    weights = sum(size for name, size in sizes.items() if not name.endswith("_lora"))
    files = [File(name, "", size) for name, size in sizes.items()]
    shape = make_shape(
        family.model_type,
        fields,
        plan,
        layers,
        spec,
        adapter_base=method.adapter_base,
        emulator_base=method.emulator_base,
        quantized_embedding=method.quantize_embedding,
        dtype=dtype,
    )
    needs = edge_needs(shape, files)
    adapter_bytes = most_bytes(spec.adapter, settings.wire.codec)
    every = rounds_between(method)
    emulator_bytes = most_bytes(spec.emulator, of_alignment(settings.wire.codec)) if every else 0
    trainable, emulator_lora = _count(spec.adapter), _count(item for item in spec.emulator if item.layer is not None)
    per_round = 2 * trainable + (emulator_lora / every if every else 0)
    resident = sum(layers[number] for number in plan.resident)
    swept_lora = _count(item for item in spec.emulator if item.layer in plan.swept)
    swept = sum(layers[number] for number in plan.swept) + swept_lora + _count(spec.emulator) - emulator_lora
    through = resident + emulator_lora - swept_lora + head  # what gradients go through
    return Prediction(
        family=family.model_type,
        num_layers=plan.num_layers,
        kept_layers=len(plan.kept),
        full_parameters=full,
        sub_parameters=sub,
        paper=PaperFigures(
            trainable_parameters=trainable,
            parameters_per_round=per_round,
            mib_per_round=per_round * 0.5 / 2**20,
            full_gib_16bit=full * 2 / 2**30,
            sub_gib_16bit=sub * 2 / 2**30,
        ),
        ours=OurFigures(
            bundle_bytes=sum(sizes.values()) + tokenizer_bytes,
            bits_per_parameter=8 * weights / sub,
            up_bytes_per_edge_round=adapter_bytes,
            down_bytes_per_edge_round=adapter_bytes + emulator_bytes / max(every, 1),
            edge_memory_bytes=needs.ram_bytes,
            edge_vram_bytes=needs.vram_bytes,
            edge_disk_bytes=needs.disk_bytes + tokenizer_bytes,
            gflop_per_token=Arithmetic(
                full_lora=_gflop(forward=full - ends + head, backward=full - ends + head, lora=_count(on_all)),
                sub_llm=_gflop(forward=sub - ends + head, backward=through, lora=trainable),
                sweep=_gflop(forward=swept, backward=0, lora=0),
                cached=_gflop(forward=through, backward=through, lora=trainable),
            ),
        ),
    )


def _gflop(*, forward: int, backward: int, lora: int) -> float:
    """Count GFLOP a token: 2 for a weight in each direction (frozen weights get no gradient), 6 for a LoRA weight.

    Attention scores, which grow with the length, are not counted.
    """
    return (2 * forward + 2 * backward + 6 * lora) / 1e9


def _parameters(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _ends(family: Family, fields: dict[str, Any]) -> tuple[int, int]:
    """Count the parameters outside the layers, each once, and those that the product with the head uses."""
    model = skeleton(family, build_config(family, fields, (0,)))
    head = model.get_submodule(family.head).weight.numel()
    norm = _parameters(model.get_submodule(family.norm))
    tied = bool(fields.get("tie_word_embeddings"))
    return norm + model.get_submodule(family.embedding).weight.numel() + (0 if tied else head), head


def _count(specs: Iterable[TensorSpec]) -> int:
    return sum(spec.shape[0] * spec.shape[1] for spec in specs)


def plan_report(model: str, settings: RunSettings, rates: Rates = Rates()) -> PlanReport:
    """Make the report of `fedsoda-hub plan MODEL` with these settings.

    Raises:
        UsageProblem: `model` is neither a model directory nor a config.json, or the settings do not fit it.
    """
    family, fields, dtype, directory = read_config(model)
    files = [directory / name for name in TOKENIZER_FILES] if directory is not None else []
    tokenizer_bytes = sum(file.stat().st_size for file in files if file.exists())
    return _report(_Sizes(family, fields, dtype, tokenizer_bytes), settings, rates)


def measured_report(llm: StreamedLLM, rates: Rates = Rates()) -> PlanReport:
    """Make the report of `fedsoda-hub plan RUN.toml --measure`.

    Where groups are chosen by their size, it is that of the recommended point, or of the smallest where none is.
    """
    curve, settings, source = measure_curve(llm), llm.settings, llm.source
    if settings.method.groups == "auto":
        point = next((point for point in curve if point.is_recommended), curve[-1])
        shape = {"layers_per_group": point.layers_per_group, "groups": point.groups, "bundle_bytes": 0}
        settings = msgspec.structs.replace(settings, method=msgspec.structs.replace(settings.method, **shape))
    tokenizer_bytes = sum(file.stat().st_size for file in source.tokenizer_files)
    report = _report(_Sizes(source.family, source.fields, llm.dtype, tokenizer_bytes), settings, rates)
    return msgspec.structs.replace(report, curve=curve)


@dataclass(frozen=True)
class _Sizes:
    """The facts that sizes follow from: fields, the model's numeric config; dtype, the checkpoint's; the bytes of its tokenizer."""

    family: Family
    fields: dict[str, Any]
    dtype: str
    tokenizer_bytes: int


def _report(model: _Sizes, settings: RunSettings, rates: Rates) -> PlanReport:
    def predicted(of: RunSettings) -> list[Prediction]:
        plans = likely_plans(int(model.fields["num_hidden_layers"]), of.method, of.seed)
        return [
            predict(model.family, model.fields, model.dtype, plan, of, model.tokenizer_bytes, size_class)
            for size_class, plan in enumerate(plans)
        ]

    largest, *smaller = predicted(settings)
    emulators = None
    if settings.method.name == "fedsoda":
        full = with_full_emulator(settings)
        emulators = Emulators(
            sub=_emulator(largest, rounds_between(settings.method), rates),
            full=_emulator(predicted(full)[0], rounds_between(full.method), rates),
            assumed=rates,
        )
    return PlanReport(
        **msgspec.structs.asdict(largest),
        model=settings.model,
        settings=Planned(method=settings.method, lora=settings.lora, codec=settings.wire.codec),
        emulators=emulators,
        smaller=tuple(
            SmallerClass(
                groups=groups if settings.method.name == "fedsoda" else None,
                kept_layers=one.kept_layers,
                bundle_bytes=one.ours.bundle_bytes,
                up_bytes_per_edge_round=one.ours.up_bytes_per_edge_round,
                down_bytes_per_edge_round=one.ours.down_bytes_per_edge_round,
                edge_memory_bytes=one.ours.edge_memory_bytes,
                edge_vram_bytes=one.ours.edge_vram_bytes,
                edge_disk_bytes=one.ours.edge_disk_bytes,
            )
            for groups, one in zip(settings.method.classes, smaller, strict=True)
        ),
    )


def _emulator(report: Prediction, realign_every: int, rates: Rates) -> EmulatorCosts:
    ours, sweep = report.ours, report.ours.gflop_per_token.sweep
    return EmulatorCosts(
        kept_layers=report.kept_layers,
        bundle_bytes=ours.bundle_bytes,
        download_seconds=8 * ours.bundle_bytes / (rates.mbit_per_second * 1e6),
        sweep_gflop_per_token=sweep,
        sweep_seconds=sweep * rates.samples * rates.ids_per_sample / (rates.tflop_per_second * 1e3),
        realign_every=realign_every,
        edge_memory_bytes=ours.edge_memory_bytes,
        edge_vram_bytes=ours.edge_vram_bytes,
        edge_disk_bytes=ours.edge_disk_bytes,
    )
