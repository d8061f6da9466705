"""Read and check the settings of one run, and decide which of them may change when the run is resumed.

Every key is declared in `tables.py`. What the settings do is each room's own matter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.protocol.template import TextTemplate
from fedsoda_hub.settings.combine import settled
from fedsoda_hub.settings.keys import TOML, SettingValue, flat, keys_of
from fedsoda_hub.settings.listening import check_listening
from fedsoda_hub.settings.methods import METHODS, UNREAD
from fedsoda_hub.settings.notifying import check_notify
from fedsoda_hub.settings.tables import SELF_GENERATED, Method, Public, Tables
from fedsoda_hub.settings.toml import check, read_toml

# What may change once a run is prepared, beside [listen], [tls], [blobs], [notify], [report] and [task] eval_*: where it computes, when a round
# closes, and what an owner sets who sees an edge spoil the model.
_FREE = (
    *("path", "device", "[rounds] count", "[rounds] quorum", "[rounds] deadline_seconds"),
    *("[aggregation] robust", "[aggregation] robust_share", "[task] keep", "[task] metric"),
)
_FREE_TABLES = ("[listen]", "[tls]", "[blobs]", "[notify]", "[report]", "[task] eval_")
MAY_CHANGE = (
    "device, [rounds] count, quorum and deadline_seconds, [aggregation] robust and robust_share, [listen], [tls], [blobs], "
    "[notify], [report], [task] eval_data, eval_every, keep and metric"
)


# Keys that runs of older hubs recorded and that are gone, with the value that every run has now.
GONE: Mapping[str, object] = {"[align] closed_form": False}


class RunSettings(Tables, frozen=True):
    """All settings of a RUN.toml. path: the file that they are from, which relative paths in it are relative to."""

    path: str = ""

    @property
    def directory(self) -> Path:
        """The directory of the file."""
        return Path(self.path).parent

    @property
    def run_dir(self) -> Path:
        """The directory of everything that the run writes."""
        return self.directory / f"{self.name}.run"

    @property
    def public_text(self) -> Path | None:
        """The file of public text; None: the full LLM writes it."""
        return None if self.public.text == SELF_GENERATED else self.directory / self.public.text

    @property
    def like_task(self) -> Path | None:
        """The file of rows like the task's; None: the full LLM writes them."""
        return None if self.public.like_task == SELF_GENERATED else self.directory / self.public.like_task

    @property
    def reads_like_task(self) -> bool:
        """Whether something is fitted on text like the task's: a border map, or the kept layers that are healed."""
        return self.align.heal or self.align.border_map != "none"

    @property
    def eval_data(self) -> Path | None:
        """The file of rows to judge on, if there is one."""
        return self.directory / self.task.eval_data if self.task.eval_data else None

    @property
    def start_from(self) -> Path | None:
        """The directory of the export that the run begins with, if there is one."""
        return self.directory / Path(self.lora.start_from).expanduser() if self.lora.start_from else None

    @property
    def speaks_tls(self) -> bool:
        """Whether the hub speaks TLS by itself."""
        if self.tls.mode == "auto":
            return self.tls.certificate is not None or not self.listen.is_loopback
        return self.tls.mode == "on"

    @property
    def own_certificate(self) -> tuple[Path, Path] | None:
        """The owner's files of certificate and key; None: the hub makes its own."""
        if self.tls.certificate is None:
            return None
        return self.directory / self.tls.certificate, self.directory / (self.tls.key or self.tls.certificate)

    @property
    def prompt(self) -> TextTemplate:
        """The template of what is asked."""
        return TextTemplate(self.task.prompt)

    @property
    def completion(self) -> TextTemplate:
        """The template of what is trained and judged."""
        return TextTemplate(self.task.completion)

    def fixed(self) -> TOML:
        """Give what must be equal once the run is prepared, flat: all but what _FREE names and where to listen.

        A run that begins with fresh LoRA is recorded as one that knows no other: ledgers stay as they are.
        """
        return {
            key: value
            for key, value in flat(msgspec.to_builtins(self)).items()
            if key not in _FREE and not key.startswith(_FREE_TABLES) and (key, value) != ("[lora] start_from", None)
        }


def read_settings(path: str | Path) -> RunSettings:
    """Read and check RUN.toml.

    Raises:
        UsageProblem: the file is missing or not TOML; a key is unknown (names the nearest) or missing; a value is out of
            range or does not go with another; a file that it names does not exist.
    """
    return settings_of(read_toml(Path(path)), Path(path))


def settings_of(raw: TOML, path: Path) -> RunSettings:
    """Check these tables as `read_settings` does.

    Args:
        path: the file that they are from.

    Raises:
        UsageProblem: as in `read_settings`.
    """
    settings = _checked(raw, str(path.resolve()), path.name)
    check_listening(settings.listen, settings.tls, settings.speaks_tls, path.name)
    check_notify(settings.notify, path.name)
    for template in (settings.task.prompt, settings.task.completion):
        TextTemplate(template)
    for label, file in (
        ("[public] text", settings.public_text),
        ("[public] like_task", settings.like_task),
        ("[task] eval_data", settings.eval_data),
    ):
        if file is not None and not file.is_file():
            raise UsageProblem(
                f"{label}: {file} is not there; correct the path, which is relative to the directory of {path.name}"
            )
    return settings


def settings_for_plan(model: str, **tables: Mapping[str, object]) -> RunSettings:
    """Make the settings of a run that is only planned, checked like those of a file."""
    raw: TOML = {"name": "plan", "model": model, "public": {"text": ""}, **tables}
    return _checked(raw, "the options", "the options")


def _checked(raw: TOML, path: str, file: str) -> RunSettings:
    check(raw, Tables, file)
    return settled(msgspec.convert({**raw, "path": path}, RunSettings, strict=True), flat(raw), file)


@dataclass(frozen=True)
class EffectiveSetting:
    """The value of a key that is in force. source: the name of the file that gives it, or "default"."""

    value: SettingValue
    source: str


def effective(settings: RunSettings) -> dict[str, EffectiveSetting]:
    """List all keys of RUN.toml by name."""
    path = Path(settings.path)
    given = flat(read_toml(path))
    values = msgspec.convert(flat(msgspec.to_builtins(settings)), dict[str, SettingValue])
    return {
        key: EffectiveSetting(value, path.name if key in given else "default")
        for key, value in values.items()
        if key != "path"
    }


def defaults_of(settings: RunSettings) -> dict[str, SettingValue]:
    """List what each key would be if the method alone were given; None for what every run must give."""
    method, usual = settings.method, METHODS[settings.method.name].defaults.get("[method] emulator", Method().emulator)
    given = {"name": method.name, "emulator": method.emulator}
    raw: TOML = {"name": "x", "model": "", "public": {"text": ""}, "method": given}
    required = {str(key): None for key in keys_of(Tables).values() if key.is_required}
    values = flat(msgspec.to_builtins(_checked(raw, "", ""))) | required
    values |= {"[method] name": Method().name, "[method] emulator": usual}
    return msgspec.convert({key: value for key, value in values.items() if key != "path"}, dict[str, SettingValue])


def differences(recorded: Mapping[str, object], settings: RunSettings) -> list[str]:
    """List what the RUN.toml of a prepared run changed that it may not, each with both values.

    A run that was prepared before a key existed was prepared as one whose method does not read it, or with the key's
    default.

    Args:
        recorded: what `RunSettings.fixed` gave when the run was prepared.
    """
    then, now = (
        {**GONE, **RunSettings(name="", model="", public=Public(text="")).fixed(), **UNREAD, **recorded},
        {**GONE, **settings.fixed()},
    )
    changed = [key for key in sorted({*then, *now}) if then.get(key) != now.get(key)]
    for decisive in ("[method] name", "[method] emulator"):
        if decisive in changed:  # the others may follow from it
            follow = {*UNREAD, *(key for method in METHODS.values() for key in method.defaults)}
            changed = [key for key in changed if key == decisive or key not in follow]
    return [f"{key}: {then.get(key)!r} when the run was prepared, {now.get(key)!r} now" for key in changed]
