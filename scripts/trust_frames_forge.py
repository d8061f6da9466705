"""Draw what a forged edge says to a hub, for `trust_frames_hub`: any message with any token, and uploads that lie."""

from __future__ import annotations

import hashlib
import itertools
import json
from typing import Any

from trust_frames_judge import Facts
from trust_frames_mutate import Forger, frame_of
from trust_frames_stage import FORGED, HONEST, hello, said, update


class EdgeForger:
    """The frames of an edge, honest and forged, as the facts of the run are when they are drawn."""

    def __init__(self, forger: Forger, facts: Facts) -> None:
        self._forger, self._facts = forger, facts
        self._chance = forger.chance
        self._body = 0

    def upload(self, round_number: int, view: str, **changed: Any) -> tuple[bytes, bytes]:
        """Make the two frames of an update that this run can use."""
        data = self.body()
        start = self.start(data, round_number, view) | changed
        return said(**start), frame_of(
            json.dumps({"type": "update_chunk", "digest": start["digest"], "offset": 0}), data
        )

    def body(self) -> bytes:
        """Code an update that was not sent before."""
        self._body += 1
        data = update([0.001 * (self._body % 1000), *(float(self._body // 1000) / 64 for _ in range(31))])
        self._facts.bodies.add(hashlib.sha256(data).hexdigest())
        if len(self._facts.bodies) > 5000:
            self._facts.bodies.clear()
            self._facts.bodies.add(hashlib.sha256(data).hexdigest())
        return data

    def start(self, data: bytes, round_number: int, view: str) -> dict[str, Any]:
        """Announce an update."""
        return {
            "type": "update_start",
            "round": round_number,
            "base": view,
            "alignment": self._facts.alignment,
            "digest": hashlib.sha256(data).hexdigest(),
            "bytes": len(data),
            "codec": "bf16",
            "num_examples": 3,
            "loss": 0.5,
        }

    def frames(self, count: int) -> list[bytes]:
        """Draw the frames of an episode."""
        chance, forger, made = self._chance, self._forger, list[bytes]()
        while len(made) < count:
            kind = chance.random()
            if kind < 0.2:
                made += self._forged_upload()
            elif kind < 0.3 and forger.pool:
                made.append(chance.choice(forger.pool))
            elif kind < 0.42:
                made.append(
                    forger.damaged(
                        chance.choice(forger.pool) if forger.pool and chance.random() < 0.5 else said(**self._any())
                    )
                )
            elif kind < 0.5:
                made.append(said(**self._any()))
            else:
                made.append(forger.message(self._any(), chance.choice((b"", b"", b"", b"x", bytes(500)))))
        return made[:count]

    def _any(self) -> dict[str, Any]:
        """Draw a message that an edge, or a hub, may say at some time."""
        chance, facts = self._chance, self._facts
        number = facts.round + chance.choice((0, 0, 0, -1, 1, 1000))
        digest = chance.choice((*facts.blobs, "0" * 64, facts.view))
        return chance.choice(
            (
                hello(FORGED),
                hello(chance.choice(HONEST)),
                {"type": "ready", "num_examples": 3, "size_class": 0},
                {"type": "blob_request", "digest": digest, "offset": chance.choice((0, 0, 3, 7, 9))},
                self.start(self.body(), number, chance.choice((facts.view, digest))),
                {"type": "update_chunk", "digest": digest, "offset": chance.choice((0, 32))},
                {"type": "decline", "round": number, "reason": "no"},
                {"type": "progress", "round": number, "step": 1, "steps": 9, "loss": 0.5, "tokens_per_second": 1.0},
                {"type": "paused", "reason": "battery"},
                {"type": "resumed"},
                {"type": "leave", "reason": "bye"},
                {"type": "receipt", "round": number, "digest": digest},
                {"type": "refusal", "reason": "no", "round": number, "retry": False, "fatal": False},
                {"type": "blob_chunk", "digest": digest, "offset": 0, "total": 5},
                {"type": "farewell", "rounds": number, "reason": "over"},
            )
        )

    def _forged_upload(self) -> list[bytes]:
        """Draw an update in chunks that may overlap, go back, exceed, stop, or be of something else."""
        chance, facts = self._chance, self._facts
        data = self.body()
        start = self.start(data, facts.round + chance.choice((0, 0, 0, 0, -1, 1)), facts.view)
        if chance.random() < 0.3:
            data = self._spoilt(data)
            start |= {"digest": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        first = self._forger.message(start) if chance.random() < 0.5 else said(**start)
        cuts = sorted({0, len(data), *(chance.randrange(len(data) + 1) for _ in range(chance.randrange(3)))})
        pieces = [(at, data[at:end]) for at, end in itertools.pairwise(cuts)]
        match chance.randrange(9):
            case 0:
                chance.shuffle(pieces)
            case 1:
                pieces.append(pieces[-1])  # once more
            case 2:
                pieces = [
                    (max(0, at - 1), data[max(0, at - 1) : at + len(piece)]) for at, piece in pieces
                ]  # overlapping
            case 3:
                pieces[-1] = (pieces[-1][0], pieces[-1][1] + b"more")
            case 4:
                pieces.pop()
        frames = [first]
        for at, piece in pieces:
            chunk = {"type": "update_chunk", "digest": start["digest"], "offset": at}
            frames.append(
                self._forger.message(chunk, piece) if chance.random() < 0.12 else frame_of(json.dumps(chunk), piece)
            )
        if chance.random() < 0.1:
            frames.insert(chance.randrange(1, len(frames) + 1), first)
        return frames

    def _spoilt(self, data: bytes) -> bytes:
        """Spoil the bytes of an update; none of the results is one that this run can use."""
        chance, changed = self._chance, bytearray(data)
        match chance.randrange(7):
            case 0:
                changed[-1 - 2 * chance.randrange(32)] = 0x7F  # not finite, or above any LoRA
            case 1:
                del changed[chance.randrange(len(changed)) :]
            case 2:
                changed[chance.randrange(8)] ^= 1 << chance.randrange(8)
            case 3:
                changed += b"\0"
            case 4:
                at = data.index(b"data_offsets") + chance.randrange(20)
                changed[at] ^= 1
            case 5:
                changed = bytearray(data.replace(b"bf16", b"int8"))
            case _:
                changed[8 + chance.randrange(100)] ^= 1 << chance.randrange(7)
        return bytes(changed) or b"\0"
