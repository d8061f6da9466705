"""SmolLM2, where `scripts/fetch_smollm2` made it, is read as Transformers reads it: the same ids, the same logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fetch_smollm2 import SMOLLM2
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedsoda_edge.data.samples import SampleTokenizer
from fedsoda_edge.model.source import Checkpoint
from fedsoda_edge.model.sub_llm import build

TEXTS = [
    "Review: an utterly charming, if slight, comedy .\nSentiment: positive",
    "Question: 12 + 30 = <<12+30=42>>42?\n\n\tNaïve café – “quotes” 数学 🎬",
    "<|im_start|>user\nHi<|im_end|>",
]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (SMOLLM2 / "model.safetensors").is_file(), reason="run scripts/fetch_smollm2 first"),
]


@pytest.fixture
def smollm2() -> Checkpoint:
    return Checkpoint.open(str(SMOLLM2))


def test_it_is_the_model_that_results_are_of(smollm2: Checkpoint) -> None:
    assert (smollm2.num_layers, tuple(smollm2.embedding().shape)) == (30, (49_152, 576))
    assert torch.equal(smollm2.head(), smollm2.embedding())  # tied


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_those_of_its_own_tokenizer(smollm2: Checkpoint, text: str) -> None:
    ours = SampleTokenizer(Path(smollm2.path) / "tokenizer.json", smollm2.fields.get("eos_token_id"))
    ids = ours.encode(text)
    assert ids == AutoTokenizer.from_pretrained(SMOLLM2)(text)["input_ids"]
    sample = ours.sample(text, "yes")
    assert sample is not None
    assert sample.ids[-1] == smollm2.fields["eos_token_id"]


def test_logits_are_those_of_transformers(smollm2: Checkpoint) -> None:
    ids = torch.tensor([AutoTokenizer.from_pretrained(SMOLLM2)(TEXTS[0])["input_ids"]])
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32)(ids).logits
        whole = build(smollm2, range(smollm2.num_layers), embedding=True)
        ours = whole.hidden(ids=ids) @ smollm2.head().float().T
    assert torch.allclose(ours, theirs, atol=1e-3)
