"""Find the status of a run for commands: from the hub that serves it, or else from what lies in its directory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from fedsoda_hub.run.status import LiveStatus


def status_of_run(run: Path) -> tuple[bool, LiveStatus]:
    """Return whether a hub runs, and the run's status, from the hub or else from its ledger.

    Raises:
        UsageProblem: the run has not been started.
    """
    from fedsoda_hub.federation.state import LedgerState
    from fedsoda_hub.federation.steering import count_in_force
    from fedsoda_hub.run.directory import RunDirectory
    from fedsoda_hub.run.ledger import not_started, opened_to_read
    from fedsoda_hub.run.process import read_note
    from fedsoda_hub.run.status import live_status, run_status
    from fedsoda_hub.serving.ordering import ask_running_hub
    from fedsoda_hub.settings.run import read_settings

    settings = read_settings(run)
    directory = RunDirectory(settings.run_dir)
    noted = read_note(directory.process)
    hub, work = (None, None) if noted is None else (noted.hub, noted.work)
    is_prepared_alone = hub is not None and hub.state == "preparing"
    state, traffic, known = LedgerState(), [], []
    if directory.ledger.exists():
        with opened_to_read(directory) as ledger:
            state, traffic, known = ledger.replay(), ledger.traffic(), ledger.edges.all()
    if not state.run_id and not is_prepared_alone:  # the ledger holds tokens only
        raise not_started(settings.path)
    live = ask_running_hub(directory)
    if live is not None and live.run_id == state.run_id:  # an old address may be another run's by now
        return True, live
    edges = [msgspec.structs.replace(one, standing=state.measured.standings.get(one.edge)) for one in known]
    count = count_in_force(settings.rounds.count, state)
    found = run_status(settings.name, count, traffic, state, settings.task.best_by)
    return False, live_status(found, edges, hub=hub, work=work if is_prepared_alone else None)
