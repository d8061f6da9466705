"""Read the JSON files of a model's tokenizer. What is in tokenizer.json is left to `samples.py`, templates to `chat.py`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedsoda_edge.errors import UsageProblem

TokenizerFile = Path | bytes  # a file on disk, or what is in it


def read_text(file: TokenizerFile) -> str:
    """Read a file of a model as text, with or without a BOM.

    Raises:
        UsageProblem: it is not UTF-8.
    """
    try:
        return (file if isinstance(file, bytes) else file.read_bytes()).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        name = file if isinstance(file, Path) else "a file of the tokenizer"
        raise UsageProblem(
            f"{name} is not UTF-8 (byte {error.start + 1}: {error.reason}); save the model's tokenizer again"
        ) from error


def read_json(file: TokenizerFile | None) -> dict[str, Any]:
    """Read a JSON object of a model; an empty one where there is no such file.

    Raises:
        UsageProblem: the file is not a JSON object.
    """
    if file is None or (isinstance(file, Path) and not file.exists()):
        return {}
    name = file if isinstance(file, Path) else "a file of the tokenizer"
    try:
        found = json.loads(read_text(file))
    except (ValueError, RecursionError) as error:
        raise UsageProblem(f"{name} is not JSON ({error}); save the model's tokenizer again") from error
    if not isinstance(found, dict):
        raise UsageProblem(f"{name} holds a {type(found).__name__}, not an object; save the model's tokenizer again")
    return found


def special_tokens(config: Mapping[str, object]) -> dict[str, str]:
    """List the text of each special token that a tokenizer_config.json names ("eos_token", ...)."""
    found = {}
    for name, token in config.items():
        text = token.get("content") if isinstance(token, dict) else token
        if name.endswith("_token") and isinstance(text, str):
            found[name] = text
    return found
