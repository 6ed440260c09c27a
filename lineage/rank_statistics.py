"""Rank figures of matrices (bases X down, models Y across; nan is left out) and inference over worlds. numpy, scipy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import asin, pi, sin, sqrt

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Array = NDArray[np.float64]
FEWEST = 3  # sources that a column needs to have an order worth the name
RESAMPLES, SEED = 10_000, 0


def spearman(x: Array, y: Array) -> float:
    """Spearman's rho of two vectors; nan where `x` is constant, 0 where only `y` is."""
    return _pearson(stats.rankdata(x), stats.rankdata(y))


def _pearson(x: Array, y: Array) -> float:
    a, b = (v - v.mean() for v in (x, y))
    if not np.any(a):
        return float("nan")
    return float(a @ b / sqrt((a @ a) * (b @ b))) if np.any(b) else 0.0


def known(measured: Array, predicted: Array, mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Where both are known and the mask allows it."""
    return mask & np.isfinite(measured) & np.isfinite(predicted)


def column_tau(measured: Array, predicted: Array, mask: NDArray[np.bool_]) -> float:
    """Mean over columns of Kendall's tau-b over rows: does the prediction rank the bases of each model? A column that
    the prediction leaves constant counts 0; columns whose measured values are, or with too few rows, do not count."""
    rows = known(measured, predicted, mask)
    pairs = rows[:, None] & rows
    dx, dy = (np.where(pairs, np.sign(v[:, None] - v), 0) for v in (measured, predicted))
    ordered, said = (np.abs(d).sum((0, 1)) for d in (dx, dy))
    agree = (dx * dy).sum((0, 1)) / np.sqrt(np.maximum(ordered * said, 1))
    return _mean(agree[(rows.sum(0) >= FEWEST) & (ordered > 0)])


def _columns(mask: NDArray[np.bool_]) -> list[tuple[int, NDArray[np.bool_]]]:
    return [(y, mask[:, y]) for y in range(mask.shape[1]) if mask[:, y].sum() >= FEWEST]


def _mean(values: Sequence[float] | Array) -> float:
    return float(np.mean(values)) if len(values) else float("nan")


def additive_residual(values: Array, mask: NDArray[np.bool_]) -> Array:
    """What row means and column means leave of the entries in `mask` (vector, row by row): least squares, so that a
    missing diagonal does no harm; rounded."""
    seen = values[mask]
    return rounded(seen - additive_fit(values, mask)[mask], float(np.ptp(seen)))


def rounded(values: Array, spread: float) -> Array:
    """To ten digits of the spread: what is equal must tie, what is nothing be 0."""
    return np.round(values / (spread or 1.0), 10) * (spread or 1.0)


def additive_fit(values: Array, mask: NDArray[np.bool_]) -> Array:
    """Row effect + column effect fitted to the entries in `mask`, for every entry; nan for rows and columns unseen."""
    x, y = np.nonzero(mask)
    rows, columns = mask.shape
    design = np.hstack([np.eye(rows)[x], np.eye(columns)[y]])
    effects = np.linalg.lstsq(design, values[mask], rcond=None)[0]
    fitted = np.add.outer(effects[:rows], effects[rows:])
    fitted[~mask.any(1)] = np.nan
    fitted[:, ~mask.any(0)] = np.nan
    return fitted


def centred_spearman(measured: Array, predicted: Array, masks: Sequence[NDArray[np.bool_]]) -> float:
    """Spearman of what row and column means leave, fitted within each mask (one per root), all entries together."""
    kept = [m for m in (known(measured, predicted, mask) for mask in masks) if m.any()]
    if not kept:
        return float("nan")
    a, b = (np.concatenate([additive_residual(v, m) for m in kept]) for v in (measured, predicted))
    return spearman(a, b)


def regret(measured: Array, predicted: Array, mask: NDArray[np.bool_]) -> float:
    """Mean over columns of the best row's value less the recommended row's; ties share. nan without a column."""
    lost = []
    for y, rows in _columns(known(measured, predicted, mask)):
        got, said = measured[rows, y], predicted[rows, y]
        lost.append(got.max() - got[said == said.max()].mean())
    return _mean(lost)


def pooled_spearman(measured: Array, predicted: Array, mask: NDArray[np.bool_]) -> float:
    """Spearman over all entries at once: dominated by differences between columns and between roots."""
    both = known(measured, predicted, mask)
    return spearman(measured[both], predicted[both]) if both.sum() >= FEWEST else float("nan")


def partial_correlation(measured: Array, predicted: Array, beyond: Array, mask: NDArray[np.bool_]) -> float:
    """Partial rank correlation of measured and predicted given `beyond`; ranks within columns, pooled."""
    mask = known(measured, predicted, mask) & np.isfinite(beyond)
    ranked = [[stats.rankdata(v[rows, y]) for v in (measured, predicted, beyond)] for y, rows in _columns(mask)]
    if not ranked:
        return float("nan")
    m, p, s = (np.concatenate([r[i] - r[i].mean() for r in ranked]) for i in range(3))
    mp, ms, ps = _pearson(m, p), _pearson(m, s), _pearson(s, p)
    rest = (1 - ms**2) * (1 - ps**2)
    return (mp - ms * ps) / sqrt(rest) if rest > 1e-12 else float("nan")


def stepped_up(reliability: float) -> float:
    """Correlation of a mean with the truth behind it from that of its two halves: Spearman-Brown, then the root. Holds
    for (rank) correlations of means of parallel measurements, not for tau. 0 where the halves do not agree."""
    return sqrt(2 * reliability / (1 + reliability)) if reliability > 0 else 0.0


def stepped_up_tau(tau: float) -> float:
    """The same for tau, through Greiner's relation r = sin(pi tau / 2) of a bivariate normal."""
    return 2 / pi * asin(stepped_up(sin(pi / 2 * tau)))


def interval(values: Sequence[float], level: float = 0.95) -> tuple[float | None, float | None]:
    """Bootstrap interval of the mean over worlds; None below three. Percentiles widened for few worlds as t quantiles
    are (Hesterberg 2015, expanded percentile interval): plain ones miss one time in ten at ten worlds."""
    n = len(values)
    if n < FEWEST:
        return None, None
    tail = stats.norm.cdf(-sqrt(n / (n - 1)) * stats.t.ppf(0.5 + level / 2, n - 1))
    drawn = np.random.default_rng(SEED).integers(n, size=(RESAMPLES, n))
    low, high = np.quantile(np.asarray(values)[drawn].mean(1), [tail, 1 - tail])
    return float(low), float(high)


def mean_p(values: Sequence[float]) -> float | None:
    """Two-sided p of a mean of 0 over worlds (Student); None below three. Sign flips where all worlds are equal."""
    n = len(values)
    if n < FEWEST:
        return None
    if np.ptp(values) <= 1e-12 * np.abs(values).max():
        return 1.0 if not np.any(values) else 2.0 ** (1 - n)
    t = np.mean(values) / (np.std(values, ddof=1) / sqrt(n))
    return float(2 * stats.t.sf(abs(t), n - 1))


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """Adjusted p values (Holm 1979) of those that are known."""
    order = sorted((p, i) for i, p in enumerate(ps) if p is not None)
    adjusted: list[float | None] = [None] * len(ps)
    reached = 0.0
    for k, (p, i) in enumerate(order):
        reached = max(reached, min(1.0, (len(order) - k) * p))
        adjusted[i] = reached
    return adjusted


def share_upper(hits: int, trials: int, level: float = 0.95) -> float:
    """Upper Clopper-Pearson bound of a share."""
    return float(stats.beta.ppf(level, hits + 1, trials - hits)) if hits < trials else 1.0


def world_means(pairs: Iterable[tuple[str, float]]) -> dict[str, float]:
    """World -> mean of its values, those that are nan left out; sorted by name."""
    found: dict[str, list[float]] = {}
    for world, value in pairs:
        if np.isfinite(value):
            found.setdefault(world, []).append(value)
    return {w: float(np.mean(found[w])) for w in sorted(found)}
