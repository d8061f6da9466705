"""Shape what a command prints with --json, where its keys are not those of a struct."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from fedsoda_hub.federation.jobs import PrepareResult

if TYPE_CHECKING:
    from fedsoda_hub.report.page import Written
    from fedsoda_hub.settings.run import RunSettings


def prepared_values(result: PrepareResult) -> dict[str, object]:
    """Show the result of `prepare --json`: the largest sub-LLM, and the smaller ones and the master where there are any."""
    first, *others = result.sub_llms
    largest: dict[str, object] = msgspec.to_builtins(first)
    smaller = [
        msgspec.to_builtins(one) | ({"adapter_view": None} if one.adapter_view == first.adapter_view else {})
        for one in others
    ]
    return largest | ({"smaller": smaller, "master": result.master} if smaller else {})


def write_event_file(settings: RunSettings, to: Path, written: Written) -> Written:
    """Write a run's figures for TensorBoard, and name the file in what `report` wrote.

    Raises:
        UsageProblem: the hub writes there itself, or the directory cannot be written.
    """
    from fedsoda_edge.errors import UsageProblem
    from fedsoda_edge.ports.console import note
    from fedsoda_edge.units import counted
    from fedsoda_hub.run.directory import RunDirectory
    from fedsoda_hub.run.ledger import opened_to_read
    from fedsoda_hub.serving.event_files import write_run

    live = settings.report.tensorboard
    if live is not None and (settings.directory / live).resolve() == to.resolve():
        raise UsageProblem(
            f"--tensorboard {to} is written by the hub itself ([report] tensorboard); name another directory"
        )
    with opened_to_read(RunDirectory(settings.run_dir)) as ledger:
        path, count = write_run(to, settings.name, ledger, settings.rounds.count)
    note(f"wrote {counted(count, 'figure')} into {path}; show them with: tensorboard --logdir {to}")
    return msgspec.structs.replace(written, event_file=str(path))
