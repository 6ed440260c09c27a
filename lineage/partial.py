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
    n = len(pool)
    around = table - table[:, child][:, None] - table[:, :, child][:, :, None] + table[:, child, child][:, None, None]
    inner = around[:, pool][:, :, pool]  # <P_i - X, P_j - X>
    square = np.einsum("bii->bi", inner)
    first, second = np.triu_indices(n, 1)
    aa, bb, ab = square[:, first], square[:, second], inner[:, first, second]
    length = np.maximum(aa + bb - 2 * ab, 0)  # ||B - A||^2
    toward = aa - ab  # <X - A, B - A>
    tiny = 1e-12 * np.maximum(length.sum(0), 1e-300)
    there = length > tiny
    own = np.divide(toward, length, out=np.full_like(length, np.nan), where=there)
    whole = toward.sum(0) / np.maximum(length.sum(0), 1e-300)
    chosen = np.where(np.isnan(own), 0, own) if by_block else np.broadcast_to(whole, own.shape)
    residual = np.maximum(aa - 2 * chosen * toward + chosen**2 * length, 0).sum(0)
    nearest = np.minimum(aa.sum(0), bb.sum(0))
    safe = np.where(np.isnan(own), whole, own)
    unequal = (length * (safe - whole) ** 2).sum(0)
    path = np.divide(ab**2, length, out=np.zeros_like(length), where=there).sum(0)  # <A - X, B - X> is 0 on a path
    found = [
        Mixture(
            child,
            pool[first[k]],
            pool[second[k]],
            float(whole[k]),
            tuple(map(float, own[:, k])),
            float(residual[k]),
            float(1 - residual[k] / max(nearest[k], 1e-300)),
            float(path[k] / max(unequal[k], 1e-300)),
        )
        for k in np.argsort(residual, kind="stable")[:64]
    ]
    return found


def block_weighted(
    table: Array, own: float, child: int, pool: Sequence[int], chosen: Thresholds = CHOSEN
) -> Mixture | None:
    """The pair of which the child is an exact mixture with a weight from 0 to 1 for each block, if there is one and no
    single weight would do. own: the child's rounding energy."""
    for m in mixtures(table, child, pool, by_block=True):
        if m.residual > 3 * chosen.merge_ratio * own:
            return None
        known = np.array([w for w in m.weights if not np.isnan(w)])
        convex = len(known) > 1 and known.min() > -chosen.merge_weight and known.max() < 1 + chosen.merge_weight
        both = 2 * chosen.merge_weight < m.weight < 1 - 2 * chosen.merge_weight
        if convex and both and m.gain > chosen.exact_gain and np.ptp(known) > chosen.merge_weight:
            return m
    return None


def partial(table: Array, child: int, pool: Sequence[int], chosen: Thresholds = CHOSEN) -> Mixture | None:
    """The pair between which the child lies as a merge does (one weight in all blocks) and as no model on a path from
    one to the other does; the one that explains most."""
    fit = [
        m
        for m in mixtures(table, child, pool, by_block=False)
        if chosen.partial < m.weight < 1 - chosen.partial and m.gain > chosen.partial_gain and m.steady > chosen.steady
    ]
    return max(fit, key=lambda m: (m.gain, -m.a, -m.b), default=None)


def spherical(models: Sequence[Mapping[str, Tensor]], names: Sequence[str]) -> float:
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


def unchanged(models: Sequence[Mapping[str, Tensor]], names: Sequence[str]) -> tuple[float, float]:
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
