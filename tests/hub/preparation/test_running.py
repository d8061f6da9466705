"""What a run computes in: its own dtype where that is quick, and the same preparation within the rounding of 16 bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsoda_hub.preparation import running
from fedsoda_hub.preparation.prepare import RunPreparation
from fedsoda_hub.preparation.running import pick_device
from tests.hub.algorithms.methods.test_methods import run_of
from tests.hub.preparation.test_heal import HEALED, NEVER
from tests.hub.runs import make_run

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def multiplies(monkeypatch: pytest.MonkeyPatch, *dtypes: torch.dtype) -> None:
    """Let this CPU have instructions for these dtypes and fp32, whatever it has."""
    monkeypatch.setattr(running, "has_instructions_for", lambda dtype: dtype in (FP32, *dtypes))


@pytest.mark.parametrize("native", [(), (BF16,)], ids=["fp32 alone", "bf16 too"])
def test_a_cpu_computes_in_the_runs_dtype_where_it_has_instructions_for_it(
    monkeypatch: pytest.MonkeyPatch, native: tuple[torch.dtype, ...]
) -> None:
    multiplies(monkeypatch, *native)
    assert pick_device("cpu", "bfloat16") == ("cpu", BF16 if native else FP32)
    assert pick_device("cpu", "float16") == ("cpu", FP32)
    assert pick_device("cpu", "float32") == ("cpu", FP32)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto", "float16") == ("cuda", FP16)


KINDS: dict[str, Any] = {
    "healed": {
        "align": HEALED,
        "method": {**NEVER, "distance": "healed"},
        "public": {"like_task": "prompts.jsonl"},
    },
    "border map": {
        "align": {"steps": 2, "border_map": "ridge"},
        "public": {"like_task": "prompts.jsonl"},
    },
}


@pytest.mark.parametrize("name", [*KINDS, "fedbiot", "fedot", "fedpetuning", "fedpruner", "fedpruner+"])
def test_a_run_is_prepared_in_bf16_as_in_fp32(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    multiplies(monkeypatch, BF16)
    found, last = {}, {}
    for dtype in ("float32", "bfloat16"):
        directory = tmp_path / dtype
        directory.mkdir()
        (directory / "prompts.jsonl").write_text(
            "".join(json.dumps({"word": f"cat {at} inn"}) + "\n" for at in range(60))
        )
        if name in KINDS:
            settings = make_run(directory, tiny_llama, dtype, **KINDS[name])
        else:
            settings = run_of(directory, tiny_llama, name, dtype=dtype, learning_rate=None)
        preparation = RunPreparation(settings)
        found[dtype] = preparation.run().sub_llms[0].public_kl
        last[dtype] = preparation.llm.running.compute_dtype
    assert last == {"float32": FP32, "bfloat16": BF16}
    for stage, kl in found["float32"].items():
        assert found["bfloat16"][stage] == pytest.approx(kl, rel=0.05, abs=1e-9), stage
