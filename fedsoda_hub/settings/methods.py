"""Declare which keys each method reads, of those that not every method reads, and its own defaults: one table for all.

What the methods do is in `algorithms/methods/`, a file each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedsoda_hub.settings.keys import Key
from fedsoda_hub.settings.tables import Method, MethodName

# The keys that not every method reads, each with its value where it is not read.
UNREAD: dict[str, object] = {
    "[method] emulator": "sub",
    "[method] adapter_layers": 0,
    "[method] bottom_layers": 0,
    "[method] layers_per_group": 0,
    "[method] groups": 0,
    "[method] distance": "angular",
    "[method] bundle_bytes": 0,
    "[method] classes": [],
    "[method] drop_layers": 0,
    "[method] layer_choice": "contiguous",
    "[method] reprune_every": 0,
    "[method] realign_every": 0,
    "[method] emulator_base": "nf4",
    "[align] heal": False,
    "[align] steps": 0,
    "[align] realign_steps": 0,
    "[align] border_map": "none",
}


@dataclass(frozen=True)
class MethodKeys:
    """The keys of UNREAD that a method reads, and its defaults where they differ from those of `tables.py`."""

    reads: tuple[str, ...]
    defaults: Mapping[str, object]

    @property
    def unread(self) -> dict[str, object]:
        """The keys that the method does not read, with the values that they have."""
        return {key: self.defaults.get(key, value) for key, value in UNREAD.items() if key not in self.reads}


METHODS: dict[MethodName, MethodKeys] = {
    "fedsoda": MethodKeys(
        reads=(
            *("[method] emulator", "[method] adapter_layers", "[method] layers_per_group", "[method] groups"),
            *("[method] distance", "[method] bundle_bytes", "[method] classes", "[method] realign_every"),
            *("[method] emulator_base", "[align] heal", "[align] steps"),
            *("[align] realign_steps", "[align] border_map"),
        ),
        defaults={},
    ),
    "exact": MethodKeys(
        reads=("[method] adapter_layers", "[method] emulator_base", "[align] heal"),
        defaults={"[method] emulator": "full"},
    ),
    "fedbiot": MethodKeys(
        reads=(
            *("[method] adapter_layers", "[method] drop_layers", "[method] realign_every", "[method] emulator_base"),
            *("[align] steps", "[align] realign_steps", "[align] border_map"),
        ),
        defaults={
            "[method] drop_layers": 12,  # of 32 or 28, as FedSODA compares
            "[method] realign_every": 1,
            "[method] adapter_base": "bf16",
            "[method] emulator_base": "bf16",
            "[align] steps": 500,  # initial_update_rounds x local_update_steps, then local_update_steps
            "[align] realign_steps": 10,
            "[align] border_map": "none",  # as in the paper
        },
    ),
    "fedot": MethodKeys(
        reads=(
            *("[method] adapter_layers", "[method] bottom_layers", "[method] drop_layers", "[method] emulator_base"),
            "[align] steps",
        ),
        defaults={
            "[method] adapter_layers": 2,
            "[method] bottom_layers": 1,
            "[method] drop_layers": 12,
            "[method] adapter_base": "bf16",
            "[method] emulator_base": "bf16",
            "[align] steps": 500,  # of FederatedScope's align_student_with_teacher, which has no KL either
            "[align] kl_weight": 0.0,
        },
    ),
    "fedpetuning": MethodKeys(reads=(), defaults={"[method] emulator": "full", "[method] adapter_base": "bf16"}),
    "fedpruner": MethodKeys(
        reads=("[method] drop_layers", "[method] layer_choice", "[method] classes", "[method] reprune_every"),
        defaults={
            "[method] drop_layers": 12,  # as the other methods do where FedSODA compares them
            "[method] adapter_base": "bf16",
            "[method] reprune_every": 5,  # docs/methods.md (m9-draw); each round in the paper
        },
    ),
    "fedpruner+": MethodKeys(
        reads=("[method] drop_layers", "[method] layer_choice"),
        defaults={"[method] drop_layers": 12, "[method] adapter_base": "bf16"},  # as fedpruner's
    ),
}


def keys_of_method(settings: Method) -> MethodKeys:
    """Find what the run's method reads; FedSODA with a full emulator reads what exact does."""
    return METHODS["exact" if settings.name == "fedsoda" and settings.emulator == "full" else settings.name]


def readers_of(key: str) -> list[MethodName]:
    """List the methods that read this key."""
    return [name for name, keys in METHODS.items() if key not in UNREAD or key in keys.reads]


def default_in_words(key: Key) -> str:
    """Say the default of a key: "8"; where methods differ, "3; fedot: 2"; where not all read it, "fedsoda: 5; fedbiot: 1".

    A method that is not named has the value without a name.
    """
    readers = readers_of(str(key))
    methods: dict[str, list[MethodName]] = {_shown(key.default): []}
    for name in readers:
        methods.setdefault(_shown(METHODS[name].defaults.get(str(key), key.default)), []).append(name)
    if len(readers) == len(METHODS):
        methods[_shown(key.default)] = []  # of all that are not named
        return "; ".join(f"{', '.join(names)}: {value}" if names else value for value, names in methods.items())
    return "; ".join(f"{', '.join(names)}: {value}" for value, names in methods.items() if names)


def _shown(value: object) -> str:
    match value:
        case bool():
            return str(value).lower()
        case list():
            return ",".join(map(str, value)) or "none"
        case None:
            return "none"
    return str(value)
