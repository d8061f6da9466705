"""Read the JSON files of a model's tokenizer. What is in tokenizer.json is left to `samples.py`, templates to `chat.py`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedsoda_edge.errors import UsageProblem


def read_json(path: Path | None) -> dict[str, Any]:
    """Read a JSON object of a model; an empty one where there is no such file.

    Raises:
        UsageProblem: the file is not a JSON object.
    """
    if path is None or not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UsageProblem(f"{path} is not JSON ({error}); save the model's tokenizer again") from error
    if not isinstance(found, dict):
        raise UsageProblem(f"{path} holds a {type(found).__name__}, not an object; save the model's tokenizer again")
    return found


def special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """List the text of each special token that a tokenizer_config.json names ("eos_token", ...)."""
    found = {}
    for name, token in config.items():
        text = token.get("content") if isinstance(token, dict) else token
        if name.endswith("_token") and isinstance(text, str):
            found[name] = text
    return found
