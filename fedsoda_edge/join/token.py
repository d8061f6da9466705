"""Read the token with which this device joins. It never comes from argv, which every user of a machine can read.

Whether the token is the right one is left to the hub.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from fedsoda_edge.errors import UsageProblem


def read_token(token_file: str | Path | None) -> str:
    """Read the token from a file, from stdin for "-", or from FEDSODA_TOKEN where no file is named.

    Raises:
        UsageProblem: there is no token, its file cannot be read, or what it holds cannot be a token.
    """
    source = "stdin" if str(token_file) == "-" else token_file or "FEDSODA_TOKEN"
    if token_file is None:
        token = os.environ.get("FEDSODA_TOKEN", "")
        if not token.strip():
            raise UsageProblem("there is no token; name its file with token_file (- reads stdin), or set FEDSODA_TOKEN")
    elif str(token_file) == "-":
        token = sys.stdin.readline()
    else:
        try:
            token = Path(token_file).read_text(encoding="utf-8-sig", errors="replace")
        except OSError as error:
            raise UsageProblem(
                f"the token file {token_file} cannot be read: {error.strerror}; check the path, or ask the hub's owner"
            ) from error
    token = token.strip()
    if not token:
        raise UsageProblem(f"the token from {source} is empty; ask the hub's owner for one")
    if not re.fullmatch("[!-~]+", token):  # it goes into a header
        raise UsageProblem(
            f"the token from {source} is not one word of ASCII characters, as tokens are; check that it is the right one"
        )
    return token
