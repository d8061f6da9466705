"""Open a run on disk for the one hub that serves it: lock it, replay its ledger, refuse settings that changed after it was prepared.

Which settings may change is `settings/run.py`'s.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path

from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.ports.system import Lock
from fedsoda_edge.protocol.signatures import SigningKey
from fedsoda_hub.federation import records as rec
from fedsoda_hub.federation.schedule import Rules
from fedsoda_hub.federation.state import LedgerState
from fedsoda_hub.run.directory import RunDirectory
from fedsoda_hub.run.keys import signing_key
from fedsoda_hub.run.ledger import Ledger
from fedsoda_hub.run.tokens import write_secret
from fedsoda_hub.settings.run import MAY_CHANGE, RunSettings, differences


@dataclass(frozen=True)
class ServedRun:
    """A run that this process has locked.

    state: its folded ledger. admin_secret: the secret of whoever may ask for its status. key: by which devices know the hub.
    """

    directory: RunDirectory
    ledger: Ledger
    state: LedgerState
    admin_secret: str
    key: SigningKey
    lock: Lock

    def close(self) -> None:
        """Release the run, so that another hub can serve it."""
        self.ledger.close()
        self.lock.release()


def resume(settings: RunSettings) -> ServedRun:
    """Open the run of these settings, whether it has begun or not.

    Raises:
        UsageProblem: another hub has it, or it was prepared with other settings.
        DiskFull: the disk has no space left.
    """
    directory = RunDirectory(settings.run_dir)
    lock = directory.lock()
    try:
        ledger = Ledger(directory.ledger)
    except BaseException:
        lock.release()
        raise
    try:
        state = _replayed(ledger, settings)
        return ServedRun(directory, ledger, state, _admin_secret(directory), signing_key(directory.signing_key), lock)
    except BaseException:
        ledger.close()
        lock.release()
        raise


def _replayed(ledger: Ledger, settings: RunSettings) -> LedgerState:
    """Replay the ledger, and record the settings of the run.

    Until it is prepared every key may change: what was refused then is to be corrected, not to be put back.

    Raises:
        UsageProblem: a key changed that may not, since the bundle was made with it.
    """
    state = ledger.replay()
    changed = differences(state.fixed, settings) if state.run_id else []
    if not state.run_id or (changed and state.phase == "preparing"):
        run_id = state.run_id or secrets.token_hex(8)
        _add(ledger, state, rec.RunStarted(run_id=run_id, fixed=settings.fixed()))
    elif changed:
        raise UsageProblem(
            f"{Path(settings.path).name} has changed since this run was prepared: {'; '.join(changed)}; "
            f"restore the old values (only {MAY_CHANGE} may change), or begin again with `fedsoda-hub reset {settings.path}`"
        )
    rounds = settings.rounds
    values = {
        "count": rounds.count,
        "quorum": rounds.quorum,
        "deadline_seconds": rounds.deadline_seconds,
        "host": settings.listen.host,
        "port": settings.listen.port,
    }
    if (how := settings.aggregation).robust != "none":  # written only then, so that older ledgers stay as they are
        values |= {"robust": how.robust, "robust_share": how.robust_share}
    last = [record.values for record in ledger.records() if isinstance(record, rec.SettingsChanged)]
    if not last or last[-1] != values:
        _add(ledger, state, rec.SettingsChanged(values=values))
    return state


def _add(ledger: Ledger, state: LedgerState, record: rec.AnyRecord) -> None:
    ledger.append(record)
    state.apply(record)


def _admin_secret(directory: RunDirectory) -> str:
    if not directory.admin_token.exists():
        write_secret(directory.admin_token, secrets.token_urlsafe(32))
    return directory.admin_token.read_text().strip()


def rules_of(settings: RunSettings) -> Rules:
    """Collect the settings that decide rounds."""
    rounds = settings.rounds
    return Rules(
        count=rounds.count,
        min_edges=rounds.min_edges,
        cohort=rounds.cohort,
        quorum=rounds.quorum,
        deadline_seconds=rounds.deadline_seconds,
        stall_seconds=settings.wire.stall_seconds,
        realign_every=settings.method.realign_every,
        reprune_every=settings.method.reprune_every,
        seed=settings.seed,
        has_eval=settings.eval_data is not None,
        eval_every=settings.task.eval_every,
        aggregation=settings.aggregation.rule,
    )
