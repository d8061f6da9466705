"""Read files of a model's directory that other programs wrote, and say what a file is that is not what its name says.

What a config means is `config_file.py`'s, which tensors belong together `weight_files.py`'s.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

from fedsoda_edge.errors import UsageProblem, panics_caught
from fedsoda_edge.protocol.tokenizer_json import check_tokenizer_json

MAX_JSON_BYTES = 64 << 20  # the index of 10^5 tensors has a tenth of it
_LFS = b"version https://git-lfs.github.com/spec/"


def import_advice(file: Path) -> str:
    """Say how a GGUF becomes a model's directory."""
    return f"`fedsoda-hub import {file} --to DIRECTORY` makes a model directory of it: name that one"


def what_is(file: Path) -> str:
    """Say what a file that cannot be used is instead, and what to do, from its first bytes."""
    with file.open("rb") as opened:
        start = opened.read(512)
    size = file.stat().st_size
    if not start:
        return "it is empty: the disk was full, or the download was cut; fetch it again"
    if start.startswith(_LFS):
        return "it is a Git LFS pointer, not the file itself; run `git lfs pull` in its directory"
    if start.startswith(b"GGUF"):
        return f"it is a GGUF; {import_advice(file)}"
    if start.lstrip()[:14].lower().startswith((b"<!doctype html", b"<html")):
        return "it is a web page; download the file itself"
    if not start.strip(b"\0"):
        return "it begins with zeros: its download did not end; fetch it again"
    if zipfile.is_zipfile(file) or start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x04")):
        return (
            "it is a pickle of PyTorch, which can run code; convert it on a machine where you trust it: "
            "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(OUT)"
        )
    return f"it has {size} bytes and was cut or changed; fetch it again"


def present(file: Path) -> bool:
    """Tell whether the file is there.

    Raises:
        UsageProblem: it is a link to nothing, as a copy of one snapshot of a model hub's cache holds, or no file.
    """
    try:
        if file.is_symlink() and not file.exists():
            raise UsageProblem(
                f"{file} is a link to {file.readlink()}, which is not there; copy the directory with its links followed "
                "(cp -rL), or fetch the model again"
            )
        return file.is_file()
    except OSError as error:
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: OSError) -> UsageProblem:
    return UsageProblem(f"{file} cannot be read ({error.strerror or error}); make it readable for this user")


def read_json(file: Path) -> dict[str, Any]:
    """Read an object of JSON in any of Unicode's encodings, with or without a byte order mark.

    Raises:
        UsageProblem: the file cannot be read, or holds something else.
    """
    try:
        size = file.stat().st_size
        if size > MAX_JSON_BYTES:
            raise UsageProblem(f"{file} is not JSON: {what_is(file)}")
        data = file.read_bytes()
        value = json.loads(data)  # finds the encoding
    except OSError as error:
        raise _unreadable(file, error) from error
    except (ValueError, RecursionError) as error:
        if data.lstrip()[:1] in (b"{", b"[") or data.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
            raise UsageProblem(f"{file} is not JSON ({error}); correct that place, or fetch the file again") from error
        raise UsageProblem(f"{file} is not JSON: {what_is(file)}") from error
    if not isinstance(value, dict):
        raise UsageProblem(f"{file} holds a {type(value).__name__}, but an object {{...}} is expected; fetch it again")
    return value


def check_tokenizer(directory: Path) -> None:
    """Refuse a tokenizer.json that the package tokenizers cannot read, and files beside it that are not JSON.

    Raises:
        UsageProblem: as above.
    """
    import tokenizers

    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if present(directory / name):
            read_json(directory / name)
    file = directory / "tokenizer.json"
    try:
        check_tokenizer_json(file.read_text(encoding="utf-8-sig"))
        with panics_caught():
            tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # it raises nothing more exact
        is_pointer = file.stat().st_size < 1024
        reason = (
            what_is(file) if is_pointer else f"{error}; upgrade it (pip install -U tokenizers), or fetch the file again"
        )
        raise UsageProblem(
            f"{file} is not a tokenizer that tokenizers {tokenizers.__version__} reads: {reason}"
        ) from error
