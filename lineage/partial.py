"""Merges that are no exact affine combination of the files at hand: weights that differ by block, arithmetic that is
not linear, or a parent that is in no file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lineage.thresholds import CHOSEN, Thresholds

Array = NDArray[np.float64]
Models = Sequence[Mapping[str, Tensor]]
CLEAR = 32.0  # roundings that a change is larger than, for its share in a child to be told
FEWEST = 100  # such changes in a tensor
ALIKE = 0.05  # logarithm of the weights of two tensors of one merge
WHOLE = 1e-4  # of a change, that arithmetic may leave of it when it is held whole
HIDDEN = 0.25  # of CLEAR, by which an entry must differ from what the other parent would have left
BINS = 231  # of ratios from 0.1 to 10, 2 % wide
NEIGHBOURS = 2.0  # times which a bin must exceed those beside it
SMALL = 0.8  # of the usual change, below which what was dropped was chosen for being small


@dataclass(frozen=True)
class Mixture:
    """child = (1 - w) a + w b + something else. weights: w by block, NaN where a and b are equal. residual: squared
    norm of the something else. gain: 1 - residual / squared distance to the nearer of both. steady: how much better one
    w for all blocks explains the child than its lying on a path from a to b does, a ratio of squared misfits."""

    child: int
    a: int
    b: int
    weight: float
    weights: tuple[float, ...]
    residual: float
    gain: float
    steady: float


def mixtures(table: Array, child: int, pool: Sequence[int], by_block: bool) -> list[Mixture]:
    """The child as a mixture of every pair of the pool; the smallest residual first.

    table: (blocks, n, n) inner products. by_block: a weight for each block, else one for all."""
    pool = sorted(pool)
    first, second = np.triu_indices(len(pool), 1)
    own = table[:, child, pool]
    inner = table[:, np.array(pool)[:, None], pool] - own[:, None] - own[:, :, None]  # <P_i - X, P_j - X>
    inner += table[:, child, child][:, None, None]
    square = np.einsum("bii->bi", inner)
    aa, ab = square[:, first], inner[:, first, second]
    length = np.maximum(aa + square[:, second] - 2 * ab, 0)  # ||B - A||^2
    toward = aa - ab  # <X - A, B - A>
    there = length > 1e-12 * np.maximum(length.sum(0), 1e-300)
    whole = toward.sum(0) / np.maximum(length.sum(0), 1e-300)
    own = np.divide(toward, length, out=np.full_like(length, np.nan), where=there)
    weight = np.where(there, own, whole) if by_block else np.broadcast_to(whole, own.shape)
    residual = np.maximum(aa - 2 * weight * toward + weight**2 * length, 0).sum(0)
    gain = 1 - residual / np.maximum(np.minimum(aa.sum(0), square[:, second].sum(0)), 1e-300)
    unequal = (length * (np.where(there, own, whole) - whole) ** 2).sum(0)
    path = np.divide(ab**2, length, out=np.zeros_like(length), where=there).sum(0)  # <A - X, B - X> is 0 on a path
    steady = path / np.maximum(unequal, 1e-300)
    numbers = np.stack([whole, residual, gain, steady], 1)
    return [
        Mixture(child, pool[first[k]], pool[second[k]], w, tuple(map(float, own[:, k])), r, g, s)
        for k in np.argsort(residual, kind="stable")[:64]
        for w, r, g, s in [map(float, numbers[k])]
    ]


def block_weighted(m: Mixture, weights: Sequence[float], chosen: Thresholds = CHOSEN) -> bool:
    """Whether an exact mixture with these weights for its parts is one by intention: all from 0 to 1, both parents in
    it, and no single weight would do."""
    convex = len(weights) > 1 and min(weights) > -chosen.merge_weight and max(weights) < 1 + chosen.merge_weight
    both = 2 * chosen.merge_weight < m.weight < 1 - 2 * chosen.merge_weight
    return convex and both and np.ptp(weights) > chosen.merge_weight


def partial(table: Array, child: int, pool: Sequence[int], chosen: Thresholds = CHOSEN) -> Mixture | None:
    """The pair between which the child lies as a merge does (one weight in all blocks) and as no model on a path from
    one to the other does; the one that explains most."""
    fit = [
        m
        for m in mixtures(table, child, pool, by_block=False)
        if chosen.partial < m.weight < 1 - chosen.partial and m.gain > chosen.partial_gain and m.steady > chosen.steady
    ]
    return max(fit, key=lambda m: (m.gain, -m.a, -m.b), default=None)


def tensor_table(models: Models, names: Sequence[str]) -> Array:
    """(tensors, n, n) inner products in float64 of differences to the second model."""
    table = np.zeros((len(names), len(models), len(models)))
    for i, name in enumerate(names):
        origin = models[1][name].double().flatten()
        moved = torch.stack([m[name].double().flatten() - origin for m in models])
        table[i] = (moved @ moved.T).numpy()
    return table


def tensor_weights(models: Models, names: Sequence[str]) -> tuple[dict[str, float], float]:
    """(weight of models[2] in models[0] = (1 - w) models[1] + w models[2] by tensor, NaN where both are equal; squared
    residual)."""
    table = tensor_table(models, names)
    toward, length = table[:, 0, 2], table[:, 2, 2]
    weight = np.divide(toward, length, out=np.full_like(length, np.nan), where=length > 0)
    residual = table[:, 0, 0] - np.where(length > 0, weight * toward, 0)
    return dict(zip(names, map(float, weight), strict=True)), float(np.maximum(residual, 0).sum())


@dataclass(frozen=True)
class Kept:
    """share: of the entries that hold a parent's change whole, of the parent that has fewer; weights: at which, of each
    parent; random: whether what was dropped is as large as the rest, as in DARE, and not the smallest, as in TIES."""

    share: float
    weights: tuple[float, float]
    random: bool


def kept_whole(slots: Sequence[Sequence[Tensor]]) -> Kept | None:
    """Entries at which x holds, at one weight per tensor, the whole change of a or of b from the base, and of the other
    one's nothing. None where changes are too small to tell. slots: of each tensor x, base, a, b and the rounding steps
    of x, all of one shape."""
    found, dropped, usual = [], [], []
    for own, start, one, other, step in slots:
        moved, changes = own - start, (one - start, other - start)
        seen = [change.abs() > CLEAR * step for change in changes]
        if min(int(s.sum()) for s in seen) < FEWEST:
            continue
        spikes = [_spike(moved[s] / c[s]) for s, c in zip(seen, changes, strict=True)]
        alone = [
            s & ((moved - w * c).abs() < step + WHOLE * c.abs()) & ((moved - w2 * c2).abs() > 2 * CLEAR * HIDDEN * step)
            for s, c, (_, w), c2, (_, w2) in zip(seen, changes, spikes, changes[::-1], spikes[::-1], strict=True)
        ]
        held = [min(spike, int(k.sum()) / int(s.sum())) for (spike, _), k, s in zip(spikes, alone, seen, strict=True)]
        found.append((min(held), spikes[0][1], spikes[1][1], min(int(s.sum()) for s in seen)))
        gone = (moved.abs() <= step) & (seen[0] | seen[1])
        dropped.append((changes[0].abs() + changes[1].abs())[gone])
        usual.append((changes[0].abs() + changes[1].abs())[seen[0] | seen[1]])
    if len(found) < 3:
        return None
    rows = np.array(found)
    alike = np.abs(np.log(rows[:, 1:3] / np.median(rows[:, 1:3], 0))).max(1) < ALIKE
    rows[~alike, 0] = 0
    gone = torch.cat(dropped)
    random = bool(len(gone)) and float(gone.mean()) > SMALL * float(torch.cat(usual).mean())
    share = float(np.average(rows[:, 0], weights=rows[:, 3]))
    return Kept(share, (float(np.median(rows[:, 1])), float(np.median(rows[:, 2]))), random)


def _spike(ratio: Tensor) -> tuple[float, float]:
    """(share of the ratios that lie in the fullest bin beyond what its neighbours hold, that bin's ratio)."""
    low, high = -float(np.log(10)), float(np.log(10))
    counts = torch.histc(ratio[(ratio > 0.1) & (ratio < 10)].log(), BINS, low, high)
    beyond = counts - (torch.nn.functional.avg_pool1d(counts[None, None], 9, 1, 4)[0, 0] * 9 - counts) / 8 * NEIGHBOURS
    top = int(beyond.argmax())
    edges = np.exp(low + (top + np.arange(2)) * (high - low) / BINS)
    inside = ratio[(ratio >= edges[0]) & (ratio <= edges[1])]
    return float(beyond[top]) / len(ratio), float(inside.median()) if len(inside) else 1.0


def spherical(models: Models, names: Sequence[str]) -> float:
    """Squared residual of child (models[0]) as any linear combination, tensor by tensor, of models[1] and models[2]:
    what spherical interpolation is, whose coefficients do not sum to 1."""
    total = 0.0
    for name in names:
        x, a, b = (m[name].double().flatten() for m in models)
        basis = torch.stack([a, b - a])
        normal, right = basis @ basis.T, basis @ x
        weights = torch.linalg.lstsq(normal, right).solution
        total += float((x - weights @ basis).square().sum())
    return total


def unchanged(models: Models, names: Sequence[str]) -> tuple[float, float]:
    """Of the entries in which a and b (models[1], models[2]) both differ from their base (models[3]): the share in
    which the child (models[0]) does not, up to rounding, and how far a and b are from the base there, relative to
    all."""
    kept = moved = 0
    kept_size = moved_size = 0.0
    for name in names:
        x, a, b, base = (m[name].float().flatten() for m in models)
        size = (a - base).abs() + (b - base).abs()
        both = ((a - base).abs() > 0.1 * size) & ((b - base).abs() > 0.1 * size)
        same = both & ((x - base).abs() < 1e-3 * size)
        moved, kept = moved + int(both.sum()), kept + int(same.sum())
        moved_size, kept_size = moved_size + float(size[both].sum()), kept_size + float(size[same].sum())
    return (kept / moved, kept_size / kept / (moved_size / moved)) if kept else (0.0, 1.0)
