"""Which models are affine combinations of others: parents and coefficients, from inner products alone.

An affine dependency has no direction by itself: what is the child is decided by size, convexity, rounding noise, and
then by which reading leaves the shortest tree. Inner products are those of float64 differences to a kin model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from lineage.graph import spanning_tree
from lineage.thresholds import CHOSEN, Thresholds

Array = NDArray[np.float64]
CHUNK = 4096  # subsets solved in one batch
COARSE = 1.5  # ulp^2 / 8, the mean square error of a sum that lies on half steps, over ulp^2 / 12


@dataclass(frozen=True)
class Reading:
    """child = sum of weights x parents (weights sum to 1). residual: ||child - sum||^2; own: the rounding energy of the
    child's storage, sum ulp^2 / 12; floor: what its making leaves, see `floors`. Parents count as stored: a merge is
    made of files."""

    child: int
    parents: tuple[int, ...]
    weights: tuple[float, ...]
    residual: float
    own: float
    floor: float

    @property
    def ratio(self) -> float:
        """Residual over the rounding floor; about 1 where the reading is the truth."""
        return self.residual / self.floor if self.floor > 0 else (0.0 if self.residual <= 0 else np.inf)

    @property
    def convex(self) -> bool:
        return min(self.weights) >= 0

    @property
    def members(self) -> frozenset[int]:
        return frozenset((self.child, *self.parents))


def affine(g: Array, child: int, sets: NDArray[np.intp]) -> tuple[Array, Array]:
    """Least squares of a model on each of several parent sets, weights summing to 1.

    g: (n, n) inner products of differences to any one point. sets: (m, k) indices. (m, k) weights and (m,) squared
    residuals; linearly dependent sets have infinite residual."""
    first, rest = sets[:, :1], sets[:, 1:]
    corner = g[first, first]
    normal = g[rest[:, :, None], rest[:, None, :]] - g[rest, first][:, :, None] - g[rest, first][:, None, :]
    normal = normal + corner[:, :, None]
    right = g[child, rest] - g[child, first] - g[rest, first] + corner
    distance = g[child, child] - 2 * g[child, first[:, 0]] + corner[:, 0]
    scale = np.sqrt(np.maximum(np.einsum("mii->mi", normal), 1e-300))
    unit = normal / scale[:, :, None] / scale[:, None, :]
    dependent = np.linalg.eigvalsh(unit)[:, 0] < 1e-9 if rest.shape[1] else np.zeros(len(sets), bool)
    unit[dependent] = np.eye(rest.shape[1])
    solved = np.linalg.solve(unit, (right / scale)[..., None])[..., 0] / scale
    weights = np.concatenate([1 - solved.sum(1, keepdims=True), solved], 1)
    residual = np.maximum(distance - (solved * right).sum(1), 0)
    return weights, np.where(dependent, np.inf, residual)


def subsets(pool: Sequence[int], size: int) -> NDArray[np.intp]:
    """All subsets (m, size) of a pool, in sorted order."""
    return np.array(list(combinations(sorted(pool), size)), np.intp).reshape(-1, size)


def candidates(g: Array, child: int, pool: Sequence[int], limit: int) -> list[int]:
    """At most `limit` of the pool that can be parents: those of the convex fit, those that a backward elimination of
    the full fit keeps longest, and the nearest."""
    if len(pool) <= limit:
        return sorted(pool)
    near = _nearest(g, child, pool)
    kept = [*_convex_support(g, child, near)[: limit // 2], *_eliminate(g, child, near, limit // 2)]
    return sorted(list(dict.fromkeys([*kept, *near]))[:limit])


def distances(g: Array) -> Array:
    """(n, n) squared distances from inner products."""
    own = np.diag(g)
    return np.maximum(own[:, None] + own[None] - 2 * g, 0)


def from_one(g: Array, one: int, others: Sequence[int]) -> Array:
    """(m,) squared distances of `others` from one model."""
    rows = np.asarray(others, np.intp)
    return np.maximum(g[rows, rows] + g[one, one] - 2 * g[one, rows], 0)


def around(g: Array, at: int, members: Sequence[int]) -> Array:
    """(m, m) inner products of the differences of `members` to model `at`."""
    own = g[at, members]
    return g[np.ix_(members, members)] - own[None] - own[:, None] + g[at, at]


def centred(g: Array, at: int) -> Array:
    """Inner products of differences to model `at`."""
    return g - g[at][None] - g[:, at][:, None] + g[at, at]


def _convex_support(g: Array, child: int, pool: list[int]) -> list[int]:
    """Members with positive weight in the nearest convex combination, largest first."""
    values, vectors = np.linalg.eigh(around(g, child, pool))
    root = (vectors * np.sqrt(np.maximum(values, 0))).T
    heavy = 1e3 * np.sqrt(max(values[-1], 1e-300))
    rows = np.vstack([root, np.full(len(pool), heavy)])
    try:
        weights = nnls(rows, np.append(np.zeros(len(pool)), heavy))[0]
    except RuntimeError:  # no convergence within its iterations
        return []
    return [pool[i] for i in np.argsort(-weights, kind="stable") if weights[i] > 1e-6]


def _eliminate(g: Array, child: int, pool: list[int], keep: int) -> list[int]:
    """What is left of the pool when the member that matters least is dropped again and again."""
    left, inner = list(range(len(pool))), around(g, child, pool)
    ridge = 1e-12 * np.trace(inner) / max(1, len(inner))
    while len(left) > keep:
        inverse = np.linalg.inv(inner[np.ix_(left, left)] + ridge * np.eye(len(left)))
        weights = inverse.sum(1)
        left.pop(int(np.argmin(weights**2 / np.diag(inverse))))
    return [pool[i] for i in left]


def full_residual(g: Array, child: int, pool: Sequence[int]) -> float:
    """Squared distance of the child to the affine hull of the pool."""
    first, *rest = pool
    inner = around(g, first, [child, *rest])
    if not rest:
        return float(inner[0, 0])
    scale = np.sqrt(np.maximum(np.diag(inner)[1:], 1e-300))
    normal = inner[1:, 1:] / scale[:, None] / scale
    right = inner[1:, 0] / scale
    weights = np.linalg.lstsq(normal, right, rcond=1e-13)[0]
    return max(0.0, float(inner[0, 0] - 2 * weights @ right + weights @ normal @ weights))


def readings(
    g: Array, own: float, entries: int, child: int, pool: Sequence[int], chosen: Thresholds = CHOSEN
) -> list[Reading]:
    """Every plausible exact reading of a model as a merge of 2 to 5 of the pool; the fewest parents first.

    g: (n, n); own: the child's rounding energy, sum ulp^2 / 12; entries: compared per model."""
    near = candidates(g, child, pool, chosen.merge_pool)
    found: list[Reading] = []
    for size in range(2, min(chosen.merge_parents, len(near)) + 1):
        sets = subsets(near, size)
        for part in np.array_split(sets, max(1, len(sets) // CHUNK)):
            found += _exact(g, own, child, part, chosen)
    return [r for r in found if _needed(g, r, entries, chosen)]


def _exact(g: Array, own: float, child: int, sets: NDArray[np.intp], chosen: Thresholds) -> Iterator[Reading]:
    weights, residual = affine(g, child, sets)
    once, chained = floors(weights)
    floor = own * np.where(residual <= chosen.merge_ratio * own * once, once, chained)
    good = (residual <= chosen.merge_ratio * floor) & (np.abs(weights).min(1) >= chosen.merge_weight)
    for i in np.flatnonzero(good):
        if plausible(weights[i]):
            parents, shares = tuple(map(int, sets[i])), tuple(map(float, weights[i]))
            yield Reading(child, parents, shares, float(residual[i]), own, float(floor[i]))


def floors(weights: Array) -> tuple[Array, Array]:
    """Energy that rounding leaves in merges with these weights (m, k), over that of storing the child, (m,): made at
    once, 3/2 + sum w^2, as half precision rounds every product too and its sums lie on half steps, where the mean
    square of an error is ulp^2 / 8; and made in k - 1 steps, each of which is stored and then weighed by the next."""
    squares = (weights**2).sum(1)
    sums = np.cumsum(-np.sort(-weights, 1), 1)  # of convex ones; the heaviest come first: at most that much is left
    steps = (COARSE * sums[:, 1:] ** 2 + sums[:, :-1] ** 2).sum(1) + squares - weights.max(1) ** 2
    k = weights.shape[1]
    added = COARSE * (k - 1 if k > 3 else 1) + squares  # a + w (b - c) is one step
    return COARSE + squares, np.where(weights.min(1) >= 0, steps, added)


def plausible(weights: Array, tolerance: float = 0.02) -> bool:
    """Convex; or an add-difference: one parent whole, and at most as much of another as is taken off the third; or
    several, each adding at most the whole of what one parent differs by from the same base."""
    w = np.sort(weights)
    one = len(w) == 3 and w[0] >= -1 and w[1] > 0 and abs(w[2] - 1) < tolerance
    return bool(w[0] >= 0 or one or (len(w) > 3 and w[1] > 0 and w[-1] < 1 + tolerance))


def crowd(
    g: Array, own: float, entries: int, child: int, pool: Sequence[int], chosen: Thresholds = CHOSEN
) -> Reading | None:
    """An exact reading as a merge of many parents: what is left when the member that matters least is dropped again and
    again. pool: no merges of the same parents, which would be left in their stead."""
    near = _nearest(g, child, pool)
    for size in range(3, min(chosen.merge_crowd, len(near)) + 1):
        kept = np.array([sorted(_eliminate(g, child, near, size))], np.intp)
        for reading in _exact(g, own, child, kept, chosen):
            if _needed(g, reading, entries, chosen):
                return reading
    return None


def _nearest(g: Array, child: int, pool: Sequence[int], count: int = 64) -> list[int]:
    pool = sorted(pool)
    return [pool[i] for i in np.argsort(from_one(g, child, pool), kind="stable")[:count]]


def _needed(g: Array, reading: Reading, entries: int, chosen: Thresholds) -> bool:
    """Whether the fit without any one of the parents is worse than chance and a little more."""
    sets = np.array(list(combinations(reading.parents, len(reading.parents) - 1)), np.intp)
    residual = affine(g, reading.child, sets)[1]
    usual = reading.convex or len(reading.parents) == 3
    plain = usual and reading.floor <= 1.001 * reading.own * floors(np.array([reading.weights]))[0][0]
    growth = max(chosen.necessity if plain else chosen.necessity_chained, 1 + 8 * np.sqrt(2 / entries))
    return bool((residual > growth * max(reading.own, reading.residual)).all())


def resolve(found: Iterable[Reading], g: Array, pool: Sequence[int], chosen: Thresholds = CHOSEN) -> dict[int, Reading]:
    """One reading per merged model: child -> reading. Each dependency is read from one end only, and no model
    descends from itself. pool: all models, over which the shortest tree is drawn."""
    found = list(found)
    convex = {r.child for r in found if r.convex}
    found = [r for r in found if r.convex or r.child not in convex]  # what is made of a model knows its rounding
    best: dict[int, float] = {}
    for r in found:
        best[r.child] = min(best.get(r.child, np.inf), r.residual)
    d = distances(g)
    length = {r.child: _length_without(d, pool, r.child) for r in found if not r.convex}

    def rank(r: Reading) -> tuple:
        worse = r.residual > chosen.noise_gap * best[r.child]
        merged = sum(p in convex for p in r.parents)
        return worse, len(r.parents), not r.convex, 0.0 if r.convex else length[r.child], merged, r.ratio, r.child

    taken: dict[int, Reading] = {}
    spent: set[frozenset[int]] = set()
    for r in sorted(found, key=rank):
        if r.child not in taken and r.members not in spent and not _cyclic(r, taken):
            taken[r.child] = r
            spent.add(r.members)
    return taken


def _length_without(d: Array, pool: Sequence[int], child: int) -> float:
    """Logarithmic length of the shortest tree over the pool without one model: the least surprise at what is left."""
    left = [m for m in pool if m != child]
    return sum(float(np.log(max(d[edge], 1e-300))) for edge in spanning_tree(d, left))


def _cyclic(reading: Reading, taken: dict[int, Reading]) -> bool:
    seen, open_ = set(), list(reading.parents)
    while open_:
        node = open_.pop()
        if node == reading.child:
            return True
        if node not in seen and node in taken:
            seen.add(node)
            open_ += taken[node].parents
    return False
