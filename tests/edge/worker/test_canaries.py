"""Marked private text is searched for: the search finds what is planted, and a worker's crashes hold none of it.

The whole search, over a federation whose processes are killed, is `scripts/bench_trust_canaries.py`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import bench_trust_canaries as bench
import pytest
from canary_federation import unmasked
from canary_search import SENTENCE, WORDS, Search
from tokenizers import Tokenizer
from websockets.frames import Frame, Opcode


@pytest.fixture
def search(scripted: Path) -> Search:
    return Search(Tokenizer.from_file(str(scripted / "tokenizer.json")))


def test_each_form_is_found_where_it_is_planted(search: Search, tmp_path: Path) -> None:
    assert len(search.forms) == 17 * len(WORDS)
    assert bench.planted_hits_missed(search, tmp_path / "planted") == []


def test_what_a_websocket_masks_is_read(search: Search) -> None:
    """As a client of websockets sends it: short, of two bytes' length and of eight."""
    handshake = b"GET /v1/session HTTP/1.1\r\nUpgrade: websocket\r\n\r\n"
    for size in (0, 100, 300, 70_000):
        text = b"x" * size + SENTENCE.encode() + b"y" * size
        frames = b"".join(Frame(Opcode.BINARY, part).serialize(mask=True) for part in (b"before", text))
        search.hits = []
        search.look("as it is", handshake + frames)
        assert search.hits == []
        search.look("unmasked", unmasked(handshake + frames))
        assert {hit.partition(" of ")[0] for hit in search.hits} >= {"UTF-8"}
        assert unmasked(handshake + frames).endswith(b"before" + text)


@pytest.mark.skipif(sys.platform != "linux", reason="kills and aborts as POSIX has them")
def test_no_crash_of_the_worker_holds_a_word_of_the_rows(search: Search, scripted: Path, tmp_path: Path) -> None:
    rows = bench.write_rows(tmp_path / "rows.jsonl")
    assert bench.crashes_of_the_worker(search, tmp_path, rows, scripted) == 7
    search.look_below(tmp_path, [rows])
    assert search.hits == []
