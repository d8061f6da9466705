"""Make tiny random models and data for tests: real files, no network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM


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
    tokenizer.add_special_tokens(["<pad>", "<s>", "</s>"])
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


# What each family does differently from llama, all of it switched on and small enough to matter on 20 tokens. Rows of
# matrices are whole blocks of 64: bitsandbytes 0.50 reads others wrongly where a CPU has AVX512.
FAMILY_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 6},
    "qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 3},
    "qwen3": {"head_dim": 32, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 3},
    "gemma3_text": {
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 6,
        "layer_types": [("full" if n % 3 == 2 else "sliding") + "_attention" for n in range(8)],
        "tie_word_embeddings": True,
    },
    "phi3": {"partial_rotary_factor": 0.5},
    "olmo2": {},
    "smollm3": {"no_rope_layer_interval": 3, "tie_word_embeddings": True},
    "qwen3_moe": {
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "mlp_only_layers": [1, 6],
    },
}


def make_tiny(directory: Path, family: str, *, layers: int = 8, vocab: int = 320) -> Path:
    """A random checkpoint of any family, whose norms and biases are no ones and zeros."""
    directory.mkdir(parents=True, exist_ok=True)
    config = AutoConfig.for_model(
        family,
        vocab_size=vocab,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **FAMILY_CONFIGS[family],
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(config)
        for name, weight in model.model.layers.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(weight, std=0.3)
            elif weight.ndim == 1:
                weight.data.uniform_(0.6, 1.4)
            else:
                torch.nn.init.normal_(weight, std=0.12)
        model.to(torch.bfloat16).save_pretrained(directory)
    make_tokenizer(directory, vocab)
    return directory
