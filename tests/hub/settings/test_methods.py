"""The table of methods: its keys are keys of RUN.toml, and its values are values of them."""

from __future__ import annotations

from typing import get_args

import msgspec

from fedsoda_hub.settings.keys import keys_of
from fedsoda_hub.settings.methods import METHODS, UNREAD, default_in_words, keys_of_method, readers_of
from fedsoda_hub.settings.tables import Method, MethodName, Tables

KEYS = keys_of(Tables)


def test_every_method_has_a_line_and_every_value_is_one_of_its_key() -> None:
    assert tuple(METHODS) == get_args(MethodName)
    values = [*UNREAD.items(), *(one for method in METHODS.values() for one in method.defaults.items())]
    assert [key for key, value in values if msgspec.convert(value, KEYS[key].type, strict=True) != value] == []


def test_a_key_that_some_method_does_not_read_is_read_by_another_but_not_by_all() -> None:
    for key in UNREAD:
        assert 0 < len(readers_of(key)) < len(METHODS), key
    assert {key for method in METHODS.values() for key in method.reads} == {*UNREAD}
    assert readers_of("[lora] rank") == list(METHODS)


def test_fedsoda_with_a_full_emulator_reads_what_exact_does() -> None:
    assert keys_of_method(Method(emulator="full")) is keys_of_method(Method(name="exact")) is METHODS["exact"]
    assert keys_of_method(Method()) is METHODS["fedsoda"]


def test_defaults_are_said_with_the_methods_that_have_them() -> None:
    assert {key: default_in_words(KEYS[key]) for key in SAID} == SAID


SAID = {
    "[lora] rank": "8",
    "[lora] targets": "q_proj,k_proj,v_proj,up_proj,down_proj",
    "[method] layers_per_group": "fedsoda: 3",
    "[method] realign_every": "fedsoda: 0; fedbiot: 1",
    "[method] drop_layers": "fedbiot, fedot, fedpruner, fedpruner+: 12",
    "[method] adapter_base": "nf4; fedbiot, fedot, fedpetuning, fedpruner, fedpruner+: bf16",
    "[align] kl_weight": "1.0; fedot: 0.0",
    "[method] quantize_embedding": "false",
}
