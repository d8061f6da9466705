"""Sub-LLMs that are healed beside one pass over the full LLM have the errors that each has when it is healed alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from fedsoda_edge.model.source import Checkpoint
from fedsoda_edge.model.streaming import stream
from fedsoda_edge.protocol.manifest import Group, LayerPlan
from fedsoda_hub.algorithms.alignment.healing import heal
from fedsoda_hub.algorithms.pruning.layer_plan import make_plan
from fedsoda_hub.preparation import shapes
from fedsoda_hub.preparation.full_llm import StreamedLLM
from fedsoda_hub.preparation.heal import healing_texts
from fedsoda_hub.settings.run import RunSettings
from tests.hub.runs import WORDS, make_run
from tests.tiny import make_tiny_llama

LAYERS, ADAPTER = 7, 2


def healing_run(directory: Path, model: Path, **tables: dict[str, Any]) -> RunSettings:
    """A run that heals on rows of a file, and aligns nothing."""
    directory.mkdir(parents=True, exist_ok=True)
    rows = [{"word": f"{a} {b}", "answer": "yes"} for a in WORDS for b in WORDS[:4]]
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes: dict[str, dict[str, Any]] = {
        "public": {"like_task": "rows.jsonl"},
        "align": {"heal": True, "steps": 0},
        "method": {"distance": "healed", "realign_every": 0},
    }
    return make_run(
        directory, model, **{name: {**changes.get(name, {}), **tables.get(name, {})} for name in {**changes, **tables}}
    )


def plan(*starts: int, size: int = 1) -> LayerPlan:
    groups = [Group(start=t, removed=tuple(range(t + 1, t + size + 1)), distance=0.0) for t in starts]
    return make_plan(LAYERS, ADAPTER, groups)


PLANS = [plan(), plan(0, 2), plan(1, size=3), plan(3)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("shapes") / "model", layers=LAYERS, dtype=torch.float32)


def alone(llm: StreamedLLM, one: LayerPlan, *, in_nf4: bool) -> float:
    """The error of one plan: healed by itself, run as a whole, against the hidden states of plain Transformers."""
    texts = healing_texts(llm)
    judged = texts[3::4]
    seen = [text for place, text in enumerate(texts) if place % 4 != 3]
    after = {layer: layer for layer in range(LAYERS - ADAPTER)} | {
        group.start: group.removed[-1] for group in one.groups
    }
    for group in one.groups:
        for layer in group.removed:
            del after[layer]
    layers = dict(heal(llm.source, after, seen, in_nf4=in_nf4, lacking={}, healed={}))
    made = stream(llm.source.with_layers(layers), list(after), judged)
    return error(made, full_states(llm.source, judged))


def full_states(source: Checkpoint, texts: Sequence[Tensor]) -> list[Tensor]:
    whole = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32)
    with torch.inference_mode():
        return [whole(text[None], output_hidden_states=True).hidden_states[LAYERS - ADAPTER][0] for text in texts]


def error(made: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Position by position."""
    lengths = sorted(float(row.norm()) for state in wanted for row in state[1:])
    limit = 5 * lengths[(len(lengths) - 1) // 2]
    found = [
        float((a - b).norm() / b.norm()) ** 2
        for one, other in zip(made, wanted, strict=True)
        for a, b in zip(one[1:], other[1:], strict=True)
        if float(b.norm()) <= limit
    ]
    return sum(found) / len(found)


@pytest.mark.parametrize(("base", "close"), [("bf16", 1e-3), ("nf4", 0.05)])
def test_the_error_of_each_plan_is_that_of_healing_it_alone(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, base: str, close: float
) -> None:
    monkeypatch.setattr("fedsoda_hub.preparation.running.has_instructions_for", lambda _: False)
    llm = StreamedLLM(healing_run(tmp_path, model, method={"emulator_base": base}))
    found = shapes.healed_errors(llm, PLANS)
    assert found == pytest.approx([alone(llm, one, in_nf4=base == "nf4") for one in PLANS], rel=close, abs=1e-6)
    if base == "bf16":
        assert found[0] < 1e-6 < min(found[1:])


def test_the_full_llm_is_run_once_whatever_is_compared(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = StreamedLLM(healing_run(tmp_path, model))
    ran: list[int] = []
    really = shapes._run

    def counted(source: Checkpoint, layers: Sequence[int], *rest: Any) -> list[Tensor]:
        if source is llm.source:
            ran.extend(layers)
        return really(source, layers, *rest)

    monkeypatch.setattr(shapes, "_run", counted)
    shapes.healed_errors(llm, PLANS)
    assert ran == list(range(LAYERS - ADAPTER))


def test_progress_is_told_from_the_beginning_and_layer_by_layer(tmp_path: Path, model: Path) -> None:
    llm = StreamedLLM(healing_run(tmp_path, model))
    told: list[tuple[int, int]] = []
    llm.running.report = lambda one: told.append((one.done, one.total))  # type: ignore[union-attr]
    shapes.healed_errors(llm, PLANS)
    total = sum(len(one.sub_emulator) for one in PLANS)
    assert told == [(done, total) for done in range(total + 1)]


def test_no_more_text_is_judged_on_than_choosing_needs(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = StreamedLLM(healing_run(tmp_path, model))
    everything = healing_texts(llm)
    assert len(shapes.choosing_texts(llm)) == len(everything)
    monkeypatch.setattr(shapes, "CHOOSING_IDS", sum(map(len, everything)) // 3)
    some = shapes.choosing_texts(llm)
    assert len(everything) // 4 - 1 <= len(some) <= len(everything) // 3 + 1
    kinds = {len(text) for text in some}
    assert len(kinds & {len(text) for text in llm.text.used}) > 0  # public text is among them
