"""Keep hidden states as encrypted records in one file, found by name; a damaged record is not read.

Text can be recovered from hidden states, so records are AES-256-GCM under a key that the agent holds and that is on no
disk (unless the owner wants to keep it). Which states are kept, and under which names, is left to `border_cache.py`.
"""

from __future__ import annotations

import errno
import hmac
import os
import struct
from pathlib import Path

import torch
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from torch import Tensor

from fedsoda_edge.ports import disk

_MAGIC = b"fedsoda border 1"
_HEAD = struct.Struct("<16sI12s")  # the sample's name, its number of ids, the record's nonce
_TAG_BYTES = 16


class RecordFile:
    """A file of append-only records, found by name; only its owner may read it.

    Args:
        key: 32 bytes.
        purpose: what the states belong to. A file of another purpose or key is emptied.
        row_bytes: bytes of one position.
        max_bytes: the most bytes of the file; a larger one is cut.
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
            self._file.truncate(self._end)  # else remains would be read as heads of records after the next one
        else:
            self._file.truncate(0)
            disk.write_at(self._file, 0, mark)
            self._end = len(mark)

    def _scan(self, at: int) -> int:
        """Index the whole records within max_bytes; return the end of the last one."""
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
        """Count the bytes of a record of this number of ids."""
        return _HEAD.size + ids * self._row_bytes + _TAG_BYTES

    @property
    def num_bytes(self) -> int:
        """The bytes of the file."""
        return self._end

    def __contains__(self, name: bytes) -> bool:
        return name in self._places

    @property
    def room(self) -> int:
        """The bytes that may still be added."""
        return self._max_bytes - self._end

    def put(self, name: bytes, ids: int, data: bytes) -> bool:
        """Add a record of ids x row_bytes bytes; return whether budget and disk had room for it.

        Raises:
            OSError: the disk failed; a full one does not raise.
        """
        if self.size(ids) > self.room:
            return False
        nonce = os.urandom(12)
        sealed = self._aead.encrypt(nonce, data, self._purpose + name)
        try:
            disk.write_at(self._file, self._end, _HEAD.pack(name, ids, nonce), sealed)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            self._file.truncate(self._end)
            self._max_bytes = self._end  # the disk is full: later records need not try
            return False
        self._places[name] = self._end, ids
        self._end += self.size(ids)
        return True

    def get(self, name: bytes) -> bytes | None:
        """Read a record's data; None where there is no record or where it is damaged, which `damaged` counts."""
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
        """Close the file; its records stay."""
        self._file.close()


def row_bytes(width: int, dtype: str) -> int:
    """Count the bytes of one position (C = width) in a record of "bf16" or "int8"."""
    return 2 * width if dtype == "bf16" else width + 4


def to_record(state: Tensor, dtype: str) -> bytes:
    """Code hidden states (T, C) as a record's data.

    Args:
        dtype: "bf16", rounded to nearest; or "int8": for each row an fp32 scale, the row's largest magnitude / 127,
            before the codes.
    """
    if dtype == "bf16":
        return state.to(torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes()
    scale = state.float().abs().amax(dim=1).clamp(min=1e-30) / 127
    codes = (state.float() / scale[:, None]).round().to(torch.int8)
    return scale.numpy().tobytes() + codes.contiguous().numpy().tobytes()


def from_record(data: bytes, width: int, dtype: str) -> Tensor:
    """Decode a record's data: (T, C), bf16, or fp32 where it was coded as int8."""
    ids = len(data) // row_bytes(width, dtype)
    if dtype == "bf16":
        return torch.frombuffer(bytearray(data), dtype=torch.bfloat16).view(ids, width)
    scale = torch.frombuffer(bytearray(data[: 4 * ids]), dtype=torch.float32)
    codes = torch.frombuffer(bytearray(data[4 * ids :]), dtype=torch.int8).view(ids, width)
    return codes.float() * scale[:, None]
