"""A report's history is what the ledger says."""

from __future__ import annotations

from fedsoda_edge.protocol.messages import EdgeId
from fedsoda_hub.federation import records as rec
from fedsoda_hub.report.history import kl_sentence, read_history
from fedsoda_hub.run.ledger import Ledger
from tests.hub.report.recorded import ANN, BOB, RECORDED, opened


def test_the_history_is_what_the_ledger_says() -> None:
    ledger = Ledger(None)
    for record in RECORDED:
        ledger.append(record)
    ledger.add_traffic(ANN, 1, 1000, 2000)
    ledger.add_traffic(BOB, 2, 30, 40)
    history = read_history(ledger)
    first, second = history.rounds
    assert first.loss == (30 * 2.0 + 10 * 1.0) / 40  # weighted by examples
    assert (first.cohort, first.answered) == ([ANN, BOB], {})  # who was asked again and came is not missed
    assert (second.closed_at, second.loss, list(second.answered)) == (None, None, [BOB])
    assert first.closed_at is not None
    assert history.began_at <= first.opened_at <= first.updates[ANN].at <= first.closed_at <= second.opened_at
    assert [history.bytes_until(number) for number in (0, 1, 2)] == [0, 3000, 3070]
    assert not history.is_over
    ledger.append(rec.RunEnded(rounds=2))
    assert read_history(ledger).is_over


def test_the_history_says_how_many_rounds_the_owner_asked_for_meanwhile() -> None:
    ledger = Ledger(None)
    for record in RECORDED:
        ledger.append(record)
    assert read_history(ledger).count is None
    ledger.append(rec.RulesChanged(values={"count": 7}, instead_of={"count": 20}))
    assert read_history(ledger).count == 7
    ledger.append(rec.SettingsChanged(values={"count": 9}))  # RUN.toml says something else now, which counts
    assert read_history(ledger).count is None


def test_edges_are_in_the_order_people_count() -> None:
    ledger = Ledger(None)
    ledger.append(opened(1, *(EdgeId(name) for name in ("ward-10", "ward-9", "lab", "²"))))
    assert read_history(ledger).edges == ["lab", "ward-9", "ward-10", "²"]


def test_nothing_is_said_of_an_alignment_that_a_full_emulator_does_not_need() -> None:
    pruned = {"pruned": 0.619, "quantized": 0.631, "aligned": 0.386}
    assert kl_sentence(pruned) == "public KL 0.619 pruned, 0.631 as stored, 0.386 aligned"
    full = {"pruned": 0.0, "quantized": 0.012, "aligned": 0.012}
    assert kl_sentence(full) == "public KL 0.012 as stored, all layers kept"
