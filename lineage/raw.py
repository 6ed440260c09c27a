"""What files hold under their stored names: safetensors, sharded indexes, pickles read weights-only, folders.

A file is hostile until read: sizes are compared with the bytes that are there, no pickle code runs, and paths inside a
file cannot leave its folder.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lineage.errors import FileError
from lineage.stored import DAMAGED, Raw, Spec
from lineage.torchfile import LEGACY, ZIP, TorchFile

PICKLES = (".ckpt", ".pt", ".pth", ".bin")
MAX_HEADER = 100_000_000

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
_COMPONENTS = ("unet", "vae", "text_encoder", "text_encoder_2")
_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model", "adapter_model")


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


class Joined(Raw):
    """Several files as one; names get their part's prefix."""

    def __init__(self, path: Path, parts: list[tuple[str, Raw]]):
        self.named = parts
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
    return _open_file(path)


def _open_file(path: Path) -> Raw:
    """By its first bytes; a wrong ending (a .ckpt that is a .safetensors) does no harm."""
    if not path.is_file():
        raise FileError(path, "is neither a file nor a folder.", "Give a model's file or folder.")
    try:
        with open(path, "rb") as f:
            head = f.read(9)
        if head.startswith(ZIP) or (head.startswith(LEGACY) and head[8:] != b"{"):
            return TorchFile(path)
        if head[8:] == b"{" or path.suffix.lower() == ".safetensors":
            return SafetensorsRaw(path)
    except OSError as e:
        raise FileError(path, f"cannot be read ({e.strerror or e}).", "Is it there, and yours to read?") from e
    known = f"Known are .safetensors, *.index.json, {', '.join(PICKLES)} and folders."
    advice = DAMAGED if path.suffix.lower() in PICKLES else known
    raise FileError(path, "is no model file.", advice)


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
        if not _lies_inside(shard, path.parent):
            raise FileError(path, f"names the shard {file!r}, a link out of its folder.", "Do not trust this file.")
        if is_index(shard):
            raise FileError(path, f"names the index {file!r} as a shard.", "Do not trust this file.")
        shards.append(shard)
    if not shards:
        raise FileError(path, "names no shards.", DAMAGED)
    return _joined(path, [("", shard) for shard in shards])


def is_index(path: Path) -> bool:
    """Whether a file is named as an index of shards."""
    return path.name.endswith(".json") and ".index." in path.name


def stays_inside(name: str) -> bool:
    """Whether a relative file name stays in its folder, by the rules of POSIX and of Windows."""
    kinds: tuple[PurePath, ...] = (PurePosixPath(name), PureWindowsPath(name))
    return bool(name) and "\0" not in name and all(not p.anchor and ".." not in p.parts for p in kinds)


def _lies_inside(shard: Path, folder: Path) -> bool:
    """Whether a file, all links followed, is in `folder`; the hub's cache may link from snapshots to its blobs."""
    caches = (p.parent / "blobs" for p in folder.absolute().parents if p.name == "snapshots")
    real = shard.resolve()
    return any(real.is_relative_to(home.resolve()) for home in (folder, *caches))


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
    file = _weights(path)
    folders = sorted((p.name for p in path.iterdir() if p.is_dir()), key=lambda n: (n not in _COMPONENTS, n))
    parts = [(f"{name}.", found) for name in folders if not file and (found := _weights(path / name))]
    if not parts and not file:
        raise FileError(path, "holds no weights of diffusers or transformers.", "Give a model's folder or file.")
    return _joined(path, parts or ([("", file)] if file else []))


def _weights(folder: Path) -> Path | None:
    """The weights of one component: safetensors before pickles, whole before sharded, plain before fp16."""
    kinds = ("safetensors", "fp16.safetensors", "safetensors.index.json", "safetensors.index.fp16.json")
    kinds += ("bin", "fp16.bin", "bin.index.json")
    files = (folder / f"{stem}.{kind}" for kind in kinds for stem in _STEMS)
    return next((file for file in files if file.is_file()), None)
