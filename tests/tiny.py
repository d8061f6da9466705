"""Make tiny random models and data for tests: real files, no network."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM


def make_tokenizer(directory: Path, vocab: int = 320) -> None:
    """A byte-level BPE with <pad> 0, <s> 1, </s> 2 that puts <s> in front."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    merges = []
    for left, right in [("t", "h"), ("i", "n"), ("a", "n"), ("Ġ", "t"), ("o", "n"), ("e", "r"), ("Ġ", "a")]:
        if len(tokens) < vocab:
            tokens[left + right] = len(tokens)
            merges.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocab=tokens, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def make_tiny_llama(
    directory: Path,
    *,
    layers: int = 8,
    hidden: int = 64,
    intermediate: int = 128,
    heads: int = 4,
    kv_heads: int = 2,
    vocab: int = 320,
    tie: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> Path:
    """A random llama checkpoint whose layers differ in strength, so that pruning has something to choose."""
    directory.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=256,
        tie_word_embeddings=tie,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        for number, layer in enumerate(model.model.layers):
            strength = 1.0 + 3.0 * abs(((number * 5 + seed) % layers) / layers - 0.3)
            for _, weight in layer.named_parameters():
                if weight.ndim == 2:
                    torch.nn.init.normal_(weight, std=0.06 * strength)
                else:
                    weight.data.uniform_(0.8, 1.2)
        model.to(dtype).save_pretrained(directory)
    make_tokenizer(directory, vocab)
    return directory
