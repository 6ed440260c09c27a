"""The exact pass: the Gram of a group's files, read once, all of them side by side, parameter by parameter."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from joblib import Parallel, delayed
from numpy.typing import NDArray
from torch import Tensor

from lineage.cache import Cache
from lineage.checkpoint import Checkpoint, open_checkpoint
from lineage.errors import LineageError
from lineage.fingerprint import Fingerprint, fingerprint
from lineage.gram import Gram, facts, shared, sketch_gram
from lineage.moments import tame
from lineage.pairs import pick_device
from lineage.raw import SafetensorsRaw
from lineage.reading import leaves
from lineage.spectrum import exact_float32
from lineage.streaming import FileReader

Progress = Callable[[int, int, str], None]

LIMIT = 900.0  # seconds that an exact pass may take where nobody says otherwise
READ_RATE = 5e8  # bytes per second of a common disk
PRODUCT_RATE = 1e11  # float32 operations per second
RELATED = 0.5  # relative distance below which two models may have one reference
_READ = 1 << 21  # entries of all models' pieces together
_CACHED = 3 << 16  # of them in float32 at once: they stay in the processor's cache
_TASK = 1 << 24  # entries of one model in one task
_WIDE = 1 << 28  # entries of all models together up to which products are float64: they cost nothing there


@dataclass(frozen=True)
class Choice:
    """Whether the exact pass is made, and why, as a sentence. seconds: its estimated time."""

    exact: bool
    seconds: float
    reason: str


def choose(sizes: Sequence[int], *, sketch: bool | None = None, limit: float = LIMIT) -> Choice:
    """Exact pass or sketches for files of these `sizes` in bytes; sketch: what the user said, None for nothing."""
    total, n = sum(sizes), len(sizes)
    seconds = total / READ_RATE + (max(sizes, default=0) / 2) * n * n * 2 / PRODUCT_RATE
    what = f"{n} models of {total / 1e9:.1f} GB, about {seconds:.0f} s to read side by side"
    if sketch is not None:
        return Choice(not sketch, seconds, f"{'Sketches' if sketch else 'Exact'}, as asked: {what}.")
    if seconds <= limit:
        return Choice(True, seconds, f"Exact: {what}, within {limit:.0f} s.")
    return Choice(False, seconds, f"Sketches: {what}, more than {limit:.0f} s.")


def exact_gram(
    paths: Mapping[str, str | Path],
    *,
    prints: Mapping[str, Fingerprint] | None = None,
    cache: Path | Cache | None = None,
    device: str = "cpu",
    workers: int | None = None,
    progress: Progress | None = None,
) -> Gram:
    """The Gram of the models in `paths` (name -> file or folder), over the weights that all of them share.

    prints: their fingerprints, where they are at hand (norms and rounding are taken from there). Products are float32,
    float64 for small models, and sums float64. Entries that are not finite count as zero. LineageError for unreadable
    files and models that share no weight."""
    if not paths:
        raise LineageError("no models to compare.")
    known = {n: prints[n] if prints and n in prints else fingerprint(p, cache=cache) for n, p in paths.items()}
    order = sorted(known, key=lambda name: (known[name].sha256, name))
    known = {name: known[name] for name in order}
    common = shared(known)
    blocks, entries, norms, rounding = facts(known, common)
    with ExitStack() as stack, exact_float32(), torch.inference_mode():
        members = [_Member(open_checkpoint(paths[name]), stack) for name in order]
        table = _Pass(members, known, common.blocks, pick_device(device)).table(
            blocks, workers or os.cpu_count() or 1, progress
        )
    exact = Gram(tuple(order), blocks, table, entries, norms, rounding, True, common.left_out)
    return exact.part(list(paths))


class _Member:
    """One model of the pass: ranges of its canonical parameters."""

    def __init__(self, checkpoint: Checkpoint, stack: ExitStack):
        stack.callback(checkpoint.close)
        self._checkpoint, self.specs = checkpoint, checkpoint.specs
        self._readers: dict[str, tuple[FileReader, str]] = {}
        for prefix, raw in leaves(checkpoint.raw):
            if isinstance(raw, SafetensorsRaw):
                reader = FileReader(raw.path, {name: (s.offset or 0, s.dtype) for name, s in raw.specs.items()})
                stack.callback(reader.close)
                self._readers |= {prefix + name: (reader, name) for name in raw.specs}

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Entries from `start` on of a parameter, row-major, into `out`: straight from the file where they lie there
        as they are wanted, else from the tensor that is mapped."""
        param = self.specs[name]
        if param.stored in self._readers and out.dtype == param.dtype and not param.transposed:
            reader, stored = self._readers[param.stored]
            reader.read_into(stored, param.part[0] * param.numel + start, out)
        else:
            out.copy_(self._checkpoint[name].reshape(-1)[start : start + len(out)])


class _Piece(NamedTuple):
    name: str
    start: int
    stop: int


class _Pass:
    """All models side by side. Each model's difference is taken from its own centre, a model near it, and the centres'
    from the first of them: so what float32 products lose is small against the distances inside every family."""

    def __init__(
        self, members: list[_Member], prints: Mapping[str, Fingerprint], blocks: Mapping[str, str], device: torch.device
    ):
        self._members, self._block, self._device = members, blocks, device
        self._wild = {t.name for p in prints.values() for t in p.tensors if t.wild}
        self._centre = centres = _centres(prints)
        self._own, self._which = np.unique(centres, return_inverse=True)
        specs = members[0].specs
        self._sizes = {name: specs[name].numel for name in specs if name in blocks}
        self._dtypes = {name: self._common({m.specs[name].dtype for m in members}) for name in blocks}
        total = sum(self._sizes.values()) * len(members)
        wide = total <= _WIDE or torch.float64 in self._dtypes.values()
        self._dtype = torch.float64 if wide else torch.float32
        self._columns = max(1 << 10, _CACHED // len(members) >> 10 << 10)

    def table(self, blocks: Sequence[str], workers: int, progress: Progress | None) -> NDArray[np.float64]:
        """(blocks, n, n) float64."""
        n = len(self._members)
        sums = {block: np.zeros((n, n)) for block in blocks}
        tasks = list(self._tasks())
        threads = torch.get_num_threads()
        parallel: Any = Parallel(min(workers, len(tasks)), backend="threading", return_as="generator")
        try:
            found = parallel(delayed(self._products)(task) for task in tasks)
            for i, (task, products) in enumerate(zip(tasks, found, strict=True), 1):
                for block, product in products.items():
                    sums[block] += product
                if progress:
                    progress(i, len(tasks), task[-1].name)
        finally:
            torch.set_num_threads(threads)
        return self._from_first(np.stack([sums[block] for block in blocks]))

    def _from_first(self, products: NDArray) -> NDArray[np.float64]:
        """Products of differences from the centres (blocks, n, n), as those of differences from the first model."""
        n = len(self._members)
        back = np.eye(n)
        others = np.flatnonzero(self._centre != np.arange(n))
        back[others, self._centre[others]] = 1
        return back @ products @ back.T

    @staticmethod
    def _common(dtypes: set[torch.dtype]) -> torch.dtype:
        """One in which all of these are exact."""
        if len(dtypes) == 1:
            return next(iter(dtypes))
        return torch.float64 if torch.float64 in dtypes else torch.float32

    def _tasks(self) -> Iterator[list[_Piece]]:
        """Pieces in the order of the first model's bytes, in lists of about _TASK entries."""
        step = max(self._columns, min(1 << 18, _READ // len(self._members) // self._columns * self._columns))
        task, held = list[_Piece](), 0
        for name, size in self._sizes.items():
            for start in range(0, size, step):
                task.append(_Piece(name, start, min(start + step, size)))
                held += task[-1].stop - start
                if held >= _TASK:
                    yield task
                    task, held = [], 0
        if task:
            yield task

    def _products(self, task: Sequence[_Piece]) -> dict[str, NDArray[np.float64]]:
        """Block -> (n, n) float64, the products of one task's pieces."""
        torch.set_num_threads(1)  # the workers are the threads
        longest = max(p.stop - p.start for p in task)
        buffer = torch.empty(len(self._members), longest * 8, dtype=torch.uint8)
        sums: dict[str, Tensor] = {}
        with torch.inference_mode():
            for piece in task:
                dtype = self._dtypes[piece.name]
                rows = buffer[:, : (piece.stop - piece.start) * dtype.itemsize].view(dtype)
                for row, member in zip(rows, self._members, strict=True):
                    member.read_into(piece.name, piece.start, row)
                found = self._piece(rows.to(self._device), piece.name in self._wild)
                block = self._block[piece.name]
                sums[block] = sums[block] + found if block in sums else found
        return {block: found.cpu().numpy() for block, found in sums.items()}

    def _piece(self, rows: Tensor, wild: bool) -> Tensor:
        """(n, n) float64 products of the differences of `rows` (n, p), as stored."""
        parts = rows.split(self._columns if rows.device.type == "cpu" else rows.shape[1], 1)
        wide = ((tame(part) if wild else part).to(self._dtype) for part in parts)
        return torch.stack([self._product(part) for part in wide]).sum(0, dtype=torch.float64)

    def _product(self, x: Tensor) -> Tensor:
        """(n, n) products of the differences of `x` (n, p), which is overwritten."""
        centres = x[self._own]
        for row, c in zip(x, self._which, strict=True) if len(centres) > 1 else ():
            row -= centres[c]
        if len(centres) == 1:
            x -= centres
        for i, centre in zip(self._own[1:], centres[1:], strict=True):
            torch.sub(centre, centres[0], out=x[i])
        return x @ x.mT


def _centres(prints: Mapping[str, Fingerprint]) -> NDArray[np.int64]:
    """From sketches; the first model for all, where those cannot be compared."""
    try:
        return _leaders(sketch_gram(prints).relative())
    except LineageError:
        return np.zeros(len(prints), np.int64)


def _leaders(relative: NDArray) -> NDArray[np.int64]:
    """Index of each model's leader: the first leader it is related to, else itself."""
    leaders: list[int] = []
    for i, row in enumerate(relative):
        leaders.append(next((j for j in leaders if row[j] < RELATED and leaders[j] == j), i))
    return np.array(leaders, np.int64)
