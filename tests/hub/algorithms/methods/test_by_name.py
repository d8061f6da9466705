"""Every method that RUN.toml may name has a file, and every file is a method that it may name."""

from __future__ import annotations

from pathlib import Path

from fedsoda_hub.algorithms.methods import by_name, exact
from fedsoda_hub.algorithms.methods.by_name import method_of
from fedsoda_hub.settings.methods import METHODS
from fedsoda_hub.settings.tables import Method


def test_names_and_files_are_the_same() -> None:
    named = {name: str(vars(method_of(Method(name=name)))["__file__"]) for name in METHODS}
    assert len({*named.values()}) == len(METHODS)
    files = {path.stem for path in Path(by_name.__file__).parent.glob("*.py")} - {"__init__", "interface", "by_name"}
    assert {Path(file).stem for file in named.values()} == files
    assert {name: Path(file).stem for name, file in named.items()} == {
        name: name.replace("+", "_plus") for name in METHODS
    }


def test_fedsoda_with_a_full_emulator_is_exact() -> None:
    assert method_of(Method(emulator="full")) is exact
