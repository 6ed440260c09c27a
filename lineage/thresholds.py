"""Every number that a judgement of `lineage cluster` hangs on, in one place; chosen on development roots only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

ROOT = {"centrality": 2.31, "degree": 0.38, "turns": 1.99, "growth": 1.29, "known": 1.0}

MERGE_TRUST = {
    "weighted_sum": 0.99, "add_difference": 0.97, "block_weighted": 0.94, "slerp": 0.95, "ties": 0.95, "dare": 0.95,
    "unknown": 0.88,
}  # fmt: skip


@dataclass(frozen=True)
class Thresholds:
    """Relative distances are ||A - B|| / sqrt(||A|| ||B||); ratios are of energies (squared norms)."""

    same_root: float = 0.5  # relative distance below which two models grew from one initialisation
    intact_share: float = 0.3  # of the entries, in blocks that are kin, for a damaged copy to count as the same root
    copy_ratio: float = 3.0  # distance over the expected rounding, below which a file is a copy of another
    merge_ratio: float = 1.1  # residual over the rounding floor up to which an affine reading is exact
    merge_weight: float = 0.02  # least weight of a parent
    necessity: float = 1.4  # by which the residual must grow when a parent is left out
    necessity_chained: float = 10.0  # the same, of a merge made in steps, whose rounding explains more
    visible: float = 10.0  # squared distance to the nearest parent over the child's rounding, for a merge to be told
    noise_gap: float = 1.04  # residual ratios closer than this do not tell two readings apart
    merge_pool: int = 14  # candidates per child whose subsets are all tried
    merge_parents: int = 5  # up to which all subsets are tried
    merge_crowd: int = 8  # most parents of a merge
    chained: float = 8.0  # rounding energies that a merge made in many steps may leave
    interval: float = 5.0  # standard deviations of a coefficient from its middle to its bounds
    single: float = 3.0  # of the expected rounding energy, that merges in float32 may leave
    half: float = 2.0**26  # rounding energy of float16 over that of float32: of a merge inside a merge
    half_least: float = 0.01  # of that, which such a merge leaves in most tensors
    uneven: float = 10.0  # times the median over tensors, that residual over rounding may be in one of them
    certified: int = 8  # best candidates that are checked on the files themselves
    untouched: float = 0.03  # share of entries left as in a base, beyond chance, above which sparse merges are tried
    sparse_bases: int = 6  # of those, the likeliest
    sparse_parents: int = 6  # likeliest parents, of which all pairs are tried
    sparse_share: float = 0.05  # of the entries that hold a parent's change, beyond chance; that one more explains
    sparse_alone: float = 0.015  # of the entries that hold nothing, or one parent's change alone
    sparse_larger: float = 0.65  # of pairs of a kept and a dropped change, whose kept one is larger: DARE 0.5, TIES 1
    sparse_explained: float = 0.95  # of the entries at which parents differ, that a sparse merge explains
    partial: float = 0.12  # a parent's share of a merge with an unseen parent lies between this and 1 - this
    exact_gain: float = 0.9  # of the squared distance to the nearer parent that an exact mixture explains
    partial_pool: int = 64  # nearest models of which all pairs are tried for that
    partial_gain: float = 0.85  # the same of a merge with an unseen parent
    steady: float = 5.0  # by which one weight for all blocks fits better than a path does
    neighbours: int = 64  # nearest models, from one of which a pruned file may come; what was cut blurs the distances
    kept: float = 0.999  # of the entries of a pruned file that are 0 or its parent's
    zero_share: float = 0.05  # of exact zeros in matrices, above which a file may be pruned
    low_rank: float = 0.5  # of the short side, below which an increment counts as a baked adapter
    root: Mapping[str, float] = field(default_factory=lambda: dict(ROOT))  # log-odds of a root per unit of evidence
    trust: tuple[float, float, float] = (3.48, 0.25, -1.11)  # log-odds of an edge: at 0, per log gap, per joined
    merges: Mapping[str, float] = field(default_factory=lambda: dict(MERGE_TRUST))  # confidence in a merge by method
    metadata: float = 3.0  # log-odds of an order of two models that a file declares
    dates: float = 50.0  # the same, that dates prove
    roots: int = 24  # models of a tree that are tried as its root
    directed: float = 0.7  # probability of a direction from which on an edge has one
    whiten_members: int = 8  # fewest models of a tree that are no merges, whose steps tell what all share
    whiten_floor: float = 1e-3  # of the largest eigenvalue, added before the inverse root
    replicates: int = 32  # bootstrap samples of blocks
    family_similarity: float = 0.15  # least silhouette at which a tree is parted into families


CHOSEN = Thresholds()
