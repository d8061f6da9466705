"""Load the tokenizer of a model's directory as Transformers does, in a worker: it takes torch along.

What becomes of texts is left to `data/samples.py`.
"""

from __future__ import annotations

from pathlib import Path

from fedsoda_edge.join.trainer import WORKER_MODULE, worker_environment
from fedsoda_edge.ports.child import Child
from fedsoda_edge.ports.confine import Reach
from fedsoda_edge.protocol.commands import LoadedTokenizer, LoadTokenizer


async def load_tokenizer(directory: Path, to: Path) -> LoadedTokenizer:
    """Load a tokenizer.

    Args:
        directory: the model's. to: where files are written that Transformers reads otherwise than they are.

    Raises:
        UsageProblem: it cannot be loaded.
    """
    reach = Reach(reads=(str(directory.absolute()),), may_use_gpu=False)
    worker = Child(WORKER_MODULE, worker_environment(to.absolute(), reach))
    try:
        return await worker.call(LoadTokenizer(directory=str(directory.absolute()), to=str(to)))
    finally:
        await worker.close()
