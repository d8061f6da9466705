"""Decide which settings go together: what a method does not read, what is chosen by itself, what aggregation allows.

A refusal names both values and the ways out. Each value by itself is checked before, by `toml.check`.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import TypeVar, get_args

import msgspec

from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.protocol.mirrors import MAX_MIRRORS, is_mirror
from fedsoda_hub.settings.keys import TOML, refuse_unless
from fedsoda_hub.settings.methods import METHODS, MethodKeys, keys_of_method, readers_of
from fedsoda_hub.settings.tables import (
    Aggregation,
    Blobs,
    LayerChoice,
    LoRA,
    Method,
    Optimizer,
    Robust,
    Tables,
    Task,
    Wire,
)

GROUPINGS: tuple[LayerChoice, ...] = ("contiguous", "spectral")  # choices that measure the layers
NEVER_DRAWN: tuple[LayerChoice, ...] = ("uniform", "top")  # choices that are the same every time
MAX_CLASSES = 3
# What the hub's optimizer reads. The step of an adaptive one is about learning_rate long, whatever the deltas.
OPTIMIZERS: dict[Optimizer, tuple[str, ...]] = {
    "none": (),
    "fedavgm": ("learning_rate", "beta1"),
    "fedadam": ("learning_rate", "beta1", "beta2", "tau"),
    "fedyogi": ("learning_rate", "beta1", "beta2", "tau"),
}

# Rules that cut single values, and those that compare whole updates. The others ask for less.
BY_VALUE: tuple[Robust, ...] = ("median", "trimmed")
BY_DISTANCE: tuple[Robust, ...] = ("krum", "centered-clip")
READS_SHARE: tuple[Robust, ...] = ("trimmed", "krum")

T = TypeVar("T", bound=Tables)


def settled(tables: T, given: Mapping[str, object], file: str) -> T:
    """Check what goes together, and return the tables with the method's defaults and without what it does not read.

    Args:
        given: what was written, by flat key (`keys.flat`).
        file: the file's name, as messages say it.

    Raises:
        UsageProblem: a value does not go with another, or the method does not read a key that was given.
    """
    _check_layer_choice(tables.method, file)
    _check_aggregation(tables.aggregation, tables.wire, file)
    _check_mirrors(tables.blobs, file)
    method = keys_of_method(tables.method)
    values = method.unread | {key: value for key, value in method.defaults.items() if key not in given}
    if tables.method.layer_choice in NEVER_DRAWN and "[method] reprune_every" not in given:
        values["[method] reprune_every"] = 0
    for key, value in method.unread.items():
        if given.get(key, value) != value:
            raise UsageProblem(_no_use(key, given[key], tables.method, file))
    made = _with(tables, values)
    _check_adapter(made.method, file)
    _check_groups(made.method, given, file)
    _check_sizes(made.method, made.lora, made.aggregation, file)
    _check_robust(made, file)
    _check_kept(made.task, file)
    refuse_unless(
        made.lora.start_from is None or not made.lora.ranks,
        "[lora] start_from",
        made.lora.start_from,
        "no export where ranks has a rank for each size class, since the export has one",
        file,
    )
    return made


def _check_kept(task: Task, file: str) -> None:
    """Check that there are rounds to choose the best of."""
    if task.keep == "best" and (task.eval_data is None or not task.eval_every):
        lacks = (
            "eval_data names no rows to judge on"
            if task.eval_data is None
            else "eval_every = 0 judges the last round alone"
        )
        raise UsageProblem(
            f'[task] keep = "best" in {file} chooses among evaluated rounds, and {lacks}; write eval_data and eval_every = 1 '
            'under [task], or keep = "last"'
        )


def _check_mirrors(blobs: Blobs, file: str) -> None:
    refuse_unless(
        len(blobs.mirrors) <= MAX_MIRRORS, "[blobs] mirrors", blobs.mirrors, f"at most {MAX_MIRRORS} URLs", file
    )
    for url in blobs.mirrors:
        if not is_mirror(url):
            raise UsageProblem(
                f"[blobs] mirrors = {url!r} in {file} is not the address of a mirror; write https://HOST/PATH/ as edges reach "
                "it, without user, password, query and fragment"
            )


def with_full_emulator(tables: T) -> T:
    """Return the same run of FedSODA with every layer kept, so that nothing is pruned or aligned."""
    method = msgspec.structs.replace(tables.method, emulator="full")
    return _with(tables, keys_of_method(method).unread | {"[method] emulator": "full"})


def without_unused(tables: TOML, method: MethodKeys) -> TOML:
    """Return the tables without the keys that this method does not read."""
    return {
        table: {key: value for key, value in values.items() if f"[{table}] {key}" not in method.unread}
        if isinstance(values, dict)
        else values
        for table, values in tables.items()
    }


def _with(tables: T, values: Mapping[str, object]) -> T:
    """Replace these values, given by flat key."""
    changes: dict[str, dict[str, object]] = {}
    for key, value in values.items():
        table, _, name = key.removeprefix("[").partition("] ")
        changes.setdefault(table, {})[name] = value
    changed: dict[str, msgspec.Struct] = {
        table: msgspec.structs.replace(getattr(tables, table), **fields) for table, fields in changes.items()
    }
    return msgspec.structs.replace(tables, **changed)


def _no_use(key: str, value: object, method: Method, file: str) -> str:
    if key in METHODS[method.name].reads:
        beside, why = '[method] emulator = "full"', "a full emulator is neither pruned nor aligned"
        others = 'emulator = "sub"'
    else:
        beside, why = f'[method] name = "{method.name}"', f"{method.name} does not read it"
        others = "name = " + " or ".join(f'"{other}"' for other in readers_of(key))
    return f"{key} = {value!r} beside {beside} in {file}: {why}; delete {key}, or write {others}"


def _check_layer_choice(method: Method, file: str) -> None:
    """Check that FedPruner+ chooses its blocks by what was measured: it knows no other choice."""
    goes = method.layer_choice in GROUPINGS or method.name != "fedpruner+"
    allowed = f'{" or ".join(GROUPINGS)} where name = "fedpruner+"'
    refuse_unless(goes, "[method] layer_choice", method.layer_choice, allowed, file)


def _check_adapter(method: Method, file: str) -> None:
    """Check that a method with an adapter has a layer in it; 0 is the value where a method has no adapter."""
    key = "[method] adapter_layers"
    goes = method.adapter_layers >= 1 or key in keys_of_method(method).unread
    refuse_unless(goes, key, method.adapter_layers, "at least 1", file)


def _check_groups(method: Method, given: Mapping[str, object], file: str) -> None:
    """Check that a number of groups that is chosen by itself is not written too, and that its bound is."""
    if method.groups != "auto":
        if method.bundle_bytes:
            raise UsageProblem(
                f"[method] bundle_bytes = {method.bundle_bytes} beside groups = {method.groups} in {file}: the number of "
                'groups decides how large the sub-LLM is; delete bundle_bytes, or write groups = "auto"'
            )
        return
    if not method.bundle_bytes:
        raise UsageProblem(
            f'[method] groups = "auto" in {file} without bundle_bytes: the hub cannot know how large a sub-LLM may be; '
            "write the bytes that its files may take on an edge, such as bundle_bytes = 2_000_000_000"
        )
    for key in ("[method] layers_per_group", "[method] classes"):
        if given.get(key):
            raise UsageProblem(
                f'{key} = {given[key]!r} beside groups = "auto" in {file}: their size is chosen with their number; '
                f"delete {key.split()[1]}, or write groups = {Method().groups}"
            )


def _check_sizes(method: Method, lora: LoRA, aggregation: Aggregation, file: str) -> None:
    """Check that size classes become smaller, that ranks go with [aggregation], and that a choice which is redrawn draws."""
    largest = "drop_layers" if method.name == "fedpruner" else "groups"
    ascends = all(a < b for a, b in pairwise([getattr(method, largest), *method.classes]))
    allowed = f"at most {MAX_CLASSES} numbers, ascending, each above [method] {largest} = {getattr(method, largest)}"
    refuse_unless(len(method.classes) <= MAX_CLASSES and ascends, "[method] classes", method.classes, allowed, file)
    rank, ranks, rule = lora.rank, lora.ranks, aggregation.rule
    if ranks and rule != "flexlora":
        raise UsageProblem(
            f'[lora] ranks = {ranks} beside [aggregation] rule = "{rule}" in {file}: factors of different ranks cannot be '
            'averaged; write rule = "flexlora" and [wire] codec = "bf16", or delete ranks'
        )
    is_one_each = not ranks or (
        len(ranks) == 1 + len(method.classes) and ranks[0] == rank and 1 <= min(ranks) <= max(ranks) <= rank
    )
    allowed = (
        f"{1 + len(method.classes)} numbers, one for each size class, the first [lora] rank = {rank} and none above it"
    )
    refuse_unless(is_one_each, "[lora] ranks", ranks, allowed, file)
    if method.reprune_every and method.layer_choice in NEVER_DRAWN:
        others = " or ".join(f'"{choice}"' for choice in get_args(LayerChoice) if choice not in NEVER_DRAWN)
        raise UsageProblem(
            f"[method] reprune_every = {method.reprune_every} beside layer_choice = {method.layer_choice!r} in {file}, "
            f"which is the same every time; write reprune_every = 0, or layer_choice = {others}"
        )


def _check_aggregation(aggregation: Aggregation, wire: Wire, file: str) -> None:
    """Check that rule, optimizer and codec go together, and that the optimizer reads what is set."""
    rule, optimizer, codec = aggregation.rule, aggregation.optimizer, wire.codec
    choices = 'rule = "fedavg", "ffa" or "rolora"'
    if rule == "flexlora" and codec != "bf16":
        raise UsageProblem(
            f'[aggregation] rule = "flexlora" beside [wire] codec = {codec!r} in {file}: the SVD turns the gauge every '
            f'round, so a coding error would be added to other directions; write codec = "bf16", or {choices}'
        )
    if rule == "flexlora" and optimizer != "none":
        raise UsageProblem(
            f'[aggregation] rule = "flexlora" beside optimizer = {optimizer!r} in {file}: the SVD turns the gauge every '
            f'round, so moments would belong to other directions; write optimizer = "none", or {choices}'
        )
    if optimizer != "none" and codec == "nf4-weight":
        raise UsageProblem(
            f"[aggregation] optimizer = {optimizer!r} beside [wire] codec = 'nf4-weight' in {file}: an optimizer steps "
            'along deltas, and whole weights travel; write codec = "nf4", "int8" or "bf16", or optimizer = "none"'
        )
    for key in ("learning_rate", "beta1", "beta2", "tau"):
        if getattr(aggregation, key) != getattr(Aggregation(), key) and key not in OPTIMIZERS[optimizer]:
            readers = ", ".join(name for name, keys in OPTIMIZERS.items() if key in keys)
            raise UsageProblem(
                f"[aggregation] {key} = {getattr(aggregation, key)!r} beside optimizer = {optimizer!r} in {file} would "
                f"not be read; delete {key}, or choose an optimizer that reads it: {readers}"
            )


def _check_robust(tables: Tables, file: str) -> None:
    """Check that the robust rule goes with what is averaged, and that it reads what is set."""
    rule, how = tables.aggregation.robust, tables.aggregation
    if rule != "none" and tables.wire.codec == "nf4-weight":
        raise UsageProblem(
            f"[aggregation] robust = {rule!r} beside [wire] codec = 'nf4-weight' in {file}: the rules compare steps, and "
            'whole weights travel; write codec = "nf4", "int8" or "bf16", or robust = "none"'
        )
    if rule in BY_VALUE and how.rule == "flexlora":
        raise UsageProblem(
            f'[aggregation] robust = {rule!r} beside rule = "flexlora" in {file}: the mean is one of products, whose '
            'single values no low rank keeps; write robust = "clip", "krum" or "centered-clip", or rule = "fedavg"'
        )
    if rule in BY_DISTANCE and tables.method.name == "fedpruner" and tables.method.classes:
        raise UsageProblem(
            f"[aggregation] robust = {rule!r} beside [method] classes = {tables.method.classes} in {file}: edges of "
            "different classes train different layers, so that their updates have no distance; write robust = "
            '"clip", "median" or "trimmed", or delete classes'
        )
    if how.robust_share != Aggregation().robust_share and rule not in READS_SHARE:
        readers = " or ".join(f'"{reader}"' for reader in READS_SHARE)
        raise UsageProblem(
            f"[aggregation] robust_share = {how.robust_share} beside robust = {rule!r} in {file} would not be read; delete "
            f"robust_share, or write robust = {readers}"
        )
