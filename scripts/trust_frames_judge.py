"""Judge one side of a conversation from docs/protocol.md alone, for `bench_trust_frames`: no code of the product is read.

A judge says of each frame what may follow: that the connection ends, that it stays, or either where the document leaves it
open. `Reading` is what a frame says, `HubJudge` what a hub may take from an edge, `EdgeJudge` what an edge may take from a hub.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

MAX_DIGITS = 100
END, STAY, EITHER = "ends", "stays", "either"
MAX_HEADER, MAX_PAYLOAD = 64 << 10, 256 << 10
LARGEST = 2**63 - 1  # of a whole number, (p2-frames)
MAX_EXAMPLES, MAX_LOSS, MAX_STEPS = 2**31, 1e6, 2**31

DIGEST, INT, COUNT, TEXT, NUMBER, MAYBE, FLAG, STEPS = (
    "digest",
    "whole",
    "count",
    "text",
    "number",
    "number or null",
    "flag",
    "steps",
)
DEVICE = dict.fromkeys(("ram_bytes", "vram_bytes", "disk_bytes", "threads"), COUNT) | {"accelerator": TEXT}
# {message: ({field: form}, names that may be left out)}, (p1-messages)
OF_EDGE: dict[str, tuple[dict[str, Any], frozenset[str]]] = {
    "hello": (
        {"protocol": INT, "software": TEXT, "device_id": TEXT, "device": DEVICE, "place": TEXT},
        frozenset({"place"}),
    ),
    "ready": ({"num_examples": COUNT, "size_class": INT}, frozenset({"size_class"})),
    "blob_request": ({"digest": DIGEST, "offset": INT}, frozenset({"offset"})),
    "update_start": (
        {
            "round": INT,
            "base": DIGEST,
            "alignment": INT,
            "digest": DIGEST,
            "bytes": INT,
            "codec": TEXT,
            "num_examples": INT,
            "loss": MAYBE,
        },
        frozenset(),
    ),
    "update_chunk": ({"digest": DIGEST, "offset": INT}, frozenset()),
    "decline": ({"round": INT, "reason": TEXT}, frozenset()),
    "progress": (
        {"round": INT, "step": STEPS, "steps": STEPS, "loss": MAYBE, "tokens_per_second": MAYBE},
        frozenset({"loss", "tokens_per_second"}),
    ),
    "paused": ({"reason": TEXT}, frozenset()),
    "resumed": ({}, frozenset()),
    "leave": ({"reason": TEXT}, frozenset()),
}
BLOB = {"digest": DIGEST, "bytes": COUNT}
OF_HUB: dict[str, tuple[dict[str, Any], frozenset[str]]] = {
    "blob_chunk": ({"digest": DIGEST, "offset": INT, "total": INT}, frozenset()),
    "receipt": ({"round": INT, "digest": DIGEST}, frozenset()),
    "round_closed": ({"round": INT, "num_updates": COUNT}, frozenset()),
    "farewell": ({"rounds": COUNT, "reason": TEXT}, frozenset()),
    # "welcome", "round_offer" and "refusal" are judged by their outcome, see `EdgeJudge`.
}


class Wrong(Exception):
    """A header that is none of this protocol."""


@dataclass(frozen=True)
class Reading:
    """What a frame says. is_sure: whether the document leaves no other reading, such as that it is damaged."""

    kind: str
    values: Mapping[str, Any]
    payload: bytes
    is_sure: bool


def read(frame: bytes, forms: Mapping[str, tuple[dict[str, Any], frozenset[str]]]) -> Reading | None:
    """Read a frame; None: it is damaged, or no message of this side."""
    size = int.from_bytes(frame[:4], "big")
    if len(frame) < 4 or size > MAX_HEADER or size > len(frame) - 4 or len(frame) - 4 - size > MAX_PAYLOAD:
        return None
    header, payload = frame[4 : 4 + size], frame[4 + size :]
    doubts: list[str] = []

    def whole(digits: str) -> int:
        return int(digits) if len(digits) <= MAX_DIGITS else 10**MAX_DIGITS  # more than Python reads; too large anyway

    def no_constant(name: str) -> float:
        raise Wrong(name)

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(found)
        if len(made) != len(found):
            doubts.append("a key twice")
        return made

    try:
        text = header.decode()
    except UnicodeDecodeError:
        text = header.decode(errors="replace")
        doubts.append("not Unicode")  # it may stand in a field that nobody reads
    try:
        values = json.loads(text, parse_int=whole, parse_constant=no_constant, object_pairs_hook=pairs)
    except RecursionError:
        return Reading("doubtful", {}, payload, False)
    except (ValueError, Wrong):
        return None
    kind = values.get("type") if isinstance(values, dict) else None
    if not isinstance(kind, str) or kind not in forms:
        return Reading("doubtful", {}, payload, False) if doubts else None
    wanted, optional = forms[kind]
    try:
        _check(values, wanted, optional, doubts)
    except Wrong:
        return None
    others = {name: value for name, value in values.items() if name not in wanted and name != "type"}
    if _is_doubtful(others):
        doubts.append("an unknown field that is not Unicode, or too large")
    if payload and kind not in ("update_chunk", "blob_chunk"):
        return None
    return Reading(kind, values, payload, not doubts)


def _check(values: Mapping[str, Any], wanted: Mapping[str, Any], optional: Collection[str], doubts: list[str]) -> None:
    for name, form in wanted.items():
        if name not in values:
            if name in optional:
                continue
            raise Wrong(name)
        value = values[name]
        if isinstance(form, dict):
            if not isinstance(value, dict):
                raise Wrong(name)
            _check(value, form, (), doubts)
        elif form == TEXT:
            if not isinstance(value, str) or any(0xD800 <= ord(one) <= 0xDFFF for one in value):
                raise Wrong(name)
            if len(value) > 200 and name in ("software", "place", "accelerator"):
                raise Wrong(name)
            if "\ufffd" in value:
                doubts.append(name)
        elif form == DIGEST:
            if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{64}", value):
                raise Wrong(name)
        elif form in (NUMBER, MAYBE):
            if value is None and form == MAYBE:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise Wrong(name)
            if not abs(value) <= LARGEST:  # whether 1e400 is a number is left open; that it is no loss is not
                doubts.append(name)
        elif form == FLAG:
            if not isinstance(value, bool):
                raise Wrong(name)
        else:
            if isinstance(value, float) and value.is_integer():
                doubts.append(name)  # 1.0 for 1
            elif not isinstance(value, int) or isinstance(value, bool) or not -LARGEST - 1 <= value <= LARGEST:
                raise Wrong(name)
            if (form in (COUNT, STEPS) and value < 0) or (form == STEPS and value > MAX_STEPS):
                raise Wrong(name)


def _is_doubtful(value: object) -> bool:
    rest = [value]
    while rest:
        one = rest.pop()
        if isinstance(one, str) and any(0xD800 <= ord(letter) <= 0xDFFF or letter == "\ufffd" for letter in one):
            return True
        if isinstance(one, float) and not math.isfinite(one):
            return True
        if isinstance(one, int) and abs(one) > LARGEST:
            return True
        if isinstance(one, dict):
            rest += [*one.keys(), *one.values()]
        elif isinstance(one, list):
            rest += one
    return False


# --- what a hub may take ---------------------------------------------------------------------------------------------


@dataclass
class Facts:
    """What is true of the run now, as the bench that drives it knows: the open round and whom it invited.

    blobs: sizes of the blobs that may be asked for. receipts: the last (round, digest) of each edge. bodies: digests of
    bytes that are whole updates of this run.
    """

    round: int = 0
    view: str = ""
    alignment: int = 0
    codec: str = "bf16"
    num_classes: int = 1
    most_bytes: int = 0  # of an update; above it and below `least_refused` the document leaves it open
    least_refused: int = 0
    cohort: set[str] = field(default_factory=set)
    blobs: dict[str, int] = field(default_factory=dict)
    accepted: dict[str, str] = field(default_factory=dict)  # of the open round
    receipts: dict[str, tuple[int, str]] = field(default_factory=dict)
    bodies: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Verdict:
    """What may follow a frame. then: END, STAY or EITHER. answer: "receipt", "refusal", "blob_chunk", "any" or "" (none is due)."""

    then: str
    answer: str = ""
    start: Mapping[str, Any] | None = None


class HubJudge:
    """What a hub may take on one connection of an edge."""

    def __init__(self, facts: Facts, edge: str, device: str, place: str) -> None:
        self.facts, self.edge, self.device, self.place = facts, edge, device, place
        self.state = "new"
        self.is_ready = False
        self.start: Mapping[str, Any] | None = None
        self.came = bytearray()
        self.has_answered = False  # declined, paused or was refused: whether an update still counts is left open

    def judge(self, frame: bytes) -> Verdict:
        """Say what may follow, and follow it; after EITHER the bench looks what did and ends the episode."""
        found = read(frame, OF_EDGE)
        if found is None or self.state == "over":
            return Verdict(END)
        if not found.is_sure:
            return Verdict(EITHER, "any")
        return self._sure(found)

    def _sure(self, found: Reading) -> Verdict:
        values, facts = found.values, self.facts
        if (found.kind == "hello") != (self.state == "new"):
            return Verdict(END)
        match found.kind:
            case "hello":
                self.state = "open"
                is_id = 1 <= len(values["device_id"]) <= 64 and all(" " <= one <= "~" for one in values["device_id"])
                known = values["protocol"] == 1 and values["device_id"] == self.device
                return Verdict(STAY if known and is_id else END)
            case "ready":
                self.is_ready = True
                return Verdict(STAY if 0 <= values.get("size_class", 0) < facts.num_classes else END)
            case "blob_request":
                size = facts.blobs.get(values["digest"])
                is_there = size is not None and 0 <= values.get("offset", 0) < size
                return Verdict(STAY, "blob_chunk") if is_there else Verdict(END)
            case "update_start":
                if not self.is_ready or self.start is not None or not 0 < values["bytes"] < facts.least_refused:
                    return Verdict(END)
                self.start, self.came = values, bytearray()
                return Verdict(STAY if values["bytes"] <= facts.most_bytes else EITHER)
            case "update_chunk":
                return self._chunk(found)
            case "leave":
                self.state = "over"
                return Verdict(END)
            case "resumed":
                return Verdict(STAY if self.is_ready else EITHER)
            case "paused" | "decline":
                if found.kind == "paused" or values["round"] == facts.round:
                    self.has_answered = True
        return Verdict(STAY)

    def _chunk(self, found: Reading) -> Verdict:
        values, start = found.values, self.start
        if start is None or not found.payload:
            return Verdict(END)
        if values["digest"] != start["digest"] or values["offset"] != len(self.came):
            return Verdict(END)
        self.came += found.payload
        if len(self.came) > start["bytes"]:
            return Verdict(END)
        if len(self.came) < start["bytes"]:
            return Verdict(STAY)
        self.start = None
        if hashlib.sha256(self.came).hexdigest() != start["digest"]:
            return Verdict(EITHER, "any") if self._is_useless(start) else Verdict(END)
        return Verdict(STAY, self._answer(start), start)

    def _is_useless(self, start: Mapping[str, Any]) -> bool:
        """Tell whether a hub need not look at the bytes: whatever they are, no update comes of them."""
        facts, edge = self.facts, self.edge
        is_open = start["round"] == facts.round and edge in facts.cohort and edge not in facts.accepted
        return not is_open or facts.receipts.get(edge) == (start["round"], start["digest"])

    def _answer(self, start: Mapping[str, Any]) -> str:
        facts = self.facts
        if facts.receipts.get(self.edge) == (start["round"], start["digest"]):
            return "receipt"  # with bytes that were accepted
        counts = (
            start["round"] == facts.round
            and self.edge in facts.cohort
            and self.edge not in facts.accepted
            and start["base"] == facts.view
            and start["alignment"] == facts.alignment
            and start["codec"] == facts.codec
            and 1 <= start["num_examples"] <= MAX_EXAMPLES
            and start["loss"] is not None
            and 0 <= start["loss"] <= MAX_LOSS
            and start["digest"] in facts.bodies
        )
        if not counts:
            if start["round"] == facts.round:
                self.has_answered = True
            return "refusal"
        return "any" if self.has_answered else "receipt"
