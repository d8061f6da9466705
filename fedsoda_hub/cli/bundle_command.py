"""Parse `fedsoda-hub bundle`, and tell what it wrote. Which files a run's bundles have is `serving/shelf.py`'s."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from fedsoda_edge.ports.console import finish, note, reporting, working
from fedsoda_edge.units import counted, human_bytes
from fedsoda_hub.cli.options import Debug, Json, RunFile


def bundle(
    run: RunFile,
    to: Annotated[
        Path,
        typer.Option(
            "--to", envvar="FEDSODA_BUNDLE_TO", help="a directory; files that are there already are left alone"
        ),
    ],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    r"""Write the files that edges download, named by digest, to be copied to the \[blobs] mirrors of the run."""
    with reporting(as_json, False, debug), working("copying the bundle"):
        from fedsoda_hub.serving.mirrored import write_files
        from fedsoda_hub.settings.run import read_settings

        written = write_files(read_settings(run), to)
        note(
            f"{written.directory}: {counted(written.files, 'file')}, {human_bytes(written.bytes)}, of which "
            f"{written.copied} copied; run this again when the hub has drawn other layers"
        )
        finish({"status": "ok", **msgspec.to_builtins(written)}, as_json, False)
