"""Tokenizers, packed rows and datasets that a stranger made: refused in words, in little memory."""

from __future__ import annotations

import io
import json
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from fedsoda_edge.data.formats import open_bytes
from fedsoda_edge.data.local_data import LocalData
from fedsoda_edge.data.samples import SampleTokenizer
from fedsoda_edge.data.tokenizer_files import read_text
from fedsoda_edge.errors import DataProblem, Panicked, UsageProblem, panics_caught
from fedsoda_edge.protocol.template import TextTemplate


def tokenizer(model: dict[str, Any] | None = None, **others: Any) -> bytes:
    bpe = {"type": "BPE", "unk_token": "u", "vocab": {"u": 0, "a": 1, "b": 2}, "merges": []}
    return json.dumps({"version": "1.0", "added_tokens": [], "model": bpe | (model or {})} | others).encode()


MANY = {"type": "Split", "pattern": {"Regex": "(a|aa|a+)+$"}, "behavior": "Isolated", "invert": False}


def test_a_tokenizer_that_is_none_is_refused_in_words_also_where_its_library_panics() -> None:
    for data in (b"{", b'{"x":1}', b"\xff\xfe", tokenizer({"vocab": {"a": 0, "b": 1}, "merges": [["a", "b"]]})):
        with pytest.raises(UsageProblem):
            SampleTokenizer(data, 1)


def test_a_tokenizer_that_fails_on_a_text_says_its_length_and_nothing_of_the_text() -> None:
    made = SampleTokenizer(tokenizer(pre_tokenizer=MANY), 1)
    with pytest.raises(UsageProblem) as caught:
        made.encode("a" * 40 + "b private")
    assert "49 characters" in str(caught.value)
    assert "private" not in str(caught.value)


def test_a_panic_is_an_error_like_another_and_what_is_none_passes() -> None:
    class PanicException(BaseException):
        """As libraries in Rust raise it."""

    with pytest.raises(Panicked) as caught, panics_caught():
        raise PanicException("inside a private text")
    assert "private" not in str(caught.value)
    with pytest.raises(KeyboardInterrupt), panics_caught():
        raise KeyboardInterrupt


def test_a_template_that_is_not_unicode_is_refused_in_words() -> None:
    assert read_text(b"\xef\xbb\xbfa") == "a"
    with pytest.raises(UsageProblem, match="byte 2"):
        read_text(b"a\xff")


def test_what_a_few_bytes_of_zstd_stand_for_is_never_held_at_once(tmp_path: Path) -> None:
    pytest.importorskip("zstandard")
    block = struct.pack("<I", (1 << 17) << 3 | 1 << 1)[:3] + b"x"  # 128 KiB of one letter, RFC 8878 (3.1.1.2)
    last = struct.pack("<I", (1 << 17) << 3 | 1 << 1 | 1)[:3] + b"x"
    path = tmp_path / "rows"
    path.write_bytes(b"\x28\xb5\x2f\xfd\x00\x58" + block * 4000 + last)
    tracemalloc.start()
    try:
        with open_bytes(path, "zstd") as file:
            size = sum(len(piece) for piece in iter(lambda: file.read(1 << 20), b""))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert size == 4001 << 17
    assert peak < 100 << 20


@pytest.mark.parametrize("name", ["../../other/rows.arrow", "/rows.arrow", "a\\rows.arrow"])
def test_a_saved_dataset_names_only_files_of_its_directory(tmp_path: Path, name: str) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    with pytest.raises(DataProblem, match="not one of this directory"):
        LocalData(tmp_path).check(TextTemplate("{a}"), TextTemplate("{b}"))


def test_a_file_of_two_packed_parts_is_read_whole(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    path = tmp_path / "rows"
    path.write_bytes(b"".join(zstandard.compress(bytes([letter]) * 5000) for letter in b"ab"))
    with open_bytes(path, "zstd") as file:
        assert io.BytesIO(file.read()).getvalue() == b"a" * 5000 + b"b" * 5000
