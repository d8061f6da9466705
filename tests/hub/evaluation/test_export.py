"""Plain Transformers and PEFT load an export onto the full LLM and get what the hub reported."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.model import delta
from fedsoda_edge.model.bundle import Bundle
from fedsoda_edge.ports.disk import BlobStore
from fedsoda_hub.evaluation.export import export
from fedsoda_hub.evaluation.judge import evaluate_path
from fedsoda_hub.preparation.checkpoint_writer import CheckpointWriter
from fedsoda_hub.settings.run import RunSettings
from tests.edge.model.test_bundle import random_lora
from tests.hub.runs import WORDS, finish, make_run, prepare


@pytest.fixture(scope="module")
def adapter(finished: RunSettings) -> dict[str, Tensor]:
    return master_of(finished)


def master_of(settings: RunSettings) -> dict[str, Tensor]:
    spec = Bundle.open(settings.run_dir / "bundle").manifest.lora
    tensors = random_lora(spec, 21)
    return {item.name: tensors[item.name] for item in spec.adapter}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> RunSettings:
    """A run one round of which has closed, with an adapter LoRA that is not zero."""
    settings = make_run(tmp_path_factory.mktemp("finished"), tiny_llama, align={"steps": 0})
    emulator = prepare(settings).sub_llms[0].emulator_view
    master = BlobStore(settings.run_dir / "blobs").put(delta.to_bytes(master_of(settings)))
    finish(settings, master, emulator)
    return settings


@pytest.fixture(scope="module")
def exported(finished: RunSettings) -> Path:
    directory = finished.directory / "adapter"
    export(finished, directory)
    return directory


def full_llm(model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)


def test_plain_peft_loads_it_whole_and_answers_as_reported(
    finished: RunSettings, exported: Path, tiny_llama: Path
) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing.*")  # PEFT only warns of missing keys
        model = PeftModel.from_pretrained(full_llm(tiny_llama), exported).eval()
    on_disk = load_file(exported / "adapter_model.safetensors")
    assert set(get_peft_model_state_dict(model)) == set(on_disk)
    assert all(tensor.dtype == torch.float32 for tensor in on_disk.values())

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    right, total, count = 0, 0.0, 0
    for line in (finished.directory / "eval.jsonl").read_text().splitlines():
        row = json.loads(line)
        prompt, scores = f"Say {row['word']}:", {}
        for choice in ("no", "yes"):
            ids = [*tokenizer(f"{prompt} {choice}").input_ids, 2]
            start = len(tokenizer(prompt).input_ids)
            with torch.no_grad():
                logs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            scores[choice] = sum(logs[at - 1, ids[at]].item() for at in range(start, len(ids)))
            if choice == row["answer"]:
                total, count = total - scores[choice], count + len(ids) - start
        right += max(scores, key=lambda choice: scores[choice]) == row["answer"]
    report = evaluate_path(exported, finished.directory / "eval.jsonl")
    assert report.accuracy["plug_in"] == right / len(WORDS)
    assert report.loss["plug_in"] == pytest.approx(total / count, rel=1e-5)
    assert report.num_examples == len(WORDS)
    assert evaluate_path(Path(finished.path), finished.directory / "eval.jsonl") == report


def test_it_says_where_it_belongs_and_nothing_of_this_machine(exported: Path, finished: RunSettings) -> None:
    config = json.loads((exported / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny"
    assert config["task_type"] == "CAUSAL_LM"
    assert all(module.startswith(("model.layers.6.", "model.layers.7.")) for module in config["target_modules"])
    about = json.loads((exported / "fedsoda.json").read_text())
    assert about["template"] == {"prompt": "Say {word}:", "completion": "{answer}"}
    assert about["plan"]["adapter"] == [6, 7]
    assert about["rounds"] == 1
    assert not any(str(finished.directory) in file.read_text() for file in exported.glob("*.json"))


def test_merge_adds_the_scaled_product_to_exactly_the_targets(
    finished: RunSettings, adapter: dict[str, Tensor], tiny_llama: Path
) -> None:
    directory = finished.directory / "merged"
    export(finished, directory, merge=True)
    before, after = (load_file(path / "model.safetensors") for path in (tiny_llama, directory))
    assert set(before) == set(after)
    touched = {name.rpartition(".")[0] for name in adapter}
    for name, tensor in before.items():
        module = name.removeprefix("model.").removesuffix(".weight")
        if module in touched:
            tensor = tensor.float() + (8 / 4) * adapter[f"{module}.lora_B"] @ adapter[f"{module}.lora_A"]
        assert torch.equal(after[name], tensor.bfloat16()), name
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert model.config.num_hidden_layers == 8
    assert AutoTokenizer.from_pretrained(directory)("a").input_ids[0] == 1
    with pytest.raises(UsageProblem, match="merged checkpoint"):
        evaluate_path(directory, finished.directory / "eval.jsonl")


def test_exporting_again_replaces_an_export_but_nothing_else(finished: RunSettings, exported: Path) -> None:
    before = (exported / "adapter_model.safetensors").read_bytes()
    export(finished, exported)
    assert (exported / "adapter_model.safetensors").read_bytes() == before
    other = finished.directory / "photos"
    other.mkdir()
    (other / "cat.jpg").write_bytes(b"cat")
    with pytest.raises(UsageProblem, match="not empty and is not an export"):
        export(finished, other)
    assert [path.name for path in other.iterdir()] == ["cat.jpg"]


def test_an_export_that_left_its_run_is_judged_with_the_full_model_alone(
    finished: RunSettings, exported: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    data = finished.directory / "eval.jsonl"
    moved = Path(shutil.copytree(exported, tmp_path / "elsewhere" / "adapter"))
    with pytest.raises(UsageProblem, match=r"'tiny'.*name the model with --model"):
        evaluate_path(moved, data)
    there, here = evaluate_path(exported, data), evaluate_path(moved, data, model=str(tiny_llama))
    alone, beside = msgspec.to_builtins(here), msgspec.to_builtins(there)
    for name in ("accuracy", "loss", "auc", "mean_rank", "shares"):
        assert alone[name].pop("sub_llm") is None
        assert (beside[name].pop("sub_llm") is None) == (name == "mean_rank")  # there are two choices
    assert alone == beside


def test_before_the_first_round_there_is_nothing_to_export(tmp_path: Path, tiny_llama: Path) -> None:
    settings = make_run(tmp_path, tiny_llama)
    with pytest.raises(UsageProblem, match=r"RUN\.toml has not been started"):
        export(settings, tmp_path / "out")
    with pytest.raises(UsageProblem, match=r"RUN\.toml has not been started"):
        evaluate_path(Path(settings.path), tmp_path / "eval.jsonl")
    with pytest.raises(UsageProblem, match=r"has no fedsoda\.json, so it is not an export; name a RUN"):
        evaluate_path(tmp_path, tmp_path / "eval.jsonl")
    with pytest.raises(UsageProblem, match="gone does not exist; name a RUN"):
        evaluate_path(tmp_path / "gone", tmp_path / "eval.jsonl")
    assert not (tmp_path / "out").exists()


def test_a_merged_checkpoint_is_in_shards_that_transformers_loads(
    finished: RunSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, apart = finished.directory / "whole", finished.directory / "apart"
    export(finished, whole, merge=True)
    monkeypatch.setattr(CheckpointWriter.__init__, "__defaults__", (100_000,))
    export(finished, apart, merge=True)
    shards = sorted(apart.glob("*.safetensors"))
    assert len(shards) > 4
    assert shards[0].name == f"model-00001-of-{len(shards):05}.safetensors"
    assert all(path.stat().st_size < 110_000 for path in shards)
    assert not list(apart.glob("*.part"))
    ids = torch.tensor([[1, 5, 9, 30]])
    with torch.no_grad():
        assert torch.equal(full_llm(apart)(ids).logits, full_llm(whole)(ids).logits)


def test_a_merged_checkpoint_keeps_the_head_that_the_flag_denies(tmp_path: Path, tiny_llama: Path) -> None:
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text("\ufeff" + json.dumps(config | {"tie_word_embeddings": True}), encoding="utf-8")
    settings = make_run(tmp_path / "run", model, align={"steps": 0})
    emulator = prepare(settings).sub_llms[0].emulator_view
    finish(settings, BlobStore(settings.run_dir / "blobs").put(delta.to_bytes(master_of(settings))), emulator)
    export(settings, tmp_path / "merged", merge=True)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False
    held = load_file(tmp_path / "merged" / "model.safetensors")
    assert torch.equal(held["lm_head.weight"], load_file(tiny_llama / "model.safetensors")["lm_head.weight"])


def test_an_export_that_fails_leaves_the_last_one(
    finished: RunSettings, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in exported.iterdir()}

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fedsoda_hub.evaluation.export.save", full)
    with pytest.raises(OSError, match="No space left"):
        export(finished, exported)
    assert {path.name: path.read_bytes() for path in exported.iterdir()} == before
    assert not [*exported.parent.glob("*.part"), *exported.parent.glob("*.old")]


def test_the_runs_own_model_is_never_replaced(finished: RunSettings, tiny_llama: Path) -> None:
    with pytest.raises(UsageProblem, match="is the model of this run itself"):
        export(finished, tiny_llama, merge=True)
    assert (tiny_llama / "model.safetensors").is_file()


def test_the_adapter_config_says_nothing_that_the_oldest_peft_does_not_know(exported: Path) -> None:
    # Fields of peft 0.18.0's LoraConfig, with which it was loaded when this was written: an unknown one is a TypeError.
    known = {"peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "bias"}
    known |= {"inference_mode", "target_modules"}
    assert set(json.loads((exported / "adapter_config.json").read_text())) <= known
    assert PeftConfig.from_pretrained(exported).target_modules


# --- any round, and a run that begins with one -----------------------------------------------------------------------


def test_an_export_says_which_round_it_is_of(finished: RunSettings, tmp_path: Path) -> None:
    made = export(finished, tmp_path / "last")
    assert (made.rounds, made.round, made.kept, made.metric, made.value) == (1, 1, "last", None, None)
    with pytest.raises(UsageProblem, match="round 2 has not closed"):
        export(finished, tmp_path / "second", round_number=2)
    assert not (tmp_path / "second").exists()


def test_a_run_begins_with_the_lora_of_an_export(
    finished: RunSettings, exported: Path, adapter: dict[str, Tensor], tmp_path: Path, tiny_llama: Path
) -> None:
    following = make_run(tmp_path / "next", tiny_llama, align={"steps": 2}, lora={"start_from": str(exported)})
    prepared = prepare(following)
    blobs = BlobStore(following.run_dir / "blobs")
    begun = delta.from_bytes(
        blobs.get(prepared.master), Bundle.open(following.run_dir / "bundle").manifest.lora.adapter
    )
    assert begun.keys() == adapter.keys()
    assert all(torch.equal(begun[name], adapter[name]) for name in adapter)
    assert prepared.sub_llms[0].adapter_view == prepared.master  # edges train on from it
    fresh = prepare(make_run(tmp_path / "fresh", tiny_llama, align={"steps": 2}))
    assert fresh.master != prepared.master
    # What pruning costs is a property of the base, and the same for both; LoRA is on both sides of what follows.
    assert fresh.sub_llms[0].public_kl["pruned"] == pytest.approx(prepared.sub_llms[0].public_kl["pruned"], rel=1e-5)
    assert prepared.sub_llms[0].public_kl["aligned"] < prepared.sub_llms[0].public_kl["quantized"] * 1.5
    assert prepare(following) == prepared  # found again


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora": {"rank": 2}}, "has rank 4 and alpha 8, this run 2 and 8; write those of the export"),
        (
            {"method": {"adapter_layers": 3}},
            r"has no LoRA for layers\.5\..* and [0-9]+ more; write \[method\] adapter_layers",
        ),
        (
            {"lora": {"start_from": "nowhere"}},
            "cannot be read as an export .* name a directory that `fedsoda-hub export` wrote",
        ),
    ],
)
def test_an_export_of_another_layout_is_refused_before_anything_is_computed(
    exported: Path, tmp_path: Path, tiny_llama: Path, changes: dict[str, dict[str, Any]], words: str
) -> None:
    tables = {"lora": {"start_from": str(exported)} | changes.pop("lora", {}), **changes}
    with pytest.raises(UsageProblem, match=words):
        prepare(make_run(tmp_path, tiny_llama, **tables))


def test_an_export_of_another_model_a_merged_one_and_one_that_is_no_number_are_refused(
    exported: Path, tmp_path: Path, tiny_llama: Path
) -> None:
    def refused(change: str, value: object) -> str:
        copy = tmp_path / change
        shutil.copytree(exported, copy)
        about = json.loads((copy / "fedsoda.json").read_text())
        (copy / "fedsoda.json").write_text(json.dumps(about | {change: value}))
        with pytest.raises(UsageProblem) as failure:
            prepare(make_run(tmp_path / f"{change}.run", tiny_llama, lora={"start_from": str(copy)}))
        return str(failure.value)

    assert "for another model (revision 'other') than this run's" in refused("model_revision", "other")
    assert "is a merged checkpoint; export the round without --merge" in refused("merged", True)
    broken = tmp_path / "broken"
    shutil.copytree(exported, broken)
    tensors = load_file(broken / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, broken / "adapter_model.safetensors")
    with pytest.raises(UsageProblem, match="holds what is not a number in layers"):
        prepare(make_run(tmp_path / "nan", tiny_llama, lora={"start_from": str(broken)}))
