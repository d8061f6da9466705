"""Views and model directories that a stranger made are refused in words."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from fedsoda_edge.errors import ProtocolViolation, UsageProblem
from fedsoda_edge.model import delta
from fedsoda_edge.model.foreign_files import check_tokenizer
from fedsoda_edge.protocol.manifest import TensorSpec

LAYOUT = (TensorSpec("layers.1.q.lora_A", (2, 4)),)


def snapshot(shape: object, end: int, size: int) -> bytes:
    text = json.dumps({LAYOUT[0].name: {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}).encode()
    return struct.pack("<Q", len(text)) + text + bytes(size)


def test_a_snapshot_that_lies_is_refused_in_words() -> None:
    assert set(delta.from_bytes(snapshot([2, 4], 32, 32), LAYOUT)) == {LAYOUT[0].name}
    lies = [b"", b"\xff" * 30, snapshot([2, 4], 33, 32), snapshot([2**33, 2**31], 0, 0), snapshot([-1], 4, 4)]
    for lie in (*lies, snapshot([4, 2], 32, 32), b"\x80\x04\x95cposix\nsystem\n"):
        with pytest.raises(ProtocolViolation):
            delta.from_bytes(lie, LAYOUT)


def test_a_model_whose_tokenizer_makes_its_library_panic_is_refused(tmp_path: Path) -> None:
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": [["a", "b"]]}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    with pytest.raises(UsageProblem, match=r"tokenizer\.json is not a tokenizer"):
        check_tokenizer(tmp_path)
