"""Which models of a tree are merges, and of what: exact ones first, then those that only nearly fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from lineage import unmerge
from lineage.certified import certified
from lineage.cluster_result import Evidence
from lineage.ends import made_last, read_already
from lineage.kin import Ancestry, Kin, Link, Merged
from lineage.partial import (
    Mixture,
    block_weighted,
    mixtures,
    partial,
    spherical,
    tensor_weights,
)
from lineage.sparse import sparse
from lineage.thresholds import Thresholds
from lineage.unmerge import Reading
from lineage.whitening import SLOTS, sampled

Array = NDArray[np.float64]
WORDS = {
    "unknown": "shares of these are in the child as a merge leaves them, but what is left is no rounding",
    "slerp": "a spherical interpolation, up to rounding",
    "block_weighted": "an exact mixture with a weight for each block, up to rounding",
    "ties": "whole entries of the parents' changes from the base, the smallest dropped",
    "dare": "whole entries of the parents' changes from the base, others dropped at random",
}
READ = 5  # tensors, large enough but no larger, that are read entry by entry


def exact(kin: Kin, core: Sequence[int], found: Ancestry, seed: int, chosen: Thresholds) -> list[int]:
    """Record the merges that reproduce a file up to rounding: with one set of weights (also by way of a merge that was
    stored as float16 and thrown away), with weights by block, by spherical interpolation, or with most entries left as
    they were. The models that are left."""
    for coarse in (1.0, chosen.half):
        every = [r for child in _left(core, found) for r in _readings(kin, core, child, coarse, chosen)]
        every = made_last(kin, [r for r in every if not read_already(kin, found, r)])
        for _, reading in sorted(unmerge.resolve(every, kin.g, core, chosen).items()):
            record(found, certified(kin, reading, coarse, seed, chosen))
    for child in _left(core, found):
        reading = _crowd(kin, core, _left(core, found), child, chosen)
        if reading and not read_already(kin, found, reading):
            record(found, certified(kin, reading, 1.0, seed, chosen))
    for child in _left(core, found):
        near = _nearest(kin.g, child, [i for i in core if i != child])
        if len(near) > 1 and _visible(kin, child, near, 1.0, chosen):
            ways = (_by_tensor, _interpolated, _sparse)
            merged = next((m for way in ways if (m := way(kin, child, near, chosen))), None)
            if merged and not read_already(kin, found, merged.reading):
                record(found, merged)
    return _left(core, found)


def _left(core: Sequence[int], found: Ancestry) -> list[int]:
    done = {m.reading.child for m in found.merges}
    return [i for i in core if i not in done]


def _readings(kin: Kin, core: Sequence[int], child: int, coarse: float, chosen: Thresholds) -> list[Reading]:
    """The exact readings of a model. coarse: energy of the rounding that is allowed for, over that of float32."""
    pool = [i for i in core if i != child]
    if coarse > 1 and not _single(kin, child):
        return []
    limit = _limit(kin, child, coarse, chosen)
    if len(pool) < 2 or not _visible(kin, child, pool, coarse, chosen):
        return []
    if not _dependent(kin.g, limit, child, pool, chosen):
        return []
    return unmerge.readings(kin.g, limit, kin.entries, child, pool, chosen)


def _crowd(kin: Kin, core: Sequence[int], left: Sequence[int], child: int, chosen: Thresholds) -> Reading | None:
    """The exact reading of a model as a merge of many that are no merges themselves (`left`); what comes near a merge
    of theirs descends from that."""
    pool, limit = [i for i in left if i != child], _limit(kin, child, 1.0, chosen)
    if len(pool) < 3 or not _visible(kin, child, [i for i in core if i != child], 1.0, chosen):
        return None
    known = _dependent(kin.g, limit, child, pool, chosen)
    return unmerge.crowd(kin.g, limit, kin.entries, child, pool, chosen) if known else None


def partly(kin: Kin, core: Sequence[int], white: Array, merges: Sequence[int], chosen: Thresholds) -> list[Merged]:
    """Merges of which part is unexplained: a parent that no file is, or arithmetic that drops entries.

    white: (tensors, n, n) whitened inner products; merges: those that are explained: what is nearer to one of them than
    to its own would-be parents descends from it. What both parents are is settled once the tree is known."""
    whole = white.sum(0)
    near = {c: _nearest(whole, c, [i for i in core if i != c], chosen.partial_pool) for c in core}
    fit = [partial(white, c, near[c], chosen) for c in core] if len(core) > 2 else []
    d = unmerge.distances(whole)
    found: list[Merged] = []
    for m in sorted((m for m in fit if m), key=lambda m: (-m.gain, m.child)):
        children = [f.reading.child for f in found]
        nearest = min((d[m.child, other] for other in (*merges, *children)), default=np.inf)
        if nearest > min(d[m.child, m.a], d[m.child, m.b]) and not {m.a, m.b} & {*children}:
            sure = chosen.merges["unknown"]
            found.append(Merged(_reading(kin, m), (), None, "unknown", unseen=True, confidence=sure))
    return found


def settle(merged: Merged, lines: Mapping[int, set[int]]) -> Merged:
    """A merge of which part is unexplained, now that the tree is known: a parent that the other one descends from only
    stands for what both come from.

    lines: model -> all it descends from, itself included."""
    own = merged.reading
    a, b = own.parents
    if a not in lines[b] and b not in lines[a]:
        return merged
    keep = 1 if a in lines[b] else 0
    reading = Reading(own.child, (own.parents[keep],), (own.weights[keep],), own.residual, own.own, own.floor)
    return replace(merged, reading=reading)


def _single(kin: Kin, child: int) -> bool:
    return any(t.dtype == "float32" for t in kin.prints[child].tensors)


def _limit(kin: Kin, child: int, coarse: float, chosen: Thresholds) -> float:
    """The child's rounding energy; of float32 files some times that: sums are rounded in any order there, and nothing
    but a merge comes near it."""
    return float(kin.rounding[child]) * coarse * (chosen.single if _single(kin, child) else 1)


def _visible(kin: Kin, child: int, pool: Sequence[int], coarse: float, chosen: Thresholds) -> bool:
    """Whether the child differs from every other model by clearly more than storing it did."""
    nearest = unmerge.from_one(kin.g, child, pool).min(initial=np.inf) if len(pool) else 0.0
    return bool(nearest > chosen.visible * coarse * kin.rounding[child])


def _dependent(g: Array, own: float, child: int, pool: Sequence[int], chosen: Thresholds) -> bool:
    """Whether the child lies in the affine hull of the rest, up to rounding: else no subset can explain it."""
    return unmerge.full_residual(g, child, _nearest(g, child, pool, 64)) <= chosen.chained * own


def _nearest(g: Array, child: int, pool: Sequence[int], count: int = 24) -> list[int]:
    pool = sorted(pool)
    order = np.argsort(unmerge.from_one(g, child, pool), kind="stable")
    return [pool[i] for i in order[:count]]


def record(found: Ancestry, merged: Merged) -> None:
    """Add a merge and a link from each of its parents; links show weights where these have an interval."""
    found.merges.append(merged)
    reading = merged.reading
    spans = merged.intervals or ((None, None),) * len(reading.parents)
    words = WORDS.get(merged.method, "an exact affine combination, up to rounding")
    why = (Evidence("residual", words, reading.ratio),)
    for parent, weight, (low, high) in zip(reading.parents, reading.weights, spans, strict=True):
        shown = weight if low is not None or merged.unseen else None
        found.links.append(
            Link(parent, reading.child, "merge", merged.confidence, why, weight=shown, low=low, high=high)
        )


def _reading(kin: Kin, m: Mixture) -> Reading:
    own = float(kin.rounding[m.child])
    floor = own * (unmerge.COARSE + (1 - m.weight) ** 2 + m.weight**2)
    return Reading(m.child, (m.a, m.b), (1 - m.weight, m.weight), m.residual, own, floor)


def _by_tensor(kin: Kin, child: int, near: Sequence[int], chosen: Thresholds) -> Merged | None:
    """A pair of which the child is an exact mixture with a weight from 0 to 1 for each block, or else each tensor."""
    own = 3 * chosen.merge_ratio * float(kin.rounding[child])
    names = [*kin.matrices, *kin.vectors]
    for m in mixtures(kin.table, child, near, by_block=True)[: chosen.certified]:
        weights, blocks = dict(zip(kin.blocks, m.weights, strict=True)), True
        held = kin.held((child, m.a, m.b)) if m.residual > own else None
        if held:
            weights, residual = tensor_weights(held, names)
            m, blocks = replace(m, residual=residual), False
        known = {block: w for block, w in weights.items() if not np.isnan(w)}
        if m.residual <= own and block_weighted(m, list(known.values()), chosen):
            span = (min(known.values()), max(known.values()))
            by = {block: (1 - w, w) for block, w in known.items()} if blocks else None
            return Merged(_reading(kin, m), ((1 - span[1], 1 - span[0]), span) if blocks else (), None,
                          "block_weighted", blocks=by, confidence=chosen.merges["block_weighted"])  # fmt: skip
    return None


def _sparse(kin: Kin, child: int, near: Sequence[int], chosen: Thresholds) -> Merged | None:
    """A base and others of whose changes from it whole entries are in the child: TIES, DARE."""
    held = kin.held([child, *near])
    if len(near) < 3 or held is None:
        return None
    sizes = {t.name: t.entries for t in kin.prints[child].tensors}
    names = sorted(kin.matrices, key=lambda n: (sizes[n] < SLOTS, abs(sizes[n] - SLOTS), n))[:READ]
    own, *pool = ([sampled(model[n]).flatten() for n in names] for model in held)
    found = sparse(own, pool, chosen)
    if found is None:
        return None
    parents = (near[found.base], *(near[i] for i in found.parents))
    left = float(kin.rounding[child])
    reading = Reading(child, parents, (1 - sum(found.scales), *found.scales), left, left, left)
    method = "dare" if found.random else "ties"
    return Merged(reading, (), None, method, confidence=chosen.merges[method])


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
        if residual <= chosen.merge_ratio * (chosen.single if _single(kin, child) else 1) * reading.floor:
            exact = Reading(child, reading.parents, reading.weights, residual, reading.own, reading.floor)
            return Merged(exact, (), None, "slerp", confidence=chosen.merges["slerp"])
    return None
