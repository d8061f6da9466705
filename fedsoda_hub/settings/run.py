"""RUN.toml: one frozen tree of settings with the contract's names and defaults.

Unknown keys are errors that name the nearest key. What the settings do is each room's own business.
"""

from __future__ import annotations

import difflib
import json
import math
import re
import tomllib
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.protocol.coded import CODECS
from fedsoda_edge.protocol.manifest import BASES
from fedsoda_edge.protocol.messages import LocalSettings
from fedsoda_edge.protocol.template import TextTemplate
from fedsoda_hub.algorithms.methods.by_name import METHODS, method_of
from fedsoda_hub.algorithms.methods.fedpruner import NEVER_DRAWN
from fedsoda_hub.algorithms.methods.interface import FederatedMethod
from fedsoda_hub.federation.schedule import AUTO, AUTO_ROUNDS

EMULATORS = ("sub", "full")
GROUPINGS = ("contiguous", "spectral")
LAYER_CHOICES = (*GROUPINGS, "uniform", "random", "top")
BORDER_MAPS = ("auto", "ridge", "none")
SELF_GENERATED = "self-generated"  # in the place of a file of [public]
RULES = ("fedavg", "ffa", "rolora", "flexlora")
# Of the hub's step: the keys that each one reads. An adaptive step is about learning_rate long, whatever the deltas.
OPTIMIZERS: dict[str, tuple[str, ...]] = {
    "none": (),
    "fedavgm": ("learning_rate", "beta1"),
    "fedadam": ("learning_rate", "beta1", "beta2", "tau"),
    "fedyogi": ("learning_rate", "beta1", "beta2", "tau"),
}
# What not every method has a use for, and its value where it has none.
NOT_OF_ALL: dict[str, Any] = {
    "[method] emulator": "sub",
    "[method] adapter_layers": 0,
    "[method] bottom_layers": 0,
    "[method] layers_per_group": 0,
    "[method] groups": 0,
    "[method] bundle_bytes": 0,
    "[method] classes": [],
    "[method] drop_layers": 0,
    "[method] layer_choice": "contiguous",
    "[method] reprune_every": 0,
    "[method] realign_every": 0,
    "[method] emulator_base": "nf4",
    "[align] steps": 0,
    "[align] realign_steps": 0,
    "[align] border_map": "none",
    "[align] closed_form": False,
}


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The root of all tables of RUN.toml."""


class Method(Section, frozen=True):
    """Defaults are FedSODA's; other methods have their own (algorithms/methods.py).

    emulator: what edges receive below the adapter: "sub", what SGP leaves of it, aligned; "full", all its layers.
    adapter_layers: last layers that train; bottom_layers: first ones that do.
    groups: how many, or "auto": the size and number of groups that keep the sub-LLM nearest to the full LLM while all
    files of it take at most bundle_bytes on an edge; layers_per_group has no meaning then.
    classes: further, smaller sub-LLMs, ascending: numbers of groups, FedPruner's of dropped layers. An edge takes the
    largest that it has room for.
    drop_layers: how many go in all where they go uniformly: groups have no meaning there, and a share of the layers
    would have to be rounded. layer_choice: how FedPruner finds those that stay: the most important of each of its
    groups, which are "contiguous" or "spectral"; or, to compare with, "uniform", "random" or all but the "top".
    FedPruner+ groups attention and MLP blocks each by themselves, in the bytes of the layers that drop_layers leaves.
    reprune_every: rounds after which FedPruner draws them anew; 0: never.
    realign_every: rounds, or "auto": when the sub-LLM is measured to have drifted. Bases: "nf4" or "bf16", the
    checkpoint's own dtype.
    """

    name: str = "fedsoda"
    emulator: str = "sub"
    adapter_layers: int = 3
    bottom_layers: int = 0
    layers_per_group: int = 3
    groups: int | str = 4
    bundle_bytes: int = 0
    classes: list[int] = msgspec.field(default_factory=list)
    drop_layers: int = 0
    layer_choice: str = "contiguous"
    reprune_every: int = 0
    realign_every: int | str = 5
    adapter_base: str = "nf4"
    emulator_base: str = "nf4"
    quantize_embedding: bool = False

    @property
    def most_often(self) -> int:
        """Rounds from one realignment to the next, at the least; 0: none."""
        return AUTO_ROUNDS if isinstance(self.realign_every, str) else self.realign_every


class LoRA(Section, frozen=True):
    """ranks: of each size class, from the largest on; empty: all have `rank`, which is the master's and the export's."""

    rank: int = 8
    alpha: float = 16.0
    targets: list[str] = msgspec.field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"])
    ranks: list[int] = msgspec.field(default_factory=list)

    def of_class(self, size_class: int) -> int:
        return self.ranks[size_class] if self.ranks else self.rank


class Public(Section, frozen=True):
    """text: a file. like_task: a file of unlabelled rows with the columns of [task] prompt, on which the border map is
    fitted. Either may be "self-generated": the full LLM writes it.
    """

    text: str
    like_task: str = SELF_GENERATED
    sequences: int = 128
    length: int = 512


class Align(Section, frozen=True):
    """border_map: "ridge", fitted after every alignment; "auto", the same where the hub has prompts to fit it on; "none".
    border_rank: at most, the model's width is whole. closed_form: whether pre-alignment begins with
    `algorithms/closed_form.py`; with steps = 0 it is all of it.
    """

    border_map: str = "auto"
    border_rank: int = 256
    closed_form: bool = False
    steps: int = 200
    realign_steps: int = 30
    batch_size: int = 8
    learning_rate: float = 1e-4
    representation_weight: float = 1.0
    kl_weight: float = 1.0


class Rounds(Section, frozen=True):
    count: int = 20
    min_edges: int = 1
    cohort: int = 10
    quorum: float = 0.8
    deadline_seconds: float = 3600.0
    max_weight: float = 3.0


class Aggregation(Section, frozen=True):
    """How updates become the master. rule: "fedavg" averages A and B apart; "ffa" trains B alone, "rolora" B in odd and
    A in even rounds; "flexlora" takes the SVD of the mean product. optimizer: of the hub's step; "none" takes the mean
    itself. learning_rate None: 1 for fedavgm, 0.001 for the adaptive ones. beta1: FedAvgM's momentum too.
    """

    rule: str = "fedavg"
    optimizer: str = "none"
    learning_rate: float | None = None
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    @property
    def step_size(self) -> float:
        if self.learning_rate is None:
            return 1.0 if self.optimizer == "fedavgm" else 1e-3
        return self.learning_rate


class Local(Section, frozen=True):
    epochs: int = 1
    max_steps: int = 0
    batch_size: int = 8
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    proximal_mu: float = 0.01
    max_length: int = 512

    def message(self) -> LocalSettings:
        return LocalSettings(**msgspec.structs.asdict(self))


class Wire(Section, frozen=True):
    codec: str = "nf4"
    stall_seconds: float = 60.0


class Task(Section, frozen=True):
    prompt: str = "{prompt}"
    completion: str = "{completion}"
    choices: str = "auto"
    shots: int = 0
    eval_data: str | None = None
    eval_every: int = 0


class Listen(Section, frozen=True):
    host: str = "127.0.0.1"
    port: int = 8470


class RunSettings(Section, frozen=True):
    """All of RUN.toml. `path` is where it was read from; relative paths in it are relative to that file."""

    name: str
    model: str
    public: Public
    seed: int = 0
    device: str = "auto"
    dtype: str = "bfloat16"
    method: Method = msgspec.field(default_factory=Method)
    lora: LoRA = msgspec.field(default_factory=LoRA)
    align: Align = Align()
    rounds: Rounds = Rounds()
    aggregation: Aggregation = Aggregation()
    local: Local = Local()
    wire: Wire = Wire()
    task: Task = Task()
    listen: Listen = Listen()
    path: str = ""

    @property
    def directory(self) -> Path:
        return Path(self.path).parent

    @property
    def run_dir(self) -> Path:
        return self.directory / f"{self.name}.run"

    @property
    def public_text(self) -> Path | None:
        """None: the full LLM writes it."""
        return None if self.public.text == SELF_GENERATED else self.directory / self.public.text

    @property
    def like_task(self) -> Path | None:
        """None: the full LLM writes them."""
        return None if self.public.like_task == SELF_GENERATED else self.directory / self.public.like_task

    @property
    def eval_data(self) -> Path | None:
        return self.directory / self.task.eval_data if self.task.eval_data else None

    @property
    def prompt(self) -> TextTemplate:
        return TextTemplate(self.task.prompt)

    @property
    def completion(self) -> TextTemplate:
        return TextTemplate(self.task.completion)

    def fixed(self) -> dict[str, Any]:
        """What must equal on resume, flat: all but where to listen and when a round is full."""
        flat = _flat(msgspec.to_builtins(self))
        free = ("path", "device", "[rounds] count", "[rounds] quorum", "[rounds] deadline_seconds")
        return {
            key: value
            for key, value in flat.items()
            if key not in free and not key.startswith(("[listen]", "[task] eval_"))
        }


def read_settings(path: str | Path) -> RunSettings:
    """Read and check RUN.toml.

    Raises:
        UsageProblem: the file is missing, not TOML, has an unknown key (names the nearest), lacks one, or
            has a value out of range; public text or evaluation data are not there.
    """
    return settings_of(read_toml(Path(path)), Path(path))


def read_toml(path: Path, example: str = "a RUN.toml (README, A federation of your own)") -> dict[str, Any]:
    """Raises UsageProblem: the file is missing, which names what to write, or not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageProblem(f"{path} is not there; write {example}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageProblem(f"{path} cannot be read ({error}); name a file of UTF-8 text that you may read") from error
    except tomllib.TOMLDecodeError as error:
        raise UsageProblem(
            f"{path} is not TOML: {error}; mend it there: text stands in quotes, a table's name in [ ]"
        ) from error


def settings_of(raw: dict[str, Any], path: Path) -> RunSettings:
    """The settings that these tables hold, checked as `read_settings` says. path: of the file that they are from."""
    _check_keys(raw, RunSettings, path.name)
    try:
        settings = msgspec.convert({**raw, "path": str(path.resolve())}, RunSettings, strict=True)
    except msgspec.ValidationError as error:
        raise UsageProblem(_in_words(str(error), raw, path.name)) from error
    settings = _settled(settings, raw)
    for label, file in (
        ("[public] text", settings.public_text),
        ("[public] like_task", settings.like_task),
        ("[task] eval_data", settings.eval_data),
    ):
        if file is not None and not file.is_file():
            raise UsageProblem(f"{label}: {file} is not there; the path is relative to {path.name}")
    return settings


S = TypeVar("S", bound=Section)


def table_of(values: Any, kind: type[S], name: str, file: str) -> S:
    """One table of a file of ours, such as [compare], checked like those of RUN.toml but for ranges."""
    if not isinstance(values, dict):
        raise UsageProblem(f"{file}: {name} is {values!r}, but it is a table: write [{name}]")
    _check_keys(values, kind, file, name)
    try:
        return msgspec.convert(values, kind, strict=True)
    except msgspec.ValidationError as error:
        raise UsageProblem(_in_words(str(error).replace("`$.", f"`$.{name}."), {name: values}, file)) from error


def write_toml(settings: RunSettings) -> str:
    """A RUN.toml with all of these settings that the method has a use for. JSON's scalars and lists are TOML's too."""
    lines: list[str] = []
    tables = without_unused(msgspec.to_builtins(settings), method_of(settings.method))
    del tables["path"]
    for key, value in sorted(tables.items(), key=lambda item: isinstance(item[1], dict)):
        if isinstance(value, dict):
            lines.append(f"[{key}]")
        for name, scalar in value.items() if isinstance(value, dict) else [(key, value)]:
            if scalar is not None:
                lines.append(f"{name} = {json.dumps(scalar, ensure_ascii=False, allow_nan=False)}")
    return "\n".join(lines) + "\n"


def _flat(tree: dict[str, Any]) -> dict[str, Any]:
    """{"seed": 0, "[lora] rank": 8}: keys as people write them in messages."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update({f"[{key}] {name}": inner for name, inner in value.items()})
        else:
            flat[key] = value
    return flat


def effective(settings: RunSettings) -> dict[str, dict[str, Any]]:
    """{key: {value, source}} of all of RUN.toml; the source is the file's name or "default"."""
    path = Path(settings.path)
    given = _flat(tomllib.loads(path.read_text(encoding="utf-8")))
    return {
        key: {"value": value, "source": path.name if key in given else "default"}
        for key, value in _flat(msgspec.to_builtins(settings)).items()
        if key != "path"
    }


def settings_for_plan(model: str, **tables: dict[str, Any]) -> RunSettings:
    """Settings of a run that is only thought of: checked like those of a file."""
    raw = {"name": "plan", "model": model, "public": {"text": ""}, "path": "the options", **tables}
    return _settled(msgspec.convert(raw, RunSettings, strict=True), raw)


def with_full_emulator(settings: RunSettings) -> RunSettings:
    """The same run of FedSODA with every layer left in: whoever reads it neither prunes nor aligns."""
    method = msgspec.structs.replace(settings.method, emulator="full")
    return _with(settings, _unused(method_of(method)) | {"[method] emulator": "full"})


def _settled(settings: RunSettings, raw: dict[str, Any]) -> RunSettings:
    """Checked, and as its method has it: the method's defaults, and nothing where it has no use for a key.

    Raises:
        UsageProblem: a value is out of range, does not go with another, or is given to a method that has no use for it.
    """
    _check_ranges(settings)
    method, given = method_of(settings.method), _flat(raw)
    _check_aggregation(settings)
    settled = _unused(method) | {key: value for key, value in method.DEFAULTS.items() if key not in given}
    if settings.method.layer_choice in NEVER_DRAWN and "[method] reprune_every" not in given:
        settled["[method] reprune_every"] = 0
    for key in NOT_OF_ALL:
        if key not in method.USES and given.get(key, settled[key]) != settled[key]:
            raise UsageProblem(_no_use(key, given[key], settings))
    settings = _with(settings, settled)
    _check_groups(settings, given)
    _check_sizes(settings)
    return settings


def _check_sizes(settings: RunSettings) -> None:
    """Size classes ascend from the largest, their ranks go with [aggregation]; layers are drawn anew by a choice that draws.

    Raises:
        UsageProblem: with what would do.
    """
    m, file = settings.method, Path(settings.path).name
    largest = "drop_layers" if m.name == "fedpruner" else "groups"
    ascends = all(a < b for a, b in pairwise([getattr(m, largest), *m.classes]))
    allowed = f"at most 3 numbers, ascending, each above [method] {largest} = {getattr(m, largest)}"
    refuse_unless([("[method] classes", m.classes, len(m.classes) <= 3 and ascends, allowed)], file)
    rank, ranks, rule = settings.lora.rank, settings.lora.ranks, settings.aggregation.rule
    if ranks and rule != "flexlora":
        raise UsageProblem(
            f'[lora] ranks = {ranks} beside [aggregation] rule = "{rule}" in {file}: factors of different ranks have no mean; '
            'write rule = "flexlora" and [wire] codec = "bf16", or delete ranks'
        )
    is_one_each = not ranks or (
        len(ranks) == 1 + len(m.classes) and ranks[0] == rank and 1 <= min(ranks) <= max(ranks) <= rank
    )
    allowed = f"{1 + len(m.classes)} numbers, one for each size class, the first [lora] rank = {rank} and none above it"
    refuse_unless([("[lora] ranks", ranks, is_one_each, allowed)], file)
    if m.reprune_every and m.layer_choice in NEVER_DRAWN:
        others = " or ".join(f'"{choice}"' for choice in LAYER_CHOICES if choice not in NEVER_DRAWN)
        raise UsageProblem(
            f"[method] reprune_every = {m.reprune_every} beside layer_choice = {m.layer_choice!r} in {file}, which is the "
            f"same every time; write reprune_every = 0, or layer_choice = {others}"
        )


def _no_use(key: str, value: Any, settings: RunSettings) -> str:
    name = settings.method.name
    if key in METHODS[name].USES:
        beside, why = '[method] emulator = "full"', "a full emulator is neither pruned nor aligned"
        others = 'emulator = "sub"'
    else:
        beside, why = f'[method] name = "{name}"', f"{name} has no use for it"
        others = "name = " + " or ".join(f'"{other}"' for other, method in METHODS.items() if key in method.USES)
    return f"{key} = {value!r} beside {beside} in {Path(settings.path).name}: {why}; delete {key}, or write {others}"


def _unused(method: FederatedMethod) -> dict[str, Any]:
    """Of the keys that the method has no use for."""
    return {key: method.DEFAULTS.get(key, value) for key, value in NOT_OF_ALL.items() if key not in method.USES}


def without_unused(raw: dict[str, Any], method: FederatedMethod) -> dict[str, Any]:
    """The tables of a RUN.toml without the keys that the method has no use for."""
    unused = {key for key in NOT_OF_ALL if key not in method.USES}
    return {
        table: {key: value for key, value in values.items() if f"[{table}] {key}" not in unused}
        if isinstance(values, dict)
        else values
        for table, values in raw.items()
    }


def _with(settings: RunSettings, values: dict[str, Any]) -> RunSettings:
    """These values by flat key."""
    for key, value in values.items():
        table, _, name = key.removeprefix("[").partition("] ")
        changed = msgspec.structs.replace(getattr(settings, table), **{name: value})
        settings = msgspec.structs.replace(settings, **{table: changed})
    return settings


def _check_keys(raw: dict[str, Any], struct: type[msgspec.Struct], file: str, table: str = "") -> None:
    """Every key is known, and every key that has no default is there."""
    fields = {field.name: field for field in msgspec.structs.fields(struct) if field.name != "path"}
    where = f"[{table}] " if table else ""
    for key, value in raw.items():
        if key not in fields:
            near = difflib.get_close_matches(key, fields, 1, cutoff=0.0)
            raise UsageProblem(f"{file} has no key {where}{key}; the nearest is {where}{near[0]}")
        if _is_table(fields[key].type) and not isinstance(value, dict):
            raise UsageProblem(f"{file}: {key} is {value!r}, but it is a table: write [{key}]")
    for key, field in fields.items():
        if _is_table(field.type):
            if field.required or key in raw:
                _check_keys(raw.get(key, {}), field.type, file, key)
        elif field.required and key not in raw:
            below = f" below [{table}]" if table else ""
            raise UsageProblem(f"{file} has no {where}{key}; write {key} = ...{below}")


def _is_table(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)


_KINDS = {
    "int": "a whole number",
    "int | str": 'a whole number or "auto"',
    "float": "a number",
    "float | null": "a number",
    "str": "text in quotes",
    "str | null": "text in quotes",
    "bool": "true or false",
    "array": "a list",
}


def _in_words(problem: str, raw: dict[str, Any], file: str) -> str:
    """msgspec's "Expected `int`, got `str` - at `$.rounds.count`" as people say it, with the value."""
    found = re.fullmatch(
        r"(?:Expected `(.+)`, got `.+`|Number out of range) - at `\$\.(?:(\w+)\.)?(\w+)(?:\[(\d+)\])?`", problem
    )
    assert found is not None, f"_check_keys leaves nothing but a value's type to be wrong: {problem}"
    expected, table, key, place = found.groups()
    value = (raw[table] if table else raw)[key]
    where = (f"[{table}] " if table else "") + key
    if place is not None:
        value, where = value[int(place)], f"{where}[{place}]"
    return f"{where} = {value!r} in {file}; it must be {_KINDS[expected] if expected else 'a smaller number'}"


def _check_ranges(settings: RunSettings) -> None:
    s = settings
    rules = [
        ("name", s.name, s.name.replace("-", "").replace("_", "").isalnum(), "letters, digits, - and _"),
        ("seed", s.seed, 0 <= s.seed < 2**63, "0 to 2^63-1"),
        ("device", s.device, bool(re.fullmatch(r"auto|cpu|cuda(:\d+)?", s.device)), "auto, cpu, cuda or cuda:N"),
        ("dtype", s.dtype, s.dtype in ("bfloat16", "float16", "float32"), "bfloat16, float16 or float32"),
        ("[method] name", s.method.name, s.method.name in METHODS, f"one of {', '.join(METHODS)}"),
        ("[method] emulator", s.method.emulator, s.method.emulator in EMULATORS, " or ".join(EMULATORS)),
        ("[method] adapter_layers", s.method.adapter_layers, s.method.adapter_layers >= 1, "at least 1"),
        ("[method] bottom_layers", s.method.bottom_layers, s.method.bottom_layers >= 0, "at least 0"),
        ("[method] drop_layers", s.method.drop_layers, s.method.drop_layers >= 0, "at least 0"),
        (
            "[method] layer_choice",
            s.method.layer_choice,
            s.method.layer_choice in LAYER_CHOICES,
            f"one of {', '.join(LAYER_CHOICES)}",
        ),
        (
            "[method] layer_choice",
            s.method.layer_choice,
            s.method.layer_choice in GROUPINGS or s.method.name != "fedpruner+",
            f'{" or ".join(GROUPINGS)} where name = "fedpruner+"',
        ),
        ("[method] layers_per_group", s.method.layers_per_group, s.method.layers_per_group >= 0, "at least 0"),
        (
            "[method] groups",
            s.method.groups,
            s.method.groups == AUTO if isinstance(s.method.groups, str) else s.method.groups >= 0,
            'at least 0, or "auto"',
        ),
        ("[method] bundle_bytes", s.method.bundle_bytes, s.method.bundle_bytes >= 0, "at least 0"),
        ("[method] reprune_every", s.method.reprune_every, s.method.reprune_every >= 0, "at least 0 rounds (0: never)"),
        (
            "[method] realign_every",
            s.method.realign_every,
            s.method.realign_every == AUTO if isinstance(s.method.realign_every, str) else s.method.realign_every >= 0,
            'at least 0, or "auto"',
        ),
        ("[method] adapter_base", s.method.adapter_base, s.method.adapter_base in BASES, " or ".join(BASES)),
        ("[method] emulator_base", s.method.emulator_base, s.method.emulator_base in BASES, " or ".join(BASES)),
        ("[lora] rank", s.lora.rank, 1 <= s.lora.rank <= 1024, "1 to 1024"),
        ("[lora] alpha", s.lora.alpha, s.lora.alpha > 0, "above 0"),
        ("[lora] targets", s.lora.targets, bool(s.lora.targets), "at least one module name"),
        ("[public] sequences", s.public.sequences, s.public.sequences >= 1, "at least 1"),
        ("[public] length", s.public.length, s.public.length >= 2, "at least 2"),
        ("[align] border_map", s.align.border_map, s.align.border_map in BORDER_MAPS, " or ".join(BORDER_MAPS)),
        ("[align] border_rank", s.align.border_rank, s.align.border_rank >= 1, "at least 1"),
        ("[align] steps", s.align.steps, s.align.steps >= 0, "at least 0"),
        ("[align] realign_steps", s.align.realign_steps, s.align.realign_steps >= 0, "at least 0"),
        ("[align] batch_size", s.align.batch_size, s.align.batch_size >= 1, "at least 1"),
        ("[align] learning_rate", s.align.learning_rate, s.align.learning_rate >= 0, "at least 0"),
        (
            "[align] representation_weight",
            s.align.representation_weight,
            s.align.representation_weight >= 0,
            "at least 0",
        ),
        ("[align] kl_weight", s.align.kl_weight, s.align.kl_weight >= 0, "at least 0"),
        ("[rounds] count", s.rounds.count, s.rounds.count >= 1, "at least 1"),
        ("[rounds] min_edges", s.rounds.min_edges, s.rounds.min_edges >= 1, "at least 1"),
        ("[rounds] cohort", s.rounds.cohort, s.rounds.cohort >= 1, "at least 1"),
        ("[rounds] quorum", s.rounds.quorum, 0 < s.rounds.quorum <= 1, "above 0, at most 1"),
        ("[rounds] deadline_seconds", s.rounds.deadline_seconds, s.rounds.deadline_seconds > 0, "above 0"),
        ("[rounds] max_weight", s.rounds.max_weight, s.rounds.max_weight >= 1, "at least 1"),
        ("[aggregation] rule", s.aggregation.rule, s.aggregation.rule in RULES, f"one of {', '.join(RULES)}"),
        (
            "[aggregation] optimizer",
            s.aggregation.optimizer,
            s.aggregation.optimizer in OPTIMIZERS,
            f"one of {', '.join(OPTIMIZERS)}",
        ),
        ("[aggregation] learning_rate", s.aggregation.learning_rate, s.aggregation.step_size > 0, "above 0"),
        ("[aggregation] beta1", s.aggregation.beta1, 0 <= s.aggregation.beta1 < 1, "at least 0, below 1"),
        ("[aggregation] beta2", s.aggregation.beta2, 0 <= s.aggregation.beta2 < 1, "at least 0, below 1"),
        ("[aggregation] tau", s.aggregation.tau, s.aggregation.tau > 0, "above 0"),
        ("[local] epochs", s.local.epochs, s.local.epochs >= 1, "at least 1"),
        ("[local] max_steps", s.local.max_steps, s.local.max_steps >= 0, "at least 0"),
        ("[local] batch_size", s.local.batch_size, s.local.batch_size >= 1, "at least 1"),
        ("[local] learning_rate", s.local.learning_rate, s.local.learning_rate >= 0, "at least 0"),
        ("[local] weight_decay", s.local.weight_decay, s.local.weight_decay >= 0, "at least 0"),
        ("[local] max_grad_norm", s.local.max_grad_norm, s.local.max_grad_norm > 0, "above 0"),
        ("[local] proximal_mu", s.local.proximal_mu, s.local.proximal_mu >= 0, "at least 0"),
        ("[local] max_length", s.local.max_length, s.local.max_length >= 2, "at least 2"),
        ("[wire] codec", s.wire.codec, s.wire.codec in CODECS, f"one of {', '.join(CODECS)}"),
        ("[wire] stall_seconds", s.wire.stall_seconds, s.wire.stall_seconds > 0, "above 0"),
        ("[task] choices", s.task.choices, s.task.choices in ("auto", "none"), "auto or none"),
        ("[task] shots", s.task.shots, 0 <= s.task.shots <= 64, "0 to 64"),
        ("[task] eval_every", s.task.eval_every, s.task.eval_every >= 0, "at least 0 rounds (0: at the end only)"),
        ("[listen] port", s.listen.port, 0 <= s.listen.port <= 65535, "0 to 65535"),
    ]
    refuse_unless(rules, Path(s.path).name)
    TextTemplate(s.task.prompt)
    TextTemplate(s.task.completion)


def refuse_unless(rules: Iterable[tuple[str, Any, bool, str]], file: str) -> None:
    """Raises UsageProblem for the first of (key, value, whether it holds, what is allowed) that does not hold."""
    for key, value, holds, allowed in rules:
        is_finite = not isinstance(value, float) or math.isfinite(value)  # TOML has inf and nan
        if not holds or not is_finite:
            raise UsageProblem(f"{key} = {value!r} in {file}; it must be {allowed}")


def _check_groups(settings: RunSettings, given: dict[str, Any]) -> None:
    """What is chosen by itself is not written too, and what it is chosen by is.

    Raises:
        UsageProblem: with what to write.
    """
    method, file = settings.method, Path(settings.path).name
    if method.groups != AUTO:
        if method.bundle_bytes:
            raise UsageProblem(
                f"[method] bundle_bytes = {method.bundle_bytes} beside groups = {method.groups} in {file}: the number of "
                f'groups says how large the sub-LLM is; delete bundle_bytes, or write groups = "auto"'
            )
        return
    if not method.bundle_bytes:
        raise UsageProblem(
            f'[method] groups = "auto" in {file} without bundle_bytes; write how many bytes the files of the sub-LLM may '
            "take on an edge, such as bundle_bytes = 2_000_000_000"
        )
    for key in ("[method] layers_per_group", "[method] classes"):
        if given.get(key):
            raise UsageProblem(
                f'{key} = {given[key]!r} beside groups = "auto" in {file}: their size is chosen with their number; '
                f"delete {key.split()[1]}, or write groups = {Method().groups}"
            )


def _check_aggregation(settings: RunSettings) -> None:
    """Rule, optimiser and codec go together, and what is set is read.

    Raises:
        UsageProblem: with the choices that would work.
    """
    s, file = settings.aggregation, Path(settings.path).name
    codec, choices = settings.wire.codec, 'rule = "fedavg", "ffa" or "rolora"'
    if s.rule == "flexlora" and codec != "bf16":
        raise UsageProblem(
            f'[aggregation] rule = "flexlora" beside [wire] codec = {codec!r} in {file}: the SVD turns the gauge every '
            f'round, so what coding left over would be added to other directions; write codec = "bf16", or {choices}'
        )
    if s.rule == "flexlora" and s.optimizer != "none":
        raise UsageProblem(
            f'[aggregation] rule = "flexlora" beside optimizer = {s.optimizer!r} in {file}: the SVD turns the gauge every '
            f'round, so moments would belong to other directions; write optimizer = "none", or {choices}'
        )
    if s.optimizer != "none" and codec == "nf4-weight":
        raise UsageProblem(
            f"[aggregation] optimizer = {s.optimizer!r} beside [wire] codec = 'nf4-weight' in {file}: an optimiser steps "
            'along deltas, and whole weights travel; write codec = "nf4", "int8" or "bf16", or optimizer = "none"'
        )
    for key in ("learning_rate", "beta1", "beta2", "tau"):
        if getattr(s, key) != getattr(Aggregation(), key) and key not in OPTIMIZERS[s.optimizer]:
            readers = ", ".join(name for name, keys in OPTIMIZERS.items() if key in keys)
            raise UsageProblem(
                f"[aggregation] {key} beside optimizer = {s.optimizer!r} in {file} would not be read; delete it, or "
                f"choose an optimizer that reads it: {readers}"
            )


def differences(recorded: dict[str, Any], settings: RunSettings) -> list[str]:
    """What a resumed run's RUN.toml changed that it may not, each with both values.

    A run that began before a key was thought of began with its default.
    """
    then, now = RunSettings(name="", model="", public=Public(text="")).fixed() | recorded, settings.fixed()
    changed = [key for key in sorted({*then, *now}) if then.get(key) != now.get(key)]
    for decisive in ("[method] name", "[method] emulator"):
        if decisive in changed:  # the others may follow from it
            of_methods = {*NOT_OF_ALL, *(key for method in METHODS.values() for key in method.DEFAULTS)}
            changed = [key for key in changed if key == decisive or key not in of_methods]
    return [f"{key}: {then.get(key)!r} when the run began, {now.get(key)!r} now" for key in changed]
