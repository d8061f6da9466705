"""Which federated methods there are, by the name that RUN.toml gives them: one file each, which says what trains, which
layers go and what is aligned. Preparation, edges, rounds and export are the same for all.

Edges train through everything from the first layer that trains on, and sweep what lies below it once; so a method is
no more than a layer plan, the layers that carry emulator LoRA, and what these are held against.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from fedsoda_edge.protocol.manifest import LayerPlan
from fedsoda_hub.algorithms import exact, fedbiot, fedot, fedpetuning, fedsoda

if TYPE_CHECKING:
    from fedsoda_hub.config import Method

Measure = Callable[[int], Sequence[Sequence[float]]]  # distances between the outputs of the first so many layers


class FederatedMethod(Protocol):
    """A module of this directory.

    USES: keys of RUN.toml that mean something to it, of those that do not to every method.
    DEFAULTS: of RUN.toml, where they are not those of `fedsoda_hub.config`.
    """

    USES: tuple[str, ...]
    DEFAULTS: dict[str, Any]

    def plan(self, num_layers: int, settings: Method, measure: Measure) -> LayerPlan:
        """Which layers train and which stay.

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


METHODS: dict[str, FederatedMethod] = {
    "fedsoda": fedsoda,
    "exact": exact,
    "fedbiot": fedbiot,
    "fedot": fedot,
    "fedpetuning": fedpetuning,
}


def method_of(settings: Method) -> FederatedMethod:
    """The run's method; FedSODA with a full emulator is exact."""
    return exact if settings.name == "fedsoda" and settings.emulator == "full" else METHODS[settings.name]
