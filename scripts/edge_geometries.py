"""The models and samples that an edge is benched on: the published shapes with random weights, and a stand-in for each.

What is measured on them is the business of `bench_edge.py` and `bench_memory.py`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import random_bundle  # beside this file
import torch

from fedsoda_edge.data.samples import Sample
from fedsoda_edge.model.bundle import Bundle
from fedsoda_edge.protocol.manifest import LayerPlan
from fedsoda_hub.plan import likely_plan
from fedsoda_hub.settings.tables import Method

TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
ADAPTER_LAYERS, LAYERS_PER_GROUP, SUPERVISED = 3, 3, 0.2


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
