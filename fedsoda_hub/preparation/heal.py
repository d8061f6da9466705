"""Heal a run's sub-emulator before it is stored, layer by layer, and find again what an earlier call has healed.

The mathematics is that of `algorithms/alignment/healing.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors.torch import load_file, save
from torch import Tensor

from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.model.bundle_writer import packed
from fedsoda_edge.model.nf4 import unpacked
from fedsoda_edge.ports.disk import write_durably
from fedsoda_edge.protocol.manifest import LayerPlan
from fedsoda_hub.algorithms.alignment.healing import HELD_OUT, StoredLayer, heal, refitted
from fedsoda_hub.federation.jobs import LeftOut
from fedsoda_hub.preparation.filled import filled_rows
from fedsoda_hub.preparation.full_llm import StreamedLLM
from fedsoda_hub.preparation.tokenizing import tokenizer_of

HEALING_IDS = 1 << 15  # of public text, beside all texts like the task's
FILLED_IDS = 1 << 15  # of rows that are filled with pieces of public text, where there are none of users


def check_healing(llm: StreamedLLM) -> None:
    """Check that the layers of this model can be healed, where layers are removed whose work they have to do.

    Raises:
        UsageProblem: one cannot; says why, and what to write.
    """
    if llm.settings.method.emulator == "sub" and (why := _unhealed(llm)):
        raise UsageProblem(
            f'{why}; write [align] heal = false, steps = 200 and border_map = "auto" to align by steps instead'
        )


def is_healed(llm: StreamedLLM, plan: LayerPlan) -> bool:
    """Tell whether this run heals; says so where all layers are kept and stay as rounding leaves them.

    A layer of a full emulator that cannot be healed loses what NF4 takes and not more, so a run is not refused for it.
    """
    is_changed = bool(plan.groups or plan.lacking) or llm.settings.method.emulator_base == "nf4"
    if not (llm.settings.align.heal and is_changed):
        return False
    if why := _unhealed(llm):
        llm.running.report(LeftOut(stage="not healed", why=why))
        return any(refitted(llm.source, layer) for layer in plan.sub_emulator)
    return True


def _unhealed(llm: StreamedLLM) -> str:
    """Say which layer below the adapter cannot be healed, and why; nothing where all can."""
    for layer in range(llm.num_layers - llm.settings.method.adapter_layers):
        if refitted(llm.source, layer) is None:
            return (
                f"healing needs an MLP that ends in one down_proj, and layer {layer} of this "
                f"{llm.source.family.model_type} model has none"
            )
    return ""


def healing_texts(llm: StreamedLLM) -> list[Tensor]:
    """Choose the texts that a run is healed on, (T_i,) ids each: those like the task's, filled rows, and public text.

    Raises:
        UsageProblem: they are too few to keep some unseen.
    """
    settings, public = llm.settings, llm.text.used
    filled: list[Tensor] = []
    if settings.like_task is None:
        length, seed = settings.local.max_length, settings.seed
        filled = filled_rows(public, settings.prompt, tokenizer_of(llm.source), length, num_ids=FILLED_IDS, seed=seed)
    texts = [*llm.text.like_task, *filled, *public[: max(1, HEALING_IDS // settings.public.length)]]
    if len(texts) < HELD_OUT:
        raise UsageProblem(
            f"there are {len(texts)} texts to heal layers on, of which every {HELD_OUT}th stays unseen; write [public] "
            f"sequences = {HELD_OUT} or more (it is {settings.public.sequences}) and have as much text, or [align] heal = "
            'false with [method] distance = "angular"'
        )
    return texts


def restored(plan: LayerPlan) -> dict[int, int]:
    """Map the kept layers below the adapter, ascending, to the layer of the full LLM whose output each has to give."""
    last = {group.start: group.removed[-1] for group in plan.groups}
    return {layer: last.get(layer, layer) for layer in plan.sub_emulator}


def healed_layers(llm: StreamedLLM, plan: LayerPlan) -> Mapping[int, StoredLayer]:
    """Heal all layers below the adapter that this plan keeps; they are read from disk whenever they are asked for."""
    kept = _HealedLayers(llm.directory.preparation / "healed")
    after = restored(plan)
    if set(after) <= set(kept):
        return kept
    in_nf4 = llm.settings.method.emulator_base == "nf4"
    how = llm.running.how("healing the layers that are kept")
    for number, layer in heal(
        llm.source, after, healing_texts(llm), in_nf4=in_nf4, lacking=plan.lacking, healed=kept, **how
    ):
        kept.keep(number, layer)
    return kept


class _HealedLayers(Mapping[int, StoredLayer]):
    """The layers that are healed, a file each in the form of a bundle's shard."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(exist_ok=True)

    def keep(self, number: int, layer: StoredLayer) -> None:
        """Write a layer durably."""
        write_durably(self._path(number), save({name: part.contiguous() for name, part in packed(layer, ()).items()}))

    def _path(self, number: int) -> Path:
        return self._directory / f"layers.{number}.safetensors"

    def __getitem__(self, number: int) -> StoredLayer:
        path = self._path(number)
        if not path.exists():
            raise KeyError(number)
        return unpacked(load_file(path))

    def __iter__(self) -> Iterator[int]:
        names = (path.name.split(".") for path in self._directory.glob("layers.*.safetensors"))
        return iter(sorted(int(name[1]) for name in names))

    def __len__(self) -> int:
        return len(list(iter(self)))
