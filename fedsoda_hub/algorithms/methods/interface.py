"""Define what a federated method is, and what it may ask about the full LLM. The methods are the files beside this one.

Edges train through everything from the first layer that trains on, and sweep what lies below it once; so a method is
a layer plan, the layers that carry emulator LoRA, and what these are compared with. Which keys of RUN.toml it reads, and
its defaults, are in `settings/methods.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from fedsoda_edge.protocol.manifest import LayerPlan
from fedsoda_hub.settings.tables import Method


class FullLLM(Protocol):
    """The hub's model as a method may ask about it, before any layer is removed.

    Each answer is measured in one pass over the public text.
    """

    @property
    def num_layers(self) -> int:
        """The number of decoder layers."""
        ...

    def distances(self, num_layers: int) -> Sequence[Sequence[float]]:
        """Measure the distances between the outputs of the first `num_layers` layers: `sgp.angular_distances`."""
        ...

    def healed_distances(self, num_layers: int, size: int) -> Sequence[Sequence[float]]:
        """Measure what healing would leave of groups of up to `size` removed layers: `healed.distances`."""
        ...

    def representatives(self, count: int, grouping: str, drawn_by: int | None = None) -> Sequence[int]:
        """Choose `count` layers that represent all, both ends among them, ascending: `representatives.select_layers`.

        Args:
            grouping: "contiguous" or "spectral".
            drawn_by: the seed that layers are drawn by; None: the most important layer of each group.
        """
        ...

    def fits(self, plan: LayerPlan) -> bool:
        """Tell whether all files of this sub-LLM are within [method] bundle_bytes."""
        ...

    def nearest(self, plans: Sequence[LayerPlan]) -> LayerPlan:
        """Find the plan whose sub-LLM is nearest to the full LLM, by public KL and by what its adapter would learn."""
        ...

    def components(self, count: int, grouping: str) -> tuple[Sequence[int], Sequence[int]]:
        """Choose layers that keep their attention and layers that keep their MLP: `representatives.select_components`.

        Both ends are among both, which take at most the bytes of `count` layers.

        Returns:
            (layers with attention, layers with MLP), ascending.
        """
        ...


class FederatedMethod(Protocol):
    """A method: each module of this directory is one."""

    def plans(self, full_llm: FullLLM, settings: Method, seed: int) -> tuple[LayerPlan, ...]:
        """Choose which layers train and which are kept, by size class from the largest on.

        Args:
            seed: what chance is drawn by.

        Raises:
            UsageProblem: the model has too few layers; says how many would do. Nothing was measured yet.
        """
        ...

    def aligned(self, plan: LayerPlan) -> tuple[int, ...]:
        """List the kept layers that carry emulator LoRA; where there are none, nothing is aligned."""
        ...

    def held_against(self, plan: LayerPlan) -> dict[int, int]:
        """Map kept layers to the layers of the full LLM whose output each is to have.

        The emulator's last layer is compared in any case and is not named here.
        """
        ...
