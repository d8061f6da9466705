"""The border map: fitted as ridge regression says, applied alike on hub and edge, carried like the emulator's LoRA."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor

import fedsoda_hub.preparation.self_generated as self_generated
from fedsoda_edge.data.samples import Sample, SampleTokenizer
from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.model import delta, lora
from fedsoda_edge.model.border import apply_map, border_states
from fedsoda_edge.model.bundle import Bundle
from fedsoda_edge.model.source import Checkpoint
from fedsoda_edge.model.streaming import stream
from fedsoda_edge.model.sub_llm import build
from fedsoda_edge.worker.batches import SweptSamples
from fedsoda_edge.worker.border_cache import CachedStates, CacheSettings
from fedsoda_hub.algorithms.alignment import ridge
from fedsoda_hub.evaluation.evaluator import Evaluator
from fedsoda_hub.evaluation.judge import judged_models
from fedsoda_hub.evaluation.questions import Question
from fedsoda_hub.federation.jobs import BorderMapFitted, JobProgress, LeftOut, Realign
from fedsoda_hub.preparation.full_llm import StreamedLLM
from fedsoda_hub.preparation.prepare import RunPreparation
from fedsoda_hub.preparation.realign import PreparedRun
from fedsoda_hub.run.directory import RunDirectory
from fedsoda_hub.settings.run import RunSettings
from tests.hub.runs import killed_after, make_run, prepare, public_kl, put

WIDTH = 12


def some_pairs(num: int = 40, noise: float = 0.3) -> list[tuple[Tensor, Tensor]]:
    """Student states, and teacher states that are a map of them but for noise; nothing like it at position 0."""
    chance = torch.Generator().manual_seed(0)
    d, b = 0.2 * torch.randn(WIDTH, WIDTH, generator=chance), torch.randn(WIDTH, generator=chance)
    pairs = []
    for length in range(3, 3 + num):
        student = torch.randn(length, WIDTH, generator=chance) + 2
        teacher = student + student @ d + b + noise * torch.randn(length, WIDTH, generator=chance)
        teacher[0] = 500.0
        pairs.append((student, teacher))
    return pairs


def stacked(pairs: list[tuple[Tensor, Tensor]]) -> tuple[np.ndarray, np.ndarray]:
    return tuple(np.concatenate([pair[side][1:].double().numpy() for pair in pairs]) for side in (0, 1))  # type: ignore[return-value]


def test_the_fit_is_ridge_regression_with_an_intercept() -> None:
    pairs = some_pairs()
    fit = ridge.fit(pairs, WIDTH, WIDTH)
    x, y = stacked(pairs)
    centred = x - x.mean(axis=0)
    penalty = fit.weight * np.mean(np.sum(centred**2, axis=0))
    # Ridge as ordinary least squares on rows that stand for the penalty.
    rows = np.concatenate([centred, np.sqrt(penalty) * np.eye(WIDTH)])
    wanted = np.concatenate([(y - x) - (y - x).mean(axis=0), np.zeros((WIDTH, WIDTH))])
    expected, *_ = np.linalg.lstsq(rows, wanted, rcond=None)
    torch.testing.assert_close(fit.tensors["border.D"].double(), torch.from_numpy(expected), rtol=1e-5, atol=1e-6)
    shift = (y - x).mean(axis=0) - x.mean(axis=0) @ expected
    torch.testing.assert_close(fit.tensors["border.b"][0].double(), torch.from_numpy(shift), rtol=1e-5, atol=1e-5)


def test_errors_are_those_of_samples_that_the_fit_did_not_see() -> None:
    pairs = some_pairs()
    fit = ridge.fit(pairs, WIDTH, WIDTH)
    unseen = pairs[4::5]
    x, y = stacked(unseen)
    assert fit.error_before == pytest.approx(((x - y) ** 2).sum() / (y**2).sum())
    seen = ridge.fit([pair for at, pair in enumerate(pairs) if at % 5 != 4] + unseen[:1], WIDTH, WIDTH)
    assert 0.0 < fit.error < 0.2 * fit.error_before
    mapped = apply_map(torch.from_numpy(x).float()[None], seen.tensors, positions=torch.ones(1, len(x)))
    # Not the same samples to the last one, so not the same error to the last digit.
    assert fit.error == pytest.approx(
        float((mapped[0].double() - torch.from_numpy(y)).square().sum() / (y**2).sum()), rel=0.1
    )


def test_a_map_of_low_rank_is_the_best_of_its_rank() -> None:
    pairs = some_pairs(noise=0.0)
    whole, low = (ridge.fit(pairs, WIDTH, rank) for rank in (WIDTH, 3))
    x, _ = stacked(pairs)
    left, right = low.tensors["border.D.left"].double().numpy(), low.tensors["border.D.right"].double().numpy()
    assert (left.shape, right.shape) == ((WIDTH, 3), (3, WIDTH))
    centred = x - x.mean(axis=0)
    # Without noise D is exact, and the best of rank K keeps the K largest singular values of its predictions.
    singular = np.linalg.svd(centred @ whole.tensors["border.D"].double().numpy(), compute_uv=False)
    lost = np.sum((centred @ whole.tensors["border.D"].double().numpy() - centred @ left @ right) ** 2)
    assert lost == pytest.approx(np.sum(singular[3:] ** 2), rel=1e-3)
    assert low.error > low.error_whole == whole.error


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> RunSettings:
    """A prepared run with a map, fitted on prompts of random words."""
    directory = tmp_path_factory.mktemp("mapped")
    rows = [{"word": f"{a}{b}"} for a in ("the", "cat", "inn", "rain", "tin") for b in "abcdefghijklmnop"]
    (directory / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = make_run(
        directory,
        tiny_llama,
        public={"like_task": "prompts.jsonl"},
        align={"border_map": "ridge", "steps": 4, "realign_steps": 2},
    )
    prepare(settings)
    return settings


def error_on_prompts(settings: RunSettings, view: dict[str, Tensor]) -> float:
    """|mapped sub-emulator - full emulator|^2 / |full emulator|^2, on the prompts, by another way than the fit's."""
    source, bundle = Checkpoint.open(settings.model), Bundle.open(settings.run_dir / "bundle")
    tokenizer = SampleTokenizer(source.path / "tokenizer.json", None)
    ids = [torch.tensor(tokenizer.encode(f"Say {word}:")) for word in ("thea", "catb", "innc", "rainp", "tinf")]
    scale, plan = bundle.manifest.lora.scale, bundle.plan
    student = border_states(bundle, plan.sub_emulator, ids, emulator=view, lora_scale=scale)
    x = torch.cat([states[1:] for states in student])
    y = torch.cat([states[1:] for states in stream(source, plan.emulator, ids)])
    return float((x - y).square().sum() / y.square().sum())


def test_prepare_fits_the_map_after_alignment_and_the_bundle_carries_it(run: RunSettings) -> None:
    view = Bundle.open(run.run_dir / "bundle").emulator_lora()
    assert view["border.D"].shape == (64, 64)
    without = {name: tensor for name, tensor in view.items() if not name.startswith("border.")}
    assert error_on_prompts(run, view) < 0.7 * error_on_prompts(run, without)


def test_alignment_and_public_kl_do_not_see_it(run: RunSettings, tmp_path: Path, tiny_llama: Path) -> None:
    plain = make_run(tmp_path, tiny_llama, align={"border_map": "none", "steps": 4, "realign_steps": 2})
    kl, view = public_kl(plain), Bundle.open(plain.run_dir / "bundle").emulator_lora()
    assert kl == public_kl(run)
    mapped = Bundle.open(run.run_dir / "bundle").emulator_lora()
    assert all(torch.equal(mapped[name], tensor) for name, tensor in view.items())


def test_a_realignment_fits_it_again_and_sends_it_like_the_lora(run: RunSettings) -> None:
    said: list[JobProgress] = []
    run = msgspec.structs.replace(run, wire=msgspec.structs.replace(run.wire, codec="nf4"))
    bundle, blobs = Bundle.open(run.run_dir / "bundle"), RunDirectory(run.run_dir).blobs
    before = bundle.emulator_lora()
    disturbed = {name: tensor + (0.2 if name == "border.D" else 0.0) for name, tensor in before.items()}
    job = Realign(version=1, master=put(run, bundle.adapter_lora()), emulator_views=(put(run, disturbed),))
    [result] = PreparedRun(StreamedLLM(run)).realign(job, said.append).sub_llms
    layout = bundle.manifest.lora.emulator
    view = delta.from_bytes(blobs.get(result.view), layout)
    moved = delta.advance(disturbed, blobs.get(result.delta), layout, "nf4")
    assert all(torch.equal(view[name], moved[name]) for name in view)
    assert error_on_prompts(run, view) < 0.5 * error_on_prompts(run, disturbed)
    [errors] = [progress for progress in said if isinstance(progress, BorderMapFitted)]
    assert errors.error < errors.error_before


def test_edge_hub_and_a_whole_model_apply_it_alike(run: RunSettings, tmp_path: Path) -> None:
    bundle = Bundle.open(run.run_dir / "bundle")
    plan, spec, view = bundle.plan, bundle.manifest.lora, bundle.emulator_lora()
    ids = [[1, 40, 50, 60, 70], [1, 41, 51], [1, 42, 52, 62]]
    samples = [Sample(tuple(row), 1) for row in ids]
    swept = SweptSamples.sweep(bundle, plan.sub_emulator, samples, emulator=view, lora_scale=spec.scale)
    cached = CachedStates(
        bundle,
        ids,
        emulator=view,
        emulator_name="one",
        settings=CacheSettings(tmp_path / "border", b"k" * 32),
        compute_dtype=torch.float32,
        device="cpu",
    )
    cached.sweep()
    assert isinstance(swept.states, list)
    for at, state in enumerate(swept.states):
        assert (cached[at] - state).norm() < 1e-2 * state.norm()  # records are bf16
    cached.close()

    tail = build(bundle, plan.adapter)
    whole = build(bundle, plan.kept, embedding=True)
    lora.attach(tail, spec, bundle.adapter_lora())
    lora.attach(whole, spec, {**view, **bundle.adapter_lora()})
    with torch.no_grad():
        for at, row in enumerate(ids):
            expected = tail.hidden(states=swept.states[at][None])
            torch.testing.assert_close(whole.hidden(ids=torch.tensor([row])), expected, rtol=1e-4, atol=1e-5)
        # Generation reads one new position at a time, and pads on the left: the map must know where a sample begins.
        prompt = torch.tensor([[0, 0, *ids[1]], ids[0]])
        mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
        made = whole.model.generate(
            prompt, attention_mask=mask, do_sample=False, max_new_tokens=4, eos_token_id=None, pad_token_id=0
        )
        for which, length in ((0, 3), (1, 5)):
            own = made[which, 5 - length :]
            logits = whole.model(own[None, :-1]).logits[0, length - 1 :]
            assert own[length:].tolist() == logits.argmax(dim=-1).tolist()


def test_the_sub_llm_is_judged_with_it_and_the_plug_in_without(run: RunSettings) -> None:
    source, bundle = Checkpoint.open(run.model), Bundle.open(run.run_dir / "bundle")
    evaluator = Evaluator(
        [Question("Say cat:", "yes"), Question("Say inn:", "no")], SampleTokenizer(source.path / "tokenizer.json", 2)
    )
    view, adapter = bundle.emulator_lora(), bundle.adapter_lora()
    none = {name: torch.zeros_like(tensor) if name.startswith("border.") else tensor for name, tensor in view.items()}
    with_map, without = (judged_models(bundle, source, adapter, each) for each in (view, none))
    assert evaluator.answers(with_map["sub_llm"]).nll != pytest.approx(
        evaluator.answers(without["sub_llm"]).nll, rel=1e-4
    )
    assert evaluator.answers(with_map["plug_in"]).nll == evaluator.answers(without["plug_in"]).nll


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        (
            {"align": {"border_map": "linear"}},
            r"border_map = 'linear' in RUN.toml; it must be one of auto, ridge, none",
        ),
        (
            {"public": {"like_task": "none.jsonl"}, "align": {"border_map": "ridge"}},
            r"like_task: .*none.jsonl is not there",
        ),
        ({"method": {"emulator": "full"}, "align": {"border_map": "ridge"}}, "full"),
    ],
)
def test_a_map_that_cannot_be_is_refused_before_any_work(
    tmp_path: Path, tiny_llama: Path, tables: dict[str, dict[str, object]], message: str
) -> None:
    with pytest.raises(UsageProblem, match=message):
        make_run(tmp_path, tiny_llama, **tables)


@pytest.mark.parametrize(("rows", "message"), [(3, "gives 3 prompts, but a border map needs 50"), (0, "like_task")])
def test_too_few_prompts_are_refused(tmp_path: Path, tiny_llama: Path, rows: int, message: str) -> None:
    (tmp_path / "few.jsonl").write_text('{"word": "cat"}\n' * rows)
    settings = make_run(tmp_path, tiny_llama, public={"like_task": "few.jsonl"}, align={"border_map": "ridge"})
    with pytest.raises(UsageProblem, match=message):
        RunPreparation(settings)


def test_prompts_without_the_column_are_refused(tmp_path: Path, tiny_llama: Path) -> None:
    (tmp_path / "other.jsonl").write_text('{"text": "cat"}\n' * 60)
    settings = make_run(tmp_path, tiny_llama, public={"like_task": "other.jsonl"}, align={"border_map": "ridge"})
    with pytest.raises(UsageProblem) as problem:
        RunPreparation(settings)
    assert str(problem.value) == (
        f"[public] like_task: {tmp_path / 'other.jsonl'}:1: no column 'word'; there are text; "
        "name a file of rows with all columns of [task] prompt"
    )


@pytest.fixture(autouse=True)
def _few_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_generated, "MAX_PROMPTS", 60)
    monkeypatch.setattr(self_generated, "COLUMN_IDS", 8)


AUTO: dict[str, dict[str, object]] = {"align": {"border_map": "auto", "steps": 0}}


def test_where_the_map_is_left_to_the_hub_it_is_fitted_on_texts_that_the_full_llm_writes(
    tmp_path: Path, tiny_llama: Path
) -> None:
    settings = make_run(tmp_path / "first", tiny_llama, **AUTO)
    said: list[JobProgress] = []
    first = RunPreparation(settings).run(said.append)
    [fit] = [progress for progress in said if isinstance(progress, BorderMapFitted)]
    assert fit.error < 0.7 * fit.error_before
    again = make_run(tmp_path / "again", tiny_llama, **AUTO)
    with killed_after(5):
        prepare(again)
    [prompts] = (again.run_dir / "texts").glob("like_task-*.safetensors")
    written = prompts.stat().st_mtime_ns
    assert prepare(again) == first
    assert prompts.stat().st_mtime_ns == written
    other = make_run(tmp_path / "again", tiny_llama, **AUTO, task={"prompt": "Tell {word}:"})
    assert prepare(other).sub_llms[0].emulator_view != first.sub_llms[0].emulator_view
    assert len(list((again.run_dir / "texts").glob("like_task-*.safetensors"))) == 2


def test_what_the_full_llm_wrote_serves_a_run_again_whatever_else_is_changed(tmp_path: Path, tiny_llama: Path) -> None:
    prepare(make_run(tmp_path, tiny_llama, **AUTO))
    said: list[JobProgress] = []
    changed = make_run(tmp_path, tiny_llama, align={"border_map": "auto", "steps": 1, "border_rank": 8})
    RunPreparation(changed).run(said.append)
    stages = {progress.stage for progress in said}
    assert "aligning" in stages
    assert "writing rows like the task's" not in stages


def test_where_the_full_llm_cannot_write_prompts_a_run_continues_without_a_map_unless_one_was_asked_for(
    tmp_path: Path, tiny_llama: Path
) -> None:
    bare = {"prompt": "{word}"}
    without = prepare(make_run(tmp_path / "none", tiny_llama, align={"steps": 0}, task=bare))
    said: list[JobProgress] = []
    settings = make_run(tmp_path / "auto", tiny_llama, **AUTO, task=bare)
    made = RunPreparation(settings)
    prepared = made.run(said.append)
    assert prepared == without
    [why] = [progress.why for progress in said if isinstance(progress, LeftOut)]
    assert "does not show the full LLM what the task's prompts are like" in why
    job = Realign(version=1, master=prepared.master, emulator_views=(prepared.sub_llms[0].emulator_view,))
    assert PreparedRun(made.llm).realign(job).sub_llms[0].kl_after > 0
    asked = make_run(tmp_path / "asked", tiny_llama, align={"border_map": "ridge", "steps": 0}, task=bare)
    with pytest.raises(UsageProblem, match=r'write \[align\] border_map = "none"'):
        prepare(asked)


def test_nothing_removed_leaves_nothing_to_map(tmp_path: Path, tiny_llama: Path) -> None:
    settings = make_run(tmp_path, tiny_llama, **AUTO, method={"groups": 0})
    prepare(settings)
    assert not Bundle.open(settings.run_dir / "bundle").emulator_lora()
    assert not (settings.run_dir / "texts").exists()
