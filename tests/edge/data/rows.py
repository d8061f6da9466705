"""Rows that the tests of this room write, and the templates that they are read by."""

from __future__ import annotations

import json
from pathlib import Path

from fedsoda_edge.data.local_data import LocalData
from fedsoda_edge.protocol.template import TextTemplate

PROMPT, COMPLETION = TextTemplate("{text}:"), TextTemplate("{label}")
ROWS = [{"text": "in the rain", "label": "yes"}, {"text": "on a mat", "label": "no"}]

BY_DEFAULT = TextTemplate("{prompt}"), TextTemplate("{completion}")
MESSAGES = [
    {"role": "user", "content": "in the rain"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "on a mat"},
    {"role": "assistant", "content": "no"},
]


def write(path: Path, *lines: object) -> LocalData:
    """JSON Lines of these objects; a string stands as it is."""
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return LocalData.from_jsonl(path)
