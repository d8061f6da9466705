"""What a federated method is, and what it may ask about the full LLM. The methods are the files beside this one.

Edges train through everything from the first layer that trains on, and sweep what lies below it once; so a method is
a layer plan, the layers that carry emulator LoRA, and what these are held against. What it reads of RUN.toml, and its
defaults, stand in `settings/methods.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from fedsoda_edge.protocol.manifest import LayerPlan
from fedsoda_hub.settings.tables import Method


class FullLLM(Protocol):
    """What a method may ask about the hub's model before any of its layers goes; each answer is measured in one pass
    over the public text.
    """

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        ...

    def distances(self, num_layers: int) -> Sequence[Sequence[float]]:
        """Measure between the outputs of the first `num_layers` layers, as `sgp.angular_distances` gives them."""
        ...

    def representatives(self, count: int, grouping: str, drawn_by: int | None = None) -> Sequence[int]:
        """Choose `count` layers that stand for all, the ends among them, ascending: `representatives.select_layers`.

        Args:
            grouping: "contiguous" or "spectral". drawn_by: a seed; None: the most important layer of each group.
        """
        ...

    def fits(self, plan: LayerPlan) -> bool:
        """Say whether all files of this sub-LLM are within [method] bundle_bytes."""
        ...

    def nearest(self, plans: Sequence[LayerPlan]) -> LayerPlan:
        """Find the plan whose sub-LLM comes nearest to the full LLM, by public KL and by what its adapter would learn."""
        ...

    def components(self, count: int, grouping: str) -> tuple[Sequence[int], Sequence[int]]:
        """Choose layers that keep their attention and layers that keep their MLP, those of the ends among both,
        ascending, in the bytes of `count` layers at most: `representatives.select_components`.
        """
        ...


class FederatedMethod(Protocol):
    """A module of this directory."""

    def plans(self, full_llm: FullLLM, settings: Method, seed: int) -> tuple[LayerPlan, ...]:
        """Choose which layers train and which stay, by size class from the largest on; `seed` is what chance is drawn by.

        Raises:
            UsageProblem: the model has too few layers; says how many would do. Nothing was measured yet.
        """
        ...

    def aligned(self, plan: LayerPlan) -> tuple[int, ...]:
        """List the kept layers that carry emulator LoRA; none: nothing is aligned."""
        ...

    def held_against(self, plan: LayerPlan) -> dict[int, int]:
        """Pair {kept layer: layer of the full LLM whose output it is to have}, beside the emulator's last layer."""
        ...
