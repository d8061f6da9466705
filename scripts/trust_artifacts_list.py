"""List all hostile files of `bench_trust_artifacts`, from a bundle and a checkpoint that are in order."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from trust_artifacts_make import NAMES, TEMPLATES, Artifact, _archive, lies_of_safetensors, safetensors, tokenizers

SIZES: tuple[object, ...] = (0, -1, 2**40, "64", None, [], 1.5)
LARGE = 1 << 20  # bytes above which a file is left out of the quick list


def artifacts(base: Path, *, is_quick: bool) -> Iterator[Artifact]:
    """Yield all of them; the quick list has every kind, and of the many only some."""
    for number, one in enumerate((*of_agent(_manifest(base)), *_of_worker(base), *_of_hub(base))):
        is_many = one.kind in ("shard", "checkpoint", "snapshot", "delta", "bundle_manifest", "template") and number % 8
        if not is_quick or not (len(one.data) > LARGE or is_many or one.with_.get("size", 0) > LARGE):
            yield one


def _manifest(base: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((base / "bundle" / "manifest.json").read_bytes())
    return found


def _changed(whole: dict[str, Any], value: object, *place: str | int) -> bytes:
    made = json.loads(json.dumps(whole))
    inner = made
    for step in place[:-1]:
        inner = inner[step]
    inner[place[-1]] = value
    return json.dumps(made).encode("utf-8", "surrogatepass")


def _lies_of_manifests(good: dict[str, Any]) -> Iterator[tuple[str, bytes, bool]]:
    yield "empty", b"", False
    yield "a list", b"[]", False
    yield "deep", b"[" * 100000, False
    yield "deep config", _changed(good, json.loads("[" * 400 + "]" * 400), "config", "rope_scaling"), True
    yield "not Unicode", b"\xff\xfe", False
    yield "17 MB", json.dumps(good).encode() + b" " * (17 << 20), False
    yield "a key twice", json.dumps(good)[:-1].encode() + b',"format_version":99}', False
    for value in (0, -1, 2**31, 2**63, 10**40, 1.5, "64", None, [64], True):
        yield f"hidden_size {value!r:.12}", _changed(good, value, "config", "hidden_size"), False
    for value in (0, -3, 5000, 2**40):
        yield f"{value} layers", _changed(good, value, "plan", "num_layers"), False
    yield "an adapter that is not kept", _changed(good, [1], "plan", "adapter"), False
    yield "an adapter twice", _changed(good, [3, 3], "plan", "adapter"), False
    yield "a mapping to nowhere", _changed(good, [[9, 9]], "plan", "mapping"), False
    yield "a rank of 0", _changed(good, 0, "lora", "rank"), False
    yield "a rank of 2^40", _changed(good, 2**40, "lora", "rank"), False
    yield "an endless alpha", _changed(good, 1e308, "lora", "alpha"), True
    yield "no alpha", _changed(good, None, "lora", "alpha"), False
    yield "a negative file", _changed(good, -1, "files", 0, "bytes"), False
    yield "a file of 2^60", _changed(good, 2**60, "files", 0, "bytes"), False
    yield "a digest of words", _changed(good, "../../../x", "files", 0, "sha256"), False
    yield "an end that is no id", _changed(good, "abc", "config", "eos_token_id"), False
    yield "an end above all ids", _changed(good, 2**20, "config", "eos_token_id"), False
    yield "needs below 0", _changed(good, -5, "needs", "ram_bytes"), False
    yield "an unknown base", _changed(good, "pickle", "adapter_base"), False
    yield "words that steer a terminal", _changed(good, "\x1b]0;x\x07\n\u202e", "format_version"), False
    for name in NAMES:
        yield f"the file {name!r:.20}", _changed(good, name, "files", 0, "name"), False


def of_agent(manifest: dict[str, Any]) -> Iterator[Artifact]:
    """Yield what an agent reads: lies about this manifest, names, downloads, rows, coded updates."""
    for name, data, harmless in _lies_of_manifests(manifest):
        yield Artifact("agent", "manifest", name, data, harmless=harmless)
    for name in NAMES:
        is_plain = name in (
            "CON",
            "con",
            "NUL",
            "-",
            "--help",
        )  # a directory below runs/ on the systems that are supported
        yield Artifact("agent", "file_name", f"{name!r:.20}", with_={"name": name})
        yield Artifact(
            "agent",
            "run_id",
            f"{name!r:.20}",
            with_={"name": name},
            harmless=is_plain or (name.isalnum() and name.isascii() and len(name) <= 64),
        )
        yield Artifact("agent", "token_name", f"{name!r:.20}", with_={"name": name}, harmless=True)
    for size, sent, times in (
        (10, "x" * 1000, 10**6),
        (10, "x", 3),
        (1000, "", 50),
        (10, "wrongwrong", 1),
        (1, "xx", 1),
    ):
        yield Artifact(
            "agent",
            "download",
            f"{size} bytes announced, {times} x {len(sent)} sent",
            b"the file",
            {"size": size, "sent": sent, "times": times},
        )
    for size in ((16 << 20) + 1, 1 << 50):
        yield Artifact("agent", "manifest_size", f"{size} bytes", with_={"size": size})
        yield Artifact(
            "agent",
            "view_size",
            f"{size} bytes",
            with_={"size": min(size, 1 << 40), "manifest": json.dumps(manifest)},
        )
    yield from _bombs()
    yield from _coded()


def _bombs() -> Iterator[Artifact]:
    zeros = b"\0" * (1 << 20)
    line = b'{"a": "' + b"x" * (1 << 20)
    packed: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.compress, "bzip2": bz2.compress, "xz": lzma.compress}
    for name, pack in packed.items():
        yield Artifact("agent", "rows", f"2 GB of zeros, {name}", pack(zeros), {"times": 2000})
        yield Artifact(
            "agent", "rows", f"a line of 2 GB, {name}", pack(line) + pack(b"x" * (1 << 20)) * 1, {"times": 1000}
        )
        yield Artifact(
            "agent",
            "rows",
            f"a table of 1 GB, {name}",
            pack(b"a,b\n1," + b"x" * (1 << 20)) + pack(b"x" * (1 << 20)),
            {"times": 500},
        )
        yield Artifact("agent", "rows", f"cut, {name}", pack(line)[:-5])
        yield Artifact("agent", "rows", f"damaged, {name}", pack(line)[:20] + b"\xff" * 50)
    # zstd: blocks of one byte repeated 128 KiB, in 4 bytes each (RFC 8878, 3.1.1.2)
    block = struct.pack("<I", (1 << 17) << 3 | 1 << 1)[:3] + b"x"
    frame = b"\x28\xb5\x2f\xfd\x00\x58" + block * 16000
    yield Artifact("agent", "rows", "2 GB of one letter, zstd", frame + block[:2])
    yield Artifact("agent", "rows", "a window of 2 GB, zstd", b"\x28\xb5\x2f\xfd\x00\xa8" + block * 4)
    yield Artifact("agent", "rows", "packed again and again", gzip.compress(gzip.compress(gzip.compress(zeros * 8))))
    yield Artifact("agent", "rows", "deep JSON", b'{"a":' + b"[" * 200000)
    yield Artifact("agent", "rows", "a number of 10^6 digits", b'{"a": ' + b"9" * 10**6 + b', "b": 1}\n')
    yield Artifact("agent", "rows", "a key of 10 MB", b'{"' + b"k" * (10 << 20) + b'": 1}\n')
    yield Artifact("agent", "rows", "half of a letter", b'{"a": "\\ud800", "b": "x"}\n', harmless=True)
    yield Artifact("agent", "rows", "a pickle", b"\x80\x04\x95\x1a\0\0\0\0\0\0\0\x8c\x05posix\x94.")
    yield Artifact("agent", "rows", "an archive with a path out", _archive({"../../x": b"x"}))
    for name in ("../../../etc/passwd", "/etc/passwd", "a\\..\\b"):
        yield Artifact(
            "worker", "dataset", f"the file {name}", json.dumps({"_data_files": [{"filename": name}]}).encode()
        )
    yield Artifact(
        "worker",
        "rows",
        "a workbook that explodes",
        _archive({"xl/workbook.xml": b" " * (50 << 20), "[Content_Types].xml": b"<x/>"}),
    )
    yield Artifact(
        "worker",
        "rows",
        "a workbook of entities",
        _archive({"xl/workbook.xml": b'<!DOCTYPE x [<!ENTITY a "a"><!ENTITY b "&a;&a;&a;">]><workbook>&b;</workbook>'}),
    )
    yield Artifact(
        "worker",
        "rows",
        "Parquet with a foot of 2 GB",
        b"PAR1" + b"\xff" * 100 + struct.pack("<I", 2**31 - 1) + b"PAR1",
    )
    yield Artifact(
        "worker", "rows", "Arrow that lies", b"ARROW1\0\0" + b"\xff" * 200 + struct.pack("<i", 2**31 - 1) + b"ARROW1"
    )
    yield Artifact(
        "worker",
        "rows",
        "a stream of Arrow that lies",
        b"\xff\xff\xff\xff" + struct.pack("<i", 2**31 - 1) + b"\xff" * 100,
    )


def _coded() -> Iterator[Artifact]:
    spec = "layers.1.q.lora_A"
    for codec in ("nf4", "int8", "bf16", "klt", "klt-fine"):
        for name, size, data in (
            ("empty", 0, b""),
            ("another size", 7, b"1234567"),
            ("not finite", {"nf4": 34, "int8": 66, "bf16": 128}.get(codec, 3), b"\xff" * 128),
            ("endless counts", 400, b"\0\0\4" + b"\xff" * 397),
            ("endless bits", 300, b"\0\0\1" + bytes(4) + b"\1\0" + bytes(291)),
        ):
            body = data[:size]
            header = {
                "__metadata__": {"codec": codec},
                spec: {"dtype": "U8", "shape": [size], "data_offsets": [0, size]},
            }
            text = json.dumps(header, separators=(",", ":")).encode()
            yield Artifact(
                "agent",
                "coded",
                f"{codec}, {name}",
                safetensors(text + b" " * (-len(text) % 8), body),
                {"codec": codec},
            )
        deep = b'{"__metadata__":' + b'{"a":' * 990 + b"1" + b"}" * 990 + b"}"
        yield Artifact("agent", "coded", f"{codec}, deep metadata", safetensors(deep), {"codec": codec})


def _of_worker(base: Path) -> Iterator[Artifact]:
    good = _manifest(base)
    for name, data, harmless in _lies_of_manifests(good):
        if len(data) < 1 << 20:
            yield Artifact("worker", "bundle_manifest", name, data, harmless=harmless)
    for name, value in (
        ("max_position_embeddings", None),
        ("max_position_embeddings", -1),
        ("hidden_act", "os.system"),
        ("rms_norm_eps", "x"),
    ):
        yield Artifact("worker", "bundle_manifest", f"{name} {value}", _changed(good, value, "config", name))
    yield Artifact(
        "worker",
        "bundle_manifest",
        "a class of its own",
        _changed(good, {"AutoConfig": "x.Y"}, "config", "auto_map"),
        harmless=True,
    )
    yield Artifact("worker", "bundle_manifest", "a family that is code", _changed(good, "os.system", "family"))
    yield Artifact("worker", "bundle_manifest", "a dtype that is code", _changed(good, "float32; import os", "dtype"))
    for role in ("layers.0", "embedding", "adapter_lora", "norm"):
        for name, data, harmless in lies_of_safetensors((base / "bundle" / f"{role}.safetensors").read_bytes()):
            if len(data) < 1 << 25 or role == "layers.0":
                yield Artifact(
                    "worker",
                    "shard",
                    f"{role}, {name}",
                    data,
                    {"role": role},
                    harmless or (role == "layers.0" and ("dtype" in name or "dimensions" in name)),
                )
    adapter = (base / "bundle" / "adapter_lora.safetensors").read_bytes()
    for name, data, harmless in lies_of_safetensors(adapter):
        if len(data) < 1 << 25:
            yield Artifact(
                "worker",
                "snapshot",
                name,
                data,
                harmless=harmless and name not in ("other dtype of its size", "more tensors"),
            )
            yield Artifact("worker", "delta", name, data, {"codec": "nf4"})
    for name, data, harmless in tokenizers():
        yield Artifact("agent", "tokenizer", name, data, harmless=harmless)
    for source in TEMPLATES:
        yield Artifact("worker", "template", f"{source[:60]!r}", source.encode("utf-8", "surrogatepass"), harmless=True)


def _of_hub(base: Path) -> Iterator[Artifact]:
    weights = (base / "model" / "model.safetensors").read_bytes()
    for name, data, harmless in lies_of_safetensors(weights):
        may = harmless or name in ("metadata of no text",)
        yield Artifact("hub", "checkpoint", f"weights, {name}", data, {"file": "model.safetensors"}, may)
    for name, data, _ in tokenizers():
        yield Artifact("hub", "checkpoint", f"tokenizer, {name}", data, {"file": "tokenizer.json"}, harmless=True)
    config: dict[str, Any] = json.loads((base / "model" / "config.json").read_bytes())
    for name, value in (
        *(("hidden_size", value) for value in SIZES),
        *(("num_hidden_layers", value) for value in (0, -1, 2**31, "2")),
        *(("model_type", value) for value in ("../x", "os.system", 5, None, "\x1b[2J\n")),
        ("auto_map", {"AutoModelForCausalLM": "evil.Model"}),
        ("rope_scaling", {"rope_type": "evil", "factor": 1e300}),
        ("hidden_act", "__import__('os')"),
        ("transformers_weights", "../../../etc/passwd"),
        ("transformers_weights", "/etc/passwd"),
    ):
        harmless = name in ("auto_map", "num_hidden_layers")
        yield Artifact(
            "hub",
            "checkpoint",
            f"config, {name} {value!r:.20}",
            _changed(config, value, name),
            {"file": "config.json"},
            harmless,
        )
    for name in ("../../../etc/passwd", "/etc/passwd", "a\\b", "CON", "x\0y", ".", "model.bin"):
        index = json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": name}}).encode()
        case = {"file": "model.safetensors.index.json", "without": ["model.safetensors"]}
        yield Artifact("hub", "checkpoint", f"index, {name!r}", index, case)
    head = b"GGUF" + struct.pack("<I", 3)
    for name, data in (
        ("empty", b""),
        ("a head alone", head),
        ("2^60 tensors", head + struct.pack("<QQ", 2**60, 0)),
        ("2^60 keys", head + struct.pack("<QQ", 0, 2**60)),
        ("a key of 2^60 letters", head + struct.pack("<QQ", 0, 1) + struct.pack("<Q", 2**60)),
        (
            "a list of 2^60 lists",
            head + struct.pack("<QQ", 0, 1) + struct.pack("<Q", 1) + b"a" + struct.pack("<IIQ", 9, 9, 2**60),
        ),
        ("an unknown kind", head + struct.pack("<QQ", 0, 1) + struct.pack("<Q", 1) + b"a" + struct.pack("<I", 99)),
        (
            "deep lists",
            head
            + struct.pack("<QQ", 0, 1)
            + struct.pack("<Q", 1)
            + b"a"
            + struct.pack("<I", 9)
            + struct.pack("<IQ", 9, 1) * 5000,
        ),
    ):
        yield Artifact("hub", "gguf", name, data)
