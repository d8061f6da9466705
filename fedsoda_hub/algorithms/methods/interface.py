"""What a federated method is, and what it may ask about the full LLM. The methods are the files beside this one.

Edges train through everything from the first layer that trains on, and sweep what lies below it once; so a method is
no more than a layer plan, the layers that carry emulator LoRA, and what these are held against.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from fedsoda_edge.protocol.manifest import LayerPlan

if TYPE_CHECKING:
    from fedsoda_hub.settings.run import Method


class FullLLM(Protocol):
    """What a method may ask about the hub's model before any of its layers goes; each answer is measured in one pass
    over the public text.
    """

    @property
    def num_layers(self) -> int: ...

    def distances(self, num_layers: int) -> Sequence[Sequence[float]]:
        """Between the outputs of the first so many layers, as `sgp.angular_distances` has them."""
        ...

    def representatives(self, count: int, grouping: str, drawn_by: int | None = None) -> Sequence[int]:
        """So many layers that stand for all, the ends among them, ascending: `representatives.select_layers`.

        Args:
            grouping: "contiguous" or "spectral". drawn_by: a seed; None: the most important of each group.
        """
        ...

    def fits(self, plan: LayerPlan) -> bool:
        """Whether all files of this sub-LLM are within [method] bundle_bytes."""
        ...

    def nearest(self, plans: Sequence[LayerPlan]) -> LayerPlan:
        """Whose sub-LLM comes nearest to the full LLM, by public KL and by what its adapter would learn."""
        ...

    def components(self, count: int, grouping: str) -> tuple[Sequence[int], Sequence[int]]:
        """Layers that keep their attention and layers that keep their MLP, those of the ends among both, ascending, in
        no more bytes than so many layers: `representatives.select_components`.
        """
        ...


class FederatedMethod(Protocol):
    """A module of this directory.

    USES: keys of RUN.toml that mean something to it, of those that do not to every method.
    DEFAULTS: of RUN.toml, where they are not those of `fedsoda_hub.config`.
    """

    USES: tuple[str, ...]
    DEFAULTS: dict[str, Any]

    def plans(self, full_llm: FullLLM, settings: Method, seed: int) -> tuple[LayerPlan, ...]:
        """Which layers train and which stay, by size class from the largest on; `seed` where chance has a say.

        Raises:
            UsageProblem: the model has too few layers; says how many would do. Nothing was measured yet.
        """
        ...

    def aligned(self, plan: LayerPlan) -> tuple[int, ...]:
        """Kept layers that carry emulator LoRA; none: nothing is aligned."""
        ...

    def held_against(self, plan: LayerPlan) -> dict[int, int]:
        """{kept layer: layer of the full LLM whose output it is to have}, beside the emulator's last layer."""
        ...
