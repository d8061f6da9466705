"""Tokenize with the full LLM's own tokenizer, as edges do with the one of their bundle, and check that both go together."""

from __future__ import annotations

from fedsoda_edge.data.samples import SampleTokenizer
from fedsoda_edge.data.tokenizer_files import read_json, special_tokens
from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.model.source import Checkpoint
from fedsoda_edge.units import counted

# Of a family that also sees and hears, a model of text alone may lack the last ids: no text has them.
_NO_TEXT = ("image_token", "video_token", "audio_token")


def tokenizer_of(source: Checkpoint) -> SampleTokenizer:
    """Read the tokenizer of a full LLM, as Transformers does.

    Raises:
        UsageProblem: Transformers cannot load it.
    """
    fields = source.fields
    return SampleTokenizer.read(source.own_tokenizer, fields.get("eos_token_id"), int(fields["vocab_size"]))


def check_tokenizer(source: Checkpoint) -> None:
    """Check that the model has an embedding for each id that its tokenizer may give, and for its end.

    Raises:
        UsageProblem: it lacks some.
    """
    vocab, tokenizer = int(source.fields["vocab_size"]), tokenizer_of(source)
    named = special_tokens(read_json(source.own_tokenizer.get("tokenizer_config.json")))
    no_text = {named[name] for name in _NO_TEXT if name in named}
    over = {one: token for token, one in tokenizer.tokens.items() if one >= vocab and token not in no_text}
    if over:
        first = min(over)
        raise UsageProblem(
            f"the tokenizer of {source.name} has {counted(len(over), 'token')} beyond the {vocab} ids that the model has an "
            f"embedding for (vocab_size), such as {over[first]!r} with the id {first}; save the tokenizer that belongs to "
            f"the model, or give the model {max(over) + 1} ids (resize_token_embeddings)"
        )
    if ends := [one for one in tokenizer.ends if not 0 <= one < vocab]:
        raise UsageProblem(
            f"the eos_token_id {ends[0]} of {source.name} is not among the {vocab} ids that the model has an embedding for "
            "(vocab_size); correct it in config.json"
        )
