"""Every key says what it means and what it takes; errors and help have no words of their own."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.protocol.messages import LocalSettings
from fedsoda_hub.compare.settings import Compare
from fedsoda_hub.settings.keys import Key, keys_of
from fedsoda_hub.settings.tables import Tables
from fedsoda_hub.settings.toml import check
from tests.hub.settings.files import SHORT, read

EVERY = [*keys_of(Tables).values(), *keys_of(Compare, "compare").values()]


@pytest.mark.parametrize("key", EVERY, ids=str)
def test_every_key_has_words(key: Key) -> None:
    assert key.description
    assert not key.description.endswith(".")
    assert key.values.sort
    assert key.is_required or key.default is None or msgspec.convert(key.default, key.type, strict=True) == key.default


def test_words_are_those_of_the_field() -> None:
    words = {name: (key.values.sort, key.values.allowed) for name, key in keys_of(Tables).items()}
    assert words["[rounds] count"] == ("a whole number", "at least 1")
    assert words["[rounds] quorum"] == ("a number", "above 0, at most 1")
    assert words["[lora] rank"] == ("a whole number", "1 to 1024")
    assert words["[method] emulator"] == ("text in quotes", "sub or full")
    assert words["[aggregation] beta1"] == ("a number", "at least 0, below 1")
    assert words["[aggregation] learning_rate"] == ("a number", "above 0")
    assert words["[method] groups"] == ("a whole number", 'at least 0, or "auto"')
    assert words["[lora] targets"] == ("a list", "one or more, in [ ]")
    assert words["seed"] == ("a whole number", "0 to 2^63-1")
    assert words["[method] quantize_embedding"] == ("true or false", "")


def test_the_table_local_is_what_travels_in_an_offer() -> None:
    assert {name.removeprefix("[local] ") for name in keys_of(Tables) if name.startswith("[local]")} == {
        *LocalSettings.__struct_fields__
    }


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[rounds]\ncount = 'ten'", "[rounds] count = 'ten' in run.toml; it must be a whole number, at least 1"),
        ("[method]\ngroups = 1.5", '[method] groups = 1.5 in run.toml; it must be a whole number, at least 0, or "auto"'),
        ("[method]\ngroups = 'all'", "[method] groups = 'all' in run.toml; it must be at least 0, or \"auto\""),
        ("[method]\ngroups = -1", '[method] groups = -1 in run.toml; it must be at least 0, or "auto"'),
        ("[lora]\nalpha = inf", "[lora] alpha = inf in run.toml; it must be above 0 and finite"),
        ("[lora]\nalpha = nan", "[lora] alpha = nan in run.toml; it must be above 0"),
        ("[lora]\ntargets = []", "[lora] targets = [] in run.toml; it must be one or more, in [ ]"),
        ("[method]\nclasses = [5, 'six']", "[method] classes[1] = 'six' in run.toml; it must be a whole number"),
    ],
)  # fmt: skip
def test_a_value_is_refused_in_the_words_of_its_key(folder: Path, text: str, sentence: str) -> None:
    with pytest.raises(UsageProblem) as refused:
        read(folder, SHORT + text + "\n")
    assert str(refused.value) == sentence


@pytest.mark.parametrize("name", ["a b", "../x", "-", "", "a\n"])
def test_the_name_of_a_run_is_one_of_a_directory(name: str) -> None:
    with pytest.raises(UsageProblem, match="it must be letters, digits, - and _"):
        check({"name": name, "model": "m", "public": {"text": "t"}}, Tables, "run.toml")


def test_every_seed_of_torch_is_one(folder: Path) -> None:
    assert read(folder, f"seed = {2**63 - 1}\n" + SHORT).seed == 2**63 - 1
    with pytest.raises(UsageProblem, match=r"seed = 9223372036854775808 in run.toml; it must be 0 to 2\^63-1"):
        read(folder, f"seed = {2**63}\n" + SHORT)
