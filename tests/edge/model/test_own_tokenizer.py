"""Ids are those of AutoTokenizer, whatever the files of a tokenizer leave to Transformers; nothing but `tokenizers` makes them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer

from fedsoda_edge.data.samples import SampleTokenizer
from fedsoda_edge.errors import DataProblem, UsageProblem
from fedsoda_edge.model.own_tokenizer import own_eos, own_tokenizer
from fedsoda_edge.protocol.manifest import TOKENIZER_FILES

TEXTS = [
    "",
    " ",
    "in the rain",
    " two  spaces and a tail ",
    "what does </s> mean? <s> nothing </s>",
    "<|tool|>call<|tool|> <dept> <|im_end|>\n",
    "caf\u00e9 cafe\u0301 \ufb01 \u00bd \u200b\u00a0end",
    "line\n\n\tbreaks\r\n",
    "Don't , stop . Now ?",
    "\u65e5\u672c \U0001f600\U0001f3fd end",
    "the <UNK> THE thing",
]
Change = Callable[[Tokenizer, dict[str, Any]], None]


def byte_level(prefix: bool = False) -> Tokenizer:
    """A byte-level BPE with <pad> 0, <s> 1, </s> 2."""
    alphabet = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocab = {token: number for number, token in enumerate(alphabet)}
    merges = [("t", "h"), ("th", "e"), ("\u0120", "t"), ("i", "n")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    made = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<pad>", "<s>", "</s>"])
    return made


def like_sentencepiece() -> Tokenizer:
    """A BPE with byte fallback and \u2581 for spaces, as converted from sentencepiece."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["\u2581", *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ<>|/.,?'"]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    merges = [("t", "h"), ("th", "e"), ("\u2581", "the"), ("\u2581", "\u2581"), ("i", "n")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    made = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.post_processor = around("<s> $A")
    return made


def around(single: str) -> Any:
    return processors.TemplateProcessing(single=single, pair=None, special_tokens=[("<s>", 1), ("</s>", 2)])


def _prefix_and_suffix(made: Tokenizer, config: dict[str, Any]) -> None:
    made.post_processor = around("<s> $A </s>")


def _from_config_alone(made: Tokenizer, config: dict[str, Any]) -> None:
    config["added_tokens_decoder"] = {
        str(made.get_vocab_size() + at): {
            "content": content,
            "lstrip": lstrip,
            "rstrip": rstrip,
            "normalized": False,
            "single_word": False,
            "special": special,
        }
        for at, (content, lstrip, rstrip, special) in enumerate(
            [("<|tool|>", False, False, True), ("<dept>", True, True, False), ("<|im_end|>", False, True, True)]
        )
    }


def _flags(made: Tokenizer, config: dict[str, Any]) -> None:
    config |= {"add_bos_token": True, "add_eos_token": True}


def _no_bos(made: Tokenizer, config: dict[str, Any]) -> None:
    made.post_processor = around("<s> $A")
    config |= {"add_bos_token": False}


def _eos_of_config(made: Tokenizer, config: dict[str, Any]) -> None:
    config |= {"eos_token": "<|im_end|>", "pad_token": {"content": "<|fill|>", "__type": "AddedToken", "special": True}}


def _normalized(made: Tokenizer, config: dict[str, Any]) -> None:
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase(), normalizers.Strip()])
    made.add_tokens([AddedToken("the", normalized=True, single_word=True), AddedToken("THING", normalized=False)])


def _split(made: Tokenizer, config: dict[str, Any]) -> None:
    config["split_special_tokens"] = True


def _digits(made: Tokenizer, config: dict[str, Any]) -> None:
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}{1,3}|\s+(?!\S)| ?\p{L}+|[^\p{L}\s]+|\s"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _cut(made: Tokenizer, config: dict[str, Any]) -> None:
    made.enable_truncation(4)
    made.enable_padding(length=16)


def _clean(made: Tokenizer, config: dict[str, Any]) -> None:
    config |= {"clean_up_tokenization_spaces": True, "legacy": True, "model_max_length": 4}


def _extra(made: Tokenizer, config: dict[str, Any]) -> None:
    config |= {"additional_special_tokens": ["<|tool|>", "<dept>"]}


def _llama(made: Tokenizer, config: dict[str, Any]) -> None:
    config |= {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, "unk_token": "<unk>"}


def _legacy(made: Tokenizer, config: dict[str, Any]) -> None:
    _llama(made, config)
    config |= {"legacy": True, "add_prefix_space": False, "add_eos_token": True}


def _qwen(made: Tokenizer, config: dict[str, Any]) -> None:
    _from_config_alone(made, config)
    config |= {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "bos_token": None}


def _nothing(made: Tokenizer, config: dict[str, Any]) -> None:
    return


ODDITIES: dict[str, tuple[Callable[[], Tokenizer], Change]] = {
    "plain": (byte_level, _nothing),
    "prefix space": (lambda: byte_level(True), _nothing),
    "bos and eos by the tokenizer": (byte_level, _prefix_and_suffix),
    "added tokens in the config alone": (byte_level, _from_config_alone),
    "add_bos and add_eos": (byte_level, _flags),
    "add_bos off beside a template": (byte_level, _no_bos),
    "eos and pad in the config alone": (byte_level, _eos_of_config),
    "normalizers": (byte_level, _normalized),
    "special tokens are split": (byte_level, _split),
    "digits": (byte_level, _digits),
    "truncation and padding saved": (byte_level, _cut),
    "cleaned up, legacy": (byte_level, _clean),
    "additional special tokens": (byte_level, _extra),
    "qwen's own class": (byte_level, _qwen),
    "like sentencepiece": (like_sentencepiece, _nothing),
    "llama's own class": (like_sentencepiece, _llama),
    "llama, legacy": (like_sentencepiece, _legacy),
    "like sentencepiece, added tokens": (like_sentencepiece, _from_config_alone),
}


def written(directory: Path, made: Tokenizer, change: Change) -> dict[str, Any]:
    """Write a tokenizer's files as a model has them; return its config."""
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    change(made, config)
    made.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 400, "eos_token_id": 2}))
    return config


def read(directory: Path, to: Path, eos: Any = 2, vocab_size: int | None = None) -> SampleTokenizer:
    """The tokenizer as an edge has it of a bundle."""
    files = {name: directory / name for name in TOKENIZER_FILES if (directory / name).exists()}
    to.mkdir(exist_ok=True)
    for name, data in own_tokenizer(directory).items():
        files[name] = to / name
        files[name].write_bytes(data)
    return SampleTokenizer.read(files, eos, vocab_size)


@pytest.mark.parametrize("name", ODDITIES)
def test_ids_are_those_of_auto_tokenizer(tmp_path: Path, name: str) -> None:
    make, change = ODDITIES[name]
    written(tmp_path, make(), change)
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), read(tmp_path, tmp_path / "own")
    theirs.backend_tokenizer.no_truncation()
    theirs.backend_tokenizer.no_padding()
    for text in TEXTS:
        assert ours.encode(text) == theirs(text, truncation=False).input_ids, text
        assert ours.bare(text) == theirs(text, add_special_tokens=False, truncation=False).input_ids, text


@pytest.mark.parametrize("name", ODDITIES)
def test_samples_end_in_exactly_one_end_token(tmp_path: Path, name: str) -> None:
    make, change = ODDITIES[name]
    written(tmp_path, make(), change)
    eos = own_eos(tmp_path)
    ours = read(tmp_path, tmp_path / "own", eos)
    for prompt, completion in [("in", "rain"), ("", "x"), ("a:", "b </s>x"), ("what is </s>?", "an end")]:
        sample = ours.sample(prompt, completion)
        assert sample is not None
        assert sample.ids[-1] == eos
        assert sample.ids[-2] != eos
        assert ours.begun(prompt) == list(sample.ids[: len(ours.begun(prompt))])  # no end behind what is asked


def test_an_end_that_a_completion_brings_is_the_end(tmp_path: Path) -> None:
    written(tmp_path, byte_level(), _nothing)
    ours = read(tmp_path, tmp_path / "own")
    for completion in ("rain</s>", "rain</s></s>", "rain</s>\n", "rain"):
        sample = ours.sample("in", completion)
        assert sample is not None
        assert (sample.ids[-1], sample.ids.count(2)) == (2, 1)
        assert ours.decode(sample.ids[sample.start :]) == " rain"


def test_of_several_ends_a_sample_ends_with_the_tokenizers_own(tmp_path: Path) -> None:
    written(tmp_path, byte_level(), _nothing)
    for eos, end in [([0, 2], 2), ([0, 1], 0), (1, 1), ([2], 2)]:
        sample = read(tmp_path, tmp_path / "own", eos).sample("in", "rain")
        assert sample is not None
        assert sample.ids[-1] == end


def test_a_file_that_gives_the_ids_itself_stays_as_it_is(tmp_path: Path) -> None:
    written(tmp_path, byte_level(), _prefix_and_suffix)
    assert own_tokenizer(tmp_path) == {}
    written(tmp_path, byte_level(), _from_config_alone)
    assert set(own_tokenizer(tmp_path)) == {"tokenizer.json"}


def test_no_code_of_a_model_is_run(tmp_path: Path) -> None:
    config = written(tmp_path, byte_level(), _nothing)
    config |= {"tokenizer_class": "Odd", "auto_map": {"AutoTokenizer": ["odd.Odd", "odd.Odd"]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "odd.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Odd: pass\n")
    assert read(tmp_path, tmp_path / "own").encode("in") == byte_level().encode("in").ids
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_that_cannot_be_loaded_is_told(tmp_path: Path) -> None:
    written(tmp_path, byte_level(), _nothing)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UsageProblem, match=r"cannot be loaded .* save it again"):
        own_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UsageProblem, match=r"has no tokenizer\.json"):
        own_tokenizer(tmp_path)


def test_a_tokenizer_that_fails_on_a_text_is_told(tmp_path: Path) -> None:
    """Its unknown token is not in its vocabulary, which shows only where it meets something unknown."""
    made = Tokenizer(models.WordLevel(vocab={"a": 0, "</s>": 1}, unk_token="<unk>"))
    made.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UsageProblem, match=r"cannot be loaded \(.*save it again"):
        own_tokenizer(tmp_path)


def test_a_text_with_an_id_that_the_model_lacks_is_told(tmp_path: Path) -> None:
    made = byte_level()
    written(tmp_path, made, _from_config_alone)
    ours = read(tmp_path, tmp_path / "own", vocab_size=made.get_vocab_size())
    assert ours.sample("in", "rain") is not None
    with pytest.raises(DataProblem, match=r"the token '<dept>' with the id 264, but the model has ids up to 262"):
        ours.sample("in the <dept>", "rain")
