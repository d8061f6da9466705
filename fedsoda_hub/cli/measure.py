"""Measure a run's full LLM for `fedsoda-hub plan RUN.toml --measure`, and show how far that is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.ports.console import note
from fedsoda_hub.settings.rates import Rates

if TYPE_CHECKING:
    from fedsoda_hub.plan import PlanReport


def measured(run: Path, given: Mapping[str, Mapping[str, object]], rates: Rates) -> PlanReport:
    """Measure the full LLM of a RUN.toml, and make the report of it.

    Args:
        given: the options that were given, by table and key of RUN.toml.

    Raises:
        UsageProblem: an option was given that RUN.toml has, or the run does not heal, of which there is nothing to measure.
    """
    from fedsoda_hub.settings.run import read_settings

    for table, key, value in ((table, *item) for table, values in given.items() for item in values.items()):
        raise UsageProblem(
            f"[{table}] {key} = {value!r} as an option beside --measure, which takes all settings from {run.name}; write it there"
        )
    settings = read_settings(run)
    if not settings.align.heal:
        raise UsageProblem(
            f'--measure shows what healing leaves, and {run.name} does not heal ([method] name = "{settings.method.name}", '
            '[align] heal = false); write name = "fedsoda" or "exact" and heal = true, or leave out --measure'
        )
    note(f"measuring {settings.model}: what healing leaves of it at several sizes")
    from fedsoda_hub.cli.display import HubDisplay
    from fedsoda_hub.events import event_of_progress
    from fedsoda_hub.run.directory import RunDirectory

    lock = RunDirectory(settings.run_dir).lock()
    try:
        from fedsoda_hub.plan import measured_report
        from fedsoda_hub.preparation.prepare import RunPreparation

        llm = RunPreparation(settings).llm
        with HubDisplay(jsonl=False) as display:
            llm.running.report = lambda progress: display.say(event_of_progress("plan", progress))
            return measured_report(llm, rates)
    finally:
        lock.release()
