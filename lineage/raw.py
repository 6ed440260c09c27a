"""What files hold under their stored names: safetensors, sharded indexes, pickles read weights-only, folders.

A file is hostile until read: sizes are compared with the bytes that are there, no pickle code runs, and paths inside a
file cannot leave its folder.
"""

from __future__ import annotations

import json
import math
import pickle
import struct
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import torch
from numpy._core.multiarray import scalar
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lineage.errors import FileError

PICKLES = (".ckpt", ".pt", ".pth", ".bin")
MAX_HEADER = 100_000_000
DAMAGED = "The file is damaged or incomplete: get it anew."

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
_PICKLE_FAULTS = (
    *(RuntimeError, pickle.UnpicklingError, EOFError, LookupError, ValueError, TypeError, AttributeError, OSError),
    *(MemoryError, AssertionError, ArithmeticError, struct.error, zipfile.BadZipFile, ImportError, RecursionError),
)
_COMPONENTS = ("unet", "vae", "text_encoder", "text_encoder_2")
_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model", "adapter_model")


@dataclass(frozen=True)
class Spec:
    """One stored tensor. offset: of its first byte in the file, None where the bytes do not lie there in the open."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    offset: int | None = None


class Raw(Mapping[str, Tensor]):
    """Stored name -> tensor, over one file or several; specs from headers; order by file and offset."""

    specs: dict[str, Spec]
    metadata: dict[str, str]

    @property
    def order(self) -> list[str]:
        """Names in the order of their bytes."""
        return list(self.specs)

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    def close(self) -> None:
        """Let go of the file."""


class SafetensorsRaw(Raw):
    """A .safetensors file; its tensors are mapped."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self._file = safe_open(path, "pt").__enter__()
        except (SafetensorError, OSError, ValueError) as e:
            raise FileError(path, f"is no readable safetensors file ({e}).", DAMAGED) from e
        header, start = _header(path)
        self.metadata = {k: str(v) for k, v in (header.pop("__metadata__", None) or {}).items()}
        rows = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        self.specs = {name: self._spec(name, row, start) for name, row in rows}

    def _spec(self, name: str, row: dict[str, Any], start: int) -> Spec:
        begin, end = row["data_offsets"]
        dtype = _DTYPES.get(row["dtype"])
        if dtype is None:
            raise FileError(self.path, f"{name!r} is stored as {row['dtype']}, which is not known here.", "")
        return Spec(name, dtype, tuple(row["shape"]), end - begin, start + begin)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.specs:
            raise KeyError(name)
        try:
            return self._file.get_tensor(name)
        except (SafetensorError, RuntimeError, OSError, ValueError) as e:
            raise FileError(self.path, f"{name!r} cannot be read ({e}).", DAMAGED) from e

    def close(self) -> None:
        self._file.__exit__(None, None, None)


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """(header, where the tensors begin); safe_open has checked it."""
    with open(path, "rb") as f:
        (length,) = struct.unpack("<Q", f.read(8))
        return json.loads(f.read(min(length, MAX_HEADER))), 8 + length


class Tensors(Raw):
    """Tensors that lie in memory or are mapped from a pickle's storages."""

    def __init__(self, tensors: dict[str, Tensor]):
        self._tensors = tensors
        self.metadata = {}
        self.specs = {n: Spec(n, t.dtype, tuple(t.shape), t.numel() * t.itemsize) for n, t in tensors.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def close(self) -> None:
        self._tensors = {}


class Joined(Raw):
    """Several files as one; names get their part's prefix."""

    def __init__(self, path: Path, parts: list[tuple[str, Raw]]):
        self.parts = [part for _, part in parts]
        self.metadata = {k: v for part in self.parts for k, v in part.metadata.items()}
        self.specs, self._where = {}, {}
        for prefix, part in parts:
            for name, spec in part.specs.items():
                if prefix + name in self.specs:
                    self.close()
                    raise FileError(path, f"holds {name!r} twice, in two of its files.", "Remove one of them.")
                self.specs[prefix + name] = Spec(prefix + name, spec.dtype, spec.shape, spec.nbytes)
                self._where[prefix + name] = (part, name)

    def __getitem__(self, name: str) -> Tensor:
        part, inner = self._where[name]
        return part[inner]

    def close(self) -> None:
        for part in self.parts:
            part.close()


def open_parts(path: Path) -> Raw:
    """The raw contents of a file or folder, by its kind; FileError where it is none that is known."""
    if path.is_dir():
        return _open_folder(path)
    if is_index(path):
        return _open_index(path)
    if path.suffix.lower() == ".safetensors":
        return SafetensorsRaw(path)
    if path.suffix.lower() in PICKLES:
        return Tensors(load_pickle(path))
    raise FileError(path, "is no model file.", f"Known are .safetensors, *.index.json, {', '.join(PICKLES)}, folders.")


def _open_index(path: Path) -> Raw:
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        files = dict.fromkeys(index["weight_map"].values())
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
        raise FileError(path, f"is no index of shards ({e!r}).", DAMAGED) from e
    shards = []
    for file in files:
        if not isinstance(file, str) or not stays_inside(file):
            raise FileError(path, f"names the shard {file!r}, outside its own folder.", "Do not trust this file.")
        shard = path.parent / file
        if not shard.is_file():
            raise FileError(path, f"names the shard {file!r}, which is not there.", "Download it too.")
        if is_index(shard):
            raise FileError(path, f"names the index {file!r} as a shard.", "Do not trust this file.")
        shards.append(shard)
    return _joined(path, [("", shard) for shard in shards])


def is_index(path: Path) -> bool:
    """Whether a file is named as an index of shards."""
    return path.name.endswith(".json") and ".index." in path.name


def stays_inside(name: str) -> bool:
    """Whether a relative file name stays in its folder, by the rules of POSIX and of Windows."""
    kinds: tuple[PurePath, ...] = (PurePosixPath(name), PureWindowsPath(name))
    return bool(name) and "\0" not in name and all(not p.anchor and ".." not in p.parts for p in kinds)


def _joined(path: Path, files: list[tuple[str, Path]]) -> Raw:
    opened: list[tuple[str, Raw]] = []
    try:
        for prefix, file in files:
            opened.append((prefix, open_parts(file)))
        return opened[0][1] if len(opened) == 1 and not opened[0][0] else Joined(path, opened)
    except BaseException:
        for _, part in opened:
            part.close()
        raise


def _open_folder(path: Path) -> Raw:
    parts = [(f"{name}.", file) for name in _COMPONENTS if (file := _weights(path / name))]
    file = _weights(path)
    if not parts and not file:
        raise FileError(path, "holds no weights of diffusers or transformers.", "Give a model's folder or file.")
    return _joined(path, parts or ([("", file)] if file else []))


def _weights(folder: Path) -> Path | None:
    """The weights of one component: safetensors before pickles, whole before sharded, plain before fp16."""
    kinds = ("safetensors", "fp16.safetensors", "safetensors.index.json", "safetensors.index.fp16.json")
    kinds += ("bin", "fp16.bin", "bin.index.json")
    files = (folder / f"{stem}.{kind}" for kind in kinds for stem in _STEMS)
    return next((file for file in files if file.is_file()), None)


class _Inert:
    """Stands for a training framework's class that a checkpoint mentions: holds nothing, does nothing."""

    def __setstate__(self, state: object) -> None:
        """Take no state."""


_INERT = [
    (_Inert, name)
    for name in (
        "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
        "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
        "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint",
    )
]
_NUMBERS = [
    *((scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("f8", "f4", "f2", "i8", "i4", "u1", "?")),
]


def load_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickle, mapped where it is an uncompressed zip; no code in it is run.

    Tensors under "state_dict" or "model" are taken out of there."""
    zipped = zipfile.is_zipfile(path)
    try:
        if zipped:
            _check_zip(path)
        with torch.serialization.safe_globals([*_INERT, *_NUMBERS]):
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except _PICKLE_FAULTS as e:
        raise _refusal(path, e) from e
    return _tensors(path, found)


def _check_zip(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED or member.file_size > path.stat().st_size:
                raise FileError(path, f"{member.filename!r} is compressed or lies about its size.", DAMAGED)


def _refusal(path: Path, error: BaseException) -> FileError:
    text = str(error)
    try:
        unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except _PICKLE_FAULTS:
        unsafe = []
    if not unsafe and "GLOBAL" in text:
        unsafe = [text.split("GLOBAL ", 1)[1].split(" ")[0]]
    if unsafe:
        return FileError(
            path,
            f"is a pickle that wants to run {', '.join(map(repr, unsafe[:5]))}, and is refused.",
            "Get the .safetensors version, or convert it on a machine you can lose.",
        )
    first = text.splitlines()[0][:200] if text else type(error).__name__
    return FileError(path, f"cannot be read as a pickle of tensors ({first}).", DAMAGED)


def _tensors(path: Path, found: object) -> dict[str, Tensor]:
    for key in ("state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict):
        raise FileError(path, f"holds a {type(found).__name__}, not a dict of tensors.", "It is no model.")
    tensors = {k: t.detach() for k, t in found.items() if isinstance(k, str) and isinstance(t, Tensor)}
    if not tensors:
        raise FileError(path, "holds no tensors under names.", "It is no model.")
    for name, t in tensors.items():
        plain = t.layout is torch.strided and t.device.type == "cpu" and not t.is_quantized
        if not plain or math.prod(t.shape) * t.itemsize > t.untyped_storage().nbytes():
            raise FileError(path, f"{name!r} claims more entries than are stored, or is no plain tensor.", DAMAGED)
    return dict(sorted(tensors.items(), key=lambda item: item[1].data_ptr()))
