"""What a hostile side sends is refused in a sentence: numbers without end, words that steer a terminal, files that lie."""

from __future__ import annotations

import base64
import json
import math
import struct
from typing import Any

import pytest

from fedsoda_edge.errors import BlobCorrupt, ProtocolViolation, UsageProblem
from fedsoda_edge.protocol import messages as ms
from fedsoda_edge.protocol.codec import decode
from fedsoda_edge.protocol.coded import check
from fedsoda_edge.protocol.join_link import read_link
from fedsoda_edge.protocol.manifest import (
    MAX_MANIFEST_BYTES,
    BundleManifest,
    EdgeNeeds,
    File,
    Group,
    LayerPlan,
    LoRASpec,
    TensorSpec,
    check_manifest_size,
    encode_manifest,
    parse_manifest,
)
from fedsoda_edge.protocol.session import HubSession
from fedsoda_edge.protocol.template import TextTemplate
from fedsoda_edge.protocol.tokenizer_json import check_tokenizer_json
from fedsoda_edge.units import MOST_SAID, one_line

DIGEST = "0" * 64
START = {
    "type": "update_start",
    "round": 1,
    "base": DIGEST,
    "alignment": 0,
    "digest": DIGEST,
    "bytes": 5,
    "codec": "nf4",
    "num_examples": 3,
    "loss": 0.5,
}
DEVICE = {"ram_bytes": 1, "vram_bytes": 0, "disk_bytes": 1, "threads": 1, "accelerator": ""}
HELLO = {"type": "hello", "protocol": 1, "software": "s", "device_id": "a device", "device": DEVICE}
REF = {"digest": DIGEST, "bytes": 5}
VIEW = {"digest": DIGEST, "delta": None, "snapshot": None}
WELCOME = {
    "type": "welcome",
    "protocol": 1,
    "run_id": "r",
    "run_name": "n",
    "edge": "e",
    "manifest": REF,
    "rounds": 1,
    "rounds_done": 0,
    "template": None,
    "max_length": 8,
    "codec": "nf4",
    "seed": 0,
    "stall_seconds": 60,
}
OFFER = {
    "type": "round_offer",
    "round": 1,
    "rounds": 1,
    "view": VIEW,
    "alignment": 0,
    "emulator": VIEW,
    "local": {},
    "due_seconds": 9.0,
}


def frame(values: dict[str, Any]) -> bytes:
    header = json.dumps(values).encode()
    return len(header).to_bytes(4, "big") + header


@pytest.mark.parametrize("values", [START, HELLO, WELCOME, OFFER], ids=lambda values: str(values["type"]))
def test_the_messages_below_are_right_before_a_value_is_changed(values: dict[str, Any]) -> None:
    assert isinstance(decode(frame(values))[0], ms.Message)


@pytest.mark.parametrize(
    ("values", "change"),
    [
        (START, {"round": 2**63}),
        (START, {"alignment": -(10**400)}),
        (START, {"num_examples": 2**64}),
        (START, {"base": "g" * 64}),
        (START, {"digest": DIGEST + "\n"}),
        (HELLO, {"device_id": ""}),
        (HELLO, {"device_id": "a\x1b[2J"}),
        (HELLO, {"device_id": "a\n"}),
        (HELLO, {"device_id": "a" * 65}),
        (HELLO, {"software": "s" * 201}),
        (HELLO, {"device": DEVICE | {"ram_bytes": -1}}),
        (WELCOME, {"manifest": REF | {"bytes": 0}}),
        (WELCOME, {"manifest": REF | {"bytes": -5}}),
        (WELCOME, {"manifest": REF | {"bytes": 2**41}}),
        (WELCOME, {"batch_size": 0}),
        (WELCOME, {"max_length": 10**300}),
        (WELCOME, {"seed": 2**70}),
        (WELCOME, {"stall_seconds": -1}),
        (OFFER, {"due_seconds": 1e300}),
        (OFFER, {"round": -1}),
        (OFFER, {"local": {"epochs": 2**40}}),
        (OFFER, {"view": VIEW | {"digest": "../../x"}}),
    ],
)
def test_values_that_nobody_can_have_are_refused_where_a_frame_is_read(
    values: dict[str, Any], change: dict[str, Any]
) -> None:
    with pytest.raises(ProtocolViolation):
        decode(frame(values | change))


def test_a_sentence_about_a_frame_stays_one_line() -> None:
    with pytest.raises(ProtocolViolation) as caught:
        decode(frame({"type": "leave\nround 9 closed\x1b[2J\u202e"}))
    assert not {"\n", "\x1b", "\u202e"} & set(str(caught.value))


def ready() -> HubSession:
    hub = HubSession(1 << 20)
    hub.receive(frame(HELLO))
    hub.state = "open"
    hub.receive(frame({"type": "ready", "num_examples": 3}))
    return hub


def test_one_update_is_under_way_at_a_time() -> None:
    hub = ready()
    hub.receive(frame(START))
    with pytest.raises(ProtocolViolation, match="0 of 5 bytes of 000000000000 had come"):
        hub.receive(frame(START | {"digest": "1" * 64}))


def test_an_edge_that_was_never_ready_cannot_resume_into_a_round() -> None:
    hub = HubSession(1 << 20)
    hub.receive(frame(HELLO))
    hub.state = "open"
    with pytest.raises(ProtocolViolation):
        hub.receive(frame({"type": "resumed"}))
    assert isinstance(ready().receive(frame({"type": "resumed"})), ms.Resumed)


def test_words_of_another_side_are_a_part_of_one_line() -> None:
    assert one_line("battery is low") == "battery is low"
    assert one_line("caf\u00e9 \u6f22\u5b57 \U0001f4a3") == "caf\u00e9 \u6f22\u5b57 \U0001f4a3"
    assert one_line("a\nb\tc\x1b[2J\x9b\u202e\u2066\u2028\u200f") == "a\ufffdb\ufffdc\ufffd[2J" + "\ufffd" * 5
    assert len(one_line("a" * 70_000)) == MOST_SAID
    assert one_line("a" * MOST_SAID) == "a" * MOST_SAID


@pytest.mark.parametrize("host", ["h[", "hub]", "hub:\u210084", "\u2100", "hub:99999"])
def test_a_damaged_link_is_refused_in_words(host: str) -> None:
    with pytest.raises(UsageProblem):
        read_link(f"fedsoda://{host}/#k={'A' * 43}&s={'A' * 32}")


def test_a_tensor_without_directions_has_a_scale_of_a_lora_too() -> None:
    layout = (TensorSpec("layers.1.q.lora_A", (4, 20)),)

    def coded(scale: float) -> bytes:
        entry = struct.pack("<f", scale)[2:] + b"\0"
        header = {
            "__metadata__": {"codec": "klt"},
            layout[0].name: {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text + entry

    check(coded(1.0), layout, "klt")
    for scale in (2.0**111, 2.0**120, math.inf, math.nan):
        with pytest.raises(ProtocolViolation):
            check(coded(scale), layout, "klt")


def manifest(**changes: Any) -> bytes:
    config = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "vocab_size": 300,
        "num_hidden_layers": 3,
        "tie_word_embeddings": True,
    }
    names = ("layers.0", "layers.2", "embedding", "norm", "emulator_lora", "adapter_lora")
    files = [File(f"{name}.safetensors", DIGEST, 9) for name in names]
    made = BundleManifest(
        format_version=1,
        family="llama",
        config=config | changes.pop("config", {}),
        dtype="bfloat16",
        source="",
        source_revision="",
        plan=LayerPlan(3, (2,), (0, 2), (Group(0, (1,), 0.1),), ((0, 0),), ()),
        lora=LoRASpec(2, 4.0, ("q_proj",), (), ()),
        adapter_base="nf4",
        quantized_embedding=False,
        files=(*files, File("tokenizer.json", DIGEST, 9)),
        needs=EdgeNeeds(1, 1, 0),
        bits_per_parameter=4.5,
    )
    values = json.loads(encode_manifest(made))
    values["plan"] |= changes.pop("plan", {})
    return json.dumps(values | changes).encode()


def test_a_manifest_whose_plan_no_method_makes_is_refused_before_it_is_used() -> None:
    parse_manifest(manifest())
    with pytest.raises(BlobCorrupt, match="the layer plan"):
        parse_manifest(manifest(plan={"adapter": [1]}))  # a layer that is not kept


@pytest.mark.parametrize("eos", ["abc", [1, "2"], 300, -1, {"a": 1}, True])
def test_a_manifest_whose_texts_end_with_no_id_is_refused(eos: object) -> None:
    parse_manifest(manifest(config={"eos_token_id": [1, 299]}))
    with pytest.raises(BlobCorrupt, match="an end of texts other than ids"):
        parse_manifest(manifest(config={"eos_token_id": eos}))


def test_a_sentence_about_a_manifest_stays_one_line() -> None:
    for text in (
        manifest(format_version="\nround 9\x1b"),
        b'{"format_version":1,"\\n\\u001b[2J":2}',
        manifest(family=[]),
    ):
        with pytest.raises(BlobCorrupt) as caught:
            parse_manifest(text)
        assert not {"\n", "\x1b"} & set(str(caught.value))


def test_a_manifest_of_any_size_is_not_fetched() -> None:
    check_manifest_size(MAX_MANIFEST_BYTES)
    with pytest.raises(BlobCorrupt):
        check_manifest_size(MAX_MANIFEST_BYTES + 1)


def tokenizer(normalizer: object) -> str:
    return json.dumps({"normalizer": normalizer, "model": {"vocab": {"Replace": 1, "a": 2}}})


def replaced(found: str, content: str) -> dict[str, object]:
    return {"type": "Replace", "pattern": {"String": found}, "content": content}


def test_a_tokenizer_that_would_end_its_process_is_refused_before_the_library_reads_it() -> None:
    sound = [replaced(" ", "\u2581"), {"type": "Prepend", "prepend": "\u2581"}, *[replaced("\u00df", "ss")] * 40]
    check_tokenizer_json(tokenizer({"type": "Sequence", "normalizers": sound}))
    check_tokenizer_json("no JSON, and Replace in it")
    for grown in (replaced("a", "a" * 10_001), {"type": "Sequence", "normalizers": [replaced("a", "a" * 30)] * 3}):
        with pytest.raises(UsageProblem, match="times as long"):
            check_tokenizer_json(tokenizer(grown))
    for table, is_whole in ((struct.pack("<I", 4) + b"\0" * 4 + b"rest", True), (b"\xff" * 64, False)):
        charsmap = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(table).decode()}
        if is_whole:
            check_tokenizer_json(tokenizer(charsmap))
        else:
            with pytest.raises(UsageProblem, match="a table of 4294967295 bytes where 60 are"):
                check_tokenizer_json(tokenizer(charsmap))


@pytest.mark.parametrize("text", ["{a\n\x1b[2J.b}", "{" + "a " * 5000 + "}", "a" * 5000 + "{"])
def test_a_sentence_about_a_template_of_the_hub_is_one_short_line(text: str) -> None:
    with pytest.raises(UsageProblem) as caught:
        TextTemplate(text)
    assert not {"\n", "\x1b"} & set(str(caught.value))
    assert len(str(caught.value)) < 800
