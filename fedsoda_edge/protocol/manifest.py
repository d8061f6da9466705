"""Define what a bundle is: manifest.json and the layer plan in it, as data that both sides check.

The agent and the listener read it without torch. Reading files is left to `model/bundle.py`, writing them to
`model/bundle_writer.py`.
"""

from __future__ import annotations

import math
import re
from typing import Any, Literal, get_args

import msgspec

from fedsoda_edge.errors import BlobCorrupt, UsageProblem
from fedsoda_edge.units import one_line

FORMAT_VERSION = 1
MAX_MANIFEST_BYTES = 16 << 20
MAX_FILE_BYTES = 1 << 40
MAX_LAYERS = 4096
MAX_SIZE = 1 << 24  # of a dimension: no vocabulary or layer is wider
SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")  # config fields of every family
OTHER_SIZES = ("head_dim", "moe_intermediate_size", "num_experts_per_tok", "num_key_value_heads")  # of some families
Base = Literal["nf4", "bf16"]  # how layers are stored; bf16: dense, in the checkpoint's own dtype
BASES: tuple[str, ...] = get_args(Base)
Half = Literal["attention", "mlp"]  # of a decoder layer: h = x + f(norm(x)) with f either of them
ADAPTER_LORA, EMULATOR_LORA = "adapter_lora.safetensors", "emulator_lora.safetensors"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


class Group(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One pruned group: layer `start` stays, the layers `removed` above it go.

    distance: d(out(start), out(start + len(removed))), paper eq. 5, in units of pi (0..1); 0 where none was measured.
    """

    start: int
    removed: tuple[int, ...]
    distance: float


class LayerPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The choice of full-LLM layers that the sub-LLM keeps. Every number is a full-LLM layer number, except s in `mapping`.

    adapter: the layers that train, ascending: the last ones in FedSODA, any in other methods.
    kept: all layers of the sub-LLM, ascending, the adapter included.
    mapping: (t, s) per group: full-LLM layer t is local layer s of the sub-LLM (paper, I_i = (t_i, s_i)).
    distances: distances[l][m-1] = d between the outputs of layers l and l+m, below the adapter.
    without_attention, without_mlp: kept layers of which one half is pruned, so that h = x + f(norm(x)) is h = x there.
        Left out of the JSON where there are none, so that edges of older releases, which know no halves, read the plan.
    """

    num_layers: int
    adapter: tuple[int, ...]
    kept: tuple[int, ...]
    groups: tuple[Group, ...]
    mapping: tuple[tuple[int, int], ...]
    distances: tuple[tuple[float, ...], ...]
    without_attention: tuple[int, ...] = ()
    without_mlp: tuple[int, ...] = ()

    @property
    def emulator(self) -> tuple[int, ...]:
        """Layers of the full emulator: all that do not train."""
        return tuple(layer for layer in range(self.num_layers) if layer not in self.adapter)

    @property
    def sub_emulator(self) -> tuple[int, ...]:
        """Layers of the full emulator that are kept."""
        return tuple(layer for layer in self.kept if layer not in self.adapter)

    @property
    def border(self) -> int:
        """The first layer that trains. The border is the place below it, where states are constant between alignments."""
        return self.adapter[0]

    @property
    def swept(self) -> tuple[int, ...]:
        """Kept layers below the border, which an edge runs once for each alignment."""
        return tuple(layer for layer in self.kept if layer < self.border)

    @property
    def resident(self) -> tuple[int, ...]:
        """Kept layers from the border on, frozen ones included, which an edge holds and trains through."""
        return tuple(layer for layer in self.kept if layer >= self.border)

    @property
    def lacking(self) -> dict[int, Half]:
        """The half that a kept layer lacks, by layer; whole layers are not in it."""
        lacks_attention: dict[int, Half] = dict.fromkeys(self.without_attention, "attention")
        return lacks_attention | dict.fromkeys(self.without_mlp, "mlp")

    @property
    def retained(self) -> tuple[int, ...]:
        """The layers t_i that stay when their groups are pruned."""
        return tuple(group.start for group in self.groups)


def check_plan(plan: LayerPlan) -> None:
    """Check that a method can make this plan, which may come from the network.

    Raises:
        UsageProblem: the plan breaks a rule of layer plans; names the rule.
    """
    removed = [layer for group in plan.groups for layer in group.removed]
    halves = (*plan.without_attention, *plan.without_mlp)
    layers, of_groups = set(range(plan.num_layers)), {*removed, *(group.start for group in plan.groups)}
    checks = {
        "the adapter is layers of the model, ascending": plan.adapter
        and plan.adapter == tuple(sorted(layers & set(plan.adapter))),
        "each group removes the layers right above its start": all(
            group.removed == tuple(range(group.start + 1, group.start + 1 + len(group.removed))) and group.removed
            for group in plan.groups
        ),
        "groups do not overlap and remove nothing that trains": of_groups <= layers
        and not set(removed) & set(plan.adapter)
        and len(of_groups) == len(removed) + len(plan.groups),
        "kept is every layer that is not removed": plan.kept
        == tuple(layer for layer in range(plan.num_layers) if layer not in set(removed)),
        "mapping gives (t, s) of each group": plan.mapping
        == tuple((g.start, plan.kept.index(g.start)) for g in plan.groups if g.start in plan.kept),
        "a kept layer lacks one half at most": len({*halves}) == len(halves) and {*halves} <= set(plan.kept),
        "what lacks a half is ascending": all(
            half == tuple(sorted(half)) for half in (plan.without_attention, plan.without_mlp)
        ),
        "some layer has attention": set(plan.kept) != set(plan.without_attention),  # or nothing would count positions
    }
    for rule, holds in checks.items():
        if not holds:
            raise UsageProblem(f"the layer plan, which keeps the layers {plan.kept}, breaks the rule that {rule}")


class TensorSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One LoRA tensor: `layers.29.self_attn.q_proj.lora_A`, (rank, in) or (out, rank)."""

    name: str
    shape: tuple[int, int]

    @property
    def layer(self) -> int | None:
        """The full-LLM layer on which it lies; None: it belongs to a border map."""
        return int(self.name.split(".")[1]) if self.name.startswith("layers.") else None


class File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file of the bundle; sha256: 64 hex digits, the file's name in every store."""

    name: str
    sha256: str
    bytes: int


class LoRASpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The LoRA of a sub-LLM.

    targets: the names of the modules that have LoRA. adapter, emulator: the tensors of each, ascending by name; the
    emulator's border map comes first.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    adapter: tuple[TensorSpec, ...]
    emulator: tuple[TensorSpec, ...]

    @property
    def scale(self) -> float:
        """The factor of B @ A in a layer's output."""
        return self.alpha / self.rank

    @property
    def border(self) -> int:
        """The first layer that trains (`LayerPlan.border`)."""
        return min(spec.layer for spec in self.adapter if spec.layer is not None)

    @property
    def aligned(self) -> tuple[int, ...]:
        """Layers that carry emulator LoRA, ascending."""
        return tuple(sorted({spec.layer for spec in self.emulator if spec.layer is not None}))


class EdgeNeeds(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The bytes that an edge must have free; `needs.py` has the formulas."""

    disk_bytes: int
    ram_bytes: int
    vram_bytes: int


class BundleManifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The content of manifest.json, which prepare writes once.

    config: the allow-listed, numeric part of the model's config; no class names, no code.
    dtype: the checkpoint's dtype ("bfloat16", ...), that of all tensors that are not quantized.
    files: roles by name: "embedding", "norm", "head" (absent when tied), "layers.7", "emulator_lora",
        "adapter_lora", "tokenizer.json", ...
    """

    format_version: int
    family: str
    config: dict[str, Any]
    dtype: str
    source: str
    source_revision: str
    plan: LayerPlan
    lora: LoRASpec
    adapter_base: str
    quantized_embedding: bool
    files: tuple[File, ...]
    needs: EdgeNeeds
    bits_per_parameter: float
    emulator_base: str = "nf4"  # left out of the JSON then, so that edges of older releases read such a manifest

    def file(self, name: str) -> File:
        """Find the file of that name.

        Raises:
            KeyError: the bundle has none.
        """
        for file in self.files:
            if file.name == name:
                return file
        raise KeyError(name)


def file_of(name: str, size_class: int) -> str:
    """Name a file of a size class in a bundle's directory: its manifest and its LoRA carry its number.

    Args:
        name: the file's name in the manifest.
        size_class: 0 for the bundle's largest sub-LLM, then 1, 2, ...
    """
    stem, _, kind = name.partition(".")
    own = ("manifest.json", ADAPTER_LORA, EMULATOR_LORA)
    return f"{stem}.{size_class}.{kind}" if size_class and name in own else name


def encode_manifest(manifest: BundleManifest) -> bytes:
    """Write a manifest as JSON, indented, its keys sorted: equal manifests give equal bytes."""
    if manifest.emulator_base == "nf4":  # msgspec leaves out the default itself, not what equals it
        manifest = msgspec.structs.replace(manifest, emulator_base="nf4")
    return msgspec.json.format(msgspec.json.encode(manifest, order="sorted"), indent=1)


def check_manifest_size(size: int) -> None:
    """Check the announced size of a manifest before a byte of it is fetched.

    Raises:
        BlobCorrupt: no manifest is that large, or empty.
    """
    if not 0 < size <= MAX_MANIFEST_BYTES:
        raise BlobCorrupt(
            f"the hub names a manifest of {size} bytes, and one has at most {MAX_MANIFEST_BYTES}; ask the hub's owner"
        )


def parse_manifest(data: bytes) -> BundleManifest:
    """Parse and check a manifest, which may come from the network. Nothing that it names is allocated or built.

    `model/bundle.read_manifest` also checks what only the model's family knows.

    Raises:
        BlobCorrupt: the data is not a manifest, has another format, or describes what no bundle can be.
    """
    check_manifest_size(len(data))
    try:
        version = msgspec.json.decode(data).get("format_version")
        if version != FORMAT_VERSION:
            raise BlobCorrupt(
                f"the bundle has format {one_line(str(version), 20)}, this program reads {FORMAT_VERSION}; "
                "upgrade: pip install -U fedsoda"
            )
        manifest = msgspec.json.decode(data, type=BundleManifest)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, AttributeError) as error:
        raise BlobCorrupt(
            f"the manifest is not one of a bundle: {one_line(str(error))}; fetch the bundle again or ask the hub's owner"
        ) from error
    names = [file.name for file in manifest.files]
    required = {f"layers.{number}.safetensors" for number in manifest.plan.kept[:MAX_LAYERS]}
    required |= {f"{role}.safetensors" for role in ("embedding", "norm", "emulator_lora", "adapter_lora")}
    if not manifest.config.get("tie_word_embeddings"):
        required.add("head.safetensors")
    lora = manifest.lora
    sizes = {name: manifest.config.get(name) for name in (*SIZES, *OTHER_SIZES)}
    numbers = [value for value in _leaves(manifest.config) if isinstance(value, int | float)]
    shapes = [size for spec in (*lora.adapter, *lora.emulator) for size in spec.shape]
    problems = {
        "a file twice": len(set(names)) != len(names),
        "a file that no bundle has": not set(names) <= required | set(TOKENIZER_FILES),
        "no shard for a layer, an end or a LoRA that it needs": not required <= set(names),
        "no tokenizer.json": "tokenizer.json" not in names,
        "a digest that is not one": not all(re.fullmatch(r"[0-9a-f]{64}", file.sha256) for file in manifest.files),
        "a size that is not possible": not all(0 < file.bytes < MAX_FILE_BYTES for file in manifest.files),
        "a number of layers that no model has": not 0 < manifest.plan.num_layers <= MAX_LAYERS
        or not 0 < len(manifest.plan.adapter) <= len(manifest.plan.kept) <= manifest.plan.num_layers,
        "another number of layers than its plan": manifest.config.get("num_hidden_layers") != manifest.plan.num_layers,
        "a config number out of bounds": not all(abs(value) < 2.0**40 for value in numbers),
        **{
            f"a model whose {name} is {one_line(str(size), 20)}": not _is_size(size)
            and (name in SIZES or size is not None)
            for name, size in sizes.items()
        },
        "a LoRA that is not possible": not (0 < lora.rank <= MAX_SIZE and math.isfinite(lora.alpha) and lora.alpha > 0)
        or not all(0 < size <= MAX_SIZE for size in shapes),
        "an end of texts other than ids": not _are_ids(
            manifest.config.get("eos_token_id"), manifest.config["vocab_size"]
        )
        if _is_size(manifest.config.get("vocab_size"))
        else False,
        "a base that is not known": not {manifest.adapter_base, manifest.emulator_base} <= set(BASES),
        "needs below 0": min(msgspec.structs.astuple(manifest.needs)) < 0,
    }
    for problem, found in problems.items():
        if found:
            raise BlobCorrupt(f"the manifest names {problem}; fetch the bundle again or ask the hub's owner")
    try:
        check_plan(manifest.plan)
    except UsageProblem as error:
        raise BlobCorrupt(
            f"the manifest is not one of a bundle: {one_line(str(error))}; fetch the bundle again or ask the hub's owner"
        ) from error
    return manifest


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 < value <= MAX_SIZE


def _are_ids(value: Any, vocab: int) -> bool:
    """Tell whether this is an id, a list of ids, or nothing."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    return all(type(one) is int and 0 <= one < vocab for one in ids)


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [leaf for item in value for leaf in _leaves(item)]
    return [value]
