"""An exact reading of a merge, taken from the files themselves: weights, their intervals, and what is left over."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from lineage import unmerge
from lineage.kin import Kin, Merged
from lineage.partial import tensor_table
from lineage.thresholds import Thresholds
from lineage.unmerge import Reading

Array = NDArray[np.float64]
SINGLE_PRECISION = 1e-7  # of a weight, and of their sum, that their float32 forms are off
DRAWS = 199  # bootstrap samples of blocks for a p-value
ENTRIES = 256  # of a tensor, whose residual is worth a look by itself


@dataclass(frozen=True)
class Refit:
    """A reading fitted anew in float64, and inner products (parts, k, k) of the child and its parents. rounding: the
    child's own, by part; None where files are not to be read again, and parts are blocks."""

    reading: Reading
    table: Array
    rounding: Array | None = None

    @property
    def residuals(self) -> Array:
        """(parts,) ||child - sum w parent||^2."""
        weights = np.array([1, *(-w for w in self.reading.weights)])
        return np.maximum(np.einsum("i,tij,j->t", weights, self.table, weights), 0)


def refit(kin: Kin, reading: Reading) -> Refit:
    """The reading, from whole tensors where they can be read."""
    members = [reading.child, *reading.parents]
    models = kin.held(members)
    if models is None:
        return Refit(reading, kin.table[np.ix_(range(len(kin.table)), members, members)])
    names = [*kin.matrices, *kin.vectors]
    table = tensor_table(models, names)
    weights, residual = unmerge.affine(table.sum(0), 0, np.arange(1, len(members))[None])
    once, chained = (reading.own * float(f[0]) for f in unmerge.floors(weights))
    floor = once if reading.floor <= 1.001 * once else chained
    again = replace(reading, weights=tuple(map(float, weights[0])), residual=float(residual[0]), floor=floor)
    prints = {t.name: t for t in kin.prints[reading.child].tensors}
    own = [prints[n].rounding_energy if prints[n].entries >= ENTRIES else np.nan for n in names]
    return Refit(again, table, np.array(own))


def from_rounding(fit: Refit, coarse: float, chosen: Thresholds) -> bool:
    """Whether what a reading leaves is spread over the tensors as rounding is. A parent in the stead of another leaves
    much where the two differ; `coarse` readings must leave what rounding to float16 does, or next to nothing."""
    if fit.rounding is None or np.isnan(fit.rounding).all():
        return True
    ratios = fit.residuals / fit.rounding
    usual, floor = np.nanmedian(ratios), fit.reading.floor / fit.reading.own
    within = coarse == 1 or usual <= chosen.single * floor or usual >= chosen.half_least * chosen.half
    return bool(within and np.nanmax(ratios) <= chosen.uneven * max(usual, floor))


def certified(kin: Kin, reading: Reading, coarse: float, seed: int, chosen: Thresholds) -> Merged:
    """The merge that a reading tells of, seen in the files: intervals of the weights by leaving out each part in turn,
    and a p-value by resampling parts; or, where what it leaves is no rounding, one with a parent that is not here."""
    fit = refit(kin, reading)
    if not from_rounding(fit, coarse, chosen):
        return Merged(fit.reading, (), None, "unknown", unseen=True, confidence=chosen.merges["unknown"])
    reading, table = fit.reading, fit.table
    sets, g = np.arange(1, len(reading.parents) + 1)[None], table.sum(0)
    drawn = [unmerge.affine(g - part, 0, sets)[0][0] for part in table] if len(table) > 1 else []
    left_out = np.array(drawn or [reading.weights])
    n = len(left_out)
    spread = np.sqrt((n - 1) / n * ((left_out - left_out.mean(0)) ** 2).sum(0))
    half = chosen.interval * np.maximum(spread, _analytic(kin, reading, g)) + SINGLE_PRECISION * _leverage(
        kin, reading, g
    )
    intervals = tuple((float(w - h), float(w + h)) for w, h in zip(reading.weights, half, strict=True))
    method = "weighted_sum" if reading.convex else "add_difference"
    return Merged(reading, intervals, _p_value(table, seed), method, confidence=chosen.merges[method])


def _analytic(kin: Kin, reading: Reading, inner: Array) -> Array:
    """Standard deviation of each weight if the residual is noise of equal variance in all entries."""
    g = unmerge.centred(inner, 1)[2:, 2:]
    covariance = max(reading.residual, reading.own) / kin.entries * np.linalg.pinv(g, hermitian=True)
    return np.sqrt(np.maximum([covariance.sum(), *np.diag(covariance)], 0))


def _leverage(kin: Kin, reading: Reading, inner: Array) -> Array:
    """How far weights go wrong for each unit that they are off: by itself, and by their sum, which makes the child
    longer or shorter, as a parent may be that was trained with weight decay."""
    g = unmerge.centred(inner, 1)[2:, 2:]
    first, *rest = kin.squares[list(reading.parents)]
    along = np.linalg.pinv(g, hermitian=True) @ ((rest - first - np.diag(g)) / 2)  # of <P_i - P_1, P_1>
    return 1 + np.abs([along.sum(), *along])


def _p_value(table: Array, seed: int) -> float:
    """Share of samples of blocks in which the set without its least needed parent explains the child as well.
    table: (blocks, k, k), the child first."""
    rng = np.random.default_rng(seed)
    parents = range(1, table.shape[1])
    fewer = np.array(list(combinations(parents, len(parents) - 1)), np.intp)
    as_well = 0
    for _ in range(DRAWS):
        weights = rng.multinomial(len(table), np.full(len(table), 1 / len(table))).astype(np.float64)
        g = np.tensordot(weights, table, 1)
        whole = unmerge.affine(g, 0, np.array([parents]))[1][0]
        as_well += int(unmerge.affine(g, 0, fewer)[1].min() <= 2 * whole)
    return (1 + as_well) / (1 + DRAWS)
