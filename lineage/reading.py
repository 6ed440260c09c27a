"""One read of a model's files: their hashes and their tensors' entries, from the same bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lineage.cache import Cache, State, cached_sha256, state_of
from lineage.checkpoint import Checkpoint
from lineage.errors import FileError
from lineage.filesets import shards
from lineage.keys import Param
from lineage.moments import PART
from lineage.raw import Joined, is_index


def files_of(path: Path) -> list[Path]:
    """The files that make up a model: of a folder all, of an index of shards it and them."""
    if path.is_dir():
        return sorted(f for f in path.rglob("*") if f.is_file())
    return [path, *shards(path)] if is_index(path) else [path]


def content_hash(path: Path, cache: Cache) -> str:
    """sha256 of a model: as hashing.sha256 has it; of an index of shards, of the lines "<sha256>  <name>" of the index
    and its shards."""
    if not is_index(path):
        return cached_sha256(path, cache)
    lines = "".join(f"{cached_sha256(f, cache)}  {f.name}\n" for f in files_of(path))
    return hashlib.sha256(lines.encode()).hexdigest()


def leaves(raw: Any) -> Iterator[tuple[str, Any]]:
    """(prefix of its names, reader) of each file of a checkpoint's `raw`."""
    if not isinstance(raw, Joined):
        yield "", raw
        return
    for prefix, part in raw.named:
        yield from ((prefix + inner, leaf) for inner, leaf in leaves(part))


class Reading:
    """Reads a checkpoint's parameters in the order of their bytes, and hashes the files on the way."""

    def __init__(self, checkpoint: Checkpoint, cache: Cache, stack: ExitStack):
        self._checkpoint, self._cache = checkpoint, cache
        self._files: dict[Path, _File] = {}
        self._places: dict[str, tuple[_File, int | None, int]] = {}
        for prefix, raw in leaves(checkpoint.raw):
            file = self._files[raw.path] = _File(raw.path)
            stack.callback(file.close)
            self._places |= {prefix + name: (file, spec.offset, spec.nbytes) for name, spec in raw.specs.items()}

    def parts(self, param: Param) -> Iterator[Tensor]:
        """A parameter's entries, row-major, (up to PART,) each; one is overwritten by the next.

        Where they lie in the file as they are wanted they are taken as they are hashed; else from the mapped tensor,
        after the file has been hashed so far."""
        file, offset, nbytes = self._places[param.stored]
        plain = param.part == (0, 1) and not param.transposed and not param.dtype.is_complex
        if offset is None or not plain or file.at > offset:
            file.reach((offset or 0) + nbytes)
            yield from self.entries(param).split(PART)
            return
        file.reach(offset)
        left = param.numel
        while left > 0:
            yield file.take(min(left, PART), param.dtype)
            left -= PART

    def entries(self, param: Param) -> Tensor:
        """All of a parameter's entries (n,), mapped where they can be; a complex number is two entries."""
        tensor = self._checkpoint[param.name]
        real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        return real.reshape(-1).contiguous()

    def finish(self) -> str:
        """content_hash of the model; FileError where a file has changed."""
        for path, file in self._files.items():
            self._cache.remember(path, *file.finish())
        lone = self._files.get(self._checkpoint.path)
        return lone.finish()[1] if lone else content_hash(self._checkpoint.path, self._cache)


class _File:
    """A file that is hashed as it is read, from its beginning."""

    def __init__(self, path: Path):
        self._path, self._digest, self.at = path, hashlib.sha256(), 0
        self._before: State = state_of(path)
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115
        self._buffer = torch.empty(PART * 8, dtype=torch.uint8)

    def close(self) -> None:
        self._file.close()

    def reach(self, end: int) -> None:
        """Read on to `end`, if that is not done already."""
        while self.at < end:
            self.take(min(end - self.at, PART), torch.uint8)

    def take(self, count: int, dtype: torch.dtype) -> Tensor:
        """The next entries (count,), until the next call."""
        whole = self._buffer[: count * dtype.itemsize]
        left = whole.numpy().data
        while left:
            got = self._file.readinto(left)
            if not got:
                raise self._changed()
            left = left[got:]
        self._digest.update(whole.numpy().data)
        self.at += len(whole)
        return whole.view(dtype)

    def finish(self) -> tuple[State, str]:
        """The file's state and hash, once all of it is read."""
        self.reach(self._before[0])
        if state_of(self._path) != self._before or self.at != self._before[0]:
            raise self._changed()
        return self._before, self._digest.hexdigest()

    def _changed(self) -> FileError:
        return FileError(self._path, "changed while it was read.", "Run again when it is at rest.")
