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
from lineage.delta import pick_device
from lineage.errors import LineageError
from lineage.fingerprint import Fingerprint, fingerprint, parts
from lineage.gram import Gram, facts, shared, sketch_gram
from lineage.keys import Param
from lineage.moments import tame
from lineage.raw import SafetensorsRaw
from lineage.spectrum import exact_float32
from lineage.streaming import FileReader, Reader, TensorReader

Progress = Callable[[int, int, str], None]

LIMIT = 900.0  # seconds that an exact pass may take where nobody says otherwise
READ_RATE = 5e8  # bytes per second of a common disk
PRODUCT_RATE = 1e11  # float32 operations per second
RELATED = 0.5  # relative distance below which two models may have one reference
_STACK = 1 << 20  # entries of all models' pieces together
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
    float64 for small models, and sums float64. LineageError for unreadable files and models that share no weight."""
    if not paths:
        raise LineageError("no models to compare.")
    known = {n: prints[n] if prints and n in prints else fingerprint(p, cache=cache) for n, p in paths.items()}
    order = sorted(known, key=lambda name: (known[name].sha256, name))
    known = {name: known[name] for name in order}
    common = shared(known)
    blocks, entries, norms, rounding = facts(known, common)
    with ExitStack() as stack, exact_float32(), torch.inference_mode():
        members = [_Member(open_checkpoint(paths[name]), stack) for name in order]
        one_pass = _Pass(members, _centers(known), pick_device(device), common.blocks)
        table = one_pass.table(blocks, workers or os.cpu_count() or 1, progress)
    exact = Gram(tuple(order), blocks, table, entries, norms, rounding, True, common.left_out)
    return exact.part(list(paths))


class _Member:
    """One model of the pass: ranges of its canonical parameters."""

    def __init__(self, checkpoint: Checkpoint, stack: ExitStack):
        stack.callback(checkpoint.close)
        self._checkpoint = checkpoint
        self._readers: dict[str, tuple[Reader, str]] = {}
        for prefix, raw in parts(checkpoint.raw):
            reader = _reader(raw)
            stack.callback(reader.close)
            self._readers |= {prefix + name: (reader, name) for name in raw.specs}

    @property
    def specs(self) -> Mapping[str, Param]:
        return self._checkpoint.specs

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Entries start to stop of a parameter, row-major, (stop - start,), as stored."""
        param = self.specs[name]
        if param.transposed:
            return self._checkpoint[name].reshape(-1)[start:stop]
        reader, stored = self._readers[param.stored]
        first = param.part[0] * param.numel
        return reader.read(stored, first + start, first + stop)


def _reader(raw: Any) -> Any:
    """Ranges straight from the file where its bytes lie in the open; else from the tensors that are mapped."""
    if isinstance(raw, SafetensorsRaw):
        return FileReader(raw.path, {name: (s.offset or 0, s.dtype) for name, s in raw.specs.items()})
    return TensorReader(raw)


class _Piece(NamedTuple):
    name: str
    start: int
    stop: int


class _Pass:
    """All models side by side. Each model's difference is taken from its own centre, a model near it, and the centres'
    from the first of them: so what float32 products lose is small against the distances inside every family."""

    def __init__(self, members: list[_Member], centres: NDArray, device: torch.device, blocks: Mapping[str, str]):
        self._members, self._centre, self._device, self._block = members, centres, device, blocks
        specs = members[0].specs
        self._sizes = {name: specs[name].numel for name in sorted(blocks, key=list(specs).index)}
        total = sum(self._sizes.values()) * len(members)
        wide = total <= _WIDE or any(m.specs[n].dtype == torch.float64 for m in members for n in blocks)
        self._dtype = torch.float64 if wide else torch.float32

    def table(self, blocks: Sequence[str], workers: int, progress: Progress | None) -> NDArray[np.float64]:
        """(blocks, n, n) float64."""
        n = len(self._members)
        sums = {block: np.zeros((n, n)) for block in blocks}
        tasks = list(self._tasks())
        parallel: Any = Parallel(min(workers, len(tasks)), backend="threading", return_as="generator")
        found = parallel(delayed(self._products)(task) for task in tasks)
        for i, (task, products) in enumerate(zip(tasks, found, strict=True), 1):
            for block, product in products.items():
                sums[block] += product
            if progress:
                progress(i, len(tasks), task[-1].name)
        back = np.eye(n)
        others = np.flatnonzero(self._centre != np.arange(n))
        back[others, self._centre[others]] = 1
        return np.stack([back @ sums[block] @ back.T for block in blocks])

    def _tasks(self) -> Iterator[list[_Piece]]:
        """Pieces in the order of the first model's bytes, in lists of about _TASK entries."""
        step = max(1 << 10, min(1 << 16, _STACK // len(self._members)))
        task, held = list[_Piece](), 0
        for name, size in self._sizes.items():
            for start in range(0, size, step):
                task.append(_Piece(name, start, min(start + step, size)))
                held += step
                if held >= _TASK:
                    yield task
                    task, held = [], 0
        if task:
            yield task

    def _products(self, task: Sequence[_Piece]) -> dict[str, NDArray[np.float64]]:
        """Block -> (n, n) float64, the products of one task's pieces."""
        n = len(self._members)
        sums: dict[str, Tensor] = {}
        stack = torch.empty(n, max(p.stop - p.start for p in task), dtype=self._dtype, device=self._device)
        with torch.inference_mode():
            for piece in task:
                rows = stack[:, : piece.stop - piece.start]
                for row, member in zip(rows, self._members, strict=True):
                    row.copy_(member.read(*piece))
                product = self._product(rows).double()
                block = self._block[piece.name]
                sums[block] = sums[block] + product if block in sums else product
        return {block: product.cpu().numpy() for block, product in sums.items()}

    def _product(self, rows: Tensor) -> Tensor:
        """(n, n) products of the differences of `rows` (n, p), which are overwritten."""
        own, which = np.unique(self._centre, return_inverse=True)
        centres = rows[own].clone()
        for row, c in zip(rows, which, strict=True):
            row -= centres[c]
        for i, centre in zip(own, centres, strict=True):
            torch.sub(centre, centres[0], out=rows[i])
        product = rows @ rows.mT
        if bool(torch.isfinite(product).all()):
            return product
        rows = tame(rows)
        return rows @ rows.mT


def _centers(prints: Mapping[str, Fingerprint]) -> NDArray[np.int64]:
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
