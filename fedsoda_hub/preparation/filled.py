"""Fill a run's prompt with pieces of public text (docs/methods.md (m11-filled)).

Where a model looks and what it is about to say is decided by the template as much as by the words in its columns. So such
rows are like the task's for healing, cost no time, and differ more from one another than what a small LLM writes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fedsoda_edge.data.samples import SampleTokenizer
from fedsoda_edge.protocol.template import TextTemplate

REUSE = 4  # pieces have at most this many times the ids of the text that they are cut from
COMPLETION_IDS = (
    8  # at most: where the prompt ends, the answer is predicted, so that many prompts are worth more than long ends
)
PATIENCE = 64  # rows in a row that are of no use, after which there are no more


def filled_rows(
    blocks: Sequence[Tensor],
    prompt: TextTemplate,
    tokenizer: SampleTokenizer,
    max_length: int,
    *,
    num_ids: int,
    seed: int,
) -> list[Tensor]:
    """Render samples whose columns and completions are pieces of these blocks, all prompts different.

    The length of a column is drawn with a uniform logarithm, from one id to what a sample has room for: the hub does not
    know how long the rows of edges are.

    Args:
        blocks: (T_i,) ids of public text.
        max_length: ids of a sample at most; longer ones are left out.
        num_ids: ids of all samples together, at most.

    Returns:
        (T_i,) ids each; none where the prompt has no column.
    """
    generator = torch.Generator().manual_seed(seed)

    def piece(most: int) -> str:
        block = blocks[int(torch.randint(len(blocks), (), generator=generator))]
        longest = min(len(block), most)
        length = int(math.exp(float(torch.rand((), generator=generator, dtype=torch.float64)) * math.log(longest + 1)))
        begin = int(torch.randint(len(block) - length + 1, (), generator=generator))
        words = tokenizer.decode(block[begin : begin + length].tolist())
        return " ".join(words.strip("\N{REPLACEMENT CHARACTER}").split())  # a character may be cut, at both ends

    left = min(num_ids, REUSE * sum(map(len, blocks)))
    found: dict[str, Tensor] = {}
    num_useless = 0
    while prompt.columns and num_useless < PATIENCE:
        row = {name: piece(max_length) for name in prompt.columns}
        text = prompt.render(row)
        sample = tokenizer.sample(text, piece(COMPLETION_IDS))
        if not all(row.values()) or text in found or sample is None or len(sample.ids) > max_length:
            num_useless += 1
            continue
        left -= len(sample.ids)
        if left < 0:
            break
        found[text], num_useless = torch.tensor(sample.ids), 0
    return list(found.values())
