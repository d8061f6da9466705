"""An offer takes the update that it trained, as it was trained, and no other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from fedsoda_edge.data.local_data import LocalData
from fedsoda_edge.edge import Edge, Participation
from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.testing import ScriptedHub
from tests.joins import joining
from tests.test_schemas import ROWS


@pytest.fixture
def hub(scripted: Path) -> ScriptedHub:
    return ScriptedHub(rounds=2, bundle=scripted)


@pytest.fixture
def participation(hub: ScriptedHub, tmp_path: Path) -> Iterator[Participation]:
    (tmp_path / "visits.jsonl").write_text(ROWS)
    with joining(Edge(hub, device="cpu"), LocalData(tmp_path / "visits.jsonl")) as participation:
        yield participation


def test_an_update_of_another_round_is_refused(participation: Participation, hub: ScriptedHub) -> None:
    offers = iter(participation)
    first = next(offers)
    update = first.train()
    assert first.submit(update)
    second = next(offers)
    other = second.train()
    with pytest.raises(
        UsageProblem, match=r"the update of round 1 .* is not the one that was trained last, of round 2"
    ):
        second.submit(replace(update, digest="0" * 64))
    with pytest.raises(UsageProblem, match="is not the one that was trained last"):
        second.submit(replace(other, round_number=3))
    assert [sent.round for sent in hub.updates] == [1]
    assert second.submit(other)


def test_an_update_that_was_altered_is_refused(participation: Participation, hub: ScriptedHub, tmp_path: Path) -> None:
    offer = next(iter(participation))
    update = offer.train()
    scaled = tmp_path / "scaled"
    scaled.write_bytes(update.path.read_bytes()[::-1])
    with pytest.raises(UsageProblem, match=f"it was trained as {update.digest[:12]}, so its file was changed"):
        offer.submit(replace(update, path=scaled))
    with pytest.raises(UsageProblem, match=r"has digest \(no file\)"):
        offer.submit(replace(update, path=tmp_path / "gone"))
    whole = update.path.read_bytes()
    update.path.write_bytes(whole[::-1])
    with pytest.raises(UsageProblem, match="its file was changed; submit it as"):
        offer.submit(update)
    update.path.write_bytes(whole)
    assert hub.updates == []
    assert offer.submit(update)


def test_an_update_is_handed_in_once(participation: Participation, hub: ScriptedHub) -> None:
    offer = next(iter(participation))
    update = offer.train()
    assert (offer.submit(update), offer.submit(update)) == (True, True)
    assert [sent.round for sent in hub.updates] == [1]
