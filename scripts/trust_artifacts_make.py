"""Make hostile files for `bench_trust_artifacts`: each is bytes, what reads it, and whether it may be taken without harm."""

from __future__ import annotations

import base64
import io
import json
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

GIB = 1 << 30


@dataclass(frozen=True)
class Artifact:
    """A hostile file. room: "agent", "worker" or "hub". kind: what reads it (`trust_artifacts_child`).

    harmless: whether it may also be taken, since it does no harm then. data: with it further arguments.
    """

    room: str
    kind: str
    name: str
    data: bytes = b""
    with_: dict[str, Any] = field(default_factory=dict)
    harmless: bool = False


def safetensors(header: object, body: bytes = b"", *, length: int | None = None) -> bytes:
    """Write a file of safetensors, whatever its header says."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def lies_of_safetensors(good: bytes) -> Iterator[tuple[str, bytes, bool]]:
    """Yield (name, bytes, harmless) of lies about a whole file."""
    size = int.from_bytes(good[:8], "little")
    header: dict[str, Any] = json.loads(good[8 : 8 + size])
    body = good[8 + size :]
    metadata = {"__metadata__": header.pop("__metadata__")} if "__metadata__" in header else {}
    names = sorted(header, key=lambda name: header[name]["data_offsets"])
    first, last = names[0], names[-1]

    def changed(name: str = first, **entry: Any) -> bytes:
        return safetensors(metadata | header | {name: header[name] | entry}, body)

    begin, end = header[first]["data_offsets"]
    yield (
        "overlap",
        changed(last, data_offsets=[0, header[last]["data_offsets"][1] - header[last]["data_offsets"][0]]),
        len(names) == 1,
    )
    yield "gap", changed(data_offsets=[begin + 1, end]), False
    yield "backwards", changed(data_offsets=[end, begin]), False
    yield "negative offset", changed(data_offsets=[-1, end]), False
    yield "offset of 2^64", changed(data_offsets=[0, 2**64]), False
    yield "offset above 64 bits", changed(data_offsets=[0, 10**30]), False
    yield "offsets behind the file", changed(last, data_offsets=[len(body), len(body) + 8]), False
    yield "three offsets", changed(data_offsets=[begin, end, end]), False
    yield "offsets as text", changed(data_offsets=["0", "8"]), False
    yield "shape of 2^63", changed(shape=[2**63]), False
    yield "product that overflows to what is there", changed(shape=[2**32, 2**32, 1]), False
    yield "product that overflows to 0", changed(shape=[2**33, 2**31]), False
    yield "many dimensions", changed(shape=[1] * 5000), False
    yield "shape of 0", changed(shape=[0]), False
    yield "shape without dimensions", changed(shape=[]), False
    yield "negative shape", changed(shape=[-1, -1]), False
    yield "shape in halves", changed(shape=[1.5]), False
    yield "shape as text", changed(shape="4"), False
    yield "no shape", changed(shape=None), False
    yield "unknown dtype", changed(dtype="Q4_K"), False
    yield "dtype of no text", changed(dtype=7), False
    yield (
        "other dtype of its size",
        changed(dtype={"U8": "I8", "F32": "I32", "BF16": "F16", "I32": "F32"}.get(header[first]["dtype"], "I16")),
        True,
    )
    yield "wider dtype", changed(dtype="I64"), False
    yield "missing tensor", safetensors(metadata | {name: header[name] for name in names[:-1]}, body), False
    yield (
        "more tensors",
        safetensors(
            metadata | header | {"more": {"dtype": "U8", "shape": [4], "data_offsets": [len(body), len(body) + 4]}},
            body + b"more",
        ),
        True,
    )
    yield (
        "other name",
        safetensors(
            metadata | {("\u0435" + name[1:] if name == first else name): header[name] for name in names}, body
        ),
        False,
    )
    yield (
        "name with a path",
        safetensors(metadata | {("../" + name if name == first else name): header[name] for name in names}, body),
        False,
    )
    yield (
        "name with NUL",
        safetensors(metadata | {(name + "\0" if name == first else name): header[name] for name in names}, body),
        False,
    )
    yield (
        "half of a letter in a name",
        safetensors(metadata | {(name + "\ud800" if name == first else name): header[name] for name in names}, body),
        False,
    )
    twice = json.dumps(header)[:-1] + f', "{first}": {json.dumps(header[last])}' + "}"
    yield "a tensor twice", safetensors(twice.encode(), body), len(names) == 1
    yield "deep JSON", safetensors(b'{"a":' + b"[" * 200000 + b"]" * 200000 + b"}", body), False
    yield "deep metadata", safetensors(header | {"__metadata__": {"a": {"b": ["c"]}}}, body), False
    yield "metadata of no text", safetensors(header | {"__metadata__": {"a": 1}}, body), False
    yield "a list", safetensors([header], body), False
    yield "a number", safetensors(5, body), False
    yield "no JSON", safetensors(b"{" + b"\xff" * 30, body), False
    yield "UTF-16", safetensors(json.dumps(header).encode("utf-16"), body), False
    yield "header behind the file", safetensors(header, body, length=len(good) * 2), False
    yield "header of 2^63", safetensors(header, body, length=2**63), False
    yield "header of 2^64-1", safetensors(header, body, length=2**64 - 1), False
    yield "header of 0", safetensors(header, body, length=0), False
    yield "header of 99 MB", safetensors(json.dumps(header).encode() + b" " * 99_000_000, body), True
    yield "header of 101 MB", safetensors(json.dumps(header).encode() + b" " * 101_000_000, body), False
    yield "cut", good[:-1], False
    yield "longer", good + b"\0", False
    yield "empty", b"", False
    yield "eight bytes", bytes(8), False
    yield (
        "a pickle",
        b"\x80\x04\x95\x1a\0\0\0\0\0\0\0\x8c\x05posix\x94\x8c\x06system\x94\x93\x94\x8c\x02id\x94\x85\x94R\x94.",
        False,
    )
    yield "an archive", _archive({"data.pkl": b"\x80\x02cposix\nsystem\nq\0X\x02\0\0\0idq\1\x85q\2Rq\3."}), False
    yield "a pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", False
    yield "a page", b"<!doctype html><script>alert(1)</script>", False
    yield "not finite", safetensors(metadata | header, b"\xff" * len(body)), True


def _archive(files: dict[str, bytes]) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return made.getvalue()


BPE: dict[str, Any] = {
    "type": "BPE",
    "dropout": None,
    "unk_token": "u",
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "fuse_unk": False,
    "byte_fallback": False,
    "ignore_merges": False,
    "vocab": {"u": 0, "a": 1, "b": 2},
    "merges": [],
}


def tokenizers() -> Iterator[tuple[str, bytes, bool]]:
    """Yield (name, tokenizer.json, harmless); some are taken from issues of the library: panics 2094 and 2151."""

    def made(model: dict[str, Any] | None = None, **others: Any) -> bytes:
        base: dict[str, Any] = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [],
            "normalizer": None,
        }
        base |= {"pre_tokenizer": None, "post_processor": None, "decoder": None, "model": BPE | (model or {})}
        return json.dumps(base | others).encode()

    def split(regex: str) -> dict[str, Any]:
        return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}

    yield "empty", b"", False
    yield "no JSON", b"{", False
    yield "a list", b"[]", False
    yield "null", b"null", False
    yield "another object", b'{"x":1}', False
    yield "not Unicode", b"\xff\xfe\0", False
    yield "deep", b'{"model":' + b"[" * 100000 + b"]" * 100000 + b"}", False
    yield "deep normalizers", made(normalizer=_nested({"type": "NFC"}, 300)), True
    yield "a merge that is no token", made({"vocab": {"a": 0, "b": 1, "u": 2}, "merges": [["a", "b"]]}), False
    yield (
        "a merge longer than all tokens",
        made({"vocab": {"u": 0, "aaa": 1, "bbb": 2}, "merges": [["aaa", "bbb"]]}),
        False,
    )
    yield "merges of no token", made({"merges": [["x", "y"]]}), False
    yield "a prefix longer than a token", made({"continuing_subword_prefix": "####", "merges": [["a", "b"]]}), False
    yield "an unknown token that is none", made({"unk_token": "none"}), True
    yield "no tokens", made({"vocab": {}}), True
    yield "negative ids", made({"vocab": {"a": -1}}), False
    yield "ids above 32 bits", made({"vocab": {"a": 2**40}}), False
    yield "ids far above the model", made({"vocab": {"u": 0, "a": 2**31, "b": 2**32 - 1}}), False
    yield "a regex that explodes", made(pre_tokenizer=split("(a|aa|a+)+$")), False
    yield (
        "a regex that explodes in a normalizer",
        made(normalizer={"type": "Replace", "pattern": {"Regex": "(a*)*c"}, "content": ""}),
        True,
    )
    yield "a regex that is none", made(pre_tokenizer=split("(((")), False
    yield "a regex of empty matches", made(pre_tokenizer=split("")), True
    yield (
        "a normalizer that grows",
        made(normalizer={"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 100_000}),
        True,
    )
    yield "an empty pattern", made(normalizer={"type": "Replace", "pattern": {"String": ""}, "content": "x"}), True
    yield "pieces of length 0", made(pre_tokenizer={"type": "FixedLength", "length": 0}), False
    yield "a charsmap that is none", made(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}), False
    yield (
        "a charsmap of ones",
        made(normalizer={"type": "Precompiled", "precompiled_charsmap": base64.b64encode(b"\xff" * 64).decode()}),
        True,
    )
    yield (
        "a template of tokens that are none",
        made(
            post_processor={
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<none>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [],
                "special_tokens": {},
            }
        ),
        False,
    )
    yield (
        "a truncation that steps back",
        made(truncation={"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 5}),
        True,
    )
    yield (
        "a padding without end",
        made(
            padding={
                "strategy": {"Fixed": 2**40},
                "direction": "Right",
                "pad_to_multiple_of": None,
                "pad_id": 0,
                "pad_type_id": 0,
                "pad_token": "u",
            }
        ),
        True,
    )
    yield (
        "a decoder that strips all",
        made(decoder={"type": "Strip", "content": "a", "start": 2**40, "stop": 2**40}),
        True,
    )
    yield "an unknown model", made({"type": "Python"}), False
    yield "a Unigram without tokens", made({"type": "Unigram", "unk_id": 5, "vocab": []}), False
    yield "a Unigram without an unknown token", made({"type": "Unigram", "unk_id": None, "vocab": [["x", -1.0]]}), False
    yield (
        "a WordPiece",
        made(
            {"type": "WordPiece", "unk_token": "none", "continuing_subword_prefix": "##", "max_input_chars_per_word": 0}
        ),
        True,
    )
    yield (
        "added tokens with odd ids",
        made(
            added_tokens=[
                {
                    "id": 2**32 - 1,
                    "content": "a",
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": False,
                    "special": True,
                }
            ]
        ),
        True,
    )
    yield (
        "an added token of nothing",
        made(
            added_tokens=[
                {
                    "id": 3,
                    "content": "",
                    "single_word": False,
                    "lstrip": True,
                    "rstrip": True,
                    "normalized": True,
                    "special": True,
                }
            ]
        ),
        True,
    )
    yield "many tokens", made({"vocab": {f"t{number}": number for number in range(300_000)} | {"u": 300_000}}), True


def _nested(inner: dict[str, Any], depth: int) -> dict[str, Any]:
    for _ in range(depth):
        inner = {"type": "Sequence", "normalizers": [inner]}
    return inner


TEMPLATES = (
    "{% for i in range(10**9) %}x{% endfor %}",
    "{% for i in range(999) %}{% for j in range(999) %}{% for k in range(999) %}{% endfor %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "{% set ns = namespace(s='a') %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}",
    "{% set ns = namespace(s=['a']) %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}",
    "{{ 'a' * 10**10 }}",
    "{{ 'a' * 9999999999 }}",
    "{{ 9**9**9**9 }}",
    "{{ (9).__pow__(10**9) }}",
    "{{ '%9999999999d' % 1 }}",
    "{{ '{:9999999999}'.format(1) }}",
    "{{ 'a'.center(9999999999) }}",
    "{{ 'a'.ljust(10**9) | length }}",
    "{{ ['a'] | batch(10**9, 'x') | list }}",
    "{{ messages | tojson(indent=100000000) }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''|attr('__class__')|attr('__mro__') }}",
    "{{ self.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.system('id') }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(namespace) }}",
    "{{ ['{0.__class__}'.format]|map('call', 1)|list }}",
    "{% set f = '{0.__class__.__mro__}'.format %}{{ f(namespace) }}",
    "{{ ('{0.__class__}'|attr('format'))(namespace) }}",
    "{{ '{x.__class__}'.format_map({'x': 1}) }}",
    "{% import 'os' as os %}{{ os.system('id') }}",
    "{% include '/etc/passwd' %}",
    "{% extends '/etc/passwd' %}",
    "{% from '../x' import y %}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__['re'] }}",
    "{{ strftime_now('%' * 65000) }}",
    "{{ dict.fromkeys(range(10**9)) }}",
    "{{ range(10**12)|list|length }}",
    "{{ range(10**9)|sum }}",
    "{{ 'a,'*9999|replace('a','a'*9999) }}",
    "{{ ('a'*60000)|replace('a','b'*60000) }}",
    "{{ ('a'*60000)|wordwrap(1, wrapstring='x'*60000) }}",
    "{{ ('a '*30000)|urlize }}",
    "{{ ('a'*60000).split('')|length }}",
    "{{ 'x'|indent(10**9) }}",
    "{{ [[1]*1000]*1000*1000 }}",
    "{% generation %}{% for i in range(10**8) %}{% endfor %}{% endgeneration %}",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{{ " + "-" * 5000 + "1 }}",
    "{% if 1 %}" * 200 + "{% endif %}" * 200,
    "{{ " + "+".join(["'a'"] * 20000) + " }}",
    "{% set x = [] %}{% do x.append(x) %}{{ x }}",
    "{% set x = [1] %}{{ x.append(x) }}{{ x }}",
    "{{ messages.clear() }}",
    "{{ messages[0].__delitem__('role') }}",
    "{% for k in messages %}{% set messages = 1 %}{% endfor %}{{ caller() }}",
    "{{ debug() }}{{ config }}{{ request.application.__globals__ }}",
    "\ud800",
    "{{ '\\ud800' }}",
    "{{ \x00 }}",
    "{%",
)

NAMES = (
    *(
        "../escaped",
        "..",
        ".",
        "/etc/passwd",
        "//host/share",
        "a/b",
        "a\\b",
        "C:\\x",
        "C:x",
        "x:stream",
        "~",
        "~/x",
        "$HOME",
        "%TEMP%",
    ),
    *(
        "CON",
        "con",
        "NUL",
        "nul.txt",
        "COM1",
        "LPT1.safetensors",
        "AUX.",
        "a.",
        "a ",
        " a",
        "a\0b",
        "a\nb",
        "a\rb",
        "a\tb",
        "\x1b[2Ja",
        "\x9b2Ja",
    ),
    *(
        "\u202egnp",
        "\u200bname",
        "cafe\u0301",
        "caf\u00e9",
        "\ufeffx",
        "ﬁle",
        "",
        " ",
        "-",
        "--help",
        "a" * 300,
        "A" * 64,
        "0" * 63,
        "0" * 65,
        "F" * 64,
    ),
    *("<script>alert(1)</script>", "'; DROP TABLE tokens;--", "{0}", "%s%n", "x" * 70000),
)
