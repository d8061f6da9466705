"""Which federated methods there are, by the name that RUN.toml gives them: one file each, which says what trains, which
layers go and what is aligned. Preparation, edges, rounds and export are the same for all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedsoda_hub.algorithms.methods import exact, fedbiot, fedot, fedpetuning, fedpruner, fedpruner_plus, fedsoda
from fedsoda_hub.algorithms.methods.interface import FederatedMethod

if TYPE_CHECKING:
    from fedsoda_hub.settings.run import Method

METHODS: dict[str, FederatedMethod] = {
    "fedsoda": fedsoda,
    "exact": exact,
    "fedbiot": fedbiot,
    "fedot": fedot,
    "fedpetuning": fedpetuning,
    "fedpruner": fedpruner,
    "fedpruner+": fedpruner_plus,
}


def method_of(settings: Method) -> FederatedMethod:
    """The run's method; FedSODA with a full emulator is exact."""
    return exact if settings.name == "fedsoda" and settings.emulator == "full" else METHODS[settings.name]
