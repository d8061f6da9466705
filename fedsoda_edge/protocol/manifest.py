"""What a bundle is: manifest.json and the layer plan in it, as data both sides check.

The agent and the listener read it without torch. Files are made and read in `model/bundle.py`.
"""

from __future__ import annotations

from typing import Any

import msgspec

FORMAT_VERSION = 1


class Group(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One pruned group: layer `start` stays, `removed` layers above it go.

    `distance` is d(out(start), out(start + len(removed))), paper eq. 5, in units of pi (0..1).
    """

    start: int
    removed: tuple[int, ...]
    distance: float


class LayerPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which full-LLM layers the sub-LLM keeps. Every number is a full-LLM layer number but s in `mapping`.

    kept: all layers of the sub-LLM, ascending, the adapter included.
    mapping: (t, s) per group: full-LLM layer t is local layer s of the sub-LLM (paper, I_i = (t_i, s_i)).
    distances: distances[l][m-1] = d between the outputs of layers l and l+m, below the adapter.
    """

    num_layers: int
    adapter: tuple[int, ...]
    kept: tuple[int, ...]
    groups: tuple[Group, ...]
    mapping: tuple[tuple[int, int], ...]
    distances: tuple[tuple[float, ...], ...] = ()

    @property
    def emulator(self) -> tuple[int, ...]:
        """Layers of the full emulator."""
        return tuple(range(self.adapter[0]))

    @property
    def sub_emulator(self) -> tuple[int, ...]:
        """Kept layers below the adapter."""
        return tuple(layer for layer in self.kept if layer < self.adapter[0])

    @property
    def aligned(self) -> tuple[int, ...]:
        """The retained layers t_i that carry the emulator LoRA."""
        return tuple(group.start for group in self.groups)


class TensorSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One LoRA tensor: `layers.29.self_attn.q_proj.lora_A`, (rank, in) or (out, rank)."""

    name: str
    shape: tuple[int, int]


class File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file of the bundle; `sha256` is 64 hex digits and the file's name in every store."""

    name: str
    sha256: str
    bytes: int


class LoRASpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`adapter` and `emulator` list the tensors each LoRA has, ascending by name."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    adapter: tuple[TensorSpec, ...]
    emulator: tuple[TensorSpec, ...]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class EdgeNeeds(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an edge must have free, in bytes: `model/memory.py` has the formulas."""

    disk_bytes: int
    ram_bytes: int
    vram_bytes: int


class BundleManifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """manifest.json: written once, by prepare.

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

    def file(self, name: str) -> File:
        """The file of that name; KeyError when the bundle has none."""
        for file in self.files:
            if file.name == name:
                return file
        raise KeyError(name)
