"""Files of torch.save, opened without torch.load: a zip of stored blocks, or the stream that torch wrote before 1.6.

The pickle inside is read as data (lineage.pickled); every tensor is checked against the bytes that are there and mapped
from the file when it is asked for.
"""

from __future__ import annotations

import io
import mmap
import struct
import zipfile
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lineage.errors import FileError
from lineage.pickled import MAX_PICKLE, Pickle, Refused, interpret
from lineage.places import Place
from lineage.stored import DAMAGED, Raw, Spec

ZIP = b"PK\x03\x04"
LEGACY = b"\x80"
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_VERSION = 1001
_ZIP_FAULTS = (zipfile.BadZipFile, NotImplementedError, struct.error, OSError, ValueError, LookupError, OverflowError)


@dataclass(frozen=True)
class Block:
    """Bytes of the file that hold one storage."""

    offset: int
    nbytes: int


class TorchFile(Raw):
    """Tensors of a .ckpt / .pt / .pth / .bin; those under "state_dict" or "model" are taken out of there."""

    def __init__(self, path: Path):
        self.path = path
        self.metadata = {}
        found, blocks = _open_zip(path) if _begin(path).startswith(ZIP) else _open_legacy(path)
        self._places = _checked(path, _named(path, found), blocks)
        self._blocks = blocks
        first = {name: blocks[p.key].offset + p.offset * p.dtype.itemsize for name, p in self._places.items()}
        self.specs = {n: _spec(n, self._places[n], first[n]) for n in sorted(first, key=lambda n: first[n])}
        self._map: Any = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=path.stat().st_size)

    def __getitem__(self, name: str) -> Tensor:
        place = self._places[name]
        if self._map is None:
            raise FileError(self.path, "has been closed.", "Read tensors before close().")
        block = self._blocks[place.key]
        if 0 in place.shape:
            return torch.empty(place.shape, dtype=place.dtype)
        begin, end = block.offset, block.offset + place.reach
        storage = self._map[begin:end]
        if begin % 16:  # vector instructions of some processors want aligned entries
            storage = storage.clone()
        return torch.empty(0, dtype=place.dtype).set_(storage, place.offset, place.shape, place.strides)

    def close(self) -> None:
        self._map = None


def _begin(path: Path) -> bytes:
    with open(path, "rb") as f:
        return f.read(4)


def _spec(name: str, place: Place, first: int) -> Spec:
    plain, size = True, 1
    for n, stride in zip(reversed(place.shape), reversed(place.strides), strict=True):
        plain &= n == 1 or stride == size
        size *= n
    nbytes = prod(place.shape) * place.dtype.itemsize
    return Spec(name, place.dtype, place.shape, nbytes, first if plain else None)


def _checked(path: Path, places: dict[str, Place], blocks: dict[str, Block]) -> dict[str, Place]:
    size = path.stat().st_size
    for name, place in places.items():
        block = blocks.get(place.key)
        if block is None or place.reach > block.nbytes or block.offset + place.reach > size:
            raise FileError(path, f"the entries of {name!r} are not all in the file.", DAMAGED)
    return places


def _named(path: Path, found: Any) -> dict[str, Place]:
    for key in ("state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict):
        raise FileError(path, f"holds a {type(found).__name__}, not a dict of tensors.", "It is no model.")
    places = {k: v for k, v in found.items() if isinstance(k, str) and isinstance(v, Place)}
    if not places:
        raise FileError(path, "holds no tensors under names.", "It is no model.")
    return places


def _read(path: Path, data: bytes) -> Pickle:
    try:
        return interpret(data)
    except Refused as e:
        names = ", ".join(map(repr, e.names[:5])) + (" and others" if len(e.names) > 5 else "")
        raise FileError(
            path,
            f"is a pickle that names {names[:500]}, which no model needs; it is refused, and nothing in it was run.",
            "Get the model as .safetensors; if its author cannot be trusted, delete the file.",
        ) from e
    except ValueError as e:
        raise FileError(path, f"cannot be read as a pickle of tensors ({str(e)[:300]!r}).", DAMAGED) from e


def _open_zip(path: Path) -> tuple[Any, dict[str, Block]]:
    with open(path, "rb") as f:
        try:
            with zipfile.ZipFile(f) as archive:
                members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
            _refuse_other_zips(path, members)
            blocks = {name: _block(f, info) for name, info in members.items() if name.startswith("data/")}
            pickle = _block(f, members["data.pkl"])
            order = _block(f, members["byteorder"]) if "byteorder" in members else None
        except _ZIP_FAULTS as e:
            raise FileError(path, f"is no readable zip of torch.save ({str(e)[:200]}).", DAMAGED) from e
        if order and _bytes(path, f, order) != b"little":
            raise FileError(path, "was written on a big-endian machine.", "Save it again on a common one.")
        found = _read(path, _bytes(path, f, pickle)).found
    return found, {name.removeprefix("data/"): block for name, block in blocks.items()}


def _refuse_other_zips(path: Path, members: dict[str, zipfile.ZipInfo]) -> None:
    if "data.pkl" not in members:
        raise FileError(path, "is a zip without data.pkl, so not written by torch.save.", "Unpack it first?")
    if "constants.pkl" in members:
        raise FileError(path, "is a TorchScript program, not a file of weights.", "Get the weights as .safetensors.")
    packed = next((n for n, info in members.items() if info.compress_type or info.flag_bits & 1), None)
    if packed is not None:
        raise FileError(path, f"has the compressed or encrypted member {packed!r}.", "Unpack and zip it with -0.")


def _block(f: io.BufferedReader, info: zipfile.ZipInfo) -> Block:
    """Where a member's bytes begin: its own header says how long it is."""
    f.seek(info.header_offset)
    header = f.read(30)
    if header[:4] != ZIP:
        raise ValueError(f"no header of member {info.filename!r}")
    name, extra = struct.unpack("<HH", header[26:30])
    return Block(info.header_offset + 30 + name + extra, info.file_size)


def _bytes(path: Path, f: io.BufferedReader, block: Block) -> bytes:
    if block.nbytes > MAX_PICKLE:
        raise FileError(path, f"has a pickle of {block.nbytes} bytes, too large for a model.", DAMAGED)
    f.seek(block.offset)
    return f.read(block.nbytes)


def _open_legacy(path: Path) -> tuple[Any, dict[str, Block]]:
    """Five pickles (magic number, version, system, the object, storage keys), then per storage its count and bytes."""
    with open(path, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
        at, parts = 0, []
        for want in (_LEGACY_MAGIC, _LEGACY_VERSION, None, None, None):
            parts.append(_read(path, data[at : at + MAX_PICKLE]))
            if want is not None and parts[-1].found != want:
                raise FileError(path, "is a pickle, but not written by torch.save.", "It is no model.")
            at += parts[-1].length
        *_, model, keys = parts
        try:
            return model.found, _legacy_blocks(data, at, model.itemsizes, keys.found)
        except (struct.error, TypeError, ValueError, LookupError) as e:
            raise FileError(path, f"ends before its tensors do ({e}).", DAMAGED) from e


def _legacy_blocks(data: mmap.mmap, at: int, sizes: dict[str, int], keys: list[str]) -> dict[str, Block]:
    blocks = {}
    for key in keys:
        (count,) = struct.unpack("<q", data[at : at + 8])
        nbytes = count * sizes[str(key)]
        if count < 0 or at + 8 + nbytes > len(data):
            raise ValueError(f"storage {str(key)[:40]!r} claims {count} entries")
        blocks[str(key)] = Block(at + 8, nbytes)
        at += 8 + nbytes
    return blocks
