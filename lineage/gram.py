"""Gram: inner products of the differences of all models of a group, per block. It answers everything about distances,
delta directions and mixtures without touching a file again.

G[i, j] = <W_i - W_ref, W_j - W_ref> over the weights that all models share. Two producers, one type: an exact pass
through the files (lineage.exact), or the models' sketches.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from lineage.errors import LineageError
from lineage.fingerprint import Fingerprint, TensorPrint
from lineage.sketch import fold

Floats = NDArray[np.float64]
WHOLE = "all"  # the one block of a table that is not split
MOST_SPLIT = 1000  # models of a table that is split into blocks
SCREEN = 256  # slots of a block that tell kin from strangers
_CERTAIN = 1.959964  # standard deviations of a 95 % interval


@dataclass(frozen=True)
class Affine:
    """A model as a mixture of others, coefficients summing to 1. weights, low, high (95 %): (k,), by parent.

    residual: ||X - sum w P||^2. floor: what rounding alone predicts of it: of the child, and where `lost`, also of the
    parents. lost: the residual says that the mixture was made of the parents before they were rounded; then the
    attenuation that their rounding causes is taken out of the weights. condition: of the parents' differences."""

    weights: Floats
    low: Floats
    high: Floats
    residual: float
    floor: float
    lost: bool
    condition: float

    @property
    def residual_ratio(self) -> float:
        """residual / floor; infinite where nothing was rounded and something is left."""
        return self.residual / self.floor if self.floor > 0 else math.inf if self.residual > 0 else 0.0


@dataclass(frozen=True)
class Gram:
    """table: (blocks, n, n) float64, <W_i - W_ref, W_j - W_ref>; above `split` models one block.

    entries: (blocks,) shared weights. norms: (n, blocks) ||W_i||. rounding: (n, blocks) sum of ulp^2 / 12 as stored.
    left_out: canonical name -> why it is not compared. slots: (blocks,) of the sketches, 0 where exact."""

    names: tuple[str, ...]
    blocks: tuple[str, ...]
    table: NDArray
    entries: NDArray[np.int64]
    norms: Floats
    rounding: Floats
    exact: bool
    left_out: Mapping[str, str] = field(default_factory=dict)
    slots: NDArray[np.int64] | None = None

    @cached_property
    def total(self) -> NDArray:
        """(n, n): the sum over blocks."""
        return self.table[0] if len(self.blocks) == 1 else self.table.sum(0)

    def of(self, block: str | None) -> NDArray:
        """(n, n) of one block, or of all."""
        return self.total if block is None else self.table[self.blocks.index(block)]

    def distances(self, block: str | None = None) -> NDArray:
        """Squared distances ||W_i - W_j||^2, (n, n)."""
        g = self.of(block)
        squares = np.diag(g)
        out = np.maximum(squares[:, None] + squares - 2 * g, 0)
        np.fill_diagonal(out, 0)
        return out

    def relative(self, block: str | None = None) -> NDArray:
        """||W_i - W_j|| / sqrt(||W_i||^2 + ||W_j||^2), (n, n): about 1 for unrelated models; 1 % fine-tune: 0.007."""
        squares = (self.norms**2).sum(1) if block is None else self.norms[:, self.blocks.index(block)] ** 2
        scale = squares[:, None] + squares
        return np.sqrt(np.divide(self.distances(block), scale, out=np.zeros_like(scale), where=scale > 0))

    def cosines(self, base: str | int, block: str | None = None) -> NDArray:
        """Cosines of the models' differences from `base`, (n, n); 0 where a model equals it."""
        g, b = self.of(block), self.index(base)
        centred = g - g[:, b, None] - g[b] + g[b, b]
        lengths = np.sqrt(np.maximum(np.diag(centred), 0))
        scale = np.outer(lengths, lengths)
        return np.clip(np.divide(centred, scale, out=np.zeros_like(scale), where=scale > 0), -1, 1)

    def standard_error(self, block: str | None = None) -> NDArray:
        """Standard deviation of `distances` by the sketch's hash, (n, n); 0 where exact."""
        if self.slots is None:
            return np.zeros((len(self.names),) * 2)
        chosen = [self.blocks.index(block)] if block is not None else range(len(self.blocks))
        return np.sqrt(sum(2 / self.slots[b] * self.distances(self.blocks[b]) ** 2 for b in chosen))

    def index(self, name: str | int) -> int:
        """The row of a model."""
        return self.names.index(name) if isinstance(name, str) else name

    def affine(self, child: str | int, parents: Sequence[str | int], block: str | None = None) -> Affine:
        """`child` as a mixture of `parents`, coefficients summing to 1: least squares on differences, overall or in one
        block. LineageError without parents."""
        if not parents:
            raise LineageError("affine: name at least one parent.")
        rows = [self.index(p) for p in parents]
        x, b = self.index(child), None if block is None else self.blocks.index(block)
        noise = self.rounding.sum(1) if b is None else self.rounding[:, b]
        entries = int(self.entries.sum() if b is None else self.entries[b])
        return _affine(self.of(block).astype(np.float64), x, rows, noise, entries)

    def part(self, names: Sequence[str]) -> Gram:
        """The same table for some of the models, in the order given."""
        rows = [self.index(name) for name in names]
        table = self.table[:, rows][:, :, rows]
        more = {"norms": self.norms[rows], "rounding": self.rounding[rows], "names": tuple(names), "table": table}
        return Gram(**{**{k: getattr(self, k) for k in self.__dataclass_fields__}, **more})


def _affine(g: Floats, x: int, parents: list[int], noise: Floats, entries: int) -> Affine:
    """Least squares on differences from the first parent. What storing lost of a parent P_k appears in the normal
    equations as r_0 + r_k [k = l], and in their right-hand side as r_0 (Fuller 1987, errors in variables).

    The interval is chance (independent residuals) plus r_x / ||d||^2: where differences are a few ulp wide, the child's
    rounding follows them, and shifts coefficients by as much as that."""
    p0, rest = parents[0], parents[1:]
    a = _inner(g, rest, rest, p0)
    y = _inner(g, rest, [x], p0)[:, 0]
    square = _inner(g, [x], [x], p0)[0, 0]
    plain = _solve(a, y)
    w = _whole(plain)
    r = noise[parents]
    residual = max(0.0, square - 2 * plain @ y + plain @ a @ plain)
    stored, before = noise[x], noise[x] + float(w**2 @ r)
    lost = bool(residual > math.sqrt(stored * before))
    if lost:
        clean = a - r[0] - np.diag(r[1:])
        lost = bool(len(rest) and np.linalg.eigvalsh(clean)[0] > 0)
    if lost:
        a, y = a - r[0] - np.diag(r[1:]), y - r[0]
        w = _whole(_solve(a, y))
        before = noise[x] + float(w**2 @ r)
    floor = before if lost else stored
    inverse = _inverse_diagonal(a)
    chance = np.sqrt(inverse * max(residual, floor) / max(1, entries))
    spread = _CERTAIN * chance + inverse * noise[x]
    return Affine(w, w - spread, w + spread, residual, floor, lost, _condition(a))


def _inner(g: Floats, rows: Sequence[int], columns: Sequence[int], origin: int) -> Floats:
    """<W_r - W_o, W_c - W_o>."""
    return g[np.ix_(rows, columns)] - g[rows, origin][:, None] - g[origin, columns] + g[origin, origin]


def _whole(rest: Floats) -> Floats:
    return np.concatenate([[1 - rest.sum()], rest])


def _solve(a: Floats, y: Floats) -> Floats:
    """Least squares of smallest norm where the parents are dependent."""
    return np.asarray(np.linalg.lstsq(a, y, rcond=1e-12)[0], np.float64) if len(a) else np.zeros(0)


def _inverse_diagonal(a: Floats) -> Floats:
    """Variance of each coefficient per variance of an entry's residual; the first coefficient is 1 minus the rest."""
    if not len(a):
        return np.zeros(1)
    inverse = np.linalg.pinv(a, rcond=1e-12, hermitian=True)
    return np.maximum(0, np.concatenate([[inverse.sum()], np.diag(inverse)]))


def _condition(a: Floats) -> float:
    values = np.linalg.eigvalsh(a) if len(a) else np.ones(1)
    return float(values[-1] / values[0]) if values[0] > 0 else math.inf


@dataclass(frozen=True)
class Shared:
    """What all models of a group have with one shape: name -> its block; and what is left out, and why."""

    blocks: dict[str, str]
    left_out: dict[str, str]


def shared(prints: Mapping[str, Fingerprint]) -> Shared:
    """The weights that all of `prints` (name -> fingerprint) share. LineageError where there are none."""
    tensors = {name: {t.name: t for t in p.tensors if t.compared} for name, p in prints.items()}
    count = Counter((key, matrix_shape(t)) for own in tensors.values() for key, t in own.items())
    common = {key for (key, _), n in count.items() if n == len(prints)}
    first = next(iter(tensors.values()))
    blocks = {key: t.block for key, t in sorted(first.items()) if key in common}
    if not blocks:
        raise LineageError(f"{', '.join(prints)}: no weight is in all of these models with one shape.")
    every = sorted({key for key, _ in count} - common)
    return Shared(blocks, {key: _why(key, tensors) for key in every})


def matrix_shape(t: TensorPrint) -> tuple[int, int]:
    """(out, rest): layouts differ in whether a 1x1 kernel is a matrix."""
    return (t.shape[0] if t.shape else 1), t.entries


def _why(key: str, tensors: Mapping[str, Mapping[str, TensorPrint]]) -> str:
    lacking = sorted(name for name, own in tensors.items() if key not in own)
    if lacking:
        return "not in " + ", ".join(lacking[:5]) + (f" and {len(lacking) - 5} more" if len(lacking) > 5 else "")
    return "of different shapes: " + ", ".join(sorted({str(own[key].shape) for own in tensors.values()}))


def facts(
    prints: Mapping[str, Fingerprint], found: Shared
) -> tuple[tuple[str, ...], NDArray[np.int64], Floats, Floats]:
    """(blocks, entries, norms, rounding) of the shared weights, as in Gram."""
    blocks = tuple(sorted(set(found.blocks.values())))
    row = {block: i for i, block in enumerate(blocks)}
    entries = np.zeros(len(blocks), np.int64)
    norms, rounding = np.zeros((2, len(prints), len(blocks)))
    for i, own in enumerate(prints.values()):
        for t in own.tensors:
            if t.name in found.blocks:
                b = row[found.blocks[t.name]]
                entries[b] += t.entries if i == 0 else 0
                norms[i, b] += t.norm**2
                rounding[i, b] += t.rounding_energy
    return blocks, entries, np.sqrt(norms), rounding


@dataclass(frozen=True)
class _Alike:
    """What the sketches of models have in common, and facts about it, as in Gram."""

    blocks: tuple[str, ...]
    slots: NDArray[np.int64]
    entries: NDArray[np.int64]
    norms: Floats
    rounding: Floats
    left_out: Mapping[str, str]


def _alike(prints: Mapping[str, Fingerprint]) -> _Alike:
    """LineageError where nothing is left."""
    found = shared(prints)
    spoilt = {t.block: f"its block {t.block} holds {t.name}: {found.left_out[t.name]}" for p in prints.values()
              for t in p.tensors if t.name in found.left_out}  # fmt: skip
    left_out = {**found.left_out, **{k: spoilt[b] for k, b in found.blocks.items() if b in spoilt}}
    found = Shared({k: b for k, b in found.blocks.items() if b not in spoilt}, left_out)
    if not found.blocks:
        raise LineageError(f"{', '.join(prints)}: every block differs in its weights; compare the files exactly.")
    blocks, entries, norms, rounding = facts(prints, found)
    slots = np.array([min(_width(p, b) for p in prints.values()) for b in blocks])
    return _Alike(blocks, slots, entries, norms, rounding, found.left_out)


def sketch_gram(prints: Mapping[str, Fingerprint], split: int | None = None) -> Gram:
    """The table from sketches alone (name -> fingerprint; no file is touched). A block of which any model lacks a
    weight, or has it in another shape, is left out whole. LineageError where nothing is left.

    split: most models of a table that is split into blocks, by default MOST_SPLIT."""
    a, n = _alike(prints), len(prints)
    whole = n > (MOST_SPLIT if split is None else split)
    table = np.zeros((1 if whole else len(a.blocks), n, n))
    for i, (block, slots) in enumerate(zip(a.blocks, a.slots, strict=True)):
        table[0 if whole else i] += _products(prints, block, int(slots), np.float64)
    if not whole:
        return Gram(tuple(prints), a.blocks, table, a.entries, a.norms, a.rounding, False, a.left_out, a.slots)
    norms, rounding = np.linalg.norm(a.norms, axis=1, keepdims=True), a.rounding.sum(1, keepdims=True)
    entries, slots = np.array([a.entries.sum()]), np.array([a.slots.sum()])
    return Gram(tuple(prints), (WHOLE,), table, entries, norms, rounding, False, a.left_out, slots)


def screen(
    prints: Mapping[str, Fingerprint], only: Collection[str]
) -> tuple[Iterator[NDArray[np.float32]], Floats, NDArray[np.int64]]:
    """(squared distances (n, n) of one block after the other, norms (n, blocks), entries (blocks,)) of those of the
    blocks `only` that can be compared, from a few slots of each: enough to tell kin from strangers, 10 % off."""
    a = _alike(prints)
    rows = [i for i, block in enumerate(a.blocks) if block in only]
    distances = (_screened(prints, a.blocks[i], min(SCREEN, int(a.slots[i]))) for i in rows)
    return distances, a.norms[:, rows], a.entries[rows]


def _screened(prints: Mapping[str, Fingerprint], block: str, slots: int) -> NDArray[np.float32]:
    g = _products(prints, block, slots, np.float32)
    own = np.diag(g).copy()
    g *= -2
    g += own
    g += own[:, None]
    return g


def _width(p: Fingerprint, block: str) -> int:
    return next(stop - start for name, start, stop in p.slots if name == block)


def _products(prints: Mapping[str, Fingerprint], block: str, slots: int, dtype: type) -> NDArray:
    """(n, n) products of the differences of one block's sketches from the first model's."""
    rows = np.empty((len(prints), slots), dtype)
    for row, p in zip(rows, prints.values(), strict=True):
        start, stop = next((a, b) for name, a, b in p.slots if name == block)
        row[:] = fold(p.sketch[start:stop], slots)
    rows -= rows[0].copy()
    return rows @ rows.T
