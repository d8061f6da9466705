"""Keep border states on disk: one encrypted record per sample, swept once per alignment, read where training asks.

Between alignments a sample's border states are a constant, docs/methods.md (m6-cache), and a device has more disk than
memory. There are two files: `border`, which every alignment makes void, and `below`, the states under the first layer
with LoRA, which no alignment touches, so that after a realignment only the layers from there on run again. What does
not fit the disk is computed again, slice by slice.

Samples are named by HMAC: the files alone show only their number and lengths. Records are left to `record_file.py`.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import shutil
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fedsoda_edge.model.border import PREFIX, border_states
from fedsoda_edge.model.bundle import Bundle
from fedsoda_edge.model.streaming import LayersDone, buckets, stream
from fedsoda_edge.protocol.needs import GROUP_POSITIONS
from fedsoda_edge.worker.record_file import RecordFile, from_record, row_bytes, to_record

_HEAD_BYTES = 128  # more than a record takes besides its rows
_KEEP_FREE_BYTES = 256 << 20  # of the disk, for other programs


@dataclass(frozen=True)
class CacheSettings:
    """The place and the form of border states, and how they are computed.

    key: 32 bytes. dtype: "bf16" or "int8", the form in which border states are kept. max_bytes: the most that all files
    may take on disk; None: what is free. slice_bytes: memory for the samples that one pass over the layers takes along.
    dense: whether a layer's weights are dequantized once for all samples. group_positions: padded positions that run
    together.
    """

    directory: Path
    key: bytes
    dtype: str = "bf16"
    max_bytes: int | None = None
    slice_bytes: int = 256 << 20
    dense: bool = True
    group_positions: int = GROUP_POSITIONS


class BorderPasses:
    """The passes of samples over the layers below the border, in two parts: under the first layer with LoRA, and from it.

    bottom, top: the full-LLM layers of each part; either may be empty. width: C, features of a hidden state.
    """

    def __init__(
        self,
        bundle: Bundle,
        emulator: Mapping[str, Tensor],
        *,
        compute_dtype: torch.dtype,
        device: str,
        dense: bool,
    ) -> None:
        layers = bundle.plan.swept
        carrying = {int(name.split(".")[1]) for name in emulator if not name.startswith(PREFIX)}
        split = next((at for at, number in enumerate(layers) if number in carrying), len(layers))
        self.bottom, self.top = layers[:split], layers[split:]
        self.width = int(bundle.manifest.config["hidden_size"])
        self._bundle = bundle
        self._emulator = emulator
        self._compute_dtype = compute_dtype
        self._device = device
        self._dense = dense

    @property
    def num_layers(self) -> int:
        """The number of layers in both parts."""
        return len(self.bottom) + len(self.top)

    def memory(self, ids: int) -> int:
        """Count the bytes that a sample of this number of ids takes in a pass: one layer's input and output."""
        return 2 * ids * self.width * self._compute_dtype.itemsize

    def made_of(self, emulator_name: str, dtype: str) -> tuple[list[str], list[str]]:
        """List what states under the first layer with LoRA depend on, and what border states depend on.

        Args:
            emulator_name: changes with the emulator's view.
            dtype: the form in which border states are kept.
        """
        manifest = self._bundle.manifest

        def digests(roles: Iterable[str]) -> list[str]:
            return [manifest.file(f"{role}.safetensors").sha256 for role in roles]

        kind = f"{self._device.partition(':')[0]} {self._compute_dtype} {'dense' if self._dense else 'packed'}"
        config = json.dumps(manifest.config, sort_keys=True)
        below = [kind, config, *digests(["embedding", *(f"layers.{number}" for number in self.bottom)])]
        above = digests(f"layers.{number}" for number in self.top)
        return below, [*below, emulator_name, str(manifest.lora.scale), dtype, *above]

    def below(
        self, ids: Sequence[Tensor], batches: Sequence[Sequence[int]], progress: LayersDone | None
    ) -> list[Tensor]:
        """Run samples through the bottom layers, whose states no alignment changes: (T_i, C) for each sample."""
        return stream(
            self._bundle,
            self.bottom,
            ids,
            compute_dtype=self._compute_dtype,
            device=self._device,
            dense=self._dense,
            progress=progress,
            batches=batches,
        )

    def border(
        self,
        ids: Sequence[Tensor],
        batches: Sequence[Sequence[int]],
        start: Sequence[Tensor] | None,
        progress: LayersDone | None,
    ) -> list[Tensor]:
        """Run samples to the border: (T_i, C) for each sample.

        Args:
            start: states after the bottom layers, from which only the top layers run; None: all layers run.
        """
        return border_states(
            self._bundle,
            (*self.bottom, *self.top) if start is None else self.top,
            ids,
            start=start,
            emulator=self._emulator,
            lora_scale=self._bundle.manifest.lora.scale,
            compute_dtype=self._compute_dtype,
            device=self._device,
            dense=self._dense,
            progress=progress,
            batches=batches,
        )


class CachedStates:
    """The border states of all samples of an edge, as a sequence; `SweptSamples` reads them.

    Every state has been through a record, even one that is not kept, so that on a CPU the trained delta does not depend
    on how many of them fit the disk.

    Args:
        ids: the ids of each sample.
        emulator: the emulator's view: its LoRA, and its border map if it has one.
        emulator_name: changes with the view.
    """

    def __init__(
        self,
        bundle: Bundle,
        ids: Sequence[Sequence[int]],
        *,
        emulator: Mapping[str, Tensor],
        emulator_name: str,
        settings: CacheSettings,
        compute_dtype: torch.dtype,
        device: str,
    ) -> None:
        self._passes = BorderPasses(bundle, emulator, compute_dtype=compute_dtype, device=device, dense=settings.dense)
        self._settings = settings
        self._ids = [torch.tensor(sample) for sample in ids]
        self._digest_of_all = _digest([sample.numpy().tobytes().hex() for sample in self._ids])
        self._names = [hmac.digest(settings.key, sample.numpy().tobytes(), "sha256")[:16] for sample in self._ids]
        self._files = self._opened(*self._passes.made_of(emulator_name, settings.dtype))
        first = {name: at for at, name in reversed(list(enumerate(self._names)))}  # copies of a sample share it
        firsts = sorted(first.values())
        # Samples that always run together, few enough that a group is quickly computed again.
        grouped = buckets([len(self._ids[at]) for at in firsts], settings.group_positions)
        self._groups = sorted([firsts[place] for place in group] for group in grouped)
        self._group_of = {self._names[at]: number for number, group in enumerate(self._groups) for at in group}
        self._expected: deque[int] = deque()
        self._slice: dict[bytes, Tensor] = {}  # by name

    def _opened(self, below: list[str], border: list[str]) -> dict[str, RecordFile]:
        """Open the files of states that depend on these things; remove the files of other alignments and bundles."""
        settings, width = self._settings, self._passes.width
        positions = sum(len(sample) for sample in dict(zip(self._names, self._ids, strict=True)).values())
        rows = {"border": row_bytes(width, settings.dtype), "below": row_bytes(width, "bf16")}
        budget, heads = self._budget(), len(self._ids) * _HEAD_BYTES
        wanted = {"border": border}
        # Both files or the border's alone: half of each would save nothing.
        if self._passes.bottom and self._passes.top and positions * sum(rows.values()) + heads <= budget:
            wanted["below"] = below
        paths = {tier: settings.directory / f"{tier}-{_digest(parts)[:16]}.cache" for tier, parts in wanted.items()}
        for path in settings.directory.iterdir():
            if path not in paths.values():
                path.unlink()
        files = {}
        for tier, parts in wanted.items():
            most = budget - sum(rows[other] * positions + heads for other in wanted if other != tier)
            files[tier] = RecordFile(paths[tier], settings.key, _digest(parts), rows[tier], most)
        return files

    def _budget(self) -> int:
        directory = self._settings.directory
        directory.mkdir(parents=True, exist_ok=True)
        held = sum(path.stat().st_size for path in directory.iterdir())
        free = max(0, shutil.disk_usage(directory).free - _KEEP_FREE_BYTES) + held
        return free if self._settings.max_bytes is None else min(free, self._settings.max_bytes)

    # --- the sweep -------------------------------------------------------------------------------------------

    def sweep(self, progress: LayersDone | None = None) -> None:
        """Compute the border states that are not kept yet, and keep as many as fit the disk.

        Args:
            progress: called as progress(layers done, layers in all), summed over all passes.
        """
        fitting = []
        room = self._files["border"].room
        for number, group in enumerate(self._groups):
            needed = sum(self._files["border"].size(len(self._ids[at])) for at in self._unkept(group))
            room -= needed
            if needed and room >= 0:
                fitting.append(number)
        slices = self._slices(fitting)
        for done, groups in enumerate(slices):
            states = self._compute(groups, self._partly(progress, done, len(slices)))
            if not self._keep(states):
                return  # the disk is full: the rest is computed when it is read

    def _unkept(self, group: Sequence[int]) -> list[int]:
        return [at for at in group if self._names[at] not in self._files["border"]]

    def _keep(self, states: dict[int, Tensor]) -> bool:
        """Keep the states that are not kept yet, and tell whether all found room."""
        border = self._files["border"]
        return all(
            border.put(self._names[at], len(self._ids[at]), to_record(states[at], self._settings.dtype))
            for at in self._unkept(list(states))
        )

    def _partly(self, progress: LayersDone | None, done: int, total: int) -> LayersDone | None:
        """Make the callback that reports the progress of one pass as progress of all passes."""
        if progress is None:
            return None
        layers = self._passes.num_layers
        return lambda layer, _: progress(done * layers + layer, total * layers)

    def _slices(self, groups: Sequence[int]) -> list[list[int]]:
        """Cut groups into slices that fit the memory for one pass: every layer is read once for each slice."""
        slices: list[list[int]] = []
        left = 0
        for number in groups:
            size = sum(self._passes.memory(len(self._ids[at])) for at in self._groups[number])
            if not slices or size > left:
                slices.append([])
                left = self._settings.slice_bytes
            slices[-1].append(number)
            left -= size
        return slices

    def _compute(self, groups: Sequence[int], progress: LayersDone | None) -> dict[int, Tensor]:
        """Compute the border states of these groups' samples, from the kept states under the first layer with LoRA if any.

        States are rounded to bf16 there, kept or not, since border states must not depend on that.
        """
        passes, indices = self._passes, [at for number in groups for at in self._groups[number]]
        if not (passes.bottom and passes.top):
            return dict(zip(indices, passes.border(*self._together(groups), None, progress), strict=True))
        below, start = self._files.get("below"), dict[int, Tensor]()
        missing = []
        for number in groups:
            records = {at: below.get(self._names[at]) if below else None for at in self._groups[number]}
            start |= {at: from_record(data, passes.width, "bf16") for at, data in records.items() if data is not None}
            if None in records.values():
                missing.append(number)
        again = [at for number in missing for at in self._groups[number]]
        states = passes.below(*self._together(missing), progress) if missing else []
        for at, state in zip(again, states, strict=True):
            record = to_record(state, "bf16")
            start[at] = from_record(record, passes.width, "bf16")
            if below and self._names[at] not in below:
                below.put(self._names[at], len(self._ids[at]), record)
        above = progress and (lambda layer, of: progress(len(passes.bottom) + layer, of))
        made = passes.border(*self._together(groups), [start[at] for at in indices], above)
        return dict(zip(indices, made, strict=True))

    def _together(self, groups: Sequence[int]) -> tuple[list[Tensor], list[list[int]]]:
        """Return the ids of these groups' samples, and which places among them run together.

        Each group runs together, whatever else the slice holds, so that the last bits of its states are always the same.
        """
        indices = [at for number in groups for at in self._groups[number]]
        places = {at: place for place, at in enumerate(indices)}
        batches = [[places[at] for at in self._groups[number]] for number in groups]
        return [self._ids[at] for at in indices], batches

    # --- reading ---------------------------------------------------------------------------------------------

    def expect(self, order: Iterable[int]) -> None:
        """Note the samples that will be read, in order: states that are not kept are computed in slices of these."""
        self._expected = deque(order)

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> Tensor:
        """Return a sample's border states: (T, C) on the CPU."""
        while self._expected and self._expected[0] != index:
            self._expected.popleft()
        name, border, width = self._names[index], self._files["border"], self._passes.width
        data = border.get(name)
        if data is not None:
            return from_record(data, width, self._settings.dtype)
        if name not in self._slice:
            coming = [self._names[at] for at in (index, *self._expected) if self._names[at] not in border]
            [groups, *_] = self._slices(list(dict.fromkeys(self._group_of[each] for each in coming)))
            states = self._compute(groups, None)
            self._keep(states)
            self._slice = {
                self._names[at]: from_record(to_record(state, self._settings.dtype), width, self._settings.dtype)
                for at, state in states.items()
            }
        return self._slice[name]

    @property
    def dtype(self) -> str:
        """The form to which border states are rounded: "bf16" or "int8"."""
        return self._settings.dtype

    @property
    def digest(self) -> str:
        """The sha256 over all samples in their order; it does not depend on the key."""
        return self._digest_of_all

    @property
    def num_kept(self) -> int:
        """The number of samples whose border states are on disk."""
        return sum(name in self._files["border"] for name in self._names)

    @property
    def kept_bytes(self) -> int:
        """The bytes of all files."""
        return sum(file.num_bytes for file in self._files.values())

    @property
    def num_damaged(self) -> int:
        """The number of records that were damaged and were computed again."""
        return sum(file.damaged for file in self._files.values())

    def close(self) -> None:
        """Close the files; what is kept stays."""
        for file in self._files.values():
            file.close()


def _digest(parts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
