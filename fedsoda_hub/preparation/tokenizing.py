"""Tokenize with the full LLM's own tokenizer, as edges do with the one of their bundle."""

from __future__ import annotations

from fedsoda_edge.data.samples import SampleTokenizer
from fedsoda_edge.model.source import Checkpoint


def tokenizer_of(source: Checkpoint) -> SampleTokenizer:
    """Read the tokenizer of a full LLM, as Transformers does.

    Raises:
        UsageProblem: Transformers cannot load it.
    """
    fields = source.fields
    return SampleTokenizer.read(source.own_tokenizer, fields.get("eos_token_id"), int(fields["vocab_size"]))
