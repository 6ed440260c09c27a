"""The streamed executor: pieces of tensors are read and computed by a few threads, and written in order.

A piece is a flat range of one key, small enough to stay in the processor's cache, so memory does not depend on the
size of the models or on the number of lines; arithmetic on pieces gives the bits of arithmetic on the whole.
"""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from threading import Lock
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from lineage.errors import FileError
from lineage.plan import Call, Entry, Leaf, Node, Table
from lineage.writer import Writer

PIECE = 1 << 20  # bytes: smaller ones cost Python's time, larger ones leave the processor's cache
SAMPLE_ROW, SAMPLE_EVERY, SAMPLE_ALL_BELOW = 4096, 16, 1 << 16
_AHEAD = 3  # pieces waiting per worker
_T = TypeVar("_T")
_R = TypeVar("_R")


class Reader(Protocol):
    """Reads `stop - start` entries of a stored tensor, row-major, into a new 1-D tensor; safe from many threads."""

    def read(self, stored: str, start: int, stop: int) -> Tensor: ...


@dataclass(frozen=True)
class Output:
    """A file to be written: its entries by key, and the original inputs to compare with: index -> its table."""

    entries: Mapping[str, Entry]
    writer: Writer
    originals: Mapping[int, Table]
    moved: dict[tuple[int, str], float] = field(default_factory=dict)  # (input, key) -> sum of squared differences
    norm: dict[tuple[int, str], float] = field(default_factory=dict)  # (input, key) -> sum of squares


class _Piece(NamedTuple):
    name: str
    start: int
    stop: int
    whole: bool


class _Written(NamedTuple):
    tensor: Tensor
    change: dict[int, tuple[float, float]]


def stream(
    outputs: Sequence[Output], readers: Sequence[Reader], progress: Callable[[int, int, str], None] | None = None
) -> None:
    """Compute every key of every output in one pass and hand it to the output's writer."""
    names = list(dict.fromkeys(name for output in outputs for name in output.writer.order))
    whole_tensor = Lock()  # one whole tensor at a time: they can be large

    def compute(piece: _Piece) -> list[_Written | None]:
        with whole_tensor if piece.whole else nullcontext():
            values = _Values(piece, readers, [o.entries[piece.name].node for o in outputs if piece.name in o.entries])
            return [_result(output, piece, values) for output in outputs]

    with _single_threaded_torch(), ThreadPoolExecutor(_workers()) as pool:
        done = {name: i for i, name in enumerate(names, 1)}
        for piece, results in _in_order(pool, compute, _pieces(names, outputs)):
            for output, result in zip(outputs, results, strict=True):
                if result is not None:
                    output.writer.put(piece.name, result.tensor)
                    _add(output, piece.name, result.change)
            if progress and piece.stop == _size(piece.name, outputs):
                progress(done[piece.name], len(names), piece.name)


def _result(output: Output, piece: _Piece, values: _Values) -> _Written | None:
    entry = output.entries.get(piece.name)
    if entry is None:
        return None
    tensor = values.of(entry.node).to(entry.dtype)
    leaves = {i: own[piece.name].node for i, own in output.originals.items() if piece.name in own}
    alike = {i: leaf for i, leaf in leaves.items() if isinstance(leaf, Leaf) and leaf.shape == entry.node.shape}
    compared = alike if tensor.is_floating_point() else {}
    return _Written(tensor, {i: _change(tensor, values.sample(leaf)) for i, leaf in compared.items()})


class _Values:
    """Values of nodes on one piece, each computed once and held until its last use; of inputs a sample remains."""

    def __init__(self, piece: _Piece, readers: Sequence[Reader], roots: Sequence[Node]):
        self._piece, self._readers = piece, readers
        self._uses = _uses(roots)
        self._known: dict[Node, Tensor] = {}
        self._samples: dict[Leaf, Tensor] = {}

    def of(self, node: Node) -> Tensor:
        """Depth first without recursion, as a recipe may have any number of lines."""
        pending = [node]
        while pending:
            last = pending[-1]
            missing = next((n for n in last.inputs if n not in self._known), None)
            if last in self._known:
                pending.pop()
            elif missing is not None:
                pending.append(missing)
            else:
                self._known[last] = self._read(last) if isinstance(last, Leaf) else self._call(last)
        return self._known[node]

    def sample(self, leaf: Leaf) -> Tensor:
        """Sampled entries of an input, read anew only where nothing was computed from it."""
        if leaf not in self._samples:
            self._read(leaf)
        return self._samples[leaf]

    def _read(self, leaf: Leaf) -> Tensor:
        start, stop = (0, prod(leaf.shape)) if self._piece.whole else (self._piece.start, self._piece.stop)
        flat = self._readers[leaf.model].read(leaf.stored, start, stop)
        self._samples[leaf] = _sample(flat).clone()
        return flat.reshape(leaf.shape) if self._piece.whole else flat

    def _call(self, node: Call) -> Tensor:
        result = node.function(*(self._known[n] for n in node.inputs))
        for n in node.inputs:
            self._uses[n] -= 1
            if not self._uses[n]:
                self._known.pop(n, None)
        return result


def _uses(roots: Iterable[Node]) -> Counter[Node]:
    """How often each node is needed: once per input place, and once more for a root."""
    pending, uses, seen = list(roots), Counter[Node](roots), set[Node]()
    while pending:
        node = pending.pop()
        if node not in seen:
            seen.add(node)
            uses.update(node.inputs)
            pending += node.inputs
    return uses


def _pieces(names: Iterable[str], outputs: Sequence[Output]) -> Iterator[_Piece]:
    """Flat ranges, smaller where many outputs are made at once."""
    for name in names:
        nodes = [o.entries[name].node for o in outputs if name in o.entries]
        size = prod(nodes[0].shape)
        if any(n.whole for n in nodes):
            yield _Piece(name, 0, size, True)
        else:
            length = max(PIECE // len(outputs) // max(n.dtype.itemsize for n in nodes), SAMPLE_ROW)
            for start in range(0, max(size, 1), length):
                yield _Piece(name, start, min(start + length, size), False)


def _size(name: str, outputs: Sequence[Output]) -> int:
    return prod(next(o.entries[name] for o in outputs if name in o.entries).node.shape)


def _in_order(pool: ThreadPoolExecutor, function: Callable[[_T], _R], items: Iterable[_T]) -> Iterator[tuple[_T, _R]]:
    """(item, function(item)) in the order of the items, a bounded number of them ahead."""
    waiting: deque[tuple[_T, Future[_R]]] = deque()
    try:
        for item in items:
            waiting.append((item, pool.submit(function, item)))
            if len(waiting) > _AHEAD * _workers():
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        for _, future in waiting:
            future.cancel()


def _workers() -> int:
    return max(2, min(8, os.cpu_count() or 2))


@contextmanager
def _single_threaded_torch() -> Iterator[None]:
    """The workers are the threads; torch's own would only stand in their way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _change(out: Tensor, original: Tensor) -> tuple[float, float]:
    """(||out - original||^2, ||original||^2) over the entries that `_sample` gave of the original, scaled to all."""
    a, b = _sample(out).float(), original.float()
    scale = out.numel() / max(1, a.numel())
    return float((a - b).square().sum()) * scale, float(b.square().sum()) * scale


def _sample(tensor: Tensor) -> Tensor:
    """All entries of a small tensor, else every 16th row of 4096."""
    flat = tensor.reshape(-1)
    if flat.numel() < SAMPLE_ALL_BELOW:
        return flat
    rows = flat.numel() // SAMPLE_ROW
    return flat[: rows * SAMPLE_ROW].view(rows, SAMPLE_ROW)[::SAMPLE_EVERY]


def _add(output: Output, name: str, change: Mapping[int, tuple[float, float]]) -> None:
    for i, (moved, norm) in change.items():
        output.moved[i, name] = output.moved.get((i, name), 0.0) + moved
        output.norm[i, name] = output.norm.get((i, name), 0.0) + norm


class FileReader:
    """Reads ranges of a safetensors file at known offsets. `places`: stored name -> (offset, dtype)."""

    def __init__(self, path: Path, places: Mapping[str, tuple[int, torch.dtype]]):
        self._path, self._places, self._lock = path, places, Lock()
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115

    def read(self, stored: str, start: int, stop: int) -> Tensor:
        offset, dtype = self._places[stored]
        buffer = torch.empty((stop - start) * dtype.itemsize, dtype=torch.uint8)
        self._fill(buffer.numpy().data, offset + start * dtype.itemsize)
        return buffer.view(dtype)

    def read_into(self, stored: str, start: int, out: Tensor) -> None:
        """The entries from `start` on into `out`, 1-D, contiguous, of the stored dtype."""
        offset, dtype = self._places[stored]
        self._fill(out.view(torch.uint8).numpy().data, offset + start * dtype.itemsize)

    def _fill(self, view: memoryview, offset: int) -> None:
        while view:
            got = self._read_at(view, offset)
            if not got:
                raise FileError(self._path, "became shorter while it was read.", "Run again when nothing writes to it.")
            view, offset = view[got:], offset + got

    def _read_at(self, view: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [view], offset)
        with self._lock:  # no positioned read on this system
            self._file.seek(offset)
            return self._file.readinto(view) or 0

    def close(self) -> None:
        self._file.close()


class TensorReader:
    """Reads ranges of tensors that another reader maps or holds (.ckpt, folders)."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self._tensors = tensors

    def read(self, stored: str, start: int, stop: int) -> Tensor:
        return self._tensors[stored].reshape(-1)[start:stop]

    def close(self) -> None:
        """Nothing of its own is open."""
