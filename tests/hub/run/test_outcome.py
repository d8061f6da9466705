"""What a run had reached after its last, its best or any round: from the records alone, as far as its blobs are there."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.protocol.messages import Digest, EdgeId
from fedsoda_hub.federation import records as rec
from fedsoda_hub.federation.jobs import EvaluateResult
from fedsoda_hub.run.directory import RunDirectory
from fedsoda_hub.run.ledger import Ledger, opened
from fedsoda_hub.run.outcome import read_outcome, rounds_there
from fedsoda_hub.run.status import best_round
from fedsoda_hub.serving.uploads import needed_blobs

UPDATES = {f"u{number}" for number in (1, 2, 3)}  # which no file holds here
ACCURACIES = {1: 0.5, 2: 0.75, 3: 0.625}
KL = {"pruned": 0.3, "quantized": 0.2, "aligned": 0.1}


def figures(accuracy: float, loss: float | None = 1.0) -> EvaluateResult:
    return EvaluateResult(
        accuracy={"plug_in": accuracy}, loss={"plug_in": loss}, num_examples=4, shares={"a": {"b": 1.0}}
    )


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run of three rounds, each evaluated, the second the best; before the third the emulator was realigned."""
    directory = RunDirectory(tmp_path / "t.run")
    directory.path.mkdir()

    def put(what: str) -> Digest:
        return Digest(directory.blobs.put(what.encode()))

    with opened(directory) as ledger:
        ledger.append(rec.RunStarted(run_id="r" * 16, fixed={}))
        ledger.append(
            rec.RunPrepared(manifest=put("manifest"), adapter_view=put("v0"), emulator_view=put("e0"), public_kl=KL)
        )
        for number, accuracy in ACCURACIES.items():
            if number == 3:
                ledger.append(
                    rec.Realigned(round=3, version=1, view=put("e1"), delta=put("d"), kl_before=0.2, kl_after=0.1)
                )
            play_round(ledger, number, put(f"w{number}"), put(f"v{number}"))
            ledger.append(rec.Evaluated(round=number, result=figures(accuracy)))
    return directory


def play_round(ledger: Ledger, number: int, master: Digest, view: Digest) -> None:
    ledger.append(rec.RoundOpened(round=number, cohort=(EdgeId("a"),), view=view, alignment=0, deadline_at=1.0))
    ledger.append(
        rec.UpdateAccepted(round=number, edge=EdgeId("a"), digest=Digest(f"u{number}"), num_examples=1, loss=1.0)
    )
    ledger.append(rec.RoundClosed(round=number, master=master, view=view, delta=view))


def content(directory: RunDirectory, digest: str) -> str:
    return directory.blobs.get(digest).decode()


def test_the_last_the_best_and_any_round_that_is_there(run: RunDirectory) -> None:
    last, best = read_outcome(run.path), read_outcome(run.path, best_by="accuracy")
    assert [content(run, one) for one in (last.master, last.emulator_view)] == ["w3", "e1"]
    assert (last.rounds, last.evaluated_round) == (3, 3)
    assert [content(run, one) for one in (best.master, best.emulator_view)] == [
        "w2",
        "e0",
    ]  # as they were after round 2
    assert best.evaluation is not None
    assert (best.rounds, best.evaluated_round, best.evaluation.accuracy["plug_in"]) == (2, 2, 0.75)
    first = read_outcome(run.path, best_by="accuracy", round_number=1)  # what is asked for comes before what is kept
    assert (content(run, first.master), first.rounds) == ("w1", 1)
    assert rounds_there(run.path) == [1, 2, 3]


def test_a_round_whose_master_is_gone_is_refused_with_those_that_are_there(run: RunDirectory) -> None:
    first = read_outcome(run.path, round_number=1)
    run.blobs.delete(first.master)
    with pytest.raises(UsageProblem, match=r"the master of round 1 is gone: .* rounds that are still here: 2, 3"):
        read_outcome(run.path, round_number=1)
    with pytest.raises(UsageProblem, match="round 9 has not closed; 3 have, and of these are still here: 2, 3"):
        read_outcome(run.path, round_number=9)


def test_a_figure_that_no_evaluation_has_is_refused_and_so_is_a_run_without_evaluations(
    run: RunDirectory, tmp_path: Path
) -> None:
    with pytest.raises(UsageProblem, match=r'\[task\] metric = "auc", but no evaluation of t.run has such a figure'):
        read_outcome(run.path, best_by="auc")
    bare = RunDirectory(tmp_path / "bare.run")
    bare.path.mkdir()
    with opened(bare) as ledger:
        ledger.append(rec.RunStarted(run_id="r" * 16, fixed={}))
        ledger.append(
            rec.RunPrepared(manifest=Digest("m"), adapter_view=Digest("v"), emulator_view=Digest("e"), public_kl=KL)
        )
        play_round(ledger, 1, Digest("w"), Digest("v"))
    with pytest.raises(UsageProblem, match=r"no round of bare\.run is evaluated yet"):
        read_outcome(bare.path, best_by="accuracy")


def test_a_hub_keeps_what_the_best_round_needs_and_says_which_it_is(run: RunDirectory) -> None:
    with opened(run) as ledger:
        state = ledger.replay()
    named = {content(run, digest) for digest in needed_blobs(state, "accuracy") - UPDATES}
    assert named == {"w3", "w2", "e0", "e1", "v3", "d", "manifest"}
    assert "w2" not in {content(run, digest) for digest in needed_blobs(state) - UPDATES}
    best = best_round(state, "accuracy")
    assert best is not None
    assert (best.round, best.value) == (2, 0.75)
    assert best_round(state, None) is None
    assert best_round(state, "mean_rank") is None
    assert [bool(one.result.shares) for one in state.judged] == [
        False,
        False,
        True,
    ]  # a snapshot does not grow with answers


def test_a_snapshot_of_a_release_that_kept_one_evaluation_is_not_half_read(run: RunDirectory) -> None:
    with opened(run) as ledger:
        whole = ledger.replay()
        ledger.database.write(
            ("INSERT INTO snapshot (seq, state) VALUES (?, ?)", (99, b'{"run_id":"r","evaluated":null}'))
        )
        assert ledger.replay() == whole
