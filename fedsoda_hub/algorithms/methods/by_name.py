"""Find a federated method by the name that RUN.toml gives it.

Each method is one file, which says what trains, which layers are removed and what is aligned. Preparation, edges, rounds
and export are the same for all.
"""

from __future__ import annotations

from fedsoda_hub.algorithms.methods import exact, fedbiot, fedot, fedpetuning, fedpruner, fedpruner_plus, fedsoda
from fedsoda_hub.algorithms.methods.interface import FederatedMethod
from fedsoda_hub.settings.tables import Method


def method_of(settings: Method) -> FederatedMethod:
    """Find the run's method. FedSODA with a full emulator is the method exact."""
    match settings.name:
        case "fedsoda" if settings.emulator == "full":
            return exact
        case "fedsoda":
            return fedsoda
        case "exact":
            return exact
        case "fedbiot":
            return fedbiot
        case "fedot":
            return fedot
        case "fedpetuning":
            return fedpetuning
        case "fedpruner":
            return fedpruner
        case "fedpruner+":
            return fedpruner_plus
