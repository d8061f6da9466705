"""Forge coded updates and manifests for `bench_trust_frames`, and judge them by readers of their own.

Coded updates are read here as docs/protocol.md (p5-codecs) writes them, bit by bit; `protocol/coded.check` must say the same.
A manifest must be refused in a sentence, or be of use to all that an agent does with it before a worker sees it.
"""

from __future__ import annotations

import json
import math
import random
import struct
from pathlib import Path
from typing import Any

from trust_frames_mutate import Forger, Tokens, text_of, tokens

from fedsoda_edge.device.fit import Limits, fit
from fedsoda_edge.errors import FedSODAError, ProtocolViolation
from fedsoda_edge.join.download import in_order
from fedsoda_edge.protocol.coded import check
from fedsoda_edge.protocol.join_link import read_link
from fedsoda_edge.protocol.manifest import TensorSpec, encode_manifest, parse_manifest
from fedsoda_edge.protocol.messages import DeviceFacts
from fedsoda_edge.protocol.needs import SampleSizes, shape_of
from fedsoda_edge.protocol.template import TextTemplate

LAYOUT = (TensorSpec("layers.1.q.lora_A", (4, 20)), TensorSpec("layers.1.q.lora_B", (30, 3)))
CODECS = ("bf16", "int8", "nf4", "klt", "klt-fine")
TOO_LARGE = 2.0**111


# --- the document's reader of updates ----------------------------------------------------------------------------------


def is_update(data: bytes, codec: str) -> bool | None:
    """Tell whether these bytes are an update of LAYOUT; None: the document leaves it open."""
    sizes = []
    if codec.startswith("klt"):
        bits = {"klt": 0.35, "klt-fine": 0.87}[codec]
        values = sum(math.prod(spec.shape) for spec in LAYOUT)
        most = (
            64
            + sum(len(json.dumps(spec.name)) + 96 + min(spec.shape) for spec in LAYOUT)
            + math.ceil(bits / 8 * values)
        )
        if len(data) > most:
            return False
        # Sizes stand in the header alone; the header is canonical, so they are read from it and it is written again.
        length = int.from_bytes(data[:8], "little")
        try:
            header = json.loads(data[8 : 8 + length])
            sizes = [header[spec.name]["shape"][0] for spec in LAYOUT]
            if not all(type(size) is int and size >= 0 for size in sizes):
                return False
        except (ValueError, KeyError, TypeError, IndexError, RecursionError):
            return False
    else:
        for spec in LAYOUT:
            count = math.prod(spec.shape)
            scales = 2 * math.ceil(count / 64)
            sizes.append({"bf16": 2 * count, "int8": count + scales, "nf4": math.ceil(count / 2) + scales}[codec])
    text = header_of(sizes, codec)
    length = int.from_bytes(data[:8], "little")
    written = data[8 : 8 + length]
    if len(data) < 8 or len(written) != length or written.rstrip(b" ") != text or length > 1 << 20:
        return False
    body = data[8 + length :]
    if len(body) != sum(sizes):
        return False
    at = 0
    for spec, size in zip(LAYOUT, sizes, strict=True):
        entry = body[at : at + size]
        at += size
        if codec.startswith("klt"):
            found = _is_entry(entry, min(spec.shape), max(spec.shape))
            if found is not True:
                return found
        else:
            count = math.prod(spec.shape)
            numbers = entry if codec == "bf16" else entry[-2 * math.ceil(count / 64) :]
            for (value,) in struct.iter_unpack("<H", numbers):
                [number] = struct.unpack("<f", struct.pack("<HH", 0, value))
                if not abs(number) < TOO_LARGE:
                    return False
    return True


def header_of(sizes: list[int], codec: str) -> bytes:
    """Write the one header."""
    header: dict[str, Any] = {"__metadata__": {"codec": codec}}
    end = 0
    for spec, size in zip(LAYOUT, sizes, strict=True):
        header[spec.name] = {"dtype": "U8", "shape": [size], "data_offsets": [end, end + size]}
        end += size
    return json.dumps(header, separators=(",", ":")).encode()


def _is_entry(entry: bytes, rank: int, width: int) -> bool | None:
    at = 2
    is_plain = True

    def varint() -> int:
        nonlocal at, is_plain
        value = shift = 0
        while True:
            if at >= len(entry):
                raise EOFError
            byte = entry[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                is_plain = is_plain and (shift == 7 or byte > 0)  # a number in more bytes than it needs is left open
                return value
            if shift > 28:
                raise OverflowError

    try:
        if len(entry) < 3:
            return False
        [scale] = struct.unpack("<f", b"\0\0" + entry[:2])
        directions = varint()
        if directions > rank or at + directions * rank > len(entry):
            return False
        at += directions * rank
        subsets: list[list[tuple[int, int]]] = []
        for _ in range(directions):
            mine: list[tuple[int, int]] = []
            left = width
            while len(mine) < 127 and (size := varint()):
                if size > left:
                    return False
                mine.append((size, left))
                left = size
            if not mine:
                return False
            subsets.append(mine)
    except (EOFError, OverflowError):
        return False
    if not abs(scale) < TOO_LARGE:
        return False
    bits = "".join(f"{byte:08b}" for byte in entry[at:])
    signs = sum(mine[0][0] for mine in subsets)
    plan = []  # (gaps, low bits, of)
    for mine in subsets:
        for size, of in mine:
            count = min(size, of - size)
            low = ((77 * (2 * of - count)) // (320 * count)).bit_length() if count else 0
            plan.append((count, low, of))
    low_at, place = signs, signs + sum(count * low for count, low, _ in plan)
    if place > len(bits):
        return False
    for count, low, of in plan:
        position = -1
        for gap in range(count):
            high = 0
            while True:
                if place >= len(bits):
                    return False
                place += 1
                if bits[place - 1] == "1":
                    break
                high += 1
            value = high << low
            for plane in range(low):
                value += int(bits[low_at + plane * count + gap]) << plane
            position += value + 1
            if position >= of:
                return False
        low_at += count * low
    if len(bits) - place >= 8 or "1" in bits[place:]:
        return False
    return True if is_plain and abs(scale) < 2.0**80 else None


# --- writing valid ones --------------------------------------------------------------------------------------------------


def entry_of(chance: random.Random, rank: int, width: int) -> bytes:
    """Write a random entry of klt as the document says."""
    made, counts, signs, low_bits, gaps = chance.randrange(min(rank, 2) + 1), b"", "", "", ""
    for _ in range(made):
        codes = [chance.choice((0, 0, 0, 0, 0, 1, -1, 2)) for _ in range(width)]
        codes[chance.randrange(width)] = 1
        signs += "".join("1" if code < 0 else "0" for code in codes if code)
        members = codes
        for least in range(1, max(map(abs, codes)) + 1):
            within = [abs(code) >= least for code in members]
            size, of = sum(within), len(within)
            counts += bytes([size])
            count = min(size, of - size)
            low = ((77 * (2 * of - count)) // (320 * count)).bit_length() if count else 0
            at, skips = -1, []
            for place, is_in in enumerate(within):
                if is_in != (2 * size > of):
                    skips.append(place - at - 1)
                    at = place
            low_bits += "".join(str(skip >> plane & 1) for plane in range(low) for skip in skips)
            gaps += "".join("0" * (skip >> low) + "1" for skip in skips)
            members = [code for code, is_in in zip(members, within, strict=True) if is_in]
        counts += b"\0"
    text = signs + low_bits + gaps
    text += "0" * (-len(text) % 8)
    bits = bytes(int(text[at : at + 8], 2) for at in range(0, len(text), 8))
    return struct.pack("<f", 0.01)[2:] + bytes([made]) + chance.randbytes(made * rank) + counts + bits


def update_of(chance: random.Random, codec: str) -> bytes:
    """Write a random update of LAYOUT."""
    entries = []
    for spec in LAYOUT:
        count = math.prod(spec.shape)
        number = struct.pack("<f", chance.choice((0.0, -0.5, 1e-3, 3e30)))[2:]
        if codec.startswith("klt"):
            entries.append(entry_of(chance, min(spec.shape), max(spec.shape)))
        elif codec == "bf16":
            entries.append(number * count)
        else:
            codes = chance.randbytes(count if codec == "int8" else math.ceil(count / 2))
            entries.append(codes + number * math.ceil(count / 64))
    text = header_of([len(entry) for entry in entries], codec)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(entries)


MANIFEST: dict[str, Any] = {
    "format_version": 1,
    "family": "llama",
    "config": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "vocab_size": 300,
        "max_position_embeddings": 64,
        "eos_token_id": [1, 2],
        "tie_word_embeddings": True,
    },
    "dtype": "bfloat16",
    "source": "a/model",
    "source_revision": "abc",
    "plan": {
        "num_layers": 3,
        "adapter": [2],
        "kept": [0, 2],
        "groups": [{"start": 0, "removed": [1], "distance": 0.1}],
        "mapping": [[0, 0]],
        "distances": [[0.1]],
    },
    "lora": {
        "rank": 2,
        "alpha": 4.0,
        "targets": ["q_proj"],
        "adapter": [{"name": "layers.2.self_attn.q_proj.lora_A", "shape": [2, 64]}],
        "emulator": [{"name": "layers.0.self_attn.q_proj.lora_A", "shape": [2, 64]}],
    },
    "adapter_base": "nf4",
    "emulator_base": "nf4",
    "quantized_embedding": False,
    "files": [
        {"name": name, "sha256": f"{number:064x}", "bytes": 1000 + number}
        for number, name in enumerate(
            (
                *(
                    f"{role}.safetensors"
                    for role in ("layers.0", "layers.2", "embedding", "norm", "emulator_lora", "adapter_lora")
                ),
                *("tokenizer.json", "tokenizer_config.json"),
            )
        )
    ],
    "needs": {"disk_bytes": 1, "ram_bytes": 1, "vram_bytes": 0},
    "bits_per_parameter": 4.5,
}
FACTS = DeviceFacts(ram_bytes=1 << 40, vram_bytes=0, disk_bytes=1 << 40, threads=2, accelerator="")
NAMES = (
    *(
        "../../x",
        "/etc/passwd",
        "a\\b",
        "CON",
        "nul.safetensors",
        "COM1",
        "NORM.safetensors",
        "norm.safetensors ",
        "norm.safetensors.",
    ),
    *(
        "norm.safetensors\0",
        "layers.0.safetensors/..",
        "e\u0301.json",
        "tokenizer.json\n",
        "\u202enosj.rekot",
        "tokenizer_config.json::$DATA",
    ),
)


class PayloadBench:
    """Forged updates, manifests, templates and links. wrong: sentences. tried: how many were."""

    def __init__(self, seed: int, most_wrong: int = 20) -> None:
        self.tried = self.num_right = 0
        self.wrong: list[str] = []
        self.found: list[dict[str, Any]] = []
        self._most_wrong = most_wrong
        self._chance = random.Random(seed)
        self._forger = Forger(self._chance)

    def _judged(self, problem: str, what: object) -> None:
        self.tried += 1
        self.num_right += not problem
        if problem and len(self.wrong) < self._most_wrong:
            self.wrong.append(f"{problem}: {what!r:.200}")
            self.found.append({"payload": what.hex() if isinstance(what, bytes) else str(what), "problem": problem})

    def update(self) -> None:
        """Forge a coded update."""
        chance, codec = self._chance, self._chance.choice(CODECS)
        data = bytearray(update_of(chance, codec))
        begin = 8 + int.from_bytes(data[:8], "little")
        for _ in range(chance.choice((0, 1, 1, 1, 2, 3))):
            at = chance.randrange(begin if chance.random() < 0.3 else 0, len(data)) if len(data) > begin else 0
            match chance.randrange(6):
                case 0:
                    data[at] = chance.choice((0, 0x7F, 0x80, 0xFF, 0x22, 0x20))
                case 1:
                    del data[at : at + chance.choice((1, 1, 8))]
                case 2:
                    data[at:at] = chance.choice((b"\0", b"\x80", b" ", b"[" * 1200, b"\xff"))
                case 3:
                    data = bytearray(bytes(data).replace(b"U8", chance.choice((b"F8", b"U8 ", b"BF16"))))
                case _:
                    data[at] ^= 1 << chance.randrange(8)
        forged = bytes(data)
        wanted = is_update(forged, codec)
        try:
            check(forged, LAYOUT, codec)
            found, said = True, ""
        except ProtocolViolation as error:
            found, said = False, str(error)
        except Exception as error:
            self._judged(f"the check of an update raised {error!r:.120}", forged)
            return
        problem = (
            ""
            if wanted in (None, found)
            else f"a {codec} update is {'taken' if found else 'refused'}, it is {'none' if found else 'one'}"
        )
        self._judged(problem or ("" if len(said) < 700 else "an endless sentence"), forged)

    def manifest(self) -> None:
        """Forge a manifest, and use it as an agent does."""
        chance = self._chance
        made: Any = json.loads(json.dumps(MANIFEST))
        if chance.random() < 0.15:
            chance.choice(made["files"])["name"] = chance.choice(NAMES)
        flat = tokens(made)
        for name in ("plan", "lora", "files"):
            if chance.random() < 0.5:
                flat[name] = _listed(made[name])
        for _ in range(chance.choice((1, 1, 2))):
            _forge(self._forger, flat)
        text = text_of(flat).encode("utf-8", "surrogatepass")
        try:
            manifest = parse_manifest(text)
        except FedSODAError as error:
            self._judged(_unreadable(str(error)), text)
            return
        except Exception as error:
            self._judged(f"reading a manifest raised {error!r:.120}", text)
            return
        try:
            in_order(manifest)
            shape = shape_of(manifest)
            encode_manifest(manifest)
            int(manifest.config["vocab_size"])
            sum(file.bytes for file in manifest.files)
            fit("cpu", shape, SampleSizes(8, 64, 64, 100), FACTS, Limits())
        except FedSODAError:
            pass
        except Exception as error:
            self._judged(f"the use of a manifest raised {error!r:.120}", text)
            return
        self._judged("" if _is_plain(manifest.files) else "a file name that no bundle has was taken", text)

    def text(self) -> None:
        """Forge a template or a join link."""
        chance = self._chance
        if chance.random() < 0.5:
            parts = (
                "{a}",
                "{",
                "}",
                "{{",
                "}}",
                "{a.b}",
                "{a[0]}",
                "{0}",
                "{a!r}",
                "{a:>99999999}",
                "{}",
                "x" * 50,
                "{\u202e}",
                "{a\n\x1b[2J}",
                "{" + "a " * 3000 + "}",
                "{a\0}",
            )
            text = "".join(chance.choice(parts) for _ in range(chance.randint(1, 6)))
        else:
            key, secret = "A" * 43, "A" * 32
            text = f"fedsoda://hub:8470/p/#k={key}&s={secret}&t={key}&a=b.c:1"
            at = chance.randrange(len(text))
            text = (
                text[:at]
                + chance.choice(("", "#", "&", "%", "[", "]", "\0", "\n", "\u2100", "@", "//", "&k=", "A" * 3000, "::"))
                + text[at + chance.randrange(3) :]
            )
        try:
            if text.startswith("fedsoda:"):
                link = read_link(text)
                if "@" in link.urls[0] or " " in link.urls[0]:
                    self._judged("a link with a strange address was taken", text)
                    return
            else:
                TextTemplate(text).render({"a": "1"})
        except FedSODAError as error:
            self._judged(_unreadable(str(error)), text)
            return
        except KeyError:
            pass
        except Exception as error:
            self._judged(f"a template or a link raised {error!r:.120}", text)
            return
        self._judged("", text)


def _listed(value: Any) -> Any:
    """Take lists apart too, so that what is within them is forged: as tokens, a list is an object in brackets."""
    return tokens(value) if isinstance(value, dict) else json.dumps(value)


def _forge(forger: Forger, made: Tokens) -> None:
    forger.field(made)
    chance = forger.chance
    if chance.random() < 0.3:
        name = chance.choice([name for name, value in made.items() if isinstance(value, str)] or [""])
        value = made.get(name)
        if isinstance(value, str) and any(one.isdigit() for one in value):
            digits = [at for at, one in enumerate(value) if one.isdigit()]
            at = chance.choice(digits)
            made[name] = (
                value[:at]
                + chance.choice(("0", "-1", "9" * 30, "1e300", "null", "true", "2.5", "[]", "1" * 4400))
                + value[at + 1 :]
            )


def _unreadable(sentence: str) -> str:
    """Say what is wrong with a sentence for people; "": nothing."""
    is_odd = any(one in sentence for one in "\x1b\n\r\u202e") or len(sentence) > 2000
    return "a sentence that steers a terminal, or is endless" if is_odd else ""


def _is_plain(files: Any) -> bool:
    return all(Path(file.name).name == file.name and file.name.isascii() and file.name.isprintable() for file in files)


def run(seed: int, tries: int) -> dict[str, Any]:
    """Forge so many payloads."""
    bench = PayloadBench(seed)
    while bench.tried < tries:
        kind = bench._chance.random()
        (bench.update if kind < 0.6 else bench.manifest if kind < 0.85 else bench.text)()
    return {"tried": bench.tried, "right": bench.num_right, "wrong": bench.wrong, "found": bench.found[:20]}
