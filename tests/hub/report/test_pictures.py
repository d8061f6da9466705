"""Each picture is drawn where it has data."""

from __future__ import annotations

from fedsoda_hub.federation import records as rec
from fedsoda_hub.report.history import read_history
from fedsoda_hub.report.pictures import draw
from fedsoda_hub.run.ledger import Ledger
from tests.hub.report.recorded import ANN, RECORDED, A, accepted, opened


def test_pictures_without_data_are_left_out() -> None:
    ledger = Ledger(None)
    ledger.append(RECORDED[0])
    assert list(draw(read_history(ledger), None)) == []
    ledger.append(RECORDED[1])
    ledger.add_traffic(ANN, 1, 1100, 300)  # greetings
    assert list(draw(read_history(ledger), None)) == ["alignment"]
    for record in RECORDED[2:8]:
        ledger.append(record)
    assert list(draw(read_history(ledger), None)) == ["loss", "alignment", "bytes", "contributions"]


def test_what_averaging_loses_has_a_picture_where_it_loses_anything() -> None:
    ledger = Ledger(None)
    for number, share in enumerate((0.0, 0.01, None), start=1):
        ledger.append(opened(number, ANN))
        ledger.append(accepted(number, ANN, 1, 1.0))
        ledger.append(rec.RoundClosed(round=number, master=A, view=A, delta=A, cross_term=share))
        history = read_history(ledger)
        assert ("cross_term" in draw(history, None)) == (number > 1)
    assert history.cross_terms == {1: 0.0, 2: 0.01}
