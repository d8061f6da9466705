"""Load a model's tokenizer as Transformers does, and write down what came of it, so that `tokenizers` alone gives its ids.

`AutoTokenizer` does more than read tokenizer.json: classes build their own normalizer and pre-tokenizer, and
tokenizer_config.json and special_tokens_map.json add tokens, bos and eos. Edges read the result (`data/samples.py`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fedsoda_edge.errors import UsageProblem, panics_caught

PROBE = "the\n\u00e9 \u65e5\U0001f600 <|\u0378|>"  # hardly a vocabulary has all of it


def own_tokenizer(directory: Path) -> dict[str, bytes]:
    """Load the tokenizer of a model's directory, and return the files that must change to give the same ids, by name.

    No code of the model is run, and nothing is fetched.

    Raises:
        UsageProblem: Transformers cannot load it, or it fails on a text.
    """
    files = {}
    loaded = _loaded(directory)
    backend = loaded.backend_tokenizer
    backend.no_truncation()  # a file may carry the settings of whoever saved it
    backend.no_padding()
    try:
        with panics_caught():
            backend.encode(PROBE)
    except Exception as error:  # such as an unknown token that is not in the vocabulary: only a text shows it
        raise _problem(directory, error) from error
    plain = type(backend).from_str((directory / "tokenizer.json").read_text(encoding="utf-8-sig"))
    plain.no_truncation()
    plain.no_padding()
    if plain.to_str() != backend.to_str():
        files["tokenizer.json"] = backend.to_str().encode()
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8-sig")) if path.exists() else {}
    named = {name: str(token) for name, token in loaded.special_tokens_map.items() if isinstance(token, str)}
    if any(_text(config.get(name)) != token for name, token in named.items()):
        files["tokenizer_config.json"] = json.dumps(config | named, ensure_ascii=False, indent=2).encode()
    return files


def own_eos(directory: Path) -> int | None:
    """Find the id of the token that a model's tokenizer names as its end; None: it names none.

    Raises:
        UsageProblem: Transformers cannot load the tokenizer.
    """
    found = _loaded(directory).eos_token_id
    return None if found is None else int(found)


def _loaded(directory: Path) -> Any:
    """Load what `AutoTokenizer` makes of a directory; for a class that only the model's own code has, of tokenizer.json."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast, dynamic_module_utils

    path = directory / "tokenizer.json"
    if not path.exists():
        raise UsageProblem(f"{directory} has no tokenizer.json; save the model's fast tokenizer there")
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0  # nobody is asked whether a model's code may run: it may not
    try:
        with panics_caught():
            made = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
        if hasattr(made, "backend_tokenizer"):
            return made
    except Exception:  # any file of the directory may be wrong, and Transformers raises whatever it meets
        pass
    try:
        with panics_caught():
            return PreTrainedTokenizerFast.from_pretrained(str(directory), local_files_only=True)
    except Exception as error:
        raise _problem(directory, error) from error


def _problem(directory: Path, error: Exception) -> UsageProblem:
    return UsageProblem(
        f"the tokenizer in {directory} cannot be loaded ({str(error)[:200] or type(error).__name__}); save it again with the "
        "save_pretrained of Transformers"
    )


def _text(token: object) -> object:
    return token.get("content") if isinstance(token, dict) else token
