"""Border states on disk: one encrypted record per sample, swept once per alignment, read where training asks for them.

Between alignments a sample's state at the border is a constant (method.md 8a), and a device has more disk than memory.
Two files: `border`, which an alignment makes void, and `below`, the states under the first layer with LoRA, which no
alignment touches, so that a realignment runs the tail only. What does not fit the disk is computed again, slice by slice.

Hidden states give back their text, so records are AES-256-GCM under a key that the agent holds and no disk sees
(unless its owner wants that), and samples are named by HMAC: the file alone tells their number and lengths.
"""

from __future__ import annotations

import errno
import hashlib
import hmac
import json
import os
import shutil
import struct
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from torch import Tensor

from fedsoda_edge.model.border import PREFIX, mapped
from fedsoda_edge.model.bundle import Bundle
from fedsoda_edge.model.streaming import buckets, stream
from fedsoda_edge.protocol.needs import GROUP_POSITIONS

_MAGIC = b"fedsoda border 1"
_HEAD = struct.Struct("<16sI12s")  # the sample's name, its number of ids, the record's nonce
_TAG_BYTES = 16
_HEAD_BYTES = 128  # and more than a record takes besides its rows
_KEEP_FREE_BYTES = 256 << 20  # of the disk: others need it too

Progress = Callable[[int, int], None]


class RecordFile:
    """Append-only records in one file, found by name.

    Args:
        key: 32 bytes. purpose: what the states are of; a file of another purpose or key is begun anew.
        row_bytes: of one position.
        max_bytes: the file grows no larger.
    """

    def __init__(self, path: Path, key: bytes, purpose: str, row_bytes: int, max_bytes: int) -> None:
        self._aead = AESGCM(key)
        self._purpose = purpose.encode()
        self._row_bytes = row_bytes
        self._max_bytes = max_bytes
        self._places: dict[bytes, tuple[int, int]] = {}  # name -> (offset of its head, ids)
        self.damaged = 0
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("r+b" if path.exists() else "w+b", buffering=0)
        os.chmod(path, 0o600)
        mark = _MAGIC + hmac.digest(key, self._purpose, "sha256")
        if self._file.read(len(mark)) == mark:
            self._end = self._scan(len(mark))
            self._file.truncate(self._end)  # else what is cut off would be read as heads after the next record
        else:
            self._file.truncate(0)
            self._write_at(0, [mark])
            self._end = len(mark)

    def _scan(self, at: int) -> int:
        """Index what is there and may be; the end of the last whole record."""
        size = min(os.fstat(self._file.fileno()).st_size, self._max_bytes)
        while at + _HEAD.size <= size:
            self._file.seek(at)
            name, ids, _ = _HEAD.unpack(self._file.read(_HEAD.size))
            after = at + self.size(ids)
            if after > size:
                break  # cut off in the middle of a record, or more than was allowed before
            self._places[name] = at, ids
            at = after
        return at

    def size(self, ids: int) -> int:
        """Bytes of a record."""
        return _HEAD.size + ids * self._row_bytes + _TAG_BYTES

    @property
    def num_bytes(self) -> int:
        return self._end

    def __contains__(self, name: bytes) -> bool:
        return name in self._places

    @property
    def room(self) -> int:
        """Bytes that may still be added."""
        return self._max_bytes - self._end

    def put(self, name: bytes, ids: int, data: bytes) -> bool:
        """Add a record of ids x row_bytes; False where neither budget nor disk has room for it."""
        if self.size(ids) > self.room:
            return False
        nonce = os.urandom(12)
        sealed = self._aead.encrypt(nonce, data, self._purpose + name)
        try:
            self._write_at(self._end, [_HEAD.pack(name, ids, nonce), sealed])
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            self._file.truncate(self._end)
            self._max_bytes = self._end  # full is full: the next ones need not try
            return False
        self._places[name] = self._end, ids
        self._end += self.size(ids)
        return True

    def _write_at(self, offset: int, parts: Iterable[bytes]) -> None:
        self._file.seek(offset)
        for part in parts:
            view = memoryview(part)
            while view:
                view = view[self._file.write(view) :]

    def get(self, name: bytes) -> bytes | None:
        """The record's data; None where it is not there or not what was written, which `damaged` counts."""
        if name not in self._places:
            return None
        at, ids = self._places[name]
        self._file.seek(at)
        record = self._file.read(self.size(ids))
        try:
            found, _, nonce = _HEAD.unpack_from(record)
            if found != name:
                raise InvalidTag
            return self._aead.decrypt(nonce, record[_HEAD.size :], self._purpose + name)
        except (InvalidTag, struct.error):
            self.damaged += 1
            del self._places[name]
            return None

    def close(self) -> None:
        self._file.close()


def row_bytes(width: int, dtype: str) -> int:
    """Of one position of `width` in a record."""
    return 2 * width if dtype == "bf16" else width + 4


def to_record(state: Tensor, dtype: str) -> bytes:
    """(T, C) -> bytes. bf16: rounded to nearest. int8: an fp32 scale, the row's largest magnitude / 127, for each row."""
    if dtype == "bf16":
        return state.to(torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes()
    scale = state.float().abs().amax(dim=1).clamp(min=1e-30) / 127
    codes = (state.float() / scale[:, None]).round().to(torch.int8)
    return scale.numpy().tobytes() + codes.contiguous().numpy().tobytes()


def from_record(data: bytes, width: int, dtype: str) -> Tensor:
    """The reverse: (T, C), bf16 or, of int8, fp32."""
    ids = len(data) // row_bytes(width, dtype)
    if dtype == "bf16":
        return torch.frombuffer(bytearray(data), dtype=torch.bfloat16).view(ids, width)
    scale = torch.frombuffer(bytearray(data[: 4 * ids]), dtype=torch.float32)
    codes = torch.frombuffer(bytearray(data[4 * ids :]), dtype=torch.int8).view(ids, width)
    return codes.float() * scale[:, None]


@dataclass(frozen=True)
class CacheSettings:
    """Where border states are kept and how. max_bytes: of disk, all files together; None: what is free.

    slice_bytes: of memory for the samples that one pass over the layers takes along. dense: whether a layer's weights
    are dequantized once for all of them.
    """

    directory: Path
    key: bytes
    dtype: str = "bf16"
    max_bytes: int | None = None
    slice_bytes: int = 256 << 20
    dense: bool = True


class CachedStates:
    """Border states of all samples of an edge, as a sequence; `Border` reads them.

    Every state has been through a record, also one that was not kept: so on a CPU the trained delta does not
    depend on how much of it fitted the disk.
    """

    def __init__(
        self,
        bundle: Bundle,
        ids: Sequence[Sequence[int]],
        *,
        emulator: dict[str, Tensor],
        emulator_name: str,
        settings: CacheSettings,
        compute_dtype: torch.dtype,
        device: str,
    ) -> None:
        self._bundle = bundle
        self._ids = [torch.tensor(sample) for sample in ids]
        self._emulator = emulator
        self._settings = settings
        self._compute_dtype = compute_dtype
        self._device = device
        self._digest_of_all = _digest([sample.numpy().tobytes().hex() for sample in self._ids])
        self._names = [hmac.digest(settings.key, sample.numpy().tobytes(), "sha256")[:16] for sample in self._ids]
        layers = bundle.plan.swept
        carrying = {int(name.split(".")[1]) for name in emulator if not name.startswith(PREFIX)}
        split = next((at for at, number in enumerate(layers) if number in carrying), len(layers))
        self._below, self._above = layers[:split], layers[split:]
        self._width = int(bundle.manifest.config["hidden_size"])
        kind = f"{device.partition(':')[0]} {compute_dtype} {'dense' if settings.dense else 'packed'}"
        config = json.dumps(bundle.manifest.config, sort_keys=True)
        fixed = [kind, config, *self._digests(["embedding", *(f"layers.{number}" for number in self._below)])]
        above = self._digests(f"layers.{number}" for number in self._above)
        moving = [*fixed, emulator_name, str(bundle.manifest.lora.scale), settings.dtype, *above]
        positions = sum(len(sample) for sample in dict(zip(self._names, self._ids, strict=True)).values())
        rows = {"border": row_bytes(self._width, settings.dtype), "below": row_bytes(self._width, "bf16")}
        budget = self._budget()
        wanted = {"border": moving}
        # Both or the border alone: half of each would save nothing.
        if self._below and self._above and positions * sum(rows.values()) + len(ids) * _HEAD_BYTES <= budget:
            wanted["below"] = fixed
        paths = {tier: settings.directory / f"{tier}-{_digest(parts)[:16]}.cache" for tier, parts in wanted.items()}
        for path in settings.directory.iterdir():
            if path not in paths.values():
                path.unlink()  # of another alignment or bundle
        self._files: dict[str, RecordFile] = {}
        for tier, parts in wanted.items():
            most = budget - sum(rows[other] * positions + len(ids) * _HEAD_BYTES for other in wanted if other != tier)
            self._files[tier] = RecordFile(paths[tier], settings.key, _digest(parts), rows[tier], most)
        self._first = {name: at for at, name in reversed(list(enumerate(self._names)))}  # copies of a sample share it
        firsts = sorted(self._first.values())
        # Samples that always run together: one of them is little to do again.
        grouped = buckets([len(self._ids[at]) for at in firsts], GROUP_POSITIONS)
        self._groups = sorted([firsts[place] for place in group] for group in grouped)
        self._group_of = {self._names[at]: number for number, group in enumerate(self._groups) for at in group}
        self._expected: deque[int] = deque()
        self._slice: dict[bytes, Tensor] = {}  # by name

    def _digests(self, roles: Iterable[str]) -> list[str]:
        return [self._bundle.manifest.file(f"{role}.safetensors").sha256 for role in roles]

    def _budget(self) -> int:
        directory = self._settings.directory
        directory.mkdir(parents=True, exist_ok=True)
        held = sum(path.stat().st_size for path in directory.iterdir())
        free = max(0, shutil.disk_usage(directory).free - _KEEP_FREE_BYTES) + held
        return free if self._settings.max_bytes is None else min(free, self._settings.max_bytes)

    # --- the sweep -------------------------------------------------------------------------------------------

    def sweep(self, progress: Progress | None = None) -> None:
        """Compute what is not there yet and keep as much as fits."""
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
                return  # the disk is full: what is left is computed when it is asked for

    def _unkept(self, group: Sequence[int]) -> list[int]:
        return [at for at in group if self._names[at] not in self._files["border"]]

    def _keep(self, states: dict[int, Tensor]) -> bool:
        """Those that are not there yet; False where one found no room."""
        border = self._files["border"]
        return all(
            border.put(self._names[at], len(self._ids[at]), to_record(states[at], self._settings.dtype))
            for at in self._unkept(list(states))
        )

    def _partly(self, progress: Progress | None, done: int, total: int) -> Progress | None:
        """Progress of one part as progress of all."""
        if progress is None:
            return None
        layers = len(self._below) + len(self._above)
        return lambda layer, _: progress(done * layers + layer, total * layers)

    def _slices(self, groups: Sequence[int]) -> list[list[int]]:
        """As many groups as fit the memory for one pass: every layer is read once for each slice."""
        slices: list[list[int]] = []
        left = 0
        for number in groups:
            size = sum(self._memory(at) for at in self._groups[number])
            if not slices or size > left:
                slices.append([])
                left = self._settings.slice_bytes
            slices[-1].append(number)
            left -= size
        return slices

    def _memory(self, at: int) -> int:
        return 2 * len(self._ids[at]) * self._width * self._compute_dtype.itemsize  # one layer's input and output

    def _compute(self, groups: Sequence[int], progress: Progress | None) -> dict[int, Tensor]:
        """Border states of the samples of these groups, from below the first layer with LoRA where that is kept.

        States are rounded to bf16 there whether they are kept or not: the border must not depend on it.
        """
        if not (self._below and self._above):
            return self._mapped(self._stream(groups, (*self._below, *self._above), None, progress))
        below = self._files.get("below")
        start: dict[int, Tensor] = {}
        missing = []
        for number in groups:
            records = {at: below.get(self._names[at]) if below else None for at in self._groups[number]}
            start |= {at: from_record(data, self._width, "bf16") for at, data in records.items() if data is not None}
            if None in records.values():
                missing.append(number)
        for at, state in self._stream(missing, self._below, None, progress).items() if missing else ():
            record = to_record(state, "bf16")
            start[at] = from_record(record, self._width, "bf16")
            if below and self._names[at] not in below:
                below.put(self._names[at], len(self._ids[at]), record)
        above = progress and (lambda layer, of: progress(len(self._below) + layer, of))
        return self._mapped(self._stream(groups, self._above, start, above))

    def _mapped(self, states: dict[int, Tensor]) -> dict[int, Tensor]:
        return {at: mapped(state, self._emulator) for at, state in states.items()}

    def _stream(
        self,
        groups: Sequence[int],
        layers: Sequence[int],
        start: dict[int, Tensor] | None,
        progress: Progress | None,
    ) -> dict[int, Tensor]:
        """Each group runs together, whatever else the slice holds: so its last bits are the same each time."""
        indices = [at for number in groups for at in self._groups[number]]
        places = {at: place for place, at in enumerate(indices)}
        states = stream(
            self._bundle,
            layers,
            [self._ids[at] for at in indices],
            start=None if start is None else [start[at] for at in indices],
            lora=self._emulator,
            lora_scale=self._bundle.manifest.lora.scale,
            compute_dtype=self._compute_dtype,
            device=self._device,
            dense=self._settings.dense,
            progress=progress,
            batches=[[places[at] for at in self._groups[number]] for number in groups],
        )
        return dict(zip(indices, states, strict=True))

    # --- reading ---------------------------------------------------------------------------------------------

    def expect(self, order: Iterable[int]) -> None:
        """The samples that will be asked for, in order: what is not kept is computed in slices of these."""
        self._expected = deque(order)

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> Tensor:
        """(T, C) on the CPU."""
        while self._expected and self._expected[0] != index:
            self._expected.popleft()
        data = self._files["border"].get(self._names[index])
        if data is not None:
            return from_record(data, self._width, self._settings.dtype)
        name = self._names[index]
        if name not in self._slice:
            border = self._files["border"]
            coming = [self._names[at] for at in (index, *self._expected) if self._names[at] not in border]
            [groups, *_] = self._slices(list(dict.fromkeys(self._group_of[each] for each in coming)))
            states = self._compute(groups, None)
            self._keep(states)
            self._slice = {
                self._names[at]: from_record(to_record(state, self._settings.dtype), self._width, self._settings.dtype)
                for at, state in states.items()
            }
        return self._slice[name]

    @property
    def dtype(self) -> str:
        return self._settings.dtype

    @property
    def digest(self) -> str:
        """Of all samples in their order; it does not depend on the key."""
        return self._digest_of_all

    @property
    def num_kept(self) -> int:
        """Samples whose states are on the disk."""
        return sum(name in self._files["border"] for name in self._names)

    @property
    def kept_bytes(self) -> int:
        return sum(file.num_bytes for file in self._files.values())

    @property
    def num_damaged(self) -> int:
        """Records that were not what was written and were computed anew."""
        return sum(file.damaged for file in self._files.values())

    def close(self) -> None:
        for file in self._files.values():
            file.close()


def _digest(parts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
