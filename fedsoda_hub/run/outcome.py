"""Read what a run has reached from its ledger: after its last round, after the best one, or after any whose master is there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.protocol.messages import Digest
from fedsoda_hub.federation import records as rec
from fedsoda_hub.federation.best import Metric, best_of, figure_of
from fedsoda_hub.federation.jobs import EvaluateResult
from fedsoda_hub.federation.state import LedgerState
from fedsoda_hub.run.directory import RunDirectory
from fedsoda_hub.run.ledger import not_started, opened_to_read


@dataclass(frozen=True)
class Outcome:
    """The point that a run has reached, or had after one of its rounds.

    master: digest of w. emulator_view, manifest: digests of those in force of the largest sub-LLM. rounds: how many had
    closed, which is also the number of the last of them. evaluation: the last figures up to that point, of evaluated_round.
    """

    master: Digest
    emulator_view: Digest
    manifest: Digest
    rounds: int
    evaluation: EvaluateResult | None
    evaluated_round: int

    def figure(self, metric: Metric) -> float | None:
        """Return the plug-in's figure at this point; None: it was not evaluated then, or has no such figure."""
        is_of_now = self.evaluated_round == self.rounds
        return figure_of(self.evaluation, metric) if self.evaluation is not None and is_of_now else None


def read_outcome(
    run_dir: Path, run_file: str | Path = "RUN.toml", *, best_by: Metric | None = None, round_number: int | None = None
) -> Outcome:
    """Read what a run has reached from its ledger, whether a hub serves it or not.

    Args:
        run_file: the run's settings, as the error names them.
        best_by: [task] metric of a run that keeps the best round; None: the last round counts.
        round_number: the round that is asked for, whichever the run keeps; None: that which it keeps.

    Raises:
        UsageProblem: the run has not been started, none of its rounds has closed yet, no evaluated round has the figure, or
            the master of the round that is asked for is gone.
    """
    directory = RunDirectory(run_dir)
    if not directory.ledger.exists():
        raise not_started(run_file)
    with opened_to_read(directory) as ledger:
        state, records = ledger.replay(), ledger.records()
    if not state.losses:
        if not state.run_id:  # the ledger holds tokens only
            raise not_started(run_file)
        raise UsageProblem(
            f"no round of {run_dir.name} has closed yet (phase: {state.phase}); wait until the first one closes"
        )
    if round_number is not None:
        return _of_round(directory, records, round_number)
    if best_by is None:
        return _outcome(state)
    if not state.judged:
        raise UsageProblem(
            f'[task] keep = "best", and no round of {run_dir.name} is evaluated yet; wait for the first evaluation, or name a '
            "round: --round N"
        )
    best = best_of(state.judged, best_by)
    if best is None:
        raise UsageProblem(
            f'[task] metric = "{best_by}", but no evaluation of {run_dir.name} has such a figure (auc needs two choices, '
            "mean_rank more than two); write another metric, or name a round: --round N"
        )
    return _of_round(directory, records, best.round)


def rounds_there(run_dir: Path) -> list[int]:
    """List the rounds, ascending, whose master is still in the store, so that they can be exported."""
    directory = RunDirectory(run_dir)
    with opened_to_read(directory) as ledger:
        return _there(directory, ledger.records())


def _there(directory: RunDirectory, records: Iterable[rec.AnyRecord]) -> list[int]:
    blobs, manifest, found = directory.blobs, Digest(""), []
    for record in records:
        if isinstance(record, rec.RunPrepared | rec.Repruned):
            manifest = record.manifest
        if isinstance(record, rec.RoundClosed) and blobs.has(record.master) and blobs.has(manifest):
            found.append(record.round)
    return found


def _of_round(directory: RunDirectory, records: Iterable[rec.AnyRecord], number: int) -> Outcome:
    """Fold the records up to the close of a round, and its evaluation where there is one.

    Raises:
        UsageProblem: the round has not closed, or its master is gone.
    """
    state, reached = LedgerState(), None
    records = list(records)
    for record in records:
        if reached is not None and isinstance(record, rec.Evaluated) and record.round == number:
            state.apply(record)
            return _outcome(state)
        if reached is not None and isinstance(record, rec.RoundOpened | rec.Repruned | rec.Realigned):
            break  # what was in force after the round is not any more
        state.apply(record)
        if isinstance(record, rec.RoundClosed) and record.round == number:
            there = _there(directory, records)
            if number not in there:
                raise UsageProblem(
                    f"the master of round {number} is gone: a hub keeps the last ones, and the best with [task] keep = "
                    f'"best"; rounds that are still here: {_listed(there)}'
                )
            reached = _outcome(state)
    if reached is None:
        closed = len(state.losses)
        raise UsageProblem(
            f"round {number} has not closed; {closed} have, and of these are still here: {_listed(_there(directory, records))}"
        )
    return reached


def _listed(rounds: list[int]) -> str:
    return ", ".join(map(str, rounds)) or "none"


def _outcome(state: LedgerState) -> Outcome:
    largest = state.largest
    digests = state.master, largest.emulator.digest, largest.manifest
    return Outcome(*digests, len(state.losses), state.evaluation, state.evaluated_round)
