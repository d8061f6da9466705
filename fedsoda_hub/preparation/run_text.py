"""Provide the public text and the prompts of a run: read from its files, or written by its full LLM, once for a process.

Reading is `public_text.py`'s, writing `self_generated.py`'s.
"""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Callable
from functools import cached_property
from itertools import chain
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from fedsoda_edge.data.chat import ChatTemplate
from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.model.source import Checkpoint
from fedsoda_edge.ports.disk import write_durably
from fedsoda_hub.federation.jobs import LeftOut
from fedsoda_hub.preparation.public_text import MAX_PROMPTS, read_blocks, read_like_task
from fedsoda_hub.preparation.running import RunningLayers
from fedsoda_hub.preparation.self_generated import generate_blocks, generate_samples
from fedsoda_hub.preparation.tokenizing import tokenizer_of
from fedsoda_hub.settings.run import RunSettings


class RunText:
    """The text that SGP, ODA and the border map see. All of it stays in memory: a few MB of ids.

    Args:
        texts: the directory in which text that the full LLM wrote is found again, also by a run with other settings of
            which that text does not depend.
    """

    def __init__(self, settings: RunSettings, source: Checkpoint, texts: Path, running: RunningLayers) -> None:
        self._settings = settings
        self._source = source
        self._texts = texts
        self._running = running

    @property
    def used(self) -> list[Tensor]:
        """The blocks that alignment and pruning use, (T,) ids each."""
        return self.blocks[: self._settings.public.sequences]

    @property
    def held_out(self) -> list[Tensor]:
        """The blocks that public KL is measured on, (T,) ids each."""
        return self.blocks[self._settings.public.sequences :]

    @cached_property
    def blocks(self) -> list[Tensor]:
        """All public blocks: those that are used, then those that are held out."""
        public, file = self._settings.public, self._settings.public_text
        if file is None:

            def write() -> list[Tensor]:
                how = self._running.how("writing public text")
                seed = self._settings.seed
                return list(chain(*generate_blocks(self._source, public.sequences, public.length, seed=seed, **how)))

            return self._written("public", [public.sequences, public.length], write)
        tokenizer, bos = self._source.own_tokenizer["tokenizer.json"], self._source.fields.get("bos_token_id")
        return list(chain(*read_blocks(file, tokenizer, bos, public.sequences, public.length)))

    @cached_property
    def like_task(self) -> list[Tensor]:
        """The texts like the task's that kept layers are healed and the border map is fitted on, (T_i,) ids each.

        None where the run has neither, and where the full LLM cannot write any and none have to be.

        Raises:
            UsageProblem: the settings ask for a border map, and there are no prompts to fit it on.
        """
        s = self._settings
        if not s.reads_like_task:
            return []
        if s.like_task is not None:
            tokenizer, chat = tokenizer_of(self._source), ChatTemplate.read(self._source.own_tokenizer)
            return read_like_task(s.like_task, s.prompt, s.completion, tokenizer, s.local.max_length, chat)

        def write() -> list[Tensor]:
            how = self._running.how("writing rows like the task's")
            samples = generate_samples(self._source, s.prompt, s.local.max_length, seed=s.seed, **how)
            return [torch.tensor(sample.ids) for sample in samples]

        try:
            return self._written("like_task", [s.task.prompt, s.local.max_length, MAX_PROMPTS], write)
        except UsageProblem as problem:
            if s.align.border_map == "ridge":
                raise
            self._running.report(LeftOut(stage="no border map", why=str(problem)))
            return []

    def read(self) -> None:
        """Read now what is read from files, so that a file that does not suit is refused before any work.

        Raises:
            UsageProblem: a file is missing, too short or without the columns that are needed.
        """
        if self._settings.public_text is not None:
            _ = self.blocks
        if self._settings.like_task is not None:
            _ = self.like_task

    def _written(self, name: str, made_of: list[str | int], write: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Load the ids that the full LLM has written, text by text, or let it write them.

        Args:
            made_of: what they depend on beside full LLM and seed.
        """
        parts = [self._source.revision, self._settings.seed, *made_of]
        digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        path = self._texts / f"{name}-{digest[:16]}.safetensors"
        if not path.exists():
            texts = write()
            gc.collect()
            lengths = torch.tensor([len(ids) for ids in texts])
            path.parent.mkdir(parents=True, exist_ok=True)
            write_durably(path, save({"ids": torch.cat(texts), "lengths": lengths}))
        held = load_file(path)
        return list(held["ids"].split(held["lengths"].tolist()))
