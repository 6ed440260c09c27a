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

PIECE = 1 << 22  # bytes: smaller ones cost Python's time, larger ones memory
SAMPLE_LEAST, SAMPLE_EVERY = 4096, 64  # fewest entries of a piece to compare with the originals; else one in so many
WORKERS = max(2, min(8, os.cpu_count() or 2))
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


@dataclass(frozen=True)
class _Key:
    """A key to be written, and all that its pieces have in common: its size in entries, its entry in each output (None:
    not in it), the inputs that it is compared with there, and how often each node is needed. whole: not in pieces."""

    name: str
    size: int
    entries: Sequence[Entry | None]
    compared: Sequence[Mapping[int, Leaf]]
    uses: Mapping[Node, int]
    whole: bool


class _Piece(NamedTuple):
    """The entries of a key from `start` to `stop`, flat."""

    key: _Key
    start: int
    stop: int


class _Written(NamedTuple):
    tensor: Tensor
    change: dict[int, tuple[float, float]]


def stream(
    outputs: Sequence[Output], readers: Sequence[Reader], progress: Callable[[int, int, str], None] | None = None
) -> None:
    """Compute every key of every output in one pass and hand it to the output's writer."""
    names = list(dict.fromkeys(name for output in outputs for name in output.writer.order))
    keys, done = (_key(name, outputs) for name in names), 0
    whole_tensor = Lock()  # one whole tensor at a time: they can be large

    def compute(piece: _Piece) -> list[_Written | None]:
        with whole_tensor if piece.key.whole else nullcontext():
            values = _Values(piece, readers)
            return [_result(piece, i, values) for i in range(len(outputs))]

    with _single_threaded_torch(), ThreadPoolExecutor(WORKERS) as pool:
        for piece, results in _in_order(pool, compute, (p for key in keys for p in _pieces(key))):
            for output, result in zip(outputs, results, strict=True):
                if result is not None:
                    output.writer.put(piece.key.name, result.tensor)
                    _add(output, piece.key.name, result.change)
            done += piece.stop == piece.key.size
            if progress and piece.stop == piece.key.size:
                progress(done, len(names), piece.key.name)


def _key(name: str, outputs: Sequence[Output]) -> _Key:
    entries = [o.entries.get(name) for o in outputs]
    nodes = [e.node for e in entries if e]
    compared = [_compared(o.originals, name, e) if e else {} for o, e in zip(outputs, entries, strict=True)]
    return _Key(name, prod(nodes[0].shape), entries, compared, _uses(nodes), any(n.whole for n in nodes))


def _compared(originals: Mapping[int, Table], name: str, entry: Entry) -> dict[int, Leaf]:
    """The inputs' own tensors of that name, where they are numbers of the same shape."""
    leaves = {i: own[name].node for i, own in originals.items() if name in own and entry.dtype.is_floating_point}
    return {i: leaf for i, leaf in leaves.items() if isinstance(leaf, Leaf) and leaf.shape == entry.node.shape}


def _result(piece: _Piece, i: int, values: _Values) -> _Written | None:
    entry = piece.key.entries[i]
    if entry is None:
        return None
    tensor = values.of(entry.node).to(entry.dtype)
    ours, compared = _sample(tensor.reshape(-1)).float(), piece.key.compared[i]
    scale = tensor.numel() / max(1, ours.numel())
    return _Written(tensor, {n: _change(ours, values.sample(leaf), scale) for n, leaf in compared.items()})


class _Values:
    """Values of nodes on one piece, each computed once and held until its last use; of inputs a sample remains."""

    def __init__(self, piece: _Piece, readers: Sequence[Reader]):
        self._piece, self._readers = piece, readers
        self._uses = dict(piece.key.uses)
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
        key, start, stop = self._piece
        flat = self._readers[leaf.model].read(leaf.stored, start, prod(leaf.shape) if key.whole else stop)
        self._samples[leaf] = _sample(flat).float()
        return flat.reshape(leaf.shape) if key.whole else flat

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


def _pieces(key: _Key) -> Iterator[_Piece]:
    """Flat ranges, smaller where many outputs are made at once."""
    widest = max(e.node.dtype.itemsize for e in key.entries if e)
    length = key.size if key.whole else max(PIECE // len(key.entries) // widest, SAMPLE_LEAST)
    for start in range(0, max(key.size, 1), max(length, 1)):
        yield _Piece(key, start, min(start + length, key.size))


def _in_order(pool: ThreadPoolExecutor, function: Callable[[_T], _R], items: Iterable[_T]) -> Iterator[tuple[_T, _R]]:
    """(item, function(item)) in the order of the items, a bounded number of them ahead."""
    waiting: deque[tuple[_T, Future[_R]]] = deque()
    try:
        for item in items:
            waiting.append((item, pool.submit(function, item)))
            if len(waiting) > _AHEAD * WORKERS:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        for _, future in waiting:
            future.cancel()


@contextmanager
def _single_threaded_torch() -> Iterator[None]:
    """The workers are the threads; torch's own would only stand in their way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _change(ours: Tensor, original: Tensor, scale: float) -> tuple[float, float]:
    """(||ours - original||^2, ||original||^2), scaled from the entries of a sample to all."""
    return float((ours - original).square_().sum()) * scale, float(original.square().sum()) * scale


def _sample(flat: Tensor) -> Tensor:
    """The first part of a piece, but at least SAMPLE_LEAST entries, or all there are."""
    return flat[: max(SAMPLE_LEAST, flat.shape[0] // SAMPLE_EVERY)]


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
