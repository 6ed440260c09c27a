"""Which models of a tree are merges, and of what: exact ones first, then those that only nearly fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from lineage import unmerge
from lineage.cluster_result import Evidence
from lineage.kin import Ancestry, Kin, Link, Merged
from lineage.partial import Mixture, block_weighted, mixtures, partial, spherical, unchanged
from lineage.thresholds import Thresholds
from lineage.unmerge import Reading

Array = NDArray[np.float64]
SPARSE = 0.05  # share of entries left as in the base, above which a merge dropped some on purpose
SMALL = 0.8  # of the usual change: TIES drops what moved least, DARE at random
SINGLE = 3.0  # of the expected rounding energy, that merges in float32 may leave
DRAWS = 199  # bootstrap samples of blocks for a p-value


def exact(kin: Kin, core: Sequence[int], found: Ancestry, seed: int, chosen: Thresholds) -> list[int]:
    """Record the merges that reproduce a file up to rounding: with one set of weights, with weights by block, or by
    spherical interpolation. The models that are left."""
    g, every = kin.g, list[Reading]()
    for child in core:
        pool = [i for i in core if i != child]
        if (
            len(pool) > 1
            and _visible(kin, child, pool, chosen)
            and _dependent(g, _limit(kin, child), child, pool, chosen)
        ):
            every += unmerge.readings(g, _limit(kin, child), kin.entries, child, pool, chosen)
    for _, reading in sorted(unmerge.resolve(every, g, core, chosen).items()):
        record(found, _described(kin, reading, seed))
    done = {m.reading.child for m in found.merges}
    rest = [i for i in core if i not in done]
    for child in rest:
        near = _nearest(g, child, [i for i in core if i != child])
        if not _visible(kin, child, near, chosen):
            continue
        mixture = block_weighted(kin.table, _limit(kin, child), child, near, chosen) if len(near) > 1 else None
        if mixture and not _read_already(found, mixture):
            record(found, _by_block(kin, mixture))
        elif interpolated := _interpolated(kin, child, near, chosen):
            record(found, interpolated)
    done = {m.reading.child for m in found.merges}
    return [i for i in core if i not in done]


def partly(kin: Kin, core: Sequence[int], white: Array, chosen: Thresholds) -> list[Merged]:
    """Merges of which part is unexplained: a parent that no file is, or arithmetic that drops entries.

    white: (tensors, n, n) whitened inner products. What both are is settled once the tree is known."""
    fit = [partial(white, c, [i for i in core if i != c], chosen) for c in core] if len(core) > 2 else []
    found: list[Merged] = []
    for mixture in sorted((m for m in fit if m), key=lambda m: (-m.gain, m.child)):
        children = {m.reading.child for m in found}
        if not children & {mixture.a, mixture.b}:
            found.append(Merged(_reading(kin, mixture), (), None, "unknown", unseen=True, confidence=0.7))
    return found


def settle(kin: Kin, merged: Merged, lines: Mapping[int, set[int]]) -> Merged:
    """A merge of which part is unexplained, now that the tree is known: a parent that the other one descends from only
    stands for what both come from; entries left as they were in the base tell of TIES or DARE.

    lines: model -> all it descends from, itself included."""
    a, b = merged.reading.parents
    if a in lines[b] or b in lines[a]:
        keep = 1 if a in lines[b] else 0
        own = merged.reading
        reading = Reading(own.child, (own.parents[keep],), (own.weights[keep],), own.residual, own.own, own.floor)
        return replace(merged, reading=reading)
    base = max(lines[a] & lines[b], key=lambda m: (len(lines[m]), -m), default=None)
    models = [kin.models[i] for i in (merged.reading.child, a, b, base) if i is not None]
    held = [m for m in models if m is not None]
    share, size = unchanged(held, list(kin.matrices)) if len(held) == 4 else (0.0, 1.0)
    if share < SPARSE:
        return merged
    return replace(merged, method="ties" if size < SMALL else "dare", unseen=False)


def _limit(kin: Kin, child: int) -> float:
    """The child's rounding energy; of float32 files three times that: sums are rounded in any order there, and nothing
    but a merge comes near it."""
    single = any(t.dtype == "float32" for t in kin.prints[child].tensors)
    return float(kin.rounding[child]) * (SINGLE if single else 1)


def _visible(kin: Kin, child: int, pool: Sequence[int], chosen: Thresholds) -> bool:
    """Whether the child differs from every other model by clearly more than storing it did."""
    g = kin.g
    nearest = min((g[j, j] + g[child, child] - 2 * g[j, child] for j in pool), default=0.0)
    return bool(nearest > chosen.visible * kin.rounding[child])


def _dependent(g: Array, own: float, child: int, pool: Sequence[int], chosen: Thresholds) -> bool:
    """Whether the child lies in the affine hull of the rest, up to rounding: else no subset can explain it."""
    return unmerge.full_residual(g, child, _nearest(g, child, pool, 64)) <= 2 * chosen.merge_ratio * own


def _nearest(g: Array, child: int, pool: Sequence[int], count: int = 24) -> list[int]:
    return sorted(pool, key=lambda j: (g[j, j] + g[child, child] - 2 * g[j, child], j))[:count]


def _read_already(found: Ancestry, mixture: Mixture) -> bool:
    """Whether the same three models are already one merge, read from another end."""
    members = {mixture.child, mixture.a, mixture.b}
    return any(members <= m.reading.members for m in found.merges)


def record(found: Ancestry, merged: Merged) -> None:
    found.merges.append(merged)
    reading = merged.reading
    spans = merged.intervals or ((None, None),) * len(reading.parents)
    words = {
        "unknown": "one part of the child is a constant share of the parent's, more than training in common leaves",
        "slerp": "a spherical interpolation, up to rounding",
        "block_weighted": "an exact mixture with a weight for each block, up to rounding",
    }.get(merged.method, "an exact affine combination, up to rounding")
    why = (Evidence("residual", words, reading.ratio),)
    for parent, weight, (low, high) in zip(reading.parents, reading.weights, spans, strict=True):
        shown = weight if low is not None or merged.unseen else None
        found.links.append(
            Link(parent, reading.child, "merge", merged.confidence, why, weight=shown, low=low, high=high)
        )


def _described(kin: Kin, reading: Reading, seed: int) -> Merged:
    """Intervals by leaving out each block in turn; the p-value by resampling them."""
    sets, g = np.array([reading.parents]), kin.g
    drawn = [unmerge.affine(g - part, reading.child, sets)[0][0] for part in kin.table] if len(kin.table) > 1 else []
    left_out = np.array(drawn or [reading.weights])
    n = len(left_out)
    spread = np.sqrt((n - 1) / n * ((left_out - left_out.mean(0)) ** 2).sum(0))
    half = 3 * np.maximum(spread, _analytic(kin, reading)) + 1e-9
    intervals = tuple((float(w - h), float(w + h)) for w, h in zip(reading.weights, half, strict=True))
    method = "weighted_sum" if reading.convex else "add_difference"
    return Merged(reading, intervals, _p_value(kin, reading, seed), method, confidence=0.95)


def _analytic(kin: Kin, reading: Reading) -> Array:
    """Standard deviation of each weight if the residual is noise of equal variance in all entries."""
    first, *rest = reading.parents
    g = unmerge.centred(kin.g, first)[np.ix_(rest, rest)]
    covariance = max(reading.residual, reading.own) / kin.entries * np.linalg.pinv(g, hermitian=True)
    return np.sqrt(np.maximum([covariance.sum(), *np.diag(covariance)], 0))


def _p_value(kin: Kin, reading: Reading, seed: int) -> float:
    """Share of samples of blocks in which the set without its least needed parent explains the child as well."""
    rng = np.random.default_rng(seed)
    fewer = np.array(list(combinations(reading.parents, len(reading.parents) - 1)), np.intp)
    as_well = 0
    for _ in range(DRAWS):
        weights = rng.multinomial(len(kin.table), np.full(len(kin.table), 1 / len(kin.table))).astype(np.float64)
        g = np.tensordot(weights, kin.table, 1)
        whole = unmerge.affine(g, reading.child, np.array([reading.parents]))[1][0]
        as_well += int(unmerge.affine(g, reading.child, fewer)[1].min() <= 2 * whole)
    return (1 + as_well) / (1 + DRAWS)


def _reading(kin: Kin, m: Mixture) -> Reading:
    own = float(kin.rounding[m.child])
    floor = own * (1 + (1 - m.weight) ** 2 + m.weight**2)
    return Reading(m.child, (m.a, m.b), (1 - m.weight, m.weight), m.residual, own, floor)


def _by_block(kin: Kin, m: Mixture) -> Merged:
    known = {b: w for b, w in zip(kin.blocks, m.weights, strict=True) if not np.isnan(w)}
    span = (min(known.values()), max(known.values()))
    intervals = ((1 - span[1], 1 - span[0]), span)
    blocks = {block: (1 - w, w) for block, w in known.items()}
    return Merged(_reading(kin, m), intervals, None, "block_weighted", blocks=blocks, confidence=0.95)


def _interpolated(kin: Kin, child: int, near: Sequence[int], chosen: Thresholds) -> Merged | None:
    """Spherical interpolation of a pair that nearly explains the child."""
    if len(near) < 2:
        return None
    for m in mixtures(kin.table, child, near, by_block=False)[:2]:
        models = [kin.models[i] for i in (child, m.a, m.b)]
        held = [model for model in models if model is not None]
        between = chosen.merge_weight < m.weight < 1 - chosen.merge_weight
        if m.gain < chosen.exact_gain or not between or len(held) < 3:
            continue
        residual = spherical(held, [*kin.matrices, *kin.vectors])
        reading = _reading(kin, m)
        if residual <= chosen.merge_ratio * SINGLE * reading.floor:
            exact = Reading(child, reading.parents, reading.weights, residual, reading.own, reading.floor)
            return Merged(exact, (), None, "slerp", confidence=0.9)
    return None
