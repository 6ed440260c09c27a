"""The inference inside one tree: copies, then merges, then the fine-tune tree and its root, each claim with reasons.

Models are indices in an order fixed by their content, so neither names nor file order can matter.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lineage import copies, direction, unmerge
from lineage.checkpoint import Checkpoint
from lineage.cluster_result import Evidence
from lineage.delta import svd
from lineage.fingerprint import Fingerprint
from lineage.graph import adopt, attach, between, rehang, rooted, spanning_tree
from lineage.thresholds import CHOSEN, Thresholds
from lineage.whitening import whitened_table

Array = NDArray[np.float64]
Models = Sequence[Mapping[str, Tensor] | None]

SOURCES = ("whitening", "merges", "biases", "decay", "turns", "centrality")


@dataclass(frozen=True)
class Kin:
    """One tree's n models. table: (blocks, n, n) inner products of differences to one of them, of the part that is
    compared; rounding: (n,) energies; models: their tensors, None where files are not to be read again; matrices,
    vectors: names -> block of the common parameters of two or more, and of one dimension. known: (earlier, later,
    log-odds) from metadata and dates."""

    prints: tuple[Fingerprint, ...]
    models: Models
    blocks: tuple[str, ...]
    table: Array
    rounding: Array
    matrices: Mapping[str, str]
    vectors: tuple[str, ...]
    known: tuple[tuple[int, int, float], ...] = ()

    @property
    def g(self) -> Array:
        return self.table.sum(0)

    def __len__(self) -> int:
        return len(self.prints)


@dataclass(frozen=True)
class Link:
    """An edge between two models (indices), or from a hidden ancestor (parent -1, -2, ...)."""

    parent: int
    child: int
    relation: str
    confidence: float
    evidence: tuple[Evidence, ...]
    directed: bool = True
    weight: float | None = None
    low: float | None = None
    high: float | None = None
    rank: int | None = None


@dataclass
class Ancestry:
    """What was found in one tree."""

    links: list[Link] = field(default_factory=list)
    merges: list[Merged] = field(default_factory=list)
    root: int | None = None
    root_confidence: float | None = None
    root_evidence: tuple[Evidence, ...] = ()
    derived: dict[int, int] = field(default_factory=dict)  # leaf -> what it derives from, by copying


@dataclass(frozen=True)
class Merged:
    """A merge as found: its reading, intervals per parent, p-value, and coefficients by block where those differ."""

    reading: unmerge.Reading
    intervals: tuple[tuple[float, float], ...]
    p_value: float | None
    method: str = "weighted_sum"
    unseen: bool = False
    blocks: dict[str, tuple[float, ...]] | None = None
    confidence: float = 0.9


def grow(
    kin: Kin,
    *,
    base: int | None = None,
    ignore: Collection[str] = (),
    seed: int = 0,
    chosen: Thresholds = CHOSEN,
) -> Ancestry:
    """The lineage of one tree. base: a root that the user names. ignore: sources of evidence not to use."""
    found = Ancestry()
    core = _copies(kin, found, chosen)
    core = _quantised(kin, core, found, chosen)
    if "merges" not in ignore:
        core = _merges(kin, core, found, seed, chosen)
    _finetunes(kin, core, found, base, ignore, chosen)
    return found


def _copies(kin: Kin, found: Ancestry, chosen: Thresholds) -> list[int]:
    """Identical and re-typed files; what is left stands for its class."""
    left = list(range(len(kin)))
    for same in copies.identical(kin.prints, {*kin.matrices, *kin.vectors}):
        for other in same[1:]:
            words = Evidence("bytes", "every tensor that is compared has the same bytes", 1.0)
            found.links.append(Link(same[0], other, "copy", 1.0, (words,), directed=False))
            found.derived[other] = same[0]
            left.remove(other)
    d = unmerge.distances(kin.g)
    names = [*kin.matrices, *kin.vectors]
    bits = [copies.precision(p) for p in kin.prints]
    for child in sorted(left, key=lambda i: (bits[i], i)):
        close = [
            p for p in left
            if p != child and bits[p] > bits[child]
            and d[p, child] <= chosen.copy_ratio * (kin.rounding[p] + kin.rounding[child])
        ]  # fmt: skip
        for parent in sorted(close, key=lambda p: (-bits[p], d[p, child], p)):
            ours, theirs = kin.models[child], kin.models[parent]
            if ours is None or theirs is None or copies.rounds_to(ours, theirs, names):
                words = Evidence("rounding", "equal once the parent is rounded to the child's precision", 1.0)
                found.links.append(Link(parent, child, "copy", 0.98, (words,)))
                found.derived[child] = parent
                left.remove(child)
                break
    return _permuted(kin, left, found, d)


def _permuted(kin: Kin, left: list[int], found: Ancestry, d: Array) -> list[int]:
    """Copies in another order hang from the one of the two that has other kin near."""
    for pair in copies.permuted(kin.prints):
        if set(pair) <= set(left):
            near = {m: min((d[m, o] for o in left if o not in pair), default=np.inf) for m in pair}
            parent, child = sorted(pair, key=lambda m: (near[m], m))
            words = Evidence("values", "every tensor holds the same values in another order", 1.0)
            sure = near[parent] < near[child]
            found.links.append(Link(parent, child, "permuted", 0.97, (words,), directed=sure))
            found.derived[child] = parent
            left = [m for m in left if m != child]
    return left


def _quantised(kin: Kin, core: list[int], found: Ancestry, chosen: Thresholds) -> list[int]:
    """Files whose entries lie on a grid or are exactly zero hang from the nearest model that is neither."""
    flagged: dict[int, tuple[str, Evidence]] = {}
    zeros = {i: copies.zero_share(kin.prints[i]) for i in core}
    usual = float(np.median(list(zeros.values()))) if zeros else 0.0
    for i in core:
        model = kin.models[i]
        kind = copies.quantised(model, kin.prints[i]) if model is not None else None
        if kind:
            flagged[i] = "quantized", Evidence("grid", f"the entries of its matrices lie on an {kind} grid")
        elif zeros[i] > max(chosen.zero_share, 3 * usual):
            flagged[i] = "pruned", Evidence("zeros", f"{zeros[i]:.0%} of its matrices' entries are exactly 0", zeros[i])
    left = [i for i in core if i not in flagged]
    if not left:
        return core
    d = unmerge.distances(kin.g)
    for child, (relation, words) in sorted(flagged.items()):
        near = sorted(left, key=lambda p: (d[p, child], p))
        confidence = _margin(d[near[0], child], d[near[1], child]) if len(near) > 1 else 0.7
        found.links.append(Link(near[0], child, relation, max(0.6, confidence), (words,)))
        found.derived[child] = near[0]
    return left


def _margin(first: float, second: float) -> float:
    """How clearly the nearest is nearer than the next: 0.5 (not at all) to 1."""
    return float(1 / (1 + (first / second) ** 8)) if second > 0 else 0.5


def _merges(kin: Kin, core: list[int], found: Ancestry, seed: int, chosen: Thresholds) -> list[int]:
    g = kin.g
    every: list[unmerge.Reading] = []
    for child in core:
        pool = [i for i in core if i != child]
        if len(pool) > 1 and _dependent(g, kin.rounding, child, pool, chosen):
            every += unmerge.readings(g, kin.rounding, child, pool, chosen)
    for child, reading in sorted(unmerge.resolve(every, g, chosen).items()):
        merged = _described(kin, reading, chosen)
        found.merges.append(merged)
        for parent, weight, (low, high) in zip(reading.parents, reading.weights, merged.intervals, strict=True):
            words = Evidence("residual", "an exact affine combination, up to rounding", reading.ratio)
            found.links.append(
                Link(parent, child, "merge", merged.confidence, (words,), weight=weight, low=low, high=high)
            )
    return [i for i in core if i not in {m.reading.child for m in found.merges}]


def _dependent(g: Array, rounding: Array, child: int, pool: Sequence[int], chosen: Thresholds) -> bool:
    """Whether the child lies in the affine hull of the rest, up to rounding: else no subset can explain it."""
    nearest = sorted(pool, key=lambda j: (g[j, j] + g[child, child] - 2 * g[j, child], j))[:64]
    floor = rounding[child] + rounding[nearest].max()
    return unmerge.full_residual(g, child, nearest) <= chosen.merge_ratio * floor


def _described(kin: Kin, reading: unmerge.Reading, chosen: Thresholds) -> Merged:
    sets = np.array([reading.parents])
    by_block = np.array([unmerge.affine(g, reading.child, sets)[0][0] for g in kin.table])
    jack = np.array([unmerge.affine(kin.g - g, reading.child, sets)[0][0] for g in kin.table] or [reading.weights])
    n = len(jack)
    se = np.sqrt((n - 1) / n * ((jack - jack.mean(0)) ** 2).sum(0)) if n > 1 else np.zeros(len(reading.weights))
    half = 2.2 * se + 1e-9
    intervals = tuple((w - h, w + h) for w, h in zip(reading.weights, half, strict=True))
    del by_block
    method = "weighted_sum" if reading.convex else "add_difference"
    return Merged(reading, intervals, None, method)


def _finetunes(
    kin: Kin, core: list[int], found: Ancestry, base: int | None, ignore: Collection[str], chosen: Thresholds
) -> None:
    """The tree of the models that are neither copies nor merges, its root, and what hangs from merges."""
    if not core:
        return
    merges = {m.reading.child: m.reading.parents for m in found.merges}
    w = _increments(kin, sorted([*core, *merges]), ignore, chosen)
    d = unmerge.distances(w)
    late = between(w, core, merges, chosen.between)
    core = [m for m in core if m not in late]
    edges = spanning_tree(d, core)
    votes = _votes(kin, core, found, edges, w, ignore)
    chances = votes.probabilities(core)
    root = base if base in core else max(core, key=lambda m: (chances[m], -m))
    parent = adopt(rehang(rooted(edges, root), w, chosen.hidden_branch), merges, d)
    parent = attach(parent, late, [*core, *merges], d)
    sides = direction.below(rooted(edges, root), chances)
    for child, above in sorted(parent.items()):
        rivals = [d[child, o] for o in core if o not in (child, above) and parent.get(o) != child]
        sure = _margin(d[child, above], min(rivals)) if rivals else 0.6
        forward = 1 - sides.get(child, 0.0) if base != root else 1.0
        found.links.append(_finetune(kin, above, child, sure, forward, float(d[child, above]), chosen))
    found.root, found.root_confidence = root, 1.0 if base == root else chances[root]


def _finetune(
    kin: Kin, parent: int, child: int, sure: float, forward: float, distance: float, chosen: Thresholds
) -> Link:
    """A link of the fine-tune tree: an adapter's where only matrices changed, in few ranks."""
    words = [Evidence("distance", "nearest by squared distance, which adds along paths", distance)]
    words.append(Evidence("root", "probability that the parent is nearer the root of the tree", round(forward, 4)))
    directed = forward > chosen.directed
    rank = _baked_rank(kin, parent, child, chosen)
    if rank is not None:
        words.append(Evidence("rank", "only matrices differ, and in few ranks: an adapter baked in", rank))
    relation = "finetune" if rank is None else "adapter"
    return Link(parent, child, relation, sure * (forward if directed else 1), tuple(words), directed, rank=rank)


def _baked_rank(kin: Kin, parent: int, child: int, chosen: Thresholds) -> int | None:
    """Median signal rank of the changed matrices, where no vector changed and it is low; None elsewhere."""
    old, new = kin.models[parent], kin.models[child]
    if not isinstance(old, Checkpoint) or not isinstance(new, Checkpoint) or not kin.vectors:
        return None
    if not copies.rounds_to(new, old, kin.vectors):
        return None
    layers = [layer for layer in svd(old.path, new.path, tolerance=0.1).layers if layer.frobenius > 0]
    shares = [(x.signal_rank, min(x.shape[0], x.entries // x.shape[0])) for x in layers if x.signal_rank is not None]
    if not shares or np.median([r / short for r, short in shares]) > chosen.low_rank:
        return None
    return int(np.median([r for r, _ in shares]))


def _increments(kin: Kin, members: list[int], ignore: Collection[str], chosen: Thresholds) -> Array:
    """Inner products (n, n), of `members`, in which squared distances add best: whitened where there are members
    enough and their files can be read, else plain."""
    models = [m for m in (kin.models[i] for i in members) if m is not None]
    if "whitening" in ignore or len(models) < max(chosen.whiten_members, len(members)):
        return kin.g
    _, table = whitened_table(models, kin.matrices, floor=chosen.whiten_floor)
    w = np.zeros((len(kin), len(kin)))
    w[np.ix_(members, members)] = table.sum(0)
    return w


def _votes(
    kin: Kin, core: list[int], found: Ancestry, edges: list[tuple[int, int]], w: Array, ignore: Collection[str]
) -> direction.Votes:
    votes = direction.Votes()
    if "centrality" not in ignore:
        mass = {m: 1 + sum(p == m for p in found.derived.values()) for m in core}
        votes.add("centrality", direction.centrality(edges, mass))
    if "turns" not in ignore:
        votes.add("turns", {m: 4.0 * s for m, s in direction.agreement(edges, kin.g, core).items()})
    if kin.known:
        votes.add("known", direction.precedence(edges, kin.known, core))
    models = [m for m in (kin.models[i] for i in core) if m is not None]
    if "biases" not in ignore and len(models) == len(core):
        age = direction.ages(models, kin.vectors)
        if age is not None:
            full = np.zeros(len(kin))
            full[core] = age
            votes.add("biases", {m: 6 * s for m, s in direction.descent(edges, full, core).items()})
    return votes
