"""Prepare measures what the contract says, reads the full LLM once, and survives an end at any write."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from transformers import AutoModelForCausalLM

from fedsoda_edge.errors import DiskFull, UsageProblem
from fedsoda_edge.model.bundle import Bundle
from fedsoda_hub.federation.jobs import DiskNeeded, JobProgress
from fedsoda_hub.preparation.full_llm import open_full_llm
from fedsoda_hub.preparation.prepare import RunPreparation
from fedsoda_hub.settings.run import RunSettings
from tests.edge.model.test_bundle import pruned_by_hand
from tests.hub.runs import killed_after, make_run, prepare, public_kl
from tests.tiny import make_tiny_llama


def test_public_kl_is_that_of_models_pruned_by_hand(prepared: RunSettings, tiny_llama: Path) -> None:
    found = public_kl(prepared)
    ids = torch.stack(RunPreparation(prepared).llm.text.held_out)
    plan = Bundle.open(prepared.run_dir / "bundle").plan
    full: Any = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    with torch.no_grad():
        teacher = full(ids).logits.double().log_softmax(-1)
        for name, quantized in (("pruned", False), ("quantized", True)):
            student = pruned_by_hand(tiny_llama, plan, quantized)(ids).logits.double().log_softmax(-1)
            expected = (teacher.exp() * (teacher - student)).sum(-1).mean().item()
            assert found[name] == pytest.approx(expected, rel=1e-4), name
    assert set(found) == {"pruned", "quantized", "aligned"}


def test_a_second_prepare_does_nothing_again(prepared: RunSettings) -> None:
    first = prepare(prepared)
    written = {path: path.stat().st_mtime_ns for path in prepared.run_dir.rglob("*")}
    said: list[JobProgress] = []
    assert RunPreparation(prepared).run(said.append) == first
    assert said == []
    assert {path: path.stat().st_mtime_ns for path in prepared.run_dir.rglob("*")} == written


@pytest.mark.parametrize("writes", [1, 2, 6, 13, 17, 19, 22, 24])
def test_prepare_killed_after_any_write_ends_with_the_same_bytes(
    tmp_path: Path, tiny_llama: Path, prepared: RunSettings, writes: int
) -> None:
    settings = make_run(tmp_path, tiny_llama)
    with killed_after(writes):
        prepare(settings)
    assert not (settings.run_dir / "bundle" / "manifest.json").exists()
    assert prepare(settings) == prepare(prepared)


def test_public_text_of_the_full_llm_itself_is_written_once_and_the_same_after_an_end(
    tmp_path: Path, tiny_llama: Path
) -> None:
    own: dict[str, dict[str, Any]] = {"public": {"text": "self-generated", "sequences": 4}, "align": {"steps": 2}}
    settings = make_run(tmp_path / "a", tiny_llama, **own)
    (tmp_path / "a" / "public.txt").unlink()
    first = prepare(settings)
    text = RunPreparation(settings).llm.text
    assert {len(ids) for ids in text.blocks} == {24}
    assert (len(text.used), len(text.held_out)) == (4, 32)
    again = make_run(tmp_path / "b", tiny_llama, **own)
    with killed_after(2):
        prepare(again)
    said: list[JobProgress] = []
    assert RunPreparation(again).run(said.append) == first
    assert "writing public text" not in {progress.stage for progress in said}
    assert public_kl(msgspec.structs.replace(again, seed=1))["pruned"] != first.sub_llms[0].public_kl["pruned"]


def test_when_and_how_long_it_is_aligned_again_is_nothing_that_a_bundle_is_made_of(
    tmp_path: Path, tiny_llama: Path
) -> None:
    runs = [
        make_run(tmp_path, tiny_llama),
        make_run(tmp_path, tiny_llama, method={"realign_every": 0}, align={"realign_steps": 1}),
        make_run(tmp_path, tiny_llama, method={"realign_every": "auto"}),
        make_run(tmp_path, tiny_llama, align={"steps": 3}),
    ]
    said: list[JobProgress] = []
    made = [RunPreparation(run).run(said.append) for run in runs[:1]]
    assert said
    said.clear()
    made += [RunPreparation(run).run(said.append) for run in runs[1:3]]
    assert not said
    made.append(prepare(runs[3]))
    assert made[0] == made[1] == made[2] != made[3]


def test_another_method_gives_another_bundle(tmp_path: Path, tiny_llama: Path) -> None:
    first = prepare(make_run(tmp_path, tiny_llama, align={"steps": 0}))
    other = prepare(make_run(tmp_path, tiny_llama, align={"steps": 0}, method={"groups": 1}))
    assert first.sub_llms[0].manifest != other.sub_llms[0].manifest
    assert len(Bundle.open(tmp_path / "small.run" / "bundle").plan.kept) == 7


def test_other_weights_under_the_same_names_are_another_model(tmp_path: Path) -> None:
    model = make_tiny_llama(tmp_path / "model", layers=4, seed=1)
    change = {"align": {"steps": 0}, "method": {"adapter_layers": 1, "groups": 1}}
    first = prepare(make_run(tmp_path, model, **change))
    make_tiny_llama(model, layers=4, seed=2)
    assert prepare(make_run(tmp_path, model, **change)).sub_llms[0].manifest != first.sub_llms[0].manifest


def test_without_steps_the_emulator_lora_stays_as_it_began(tmp_path: Path, tiny_llama: Path) -> None:
    settings = make_run(tmp_path, tiny_llama, align={"steps": 0})
    kl = public_kl(settings)
    assert kl["aligned"] == kl["quantized"]
    tensors = Bundle.open(settings.run_dir / "bundle").emulator_lora()
    assert not any(tensor.any() for name, tensor in tensors.items() if name.endswith("lora_B"))


def test_nothing_removed_leaves_only_what_nf4_loses(tmp_path: Path, tiny_llama: Path) -> None:
    settings = make_run(tmp_path, tiny_llama, method={"groups": 0})
    kl = public_kl(settings)
    assert kl["pruned"] == pytest.approx(0.0, abs=1e-6)
    assert kl["aligned"] == kl["quantized"] > 0


def test_too_small_a_disk_for_the_teacher_targets_is_said_before_the_work(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 10_000

    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage())
    settings = make_run(tmp_path, tiny_llama)
    with pytest.raises(DiskFull, match=r"the cached teacher targets need .* GB, but .* has 0\.0 GB free"):
        prepare(settings)
    assert not (settings.run_dir / "bundle").exists()


def test_a_resumed_prepare_needs_no_disk_for_what_is_there(tmp_path: Path, tiny_llama: Path) -> None:
    settings = make_run(tmp_path, tiny_llama)
    said: list[JobProgress] = []
    with killed_after(22):  # all targets are there by then, the bundle is not
        RunPreparation(settings).run(said.append)
    made = RunPreparation(settings)
    made.run(said.append)
    first, last = (progress.needed_bytes for progress in said if isinstance(progress, DiskNeeded))
    blocks = len(made.llm.text.blocks)
    assert first == (2 + 1 + 1) * blocks * 24 * 64 * 4  # two groups, the border, the student's own start
    assert last == 0


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"method": {"groups": 4}}, "layers_per_group"),
        ({"method": {"adapter_layers": 8}}, "adapter_layers = 8, but the model has 8 layers"),
        ({"public": {"length": 300}}, "ids"),
        ({"local": {"max_length": 300}}, r"\[local\] max_length = 300, but tiny has 256 positions"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(
    tmp_path: Path, tiny_llama: Path, change: dict[str, dict[str, Any]], sentence: str
) -> None:
    with pytest.raises(UsageProblem, match=sentence):
        prepare(make_run(tmp_path, tiny_llama, **change))


def test_a_model_hubs_id_stays_at_the_commit_that_the_run_first_saw(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the download is played: the model hub moves on to another commit between two starts."""
    asked: list[str | None] = []
    newest = "1" * 40

    def fetch(model: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        assert model == "org/tiny"
        assert not any(pattern.endswith((".bin", ".py", ".pt")) for pattern in allow_patterns)
        asked.append(revision)
        snapshot = tmp_path / "cache" / (revision or newest)
        shutil.copytree(tiny_llama, snapshot, dirs_exist_ok=True)
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    settings = msgspec.structs.replace(make_run(tmp_path / "run", tiny_llama), model="org/tiny")
    assert open_full_llm(settings).revision == "1" * 40
    newest = "2" * 40
    assert open_full_llm(settings).revision == "1" * 40
    assert asked == [None, "1" * 40]
    assert open_full_llm(msgspec.structs.replace(settings, name="another")).revision == "2" * 40
