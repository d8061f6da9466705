"""What a Welcome and an offer say of a run of two sub-LLMs, and of none of its layers chosen again."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import msgspec
import pytest

from fedsoda_edge.protocol import messages as ms
from fedsoda_hub.federation.events import SendOffer
from fedsoda_hub.federation.state import HeldView, LedgerState, ServedSubLLM
from fedsoda_hub.serving import offers
from fedsoda_hub.settings.run import RunSettings
from tests.hub.serving.test_daemon import write_run

EDGE = ms.EdgeId("clinic-7")
RULES = {"codec": "int8", "stall_seconds": 9.0}


def digest(name: str) -> ms.Digest:
    return ms.Digest(hashlib.sha256(name.encode()).hexdigest())


def size_of(blob: ms.Digest) -> ms.BlobRef:
    return ms.BlobRef(digest=blob, bytes=len(blob))


def ref(name: str) -> ms.BlobRef:
    return size_of(digest(name))


def sub_llm(name: str, adapter: HeldView | None = None) -> ServedSubLLM:
    return ServedSubLLM(
        manifest=digest(f"{name} manifest"),
        public_kl={},
        adapter=adapter or HeldView(digest(f"{name} adapter")),
        emulator=HeldView(digest(f"{name} emulator")),
    )


def view(name: str) -> ms.ViewRef:
    return ms.ViewRef(digest=digest(name), delta=None, snapshot=None)


@pytest.fixture
def settings(tmp_path: Path) -> RunSettings:
    return write_run(tmp_path, wire=RULES, rounds={"count": 5, "min_edges": 2})


@pytest.fixture
def state() -> LedgerState:
    large, small = sub_llm("large"), sub_llm("small")
    return LedgerState(run_id="r", sub_llms=(large, small), round=3, alignment=2, losses=[1.0, 0.5])


def test_a_welcome_names_the_run_and_every_sub_llm_the_largest_first(settings: RunSettings, state: LedgerState) -> None:
    said = offers.welcome(EDGE, state, settings, size_of)
    assert (said.run_id, said.run_name, said.edge) == ("r", "small", EDGE)
    assert (said.rounds, said.rounds_done) == (5, 2)
    assert (said.codec, said.stall_seconds) == ("int8", 9.0)
    assert (said.manifest, said.emulator) == (ref("large manifest"), view("large emulator"))
    assert said.smaller == (ms.SizeClass(manifest=ref("small manifest"), emulator=view("small emulator")),)


@pytest.mark.parametrize(("size_class", "name"), [(0, "large"), (1, "small")])
def test_an_offer_is_of_the_edges_own_sub_llm(
    settings: RunSettings, state: LedgerState, size_class: int, name: str
) -> None:
    said = offers.offer(SendOffer(EDGE, size_class, "both", "both"), state, settings, size_of, 7.5)
    assert (said.round, said.rounds, said.alignment, said.due_seconds) == (3, 5, 2, 7.5)
    assert (said.view, said.emulator) == (view(f"{name} adapter"), view(f"{name} emulator"))
    assert said.local == settings.local
    assert said.manifest is None


def test_a_view_that_moved_is_offered_as_its_step_and_as_a_whole(settings: RunSettings, state: LedgerState) -> None:
    state.sub_llms = (sub_llm("large", adapter=HeldView(digest("third"), digest("step"))),)
    said = offers.offer(SendOffer(EDGE, 0, "A", "B"), state, settings, size_of, 1.0)
    assert said.trains == "A"
    assert said.view == ms.ViewRef(digest=digest("third"), delta=ref("step"), snapshot=ref("third"), moved="B")


def test_once_layers_were_chosen_again_an_offer_names_its_bundle(settings: RunSettings, state: LedgerState) -> None:
    state.repruned_for = 3
    said = offers.offer(SendOffer(EDGE, 1, "both", "both"), state, settings, size_of, 1.0)
    assert said.manifest == ref("small manifest")


@pytest.mark.parametrize(("rule", "has_feedback"), [("weighted-mean", True), ("flexlora", False)])
def test_only_flexlora_asks_for_no_error_feedback(
    settings: RunSettings, state: LedgerState, rule: Any, has_feedback: bool
) -> None:
    settings = msgspec.structs.replace(settings, aggregation=msgspec.structs.replace(settings.aggregation, rule=rule))
    said = offers.offer(SendOffer(EDGE, 0, "both", "both"), state, settings, size_of, 1.0)
    assert said.has_feedback == has_feedback
