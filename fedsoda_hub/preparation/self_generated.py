"""Let the full LLM write public text, for a hub that has none: plain text, and prompts like the run's (docs/methods.md
(m11-self)).

The idea is LLM-QAT's (arXiv 2305.17888): distil on what the model writes itself. Text begins with bos and the model
continues, its first ids drawn from the whole vocabulary for breadth, later ones from the TOP_K likeliest. The result has
the form of text that is read, so that SGP, ODA and the border map see no difference; reading is `public_text.py`'s.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any

import psutil
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList

from fedsoda_edge.data.samples import SampleTokenizer
from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.model.source import Checkpoint
from fedsoda_edge.model.sub_llm import SubLLM, build
from fedsoda_edge.protocol.template import TextTemplate
from fedsoda_hub.preparation.public_text import MAX_HELD_OUT, MAX_PROMPT_IDS, MAX_PROMPTS, MIN_PROMPTS

BROAD_IDS = 4  # ids at a text's beginning that are drawn from the whole vocabulary
TOP_K = 50
COLUMN_IDS = 64  # largest length of one column of a template
BATCH_SIZE = 32


def generate_blocks(
    source: Checkpoint,
    sequences: int,
    length: int,
    *,
    seed: int,
    compute_dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Write blocks as `public_text.read_blocks` cuts them: `length` ids each, with bos first where the model has one.

    The whole full LLM is in memory while it generates. On a CPU the same seed gives the same blocks.

    Args:
        progress: called as progress(ids made, ids needed).

    Returns:
        (used, held out), (length,) ids each.

    Raises:
        UsageProblem: the full LLM does not fit into memory, or ends its texts before it has written anything.
    """
    writer = _Writer.of(source, compute_dtype, device)
    head = [] if writer.bos is None else [writer.bos]
    step = length - len(head)
    needed = (sequences + MAX_HELD_OUT) * step
    made: list[int] = []
    with torch.random.fork_rng(), torch.inference_mode():  # `generate` draws from the global generator
        torch.manual_seed(seed)
        while len(made) < needed:
            texts = writer.plain(step)
            if not any(texts):
                raise UsageProblem(
                    f"{source.name} ends all of {BATCH_SIZE} texts before it has written anything; "
                    "name a file as [public] text"
                )
            made += [token for text in texts for token in text]
            if progress is not None:
                progress(min(len(made), needed), needed)
    blocks = [torch.tensor(head + made[at : at + step]) for at in range(0, needed, step)]
    return blocks[:sequences], blocks[sequences:]


def generate_prompts(
    source: Checkpoint,
    template: TextTemplate,
    max_length: int,
    *,
    seed: int,
    compute_dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> list[Tensor]:
    """Write prompts as `public_text.read_prompts` reads them: the full LLM writes the columns; all prompts differ.

    There are as many as MAX_PROMPTS and MAX_PROMPT_IDS allow, or fewer if the model has nothing new to write. The whole
    full LLM is in memory while it generates. On a CPU the same seed gives the same prompts.

    Args:
        max_length: the longest prompt in ids; longer ones are left out, since the end of a prompt shows the task.
        progress: called as progress(prompts made, prompts wanted).

    Returns:
        (T_i,) ids each.

    Raises:
        UsageProblem: the template has no column or no text of its own, the full LLM does not fit into memory, or it
            writes too few prompts; says what to do.
    """
    remedy = 'name a file as [public] like_task, or write [align] border_map = "none"'
    if not template.columns or not any(text.strip() for text, *_ in string.Formatter().parse(template.text)):
        raise UsageProblem(
            f"[task] prompt = {template.text!r} does not show the full LLM what the task's prompts are like, for which it "
            f"needs a column and text around it; {remedy}"
        )
    writer, tokenizer = _Writer.of(source, compute_dtype, device), SampleTokenizer(source.path / "tokenizer.json", None)
    found: dict[str, Tensor] = {}
    left, is_new = MAX_PROMPT_IDS, True
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(seed)
        while is_new:
            is_new = False
            for text in writer.rows(template):
                ids = tokenizer.encode(text)
                if text and text not in found and len(ids) <= min(max_length, left) and len(found) < MAX_PROMPTS:
                    found[text], is_new = torch.tensor(ids), True
                    left -= len(ids)
            if progress is not None:
                progress(len(found), MAX_PROMPTS)
    if len(found) < MIN_PROMPTS:
        raise UsageProblem(
            f"{source.name} has written {len(found)} different prompts of at most {max_length} ids, but a border map "
            f"needs {MIN_PROMPTS}; {remedy}"
        )
    return list(found.values())


class _Writer:
    """A model that writes BATCH_SIZE texts at a time. bos: the id that a text begins with; None: the model has none."""

    @classmethod
    def of(cls, source: Checkpoint, compute_dtype: torch.dtype, device: str | torch.device) -> _Writer:
        """Load the whole full LLM.

        Raises:
            UsageProblem: it does not fit into the free memory; nothing was loaded.
        """
        is_cuda = torch.device(device).type == "cuda"
        free = torch.cuda.mem_get_info(device)[0] if is_cuda else psutil.virtual_memory().available
        needed = source.bytes * compute_dtype.itemsize // source.dtype.itemsize
        if needed > free:
            raise UsageProblem(
                f"{source.name} needs {needed / 1e9:.1f} GB of memory to write text, but {free / 1e9:.1f} GB are free; "
                "free some memory, or name files as [public] text and like_task (or write [align] border_map = "
                '"none")'
            )
        model = build(source, range(source.num_layers), compute_dtype=compute_dtype, device=device, embedding=True)
        return cls(model, Tokenizer.from_file(str(source.path / "tokenizer.json")), source.fields)

    def __init__(self, model: SubLLM, tokenizer: Tokenizer, fields: dict[str, Any]) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        eos = fields.get("eos_token_id")
        self.bos: int | None = fields.get("bos_token_id")
        self._ends = set() if eos is None else {eos} if isinstance(eos, int) else set(eos)
        self._model = model
        self._tokenizer = tokenizer
        self._vocab = int(fields["vocab_size"])
        self._positions = int(fields["max_position_embeddings"])
        self._break = self._encode("\n")

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def plain(self, num_ids: int) -> list[list[int]]:
        """Write texts of at most `num_ids` ids; a text that the model ends earlier gets a line break."""
        if self.bos is None:
            first = torch.randint(self._vocab, (BATCH_SIZE, 1)).tolist()
            texts = [a + b for a, b in zip(first, self._continued(first, num_ids - 1, BROAD_IDS), strict=True)]
        else:
            texts = self._continued([[self.bos]] * BATCH_SIZE, num_ids, BROAD_IDS)
        return [text + self._break if 0 < len(text) < num_ids else text for text in texts]

    def rows(self, template: TextTemplate) -> list[str]:
        """Write rows of a template; a row in which a column stays empty is "".

        A column is what the model writes after the text before it, up to a line break, the template's next fixed text
        or the model's own end.
        """
        begin = self._break if self.bos is None else [self.bos]
        parts = [(literal, name) for literal, name, _, _ in string.Formatter().parse(template.text)]
        texts = [""] * BATCH_SIZE
        values: dict[str, list[str]] = {}
        for (literal, name), (following, _) in zip(parts, [*parts[1:], ("", None)], strict=True):
            texts = [text + literal for text in texts]
            if name is None:
                continue
            if name not in values:
                # The model writes the space itself, as part of its first word, which is how vocabularies have it.
                starts = [begin + self._encode(text.rstrip(" ")) for text in texts]
                values[name] = self._column(starts, following.strip(), 0 if values else BROAD_IDS)
            texts = [text + value for text, value in zip(texts, values[name], strict=True)]
        whole = [all(row) for row in zip(*values.values(), strict=True)]
        return [text if is_whole else "" for text, is_whole in zip(texts, whole, strict=True)]

    def _column(self, starts: list[list[int]], following: str, broad: int) -> list[str]:
        """Write a column after each start, up to a line break or the text that follows the column in the template."""

        def text(ids: Sequence[int]) -> tuple[str, bool]:
            written = self._tokenizer.decode(list(ids)).lstrip()
            cut = written.partition("\n")[0]
            cut = cut.partition(following)[0] if following else cut
            return cut.strip(), cut != written

        return [text(ids)[0] for ids in self._continued(starts, COLUMN_IDS, broad, lambda ids: text(ids)[1])]

    def _continued(
        self,
        starts: list[list[int]],
        num_ids: int,
        broad: int,
        is_over: Callable[[list[int]], bool] | None = None,
    ) -> list[list[int]]:
        """Write at most `num_ids` more ids after each start, without the end of text.

        Args:
            broad: how many of the new ids, from the first on, are drawn from the whole vocabulary.
            is_over: tells whether these new ids are enough; others may follow them nevertheless.
        """
        width = max(map(len, starts))
        if width >= self._positions:
            raise UsageProblem(
                f"a row of [task] prompt has {width} ids before its last column, but the model has {self._positions} "
                "positions; shorten the prompt"
            )
        pad = min(self._ends, default=0)  # any id serves: it is masked on the left and cut off on the right

        def top_k(ids: Tensor, scores: Tensor) -> Tensor:
            if ids.shape[1] < width + broad:
                return scores
            least = scores.topk(min(TOP_K, scores.shape[1])).values[:, -1:]
            return scores.masked_fill(scores < least, -torch.inf)

        def criterion(ids: Tensor, _: object, **__: object) -> Tensor:
            over = [is_over is not None and is_over(row) for row in ids[:, width:].tolist()]
            return torch.tensor(over, device=ids.device)

        ids = torch.tensor([[pad] * (width - len(start)) + start for start in starts])
        mask = torch.tensor([[0] * (width - len(start)) + [1] * len(start) for start in starts])
        out = self._model.model.generate(
            ids.to(self._model.device),
            attention_mask=mask.to(self._model.device),
            do_sample=True,
            top_k=0,
            max_new_tokens=min(num_ids, self._positions - width),
            eos_token_id=sorted(self._ends) or None,
            pad_token_id=pad,
            logits_processor=LogitsProcessorList([top_k]),
            stopping_criteria=StoppingCriteriaList([criterion]),
        )
        return [list(takewhile(lambda token: token not in self._ends, row)) for row in out[:, width:].tolist()]
