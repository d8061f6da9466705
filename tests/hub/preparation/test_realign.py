"""A prepared run is probed and aligned again from what lies there: neither text nor weights are read twice."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from fedsoda_edge.model import delta
from fedsoda_edge.model.bundle import Bundle
from fedsoda_edge.model.source import Checkpoint
from fedsoda_hub.federation.jobs import JobProgress, Probe, Realign
from fedsoda_hub.preparation.full_llm import StreamedLLM
from fedsoda_hub.preparation.prepare import RunPreparation
from fedsoda_hub.preparation.realign import PreparedRun
from fedsoda_hub.run.directory import RunDirectory
from fedsoda_hub.settings.run import RunSettings
from tests.edge.model.test_bundle import random_lora
from tests.hub.runs import make_run, put


def adapter_of(bundle: Bundle) -> dict[str, Tensor]:
    tensors = random_lora(bundle.manifest.lora, 1)
    return {item.name: tensors[item.name] for item in bundle.manifest.lora.adapter}


@pytest.mark.parametrize(("codec", "of_alignments"), [("int8", "int8"), ("klt", "nf4")])
def test_a_realignment_reads_only_the_adapter_of_the_full_llm(
    prepared: RunSettings, monkeypatch: pytest.MonkeyPatch, codec: str, of_alignments: str
) -> None:
    settings = msgspec.structs.replace(prepared, wire=msgspec.structs.replace(prepared.wire, codec=codec))
    bundle, blobs, read = Bundle.open(settings.run_dir / "bundle"), RunDirectory(settings.run_dir).blobs, set()
    spec, view, real = bundle.manifest.lora, bundle.emulator_lora(), Checkpoint.layer

    def layer(self: Checkpoint, number: int) -> dict[str, torch.Tensor]:
        read.add(number)
        return real(self, number)

    monkeypatch.setattr(Checkpoint, "layer", layer)
    made = PreparedRun(StreamedLLM(settings))
    job = Realign(version=1, master=put(settings, adapter_of(bundle)), emulator_views=(put(settings, view),))
    [result] = made.realign(job).sub_llms
    assert read == set(bundle.plan.adapter)
    stepped = delta.advance(view, blobs.get(result.delta), spec.emulator, of_alignments)
    assert delta.digest(stepped) == result.view
    assert made.realign(job).sub_llms == (result,)
    [other] = made.realign(msgspec.structs.replace(job, version=2)).sub_llms
    assert other.view != result.view


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file was hashed."""
    found: Counter[str] = Counter()
    real = hashlib.file_digest

    def digest(file: Any, algorithm: str) -> Any:
        found[Path(file.name).name] += 1
        return real(file, algorithm)

    monkeypatch.setattr(hashlib, "file_digest", digest)
    return found


def test_text_and_weights_are_read_once_however_often_it_is_probed_and_aligned(
    tmp_path: Path, tiny_llama: Path, hashed: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, read, real = make_run(tmp_path, tiny_llama), Counter[str](), Path.read_bytes

    def read_bytes(self: Path) -> bytes:
        read[self.name] += 1
        return real(self)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    preparation = RunPreparation(settings)
    started = preparation.run()
    assert preparation.run() == started
    hashed_before = hashed.copy()
    made = PreparedRun(preparation.llm)
    [sub_llm] = started.sub_llms
    for version in (1, 2, 3):
        made.probe(Probe(master=started.master, emulator_view=sub_llm.emulator_view))
        made.realign(Realign(version=version, master=started.master, emulator_views=(sub_llm.emulator_view,)))
    assert read["public.txt"] == 1
    assert hashed_before["model.safetensors"] == 1
    again = hashed - hashed_before
    assert again["model.safetensors"] == 0
    assert max(again.values()) == 1  # shards of the bundle


def test_each_job_reports_to_whoever_asked_for_it(prepared: RunSettings) -> None:
    bundle, made = Bundle.open(prepared.run_dir / "bundle"), PreparedRun(StreamedLLM(prepared))
    master, view = put(prepared, bundle.adapter_lora()), put(prepared, bundle.emulator_lora())
    said: list[list[JobProgress]] = [[], []]
    for version, heard in enumerate(said, start=1):
        made.realign(Realign(version=version, master=master, emulator_views=(view,)), heard.append)
    assert [[one.stage for one in heard] for heard in said] == [["aligning"] * 4] * 2
