"""A run that heals: what leaves the hub is nearer to the full LLM, and an interrupted preparation ends with the same bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsoda_edge.data.samples import SampleTokenizer
from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.model.bundle import Bundle
from fedsoda_edge.model.source import Checkpoint
from fedsoda_edge.model.streaming import stream
from fedsoda_hub.federation.jobs import JobProgress, LeftOut
from fedsoda_hub.preparation import self_generated
from fedsoda_hub.preparation.filled import REUSE
from fedsoda_hub.preparation.full_llm import StreamedLLM
from fedsoda_hub.preparation.heal import healing_texts
from fedsoda_hub.preparation.prepare import RunPreparation, made_of
from fedsoda_hub.settings.methods import METHODS
from fedsoda_hub.settings.run import RunSettings, read_settings
from tests import tiny
from tests.hub.runs import FULL, WORDS, killed_after, make_run, prepare

HEALED = {"heal": True, "steps": 0}
NEVER = {"realign_every": 0}
RECORDED = Path(__file__).parents[2] / "golden" / "fixed_settings.json"  # of ledgers, as commit f7a12bf wrote them


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
    model = tiny.make_tiny(tmp_path / "model", "olmo2")
    settings = make_run(tmp_path / "run", model, align={"heal": True})
    with pytest.raises(UsageProblem, match=r'write \[align\] heal = false, steps = 200 and border_map = "auto"'):
        prepare(settings)


def test_only_fedsoda_and_exact_heal_by_default() -> None:
    assert [name for name, keys in METHODS.items() if "[align] heal" in keys.reads] == ["fedsoda", "exact"]


# --- every layer kept: there is only rounding to make good ------------------------------------------------------------


def exact(directory: Path, model: Path, *, heal: bool | None, **method: Any) -> RunSettings:
    directory.mkdir()
    words = [f"{a} {b}" for a in WORDS for b in WORDS[:4]]
    rows = [{"word": word, "answer": "yes" if len(word) % 2 else "no"} for word in words]
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return make_run(
        directory,
        model,
        public={"like_task": "rows.jsonl"},
        lora={"targets": ["q_proj", "v_proj"]},  # which layers of every family have
        align={**FULL["align"], "heal": heal, "border_map": None},
        method={**FULL["method"], "distance": None, **method},
    )


def test_exact_makes_good_what_rounding_changes(tmp_path: Path, tiny_llama: Path) -> None:
    plain, healed = (exact(tmp_path / str(heal), tiny_llama, heal=heal) for heal in (False, None))
    before, after = prepare(plain), prepare(healed)
    assert border_error(healed) < 0.7 * border_error(plain)
    assert after.sub_llms[0].public_kl["quantized"] < before.sub_llms[0].public_kl["quantized"]
    bundles = [Bundle.open(run.run_dir / "bundle") for run in (plain, healed)]
    assert bundles[0].plan == bundles[1].plan
    assert sum(file.bytes for file in bundles[0].manifest.files) == sum(
        file.bytes for file in bundles[1].manifest.files
    )


def test_nothing_is_healed_where_nothing_was_changed(tmp_path: Path, tiny_llama: Path) -> None:
    plain, asked = (exact(tmp_path / str(heal), tiny_llama, heal=heal, emulator_base="bf16") for heal in (False, True))
    assert prepare(plain) == prepare(asked)
    assert not (asked.run_dir / "prepare" / "healed").exists()


def test_exact_of_a_family_that_cannot_be_healed_is_rounded_plainly_and_says_so(tmp_path: Path) -> None:
    model = tiny.make_tiny(tmp_path / "model", "olmo2")
    said: list[JobProgress] = []
    made = RunPreparation(exact(tmp_path / "run", model, heal=None)).run(said.append)
    assert made == prepare(exact(tmp_path / "plain", model, heal=False))
    [why] = [one.why for one in said if isinstance(one, LeftOut)]
    assert why == "healing needs an MLP that ends in one down_proj, and layer 0 of this olmo2 model has none"


def test_exact_of_a_mixture_heals_the_layers_that_have_one_down_proj(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        tiny.FAMILY_CONFIGS, "qwen3_moe", {**tiny.FAMILY_CONFIGS["qwen3_moe"], "mlp_only_layers": [1, 3]}
    )
    model = tiny.make_tiny(tmp_path / "model", "qwen3_moe")
    plain, healed = (exact(tmp_path / str(heal), model, heal=heal) for heal in (False, None))
    said: list[JobProgress] = []
    prepare(plain)
    RunPreparation(healed).run(said.append)
    assert [one.stage for one in said if isinstance(one, LeftOut)] == ["not healed"]
    before, after = (Bundle.open(run.run_dir / "bundle") for run in (plain, healed))
    changed = [
        number
        for number in before.plan.sub_emulator
        if any(not torch.equal(before.layer(number)[name], part) for name, part in after.layer(number).items())
    ]
    assert changed == [1, 3]
    assert border_error(healed) < border_error(plain)


@pytest.mark.parametrize("what", ["exact", "fedsoda, full emulator"])
def test_a_run_of_an_older_hub_finds_its_bundle_where_its_file_says_that_nothing_is_healed(
    tmp_path: Path, what: str
) -> None:
    """A bundle is found by a digest of these values, as they were written then."""
    [case] = [case for case in json.loads(RECORDED.read_text()) if case["what"] == what]
    (tmp_path / "public.txt").write_text("text")
    (tmp_path / "RUN.toml").write_text(case["toml"] + "[align]\nheal = false\n")
    then = {"[method] realign_every": 0, "[align] realign_steps": 0}
    tables = [
        {
            key.removeprefix(f"[{table}] "): then.get(key, value)
            for key, value in case["fixed"].items()
            if key.startswith(f"[{table}]")
        }
        for table in ("method", "lora", "public", "align")
    ]
    assert json.dumps(made_of(read_settings(tmp_path / "RUN.toml"))) == json.dumps(tables)
