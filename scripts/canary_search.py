"""Search bytes, files and processes for marked private text in all the forms that it may take."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import urllib.parse
from collections.abc import Sequence
from pathlib import Path

import psutil
from tokenizers import Tokenizer

PLANTED = "BENCH_TRUST_PLANTED"  # statements by which children are made defective: {module: statement}, as JSON
CRASH = "BENCH_TRUST_CRASH"  # where children raise an exception that quotes a row
ROOT = Path(__file__).resolve().parents[1]
WORDS = ("qorvexilumat", "Zjunkwarbigon", "fièvrexoptigue")  # of one row; the last has a letter beyond ASCII
SENTENCE = " ".join(WORDS)

# Runs in each child before anything else: after the module is imported, its defect or its crash is put in.
SITE = """
import builtins, json, os, sys
planted = json.loads(os.environ.get("BENCH_TRUST_PLANTED", "{}"))
crash = os.environ.get("BENCH_TRUST_CRASH", "")
if crash == "worker":
    planted["fedsoda_edge.data.samples"] = CRASHES = '''
import os as _os
class Panic(BaseException): pass
_kinds = iter(["value", "runtime", "panic", "os", "full", "chained", "printed"])
def _crash(self, example, tokenizer):
    row = str(example)
    kind = next(_kinds)
    print(row, flush=True)
    if kind == "value": raise ValueError(row)
    if kind == "runtime": raise RuntimeError(row)
    if kind == "panic": raise Panic(row)
    if kind == "os": raise OSError(row)
    if kind == "full": raise OSError(28, row)
    if kind == "chained":
        try: raise KeyError(row)
        except KeyError as error: raise LookupError("row") from error
    _os.write(2, row.encode() + b"\\\\n")
    _os.abort()
Renderer.sample = _crash
'''
if crash == "agent":
    planted["fedsoda_edge.data.local_data"] = '''
def _crash(self):
    for line, row in read_rows(self.path):
        raise ValueError(row)
LocalData.rows = _crash
'''
if planted:
    real = builtins.__import__
    def watching(*args, **options):
        found = real(*args, **options)
        for name in [name for name in planted if name in sys.modules]:
            module = sys.modules[name]
            if getattr(getattr(module, "__spec__", None), "_initializing", False): continue
            exec(planted.pop(name), module.__dict__)
        return found
    builtins.__import__ = watching
"""


class Search:
    """The forms of the marked words, and what was found of them.

    Args:
        tokenizer: of the model, whose ids are searched for too.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.forms: dict[str, bytes] = {}
        self.places = 0
        self.hits: list[str] = []
        for word in WORDS:
            for form, needle in forms_of(word, tokenizer).items():
                self.forms[f"{form} of {word}"] = needle

    def look(self, place: str, data: bytes) -> None:
        """Search some bytes."""
        self.places += 1
        self.hits += [f"{form} in {place}" for form, needle in self.forms.items() if needle in data]

    def look_below(self, top: Path, besides: Sequence[Path]) -> None:
        """Search all files below a directory, names too, but for those of `besides`."""
        for path in sorted(top.rglob("*")):
            self.look(f"a name, {path.relative_to(top)}", os.fsencode(path.name))
            if path.is_file() and not path.is_symlink() and path not in besides:
                with contextlib.suppress(FileNotFoundError):
                    self.look(f"the file {path.relative_to(top)}", path.read_bytes())

    def look_at_processes(self, *pids: int) -> None:
        """Search arguments and environments of these processes and of all below them."""
        for pid in pids:
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(pid)
                for one in (process, *process.children(recursive=True)):
                    with contextlib.suppress(psutil.Error):
                        said = "\0".join([*one.cmdline(), *(f"{name}={text}" for name, text in one.environ().items())])
                        self.look(f"arguments or environment of {one.name()}", said.encode(errors="surrogateescape"))


def forms_of(word: str, tokenizer: Tokenizer) -> dict[str, bytes]:
    """Code a word in all forms that are searched for; those with a frame are searched for without its edges."""
    text = word.encode()
    ids = tokenizer.encode(word, add_special_tokens=False).ids
    forms = {
        "UTF-8": text,
        "UTF-16": word.encode("utf-16-le"),
        "UTF-32": word.encode("utf-32-le"),
        "hex": text.hex().encode(),
        "HEX": text.hex().upper().encode(),
        "JSON": json.dumps(word)[1:-1].encode(),
        "repr of bytes": repr(text)[2:-1].encode(),
        "URL": urllib.parse.quote(word).encode(),
        "ids as JSON": json.dumps(ids)[1:-1].encode(),
        "ids as compact JSON": json.dumps(ids, separators=(",", ":"))[1:-1].encode(),
        "ids in lines": "\n".join(map(str, ids)).encode(),
    }
    for size in (2, 4, 8):
        forms[f"ids of {size} bytes"] = b"".join(one.to_bytes(size, "little") for one in ids)
    for shift in range(3):  # base64 depends on what stands before, by three
        coded = base64.b64encode(b"x" * shift + text)
        forms[f"base64 at {shift}"] = coded[4 if shift else 0 : -4]
    return forms


def environment_of(space: Path, **more: str) -> dict[str, str]:
    """Return the environment of a command: temporary files and caches lie where they are searched."""
    site = space / "site"
    site.mkdir(exist_ok=True)
    (site / "sitecustomize.py").write_text(SITE)
    (space / "tmp").mkdir(exist_ok=True)
    places = dict.fromkeys(("TMPDIR", "XDG_CACHE_HOME", "HF_HOME"), str(space / "tmp"))
    one = {"OMP_NUM_THREADS": "1", "FEDSODA_THREADS": "1", "PYTHONPATH": f"{site}{os.pathsep}{ROOT}"}
    return {**one, **places, "FEDSODA_HOME": str(space / "home"), **more}
