"""Make forged frames for `bench_trust_frames`: any field of any message as any token of JSON, and damaged frames.

A message is a dict of tokens: text that stands in the JSON as it is, so that what no encoder writes can be sent.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping

Tokens = dict[str, "str | Tokens"]
DEEP = "[" * 3000 + "]" * 3000
NUMBERS = (
    *(
        "0",
        "-1",
        "1",
        "2",
        "3",
        "7",
        "-0",
        "1.0",
        "1e0",
        "1.5",
        "0.5",
        "1e5",
        "1e308",
        "1e400",
        "-1e400",
        "4.9e-324",
        "01",
        "+1",
    ),
    *(
        "0x10",
        "1_000",
        "NaN",
        "Infinity",
        "-Infinity",
        "true",
        "false",
        "null",
        '""',
        '"1"',
        "[]",
        "{}",
        "[1]",
        "",
        " ",
        "--1",
    ),
    *(
        "127",
        "255",
        "256",
        "65535",
        "65536",
        "2147483647",
        "2147483648",
        "4294967296",
        "1000000",
        "1000000.5",
        "262144",
    ),
    *("9007199254740991", "9007199254740992", "9223372036854775807", "9223372036854775808", "-9223372036854775808"),
    *("-9223372036854775809", "18446744073709551615", "18446744073709551616", "9" * 40, "-" + "9" * 400, "9" * 4400),
)
TEXTS = (
    *(
        '""',
        '" "',
        "null",
        "5",
        "true",
        "[]",
        "{}",
        '["a"]',
        "'a'",
        '"',
        '"\\u0000"',
        '"\\ud800"',
        '"\\udfff\\ud800"',
        '"\\x41"',
    ),
    *(
        '"\\u001b]0;owned\\u0007\\u001b[2J"',
        '"\x1b[2J"',
        '"\\u202egnp.exe"',
        '"\u202e\u2066"',
        '"\ufeff"',
        '"\u0065\u0301\u00e9"',
    ),
    *(
        '"../../etc/passwd"',
        '"CON"',
        '"nul.txt"',
        '"a\\u0000b"',
        '"a/b\\\\c"',
        '"<script>alert(1)</script>"',
        '"{0.__class__}"',
        '"%s%n"',
    ),
    *(
        '"' + "A" * 300 + '"',
        '"' + "A" * 60000 + '"',
        '"' + "A" * 70000 + '"',
        '"' + "\U0001f4a3" * 9000 + '"',
        '"\\ud83d\\udca3"',
    ),
    *('"' + "0" * 64 + '"', '"' + "g" * 64 + '"', '"' + "F" * 64 + '"', '"line\\nround 9 closed: 3 updates"', DEEP),
)
TYPES = (
    *(
        "hello",
        "ready",
        "blob_request",
        "update_start",
        "update_chunk",
        "decline",
        "progress",
        "paused",
        "resumed",
        "leave",
    ),
    *(
        "welcome",
        "round_offer",
        "blob_chunk",
        "receipt",
        "refusal",
        "round_closed",
        "farewell",
        "Hello",
        "",
        "open_run",
        "train",
    ),
)
EXTRA = (
    '"x"',
    "1e400",
    "9" * 400,
    DEEP,
    '"\\ud800"',
    '{"a":{"b":[1,2,{"c":null}]}}',
    "NaN",
    '"' + "A" * 65000 + '"',
    "[" * 200 + "]" * 200,
)


def tokens(values: Mapping[str, object]) -> Tokens:
    """Take a message apart into tokens."""
    return {
        k: tokens(v) if isinstance(v, Mapping) and v else json.dumps(v, ensure_ascii=False) for k, v in values.items()
    }


def text_of(made: Tokens) -> str:
    """Write tokens as JSON."""
    return "{" + ",".join(f'"{k}":{text_of(v) if isinstance(v, dict) else v}' for k, v in made.items()) + "}"


def frame_of(text: str | bytes, payload: bytes = b"") -> bytes:
    """Make a frame of a header, whatever its size."""
    header = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    return len(header).to_bytes(4, "big") + header + payload


class Forger:
    """Mutations of messages and frames, from one source of chance."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.pool: list[bytes] = []  # frames that were sent or heard before, of any edge, round and connection

    def remember(self, frame: bytes) -> None:
        """Keep a frame to replay it; of many a random part."""
        if len(frame) > 20000:
            return
        if len(self.pool) < 400:
            self.pool.append(frame)
        elif self.chance.random() < 0.05:
            self.pool[self.chance.randrange(400)] = frame

    def token(self, old: str) -> str:
        """Draw a token for the place of another, of its kind or of any."""
        is_text = old.startswith('"')
        if self.chance.random() < 0.1:
            is_text = not is_text
        return self.chance.choice(TEXTS if is_text else NUMBERS)

    def field(self, made: Tokens) -> None:
        """Change one field, at any depth."""
        name = self.chance.choice(list(made))
        value = made[name]
        if isinstance(value, dict) and self.chance.random() < 0.8:
            self.field(value)
            return
        kind = self.chance.random()
        if kind < 0.72:
            made[name] = f'"{self.chance.choice(TYPES)}"' if name == "type" else self.token(str(value))
        elif kind < 0.84:
            del made[name]
        elif kind < 0.92:
            made[f'{name}":{value if isinstance(value, str) else "{}"},"{name}'] = self.token(str(value))  # twice
            del made[name]
        else:
            made[self.chance.choice((name.upper(), f"{name} ", f"_{name}", "\\u0074ype", "\ufeff" + name))] = value

    def message(self, values: Mapping[str, object], payload: bytes = b"") -> bytes:
        """Forge a message in one to three places."""
        made = tokens(values)
        for _ in range(1 if self.chance.random() < 0.8 else self.chance.randint(2, 3)):
            if made:
                self.field(made)
        if self.chance.random() < 0.06:
            made[self.chance.choice(("x", "note", "__proto__", "round", "fatal", "digest"))] = self.chance.choice(EXTRA)
        text = text_of(made)
        if self.chance.random() < 0.03:
            how: tuple[Callable[[str], str], ...] = (
                lambda t: t + " ",
                lambda t: t + "x",
                lambda t: "\ufeff" + t,
                lambda t: "[" + t + "]",
                lambda t: t.replace(":", " :\t\n"),
                lambda t: t[: len(t) // 2],
                lambda t: t.replace('"', "'"),
                lambda t: t + t,
            )
            text = self.chance.choice(how)(text)
        if self.chance.random() < 0.01:
            return frame_of(text.encode(self.chance.choice(("utf-16", "utf-32", "utf-8")), "surrogatepass"), payload)
        return frame_of(text, payload)

    def damaged(self, frame: bytes) -> bytes:
        """Damage a frame: cut, longer, of other announced sizes, with flipped bits, twice."""
        chance = self.chance
        match chance.randrange(9):
            case 0:
                return frame[: chance.randrange(len(frame) + 1)]
            case 1:
                return frame + bytes(chance.choice((1, 7, 300)))
            case 2:
                size = int.from_bytes(frame[:4], "big") + chance.choice((-1, 1, -7, 100, 65536))
                return max(0, min(size, 2**32 - 1)).to_bytes(4, "big") + frame[4:]
            case 3:
                return chance.choice((b"\xff\xff\xff\xff", b"\0\0\0\0", b"\0\1\0\1", b"\x7f\xff\xff\xff")) + frame[4:]
            case 4:
                return frame + frame
            case 5:
                return b"" if chance.random() < 0.5 else chance.randbytes(chance.randrange(1, 40))
            case 6:
                return frame_of(b"\0" * 65537) if chance.random() < 0.1 else frame_of("{}")
            case 7:
                return frame + bytes(262145) if chance.random() < 0.05 else frame[4:]
            case _:
                changed = bytearray(frame)
                for _ in range(chance.randint(1, 3)):
                    if changed:
                        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
                return bytes(changed)
