"""Let the full LLM write public text, for a hub that has none: plain text, and prompts like the run's, with what it
writes behind them (docs/methods.md (m11-self)).

The idea is LLM-QAT's (arXiv 2305.17888): distil on what the model writes itself. Text begins with bos and the model
continues, its first ids drawn from the whole vocabulary for breadth, later ones from the TOP_K likeliest. The result has
the form of text that is read, so that SGP, ODA and the border map see no difference; reading is `public_text.py`'s. How
many texts are written together is `writing.py`'s.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsoda_edge.data.samples import Sample
from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.model.families import build_config
from fedsoda_edge.model.source import Checkpoint
from fedsoda_edge.model.sub_llm import build
from fedsoda_edge.ports.machine import room
from fedsoda_edge.protocol.template import TextTemplate
from fedsoda_hub.preparation.public_text import MAX_HELD_OUT, MAX_PROMPT_IDS, MAX_PROMPTS, MIN_PROMPTS
from fedsoda_hub.preparation.tokenizing import tokenizer_of
from fedsoda_hub.preparation.writing import Text, Writer, cache_bytes, continuation

BROAD_IDS = 4  # ids at a text's beginning that are drawn from the whole vocabulary
TOP_K = 50
COLUMN_IDS = 64  # largest length of one column of a template, and of a completion
PATIENCE = 128  # texts in a row that are of no use, after which the model is asked for no more


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
    author = _Author.of(source, length, seed, compute_dtype, device)
    head = [] if author.bos is None else [author.bos]
    step = length - len(head)
    needed = (sequences + MAX_HELD_OUT) * step
    texts: list[list[int]] = []  # also those that are being written

    def begin() -> Text[list[int]] | None:
        if sum(map(len, texts)) >= needed:
            return None
        texts.append([])
        return author.plain(step, texts[-1])

    made: list[int] = []
    num_empty = 0
    for text in author.writer.write(begin):
        num_empty = 0 if text else num_empty + 1
        if num_empty == PATIENCE:
            raise UsageProblem(
                f"{source.name} ends all of {PATIENCE} texts before it has written anything; "
                "name a file as [public] text"
            )
        made += text
        if progress is not None:
            progress(min(len(made), needed), needed)
        if len(made) >= needed:
            break
    blocks = [torch.tensor(head + made[at : at + step]) for at in range(0, needed, step)]
    return blocks[:sequences], blocks[sequences:]


def generate_samples(
    source: Checkpoint,
    template: TextTemplate,
    max_length: int,
    *,
    seed: int,
    compute_dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> list[Sample]:
    """Write samples as an edge makes them of its rows: the full LLM writes the columns of prompts, which all differ, and a
    completion behind each.

    A completion is what the full LLM writes behind the prompt, up to a line break, its own end or COLUMN_IDS ids. Both are
    joined and tokenized together, with eos at the end where the model has one; the completion may be empty then. There are
    as many as MAX_PROMPTS and MAX_PROMPT_IDS allow, or fewer if the model has nothing new to write, in the order in which
    they began. The whole full LLM is in memory while it generates. On a CPU the same seed gives the same samples.

    Args:
        max_length: ids of a sample at most: a completion is cut there, a prompt that leaves no room for one is left out.
        progress: called as progress(samples made, samples wanted).

    Raises:
        UsageProblem: the template has no column or no text of its own, the full LLM does not fit into memory, or it
            writes too few prompts; says what to do.
    """
    tokenizer = tokenizer_of(source)
    author = _Author.of(source, max_length + COLUMN_IDS, seed, compute_dtype, device)
    remedy = 'name a file as [public] like_task, or write [align] border_map = "none"'
    if not template.columns or not any(text.strip() for text, *_ in string.Formatter().parse(template.text)):
        raise UsageProblem(
            f"[task] prompt = {template.text!r} does not show the full LLM what the task's prompts are like, for which it "
            f"needs a column and text around it; {remedy}"
        )
    found: dict[str, Sample] = {}
    left, begun, seen, num_useless = MAX_PROMPT_IDS, 0, 0, 0

    def begin() -> Text[_Row | None] | None:
        nonlocal begun
        if len(found) + begun - seen >= MAX_PROMPTS:
            return None  # those that are being written may be enough
        begun += 1
        return author.row(template, max_length)

    for row in author.writer.write(begin):
        seen += 1
        sample = None
        if row is not None and row.prompt not in found:
            sample = tokenizer.sample(row.prompt, row.completion, max_length)
        if row is None or sample is None or len(sample.ids) > left:
            num_useless += 1
            if num_useless == PATIENCE:
                break
            continue
        found[row.prompt] = sample
        left -= len(sample.ids)
        num_useless = 0
        if progress is not None:
            progress(len(found), MAX_PROMPTS)
    if len(found) < MIN_PROMPTS:
        raise UsageProblem(
            f"{author.name} has written {len(found)} different prompts of at most {max_length} ids, but a border map "
            f"needs {MIN_PROMPTS}; {remedy}"
        )
    return list(found.values())


@dataclass(frozen=True)
class _Row:
    """A prompt with columns that the full LLM wrote, and what it wrote behind it."""

    prompt: str
    completion: str


class _Author:
    """The full LLM as it writes plain text and rows of a template.

    bos: the id that a text begins with; None: the model has none. name: the full LLM's.
    """

    @classmethod
    def of(
        cls, source: Checkpoint, longest: int, seed: int, compute_dtype: torch.dtype, device: str | torch.device
    ) -> _Author:
        """Load the whole full LLM.

        Args:
            longest: ids of a text, at most.

        Raises:
            UsageProblem: it does not fit into the free memory; nothing was loaded.
        """
        is_cuda = torch.device(device).type == "cuda"
        free = torch.cuda.mem_get_info(device)[0] if is_cuda else room().ram_bytes
        needed = source.bytes * compute_dtype.itemsize // source.dtype.itemsize
        needed += cache_bytes(build_config(source.family, source.fields), longest, compute_dtype)
        if needed > free:
            raise UsageProblem(
                f"{source.name} needs {needed / 1e9:.1f} GB of memory to write text, but {free / 1e9:.1f} GB are free; "
                "free some memory, or name files as [public] text and like_task (or write [align] border_map = "
                '"none")'
            )
        model = build(source, range(source.num_layers), compute_dtype=compute_dtype, device=device, embedding=True)
        return cls(source, Writer(model, longest=longest, seed=seed))

    def __init__(self, source: Checkpoint, writer: Writer) -> None:
        self.name = source.name
        self.writer = writer
        self._tokenizer = tokenizer_of(source)
        self.bos: int | None = source.fields.get("bos_token_id")
        self._ends = self._tokenizer.ends
        self._vocab = int(source.fields["vocab_size"])
        self._break = self._encode("\n")

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.bare(text)

    def plain(self, num_ids: int, made: list[int]) -> Text[list[int]]:
        """Write a text of at most `num_ids` ids into `made`; one that the model ends earlier gets a line break."""
        if self.bos is None:
            made += torch.randint(self._vocab, (1,), generator=self.writer.generator).tolist()
        start, most = made if self.bos is None else [self.bos], num_ids - len(made)
        yield from continuation(start, most, ends=self._ends, among=TOP_K, broad=BROAD_IDS, made=made)
        if 0 < len(made) < num_ids:
            made += self._break
        return made

    def row(self, template: TextTemplate, max_length: int) -> Text[_Row | None]:
        """Write a row of a template; None where a column stays empty, or the prompt becomes longer than `max_length`.

        A column is what the model writes after the text before it, up to a line break, the template's next fixed text
        or the model's own end.
        """
        begin = self._break if self.bos is None else [self.bos]
        parts = [(literal, name) for literal, name, _, _ in string.Formatter().parse(template.text)]
        text = ""
        values: dict[str, str] = {}
        for (literal, name), (following, _) in zip(parts, [*parts[1:], ("", None)], strict=True):
            text += literal
            if name is None:
                continue
            if name not in values:
                # The model writes the space itself, as part of its first word, which is how vocabularies have it.
                start = begin + self._encode(text.rstrip(" "))
                if values and len(start) > max_length + 1:
                    return None
                values[name] = yield from self._column(start, following.strip(), 0 if values else BROAD_IDS)
                if not values[name]:
                    return None
            text += values[name]
        start = begin + self._encode(text.rstrip(" "))
        if len(start) > max_length + 1:
            return None
        completion = yield from self._column(start, "", 0)
        return _Row(text, completion)

    def _column(self, start: list[int], following: str, broad: int) -> Text[str]:
        """Write a column after a start, up to a line break or the text that follows the column in the template."""

        def text(ids: Sequence[int]) -> tuple[str, bool]:
            written = self._tokenizer.decode(list(ids)).lstrip()
            cut = written.partition("\n")[0]
            cut = cut.partition(following)[0] if following else cut
            return cut.strip(), cut != written

        positions = self.writer.positions
        if len(start) >= positions:
            raise UsageProblem(
                f"a row of [task] prompt has {len(start)} ids before its last column, but the model has {positions} "
                "positions; shorten the prompt"
            )
        made = yield from continuation(
            start,
            min(COLUMN_IDS, positions - len(start)),
            ends=self._ends,
            among=TOP_K,
            broad=broad,
            is_over=lambda ids: text(ids)[1],
        )
        return text(made)[0]
