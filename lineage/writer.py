"""Writing model files as a stream: header from the plan, then the bytes, one tensor after the other."""

from __future__ import annotations

import io
import json
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import BinaryIO, NamedTuple, Protocol

import torch
from torch import Tensor
from torch._utils import _rebuild_tensor_v2

from lineage.errors import LineageError

_SAFETENSORS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.complex64: "C64",
}
_STORAGES = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.int64: torch.LongStorage,
    torch.int32: torch.IntStorage,
    torch.int16: torch.ShortStorage,
    torch.int8: torch.CharStorage,
    torch.uint8: torch.ByteStorage,
    torch.bool: torch.BoolStorage,
    torch.complex64: torch.ComplexFloatStorage,
}
_ZIP_ALIGNMENT = 64


class TensorSpec(NamedTuple):
    """A tensor to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Writer(Protocol):
    """Takes the tensors in the order of `order`, each in consecutive flat pieces, then `finish`."""

    order: Sequence[str]

    def put(self, name: str, piece: Tensor) -> None: ...

    def finish(self, metadata: Mapping[str, str]) -> None: ...


def file_size(container: str, specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> int:
    """Bytes the file will take; exact for safetensors, at most a few KiB too many for ckpt."""
    data = sum(s.nbytes for s in specs)
    if container == "safetensors":
        return data + len(_header(specs, metadata))
    return data + len(_pickled(specs)) + 1024 + sum(300 + 2 * _ZIP_ALIGNMENT for _ in specs)


def aligned(specs: Iterable[TensorSpec]) -> list[TensorSpec]:
    """Wide dtypes first, else as they come, so that every tensor of a safetensors file lies aligned."""
    return sorted(specs, key=lambda s: -s.dtype.itemsize)


class SafetensorsWriter:
    """A .safetensors file. Its header is written twice, in the same room: `metadata` may change, not grow."""

    def __init__(self, file: BinaryIO, specs: Sequence[TensorSpec], metadata: Mapping[str, str]):
        self._file, self._specs = file, aligned(specs)
        self.order = [s.name for s in self._specs]
        header = _header(self._specs, metadata)
        self._room, offset = len(header), len(header)
        self._next: dict[str, int] = {}
        for spec in self._specs:
            self._next[spec.name] = offset
            offset += spec.nbytes
        file.write(header)
        self._at = self._room

    def put(self, name: str, piece: Tensor) -> None:
        if self._next[name] != self._at:
            self._file.seek(self._next[name])
        self._file.write(as_bytes(piece))
        self._at = self._next[name] = self._next[name] + piece.nbytes

    def finish(self, metadata: Mapping[str, str]) -> None:
        header = _header(self._specs, metadata, self._room)
        if len(header) != self._room:
            raise ValueError("the metadata grew after the header was laid out")
        self._file.seek(0)
        self._file.write(header)


def _header(specs: Sequence[TensorSpec], metadata: Mapping[str, str], room: int = 0) -> bytes:
    """Length and JSON of a safetensors header, padded with spaces to a multiple of 8 or to `room` bytes in all."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for s in aligned(specs):
        span = [offset, offset + s.nbytes]
        entries[s.name] = {"dtype": _SAFETENSORS[s.dtype], "shape": list(s.shape), "data_offsets": span}
        offset = span[1]
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * max(-len(text) % 8, room - 8 - len(text))
    return len(text).to_bytes(8, "little") + text


class CkptWriter:
    """A .ckpt file: an uncompressed zip as torch.save makes it, one flat dict, read by torch.load(weights_only).

    Streamed like the other: torch.save itself would want the whole model in memory. Names and pickle are kept to what
    the oldest readers allow. It has no room for metadata."""

    def __init__(self, file: BinaryIO, specs: Sequence[TensorSpec], metadata: Mapping[str, str]):
        self._file = file
        self._zip = _Zip(file, "w", zipfile.ZIP_STORED, allowZip64=True)
        self._storage = {s.name: (f"archive/data/{i}", s.nbytes) for i, s in enumerate(specs)}
        self._entry, self._left = None, 0
        self.order = [s.name for s in specs]
        with self._open("archive/data.pkl", 0) as entry:
            entry.write(_pickled(specs))
        with self._open("archive/version", 0) as entry:
            entry.write(b"3\n")

    def put(self, name: str, piece: Tensor) -> None:
        if self._entry is None:
            path, self._left = self._storage[name]
            self._entry = self._open(path, self._left)
        self._entry.write(as_bytes(piece))
        self._left -= piece.nbytes
        if self._left == 0:
            self._entry.close()
            self._entry = None

    def finish(self, metadata: Mapping[str, str]) -> None:
        self._zip.close()
        self._file.truncate()  # what was reserved for it may be more

    def _open(self, path: str, size: int):
        """A new entry whose data begins aligned, as memory-mapping readers want it."""
        info = zipfile.ZipInfo(path, (1980, 1, 1, 0, 0, 0))
        info.file_size = size
        large = size >= 1 << 31
        start = self._file.tell() + 30 + len(path) + (20 if large else 0)
        gap = -(start + 4) % _ZIP_ALIGNMENT
        info.extra = b"FB" + gap.to_bytes(2, "little") + b"Z" * gap
        return self._zip.open(info, "w", force_zip64=large)


class _Zip(zipfile.ZipFile):
    def __del__(self) -> None:
        """Nothing: an archive given up half way must not try to finish itself in a file that is closed."""


class _Storage(NamedTuple):
    kind: type
    key: str
    count: int


class _Tensor:
    def __init__(self, storage: _Storage, shape: tuple[int, ...]):
        self.storage, self.shape = storage, shape

    @property
    def stride(self) -> tuple[int, ...]:
        return tuple(math.prod(self.shape[i + 1 :]) for i in range(len(self.shape)))


class _Pickler(pickle.Pickler):
    """Writes tensors as torch.save does, from their shapes alone."""

    def persistent_id(self, obj):
        return ("storage", obj.kind, obj.key, "cpu", obj.count) if isinstance(obj, _Storage) else None

    def reducer_override(self, obj):
        if not isinstance(obj, _Tensor):
            return NotImplemented
        return _rebuild_tensor_v2, (obj.storage, 0, obj.shape, obj.stride, False, OrderedDict())


def _pickled(specs: Sequence[TensorSpec]) -> bytes:
    for s in specs:
        if s.dtype not in _STORAGES:
            raise LineageError(f"{s.name}: a .ckpt cannot hold {s.dtype}. Add --container safetensors.")
    storages = [_Storage(_STORAGES[s.dtype], str(i), math.prod(s.shape)) for i, s in enumerate(specs)]
    buffer = io.BytesIO()
    tensors = {s.name: _Tensor(storage, s.shape) for s, storage in zip(specs, storages, strict=True)}
    _Pickler(buffer, protocol=2).dump(tensors)
    return buffer.getvalue()


WRITERS = {"safetensors": SafetensorsWriter, "ckpt": CkptWriter}


def as_bytes(tensor: Tensor) -> memoryview:
    """The tensor's bytes, row-major, without a copy where it is contiguous."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
