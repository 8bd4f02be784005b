"""One rank's file beside DeepSpeed's: whole or not at all, and damage is found before it is used.

The file is what torch.save writes, a zip archive, with a stamp as the archive's comment: whose file
it is, and the crc32c of every byte before the stamp. All functions are local.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import numbers
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import google_crc32c
import numpy as np
import torch

from ds_gradprune.errors import CheckpointError

_MAGIC, _VERSION = b"DSGPRUNE", 1
_STAMP = struct.Struct("<8sIIIIIQQI")
"""Magic, version, island, islands, shard, shards, step, bytes before the stamp, their crc32c."""
_CRC = struct.Struct("<I")
"""crc32c of the stamp."""
_STAMP_BYTES = _STAMP.size + _CRC.size
_ZIP_END = 22
"""Bytes of a zip's end record, of which the last two hold the comment's length."""

_ROOM = 2**20
"""Bytes beside tensors that a file is expected to need."""
_READ_BYTES = 2**24
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_KEPT_KINDS: dict[type, Callable[..., Any]] = {
    kind: kind for kind in (collections.Counter, collections.OrderedDict)
}
"""Dicts that torch.load makes again; torch's own schedules hold a Counter."""


@dataclass(frozen=True, slots=True)
class Stamp:
    """Whose file it is.

    Attributes:
        island: index of the island.
        num_islands: islands of the run.
        shard: index of the rank inside its island.
        num_shards: ranks of an island.
        step: optimizer steps that were done.
    """

    island: int
    num_islands: int
    shard: int
    num_shards: int
    step: int


def write(path: str, state: Any, stamp: Stamp) -> None:
    """Write a file, whole or not at all.

    Args:
        path: where; its folder is made.
        state: dicts, lists and tuples of tensors, numbers, texts, None.
        stamp: whose it is.

    Raises:
        CheckpointError: the state holds what `read` would not read again, or the file cannot be
            written; there is no new file then.
    """
    state = plain(state, "state")
    temporary = path + ".tmp"
    try:
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        _check_room(path, state)
        with open(temporary, "wb") as file:
            stream: Any = _Stream(file)
            torch.save(state, stream)
            stream.finish(stamp)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(os.path.dirname(os.path.abspath(path)))
    except CheckpointError:
        raise
    except OSError as exc:
        if exc.errno in _NO_SPACE:
            raise CheckpointError(_no_space(path, str(exc.strerror).lower())) from exc
        raise CheckpointError(
            f"{path} cannot be written ({exc.strerror}). Save into a folder that can be written."
        ) from exc
    except RuntimeError as exc:
        raise CheckpointError(f"{path} cannot be written ({_first_line(exc)}).") from exc
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def read_stamp(path: str) -> Stamp:
    """Whose file it is, from its last bytes.

    Raises:
        CheckpointError: it cannot be read, is cut, damaged or of another version.
    """
    with _readable(path) as file:
        return _stamp(path, file)[0]


def read(path: str) -> tuple[Any, Stamp]:
    """What `write` wrote, on the CPU.

    Raises:
        CheckpointError: it cannot be read, is cut, damaged or of another version.
    """
    with _readable(path) as file:
        stamp, num_bytes, expected = _stamp(path, file)
        file.seek(0)
        crc, left = 0, num_bytes
        while left:
            part = file.read(min(left, _READ_BYTES))
            crc, left = google_crc32c.extend(crc, part), left - len(part)
        if crc != expected:
            raise CheckpointError(f"{path} is damaged: its checksum is wrong.")
        file.seek(0)
        try:
            return torch.load(file, map_location="cpu", weights_only=True), stamp
        except Exception as exc:  # the bytes are those that were written, and mean nothing here
            raise CheckpointError(f"{path} cannot be read ({_first_line(exc)}).") from exc


def plain(value: Any, path: str) -> Any:
    """A copy that torch.load reads with weights_only: a schedule's state may hold anything.

    Numbers of numpy become Python's. Tensors are not copied.

    Raises:
        CheckpointError: names what cannot be saved.
    """
    if value is None or isinstance(value, (bool, np.bool_)):
        return None if value is None else bool(value)
    if isinstance(value, str):
        return str(value)
    if isinstance(value, torch.Tensor):
        return value.detach()
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if isinstance(value, Mapping):
        items = {plain(key, path): plain(item, f"{path}.{key}") for key, item in value.items()}
        return _KEPT_KINDS.get(type(value), dict)(items)
    if isinstance(value, (list, tuple)):
        members = [plain(item, f"{path}[{index}]") for index, item in enumerate(value)]
        return members if isinstance(value, list) else tuple(members)
    if isinstance(value, (torch.dtype, torch.device)):
        return value
    raise CheckpointError(
        f"{path} must be a number, a text, a tensor, or a list or dict of those to be saved, "
        f"got {type(value).__name__}."
    )


class _Stream:
    """What torch.save writes into: sums up, keeps the end back, and never raises into its C++."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._held = b""
        self._crc = 0
        self._num_bytes = 0
        self._error: OSError | None = None

    def write(self, data: Any) -> int:
        """Take in some bytes."""
        view = memoryview(data).cast("B")
        if len(view) < _ZIP_END:
            view = memoryview(self._held + bytes(view))
        else:
            self._emit(self._held)
        cut = max(0, len(view) - _ZIP_END)
        self._emit(view[:cut])
        self._held = bytes(view[cut:])
        return memoryview(data).nbytes

    def flush(self) -> None:
        """Nothing: `finish` does it."""

    def finish(self, stamp: Stamp) -> None:
        """Write the archive's end with the stamp as its comment.

        Raises:
            OSError: a write has failed.
        """
        self._emit(self._held[:-2] + struct.pack("<H", _STAMP_BYTES))
        fields = (stamp.island, stamp.num_islands, stamp.shard, stamp.num_shards, stamp.step)
        packed = _STAMP.pack(_MAGIC, _VERSION, *fields, self._num_bytes, self._crc)
        self._emit(packed + _CRC.pack(google_crc32c.value(packed)))
        if self._error is not None:
            raise self._error

    def _emit(self, data: bytes | memoryview) -> None:
        if not data:
            return
        self._crc = google_crc32c.extend(self._crc, np.frombuffer(data, np.uint8))
        self._num_bytes += len(data)
        if self._error is None:
            try:
                self._file.write(data)
            except OSError as exc:
                self._error = exc


@contextlib.contextmanager
def _readable(path: str) -> Iterator[BinaryIO]:
    try:
        with open(path, "rb") as file:
            yield file
    except FileNotFoundError as exc:
        raise CheckpointError(f"{path} is missing.") from exc
    except OSError as exc:
        raise CheckpointError(f"{path} cannot be read ({exc.strerror}).") from exc


def _stamp(path: str, file: BinaryIO) -> tuple[Stamp, int, int]:
    """The stamp, the bytes before it, their checksum."""
    num_bytes = file.seek(0, os.SEEK_END) - _STAMP_BYTES
    file.seek(max(0, num_bytes))
    packed, crc = (data := file.read(_STAMP_BYTES))[: _STAMP.size], data[_STAMP.size :]
    if num_bytes < 0 or crc != _CRC.pack(google_crc32c.value(packed)):
        raise CheckpointError(f"{path} is damaged: it is cut, or its last bytes have changed.")
    magic, version, island, islands, shard, shards, step, total, checksum = _STAMP.unpack(packed)
    if magic != _MAGIC or version != _VERSION or total != num_bytes:
        raise CheckpointError(f"{path} is no state file of this version of ds_gradprune.")
    return Stamp(island, islands, shard, shards, step), total, checksum


def _check_room(path: str, state: Any) -> None:
    """Say what is missing before anything is written."""
    storages = [tensor.untyped_storage() for tensor in _tensors(state)]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    needed = sum(sizes.values()) + _ROOM
    free = shutil.disk_usage(os.path.dirname(os.path.abspath(path))).free
    if free < needed:
        raise CheckpointError(_no_space(path, f"{needed:,} bytes are needed, {free:,} are free"))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _no_space(path: str, why: str) -> str:
    return (
        f"{path} cannot be written: no space ({why}). Free some, keep fewer checkpoints, or save "
        "elsewhere. What was saved before is whole."
    )


def _sync_folder(folder: str) -> None:
    """Make the new name last through a power cut, where the file system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _first_line(exc: BaseException) -> str:
    return f"{type(exc).__name__}: {(str(exc).splitlines() or [''])[0][:200]}"
