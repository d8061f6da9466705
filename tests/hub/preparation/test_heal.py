"""A run that heals: what leaves the hub is nearer to the full LLM, and an interrupted preparation ends with the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedsoda_edge.data.samples import SampleTokenizer
from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.model.bundle import Bundle
from fedsoda_edge.model.source import Checkpoint
from fedsoda_edge.model.streaming import stream
from fedsoda_hub.preparation import self_generated
from fedsoda_hub.preparation.filled import REUSE
from fedsoda_hub.preparation.full_llm import StreamedLLM
from fedsoda_hub.preparation.heal import healing_texts
from fedsoda_hub.settings.methods import METHODS
from fedsoda_hub.settings.run import RunSettings
from tests.hub.runs import WORDS, killed_after, make_run, prepare
from tests.tiny import make_tiny

HEALED = {"heal": True, "steps": 0}
NEVER = {"realign_every": 0}


@pytest.fixture(autouse=True)
def _few_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_generated, "MAX_PROMPTS", 200)
    monkeypatch.setattr(self_generated, "COLUMN_IDS", 8)


def border_error(settings: RunSettings) -> float:
    """How far the sub-emulator's states are from the full LLM's on the task's prompts, relative, first positions aside."""
    bundle, source = Bundle.open(settings.run_dir / "bundle"), Checkpoint.open(settings.model)
    tokenizer = SampleTokenizer(source.path / "tokenizer.json", None)
    prompts = [torch.tensor(tokenizer.encode(f"Say {word}:")) for word in WORDS]
    wanted = torch.cat([states[1:] for states in stream(source, bundle.plan.emulator, prompts)])
    made = torch.cat([states[1:] for states in stream(bundle, bundle.plan.sub_emulator, prompts)])
    return float(((made - wanted).square().sum(dim=1) / wanted.square().sum(dim=1)).mean())


def test_a_healed_sub_llm_is_nearer_to_the_full_llm(tmp_path: Path, tiny_llama: Path) -> None:
    plain = make_run(tmp_path / "plain", tiny_llama, align={"steps": 0}, method=NEVER)
    healed = make_run(tmp_path / "healed", tiny_llama, align=HEALED, method=NEVER)
    before, after = prepare(plain), prepare(healed)
    assert border_error(healed) < 0.7 * border_error(plain)
    assert after.sub_llms[0].public_kl["quantized"] < before.sub_llms[0].public_kl["quantized"]
    sizes = [sum(file.bytes for file in Bundle.open(run.run_dir / "bundle").manifest.files) for run in (plain, healed)]
    assert sizes[0] == sizes[1]


def test_rows_are_filled_where_there_are_none_of_users(tmp_path: Path, tiny_llama: Path) -> None:
    own = make_run(tmp_path / "own", tiny_llama, align=HEALED, method=NEVER)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"word": "{word} {at}"}}\n' for at in range(20) for word in WORDS))
    given = make_run(tmp_path / "given", tiny_llama, align=HEALED, method=NEVER, public={"like_task": str(rows)})
    begin = SampleTokenizer(tiny_llama / "tokenizer.json", None).encode("Say")
    for settings, is_filled in ((own, True), (given, False)):
        llm = StreamedLLM(settings)
        texts, public = healing_texts(llm), len(llm.text.used)
        filled = texts[len(llm.text.like_task) : -public]
        assert bool(filled) == is_filled
        assert all(ids[: len(begin)].tolist() == begin for ids in filled)
        assert sum(map(len, filled)) <= REUSE * sum(map(len, llm.text.used))


def test_what_never_aligns_has_no_emulator_lora(tmp_path: Path, tiny_llama: Path) -> None:
    settings = make_run(tmp_path, tiny_llama, align=HEALED, method=NEVER)
    made = prepare(settings)
    assert not Bundle.open(settings.run_dir / "bundle").manifest.lora.emulator
    assert made.sub_llms[0].public_kl["aligned"] == made.sub_llms[0].public_kl["quantized"]


def test_an_interrupted_healing_ends_with_the_same_bits(tmp_path: Path, tiny_llama: Path) -> None:
    whole = prepare(make_run(tmp_path / "whole", tiny_llama, align=HEALED, method=NEVER))
    cut = make_run(tmp_path / "cut", tiny_llama, align=HEALED, method=NEVER)
    with killed_after(6):
        prepare(cut)
    healed = cut.run_dir / "prepare" / "healed"
    assert 0 < len(list(healed.iterdir())) < 6
    assert prepare(cut) == whole


def test_groups_are_chosen_by_what_healing_would_leave(tmp_path: Path, tiny_llama: Path) -> None:
    settings = make_run(tmp_path, tiny_llama, align=HEALED, method={**NEVER, "distance": "healed"})
    prepare(settings)
    plan = Bundle.open(settings.run_dir / "bundle").plan
    size = len(plan.groups[0].removed)
    assert all(group.distance == plan.distances[group.start][size - 1] for group in plan.groups)
    assert max(map(len, plan.distances)) == size


def test_a_family_that_cannot_be_healed_is_told_what_to_write(tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", "olmo2")
    settings = make_run(tmp_path / "run", model, align={"heal": True})
    with pytest.raises(UsageProblem, match=r'write \[align\] heal = false, steps = 200 and border_map = "auto"'):
        prepare(settings)


def test_only_fedsoda_heals_by_default() -> None:
    assert [name for name, keys in METHODS.items() if "[align] heal" in keys.reads] == ["fedsoda"]
