"""Roots (one initialisation = one tree), families inside a tree, and how sure they are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial.distance import squareform

from lineage.thresholds import CHOSEN, Thresholds

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Family:
    """members: indices, sorted. stability: mean Jaccard overlap with the closest family when blocks are resampled."""

    members: tuple[int, ...]
    stability: float


def kin(distances: Iterable[NDArray], norms: Array, entries: NDArray, chosen: Thresholds = CHOSEN) -> NDArray[np.bool_]:
    """(n, n): whether two models grew from one initialisation.

    distances: squared, (n, n) of each block; norms: (n, blocks) ||W||; entries: (blocks,). Whole models are close, or
    at least a share of their entries lies in blocks that are (a copy whose heads or layers were permuted, a graft)."""
    squares = norms.astype(np.float64) ** 2
    total, intact = (np.zeros((len(norms), len(norms)), np.float32) for _ in range(2))
    for b, (count, d) in enumerate(zip(entries, distances, strict=True)):
        total += d  # in place: of ten thousand models each of these takes 400 MB
        intact[_near(d, squares[:, b], chosen)] += count / entries.sum()
    return _near(total, squares.sum(1), chosen) | (intact > chosen.intact_share)


def _near(d: NDArray, squares: Array, chosen: Thresholds) -> NDArray[np.bool_]:
    """Whether squared distances are below the square of the relative one of kin."""
    lengths = np.sqrt(np.maximum(squares, 1e-300))
    scaled = d / lengths[:, None].astype(d.dtype)
    scaled /= lengths.astype(d.dtype)
    return scaled < chosen.same_root**2


def trees(related: NDArray[np.bool_]) -> list[tuple[int, ...]]:
    """Connected groups of kin, each sorted; singletons too."""
    count, label = connected_components(csr_array(related), directed=False)
    return [tuple(map(int, np.flatnonzero(label == k))) for k in range(count)]


def families(
    table: Array, origin: int | None, members: Sequence[int], seed: int = 0, chosen: Thresholds = CHOSEN
) -> list[Family]:
    """Families of a tree by the likeness of what its members added to the origin.

    table: (blocks, n, n) inner products. origin: the tree's root; None: the members' mean stands for it. The number of
    families is the one of the largest silhouette; one family where none is clear."""
    members = [m for m in sorted(members) if m != origin]
    if len(members) < 3:
        return [Family(tuple(members), 1.0)] if members else []
    apart = _dissimilarity(table.sum(0), origin, members)
    joined = linkage(squareform(apart, checks=False), "average")
    k = _count(joined, apart, chosen)
    labels = fcluster(joined, k, "maxclust")
    rng = np.random.default_rng(seed)
    overlaps = np.zeros(labels.max())
    for _ in range(chosen.replicates):
        weights = rng.multinomial(len(table), np.full(len(table), 1 / len(table))).astype(np.float64)
        drawn = _dissimilarity(np.tensordot(weights, table, 1), origin, members)
        again = fcluster(linkage(squareform(drawn, checks=False), "average"), k, "maxclust")
        overlaps += [_overlap(labels == c, again) for c in range(1, labels.max() + 1)]
    stability = overlaps / chosen.replicates
    return [
        Family(tuple(members[i] for i in np.flatnonzero(labels == c)), float(stability[c - 1]))
        for c in range(1, labels.max() + 1)
    ]


def _dissimilarity(g: Array, origin: int | None, members: list[int]) -> Array:
    """1 - cosine of the members' deltas."""
    pair = g[np.ix_(members, members)]
    if origin is None:
        mean = pair.mean(1)
        pair = pair - mean[:, None] - mean[None] + mean.mean()
    else:
        to = g[members, origin]
        pair = pair - to[:, None] - to[None] + g[origin, origin]
    norm = np.sqrt(np.maximum(np.diag(pair), 1e-300))
    apart = 1 - np.clip(pair / norm[:, None] / norm[None], -1, 1)
    apart = (apart + apart.T) / 2
    np.fill_diagonal(apart, 0)
    return apart


def _count(joined: Array, apart: Array, chosen: Thresholds) -> int:
    """Number of families with the largest mean silhouette; 1 where that is small."""
    best, count = chosen.family_similarity, 1
    for k in range(2, min(len(apart), 13)):
        score = silhouette(apart, fcluster(joined, k, "maxclust"))
        if score > best + 1e-9:
            best, count = score, k
    return count


def silhouette(apart: Array, labels: NDArray[np.int_]) -> float:
    """Mean silhouette (Rousseeuw 1987) from dissimilarities (n, n); 0 for members alone in their cluster."""
    member = labels[:, None] == np.unique(labels)[None]
    sizes = member.sum(0)
    sums = apart @ member
    own = member.argmax(1)
    rows = np.arange(len(apart))
    inside = sums[rows, own] / np.maximum(sizes[own] - 1, 1)
    means = sums / sizes
    means[rows, own] = np.inf
    outside = means.min(1)
    score = np.where(sizes[own] > 1, (outside - inside) / np.maximum(np.maximum(inside, outside), 1e-300), 0)
    return float(score.mean()) if len(sizes) > 1 else 0.0


def _overlap(member: NDArray[np.bool_], labels: NDArray[np.int_]) -> float:
    """Largest Jaccard overlap of one cluster with the clusters of another partition."""
    others = [(labels == c) for c in np.unique(labels)]
    return max(float((member & o).sum() / (member | o).sum()) for o in others)


def affinities(g: Array, origin: int | None, found: Sequence[Family]) -> Array:
    """(n, families) how much of each family a model shares: mean cosine of its delta with the members', negative ones
    as 0, scaled to sum to 1; a model belongs to several where several weigh. 0 for the origin."""
    member = np.zeros((len(g), len(found)))
    for k, family in enumerate(found):
        member[list(family.members), k] = 1
    alike = np.maximum(1 - _dissimilarity(g, origin, list(range(len(g)))), 0)
    np.fill_diagonal(alike, 0)
    others = member.sum(0) - member
    raw = np.where(others > 0, alike @ member / np.maximum(others, 1), member)
    if origin is not None:
        raw[origin] = 0
    total = raw.sum(1, keepdims=True)
    return np.where(total > 0, raw / np.where(total > 0, total, 1), member)
