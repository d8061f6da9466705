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
from fedsoda_hub.preparation.full_llm import StreamedLLM

HEALING_IDS = 1 << 15  # of public text, beside all texts like the task's


def check_healing(llm: StreamedLLM) -> None:
    """Check that the layers of this model can be healed.

    Raises:
        UsageProblem: one cannot; says why, and what to write.
    """
    for layer in range(llm.num_layers - llm.settings.method.adapter_layers):
        if refitted(llm.source, layer) is None:
            raise UsageProblem(
                f"healing needs an MLP that ends in one down_proj, and layer {layer} of this "
                f"{llm.source.family.model_type} model has none; write [align] heal = false, steps = 200 and "
                'border_map = "auto" to align by steps instead'
            )


def healing_texts(llm: StreamedLLM) -> list[Tensor]:
    """Choose the texts that a run is healed on: those like the task's, and public text. (T_i,) ids each.

    Raises:
        UsageProblem: they are too few to keep some unseen.
    """
    public, count = llm.text.used, max(1, HEALING_IDS // llm.settings.public.length)
    texts = [*llm.text.like_task, *public[:count]]
    if len(texts) < HELD_OUT:
        raise UsageProblem(
            f"there are {len(texts)} texts to heal layers on, of which every {HELD_OUT}th stays unseen; write [public] sequences = "
            f"{HELD_OUT} or more (it is {llm.settings.public.sequences}) and have as much text, or [align] heal = false with "
            '[method] distance = "angular"'
        )
    return texts


def healed_layers(llm: StreamedLLM, plan: LayerPlan) -> Mapping[int, StoredLayer]:
    """Heal all layers below the adapter that this plan keeps; they are read from disk whenever they are asked for."""
    kept = _HealedLayers(llm.directory.preparation / "healed")
    last = {group.start: group.removed[-1] for group in plan.groups}
    after = {layer: last.get(layer, layer) for layer in plan.sub_emulator}
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
