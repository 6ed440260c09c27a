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
