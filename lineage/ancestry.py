"""The inference inside one tree: copies, then merges, then the fine-tune tree and its root, each claim with reasons.

Models are indices in an order fixed by their content, so neither names nor file order can matter.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from lineage import copies, direction, joins, unmerge
from lineage.checkpoint import Checkpoint
from lineage.cluster_result import Evidence
from lineage.delta import svd
from lineage.graph import adopt, ancestors, attach, between, rooted, spanning_tree
from lineage.kin import Ancestry, Kin, Link
from lineage.thresholds import CHOSEN, Thresholds
from lineage.whitening import whitened_table

Array = NDArray[np.float64]

SOURCES = ("whitening", "merges", "biases", "turns", "centrality")


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
        core = joins.exact(kin, core, found, seed, chosen)
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
        if relation == "pruned":
            near = _pruned_from(kin, child, near, chosen)
        confidence = _margin(d[near[0], child], d[near[1], child]) if len(near) > 1 else 0.7
        found.links.append(Link(near[0], child, relation, max(0.6, confidence), (words,)))
        found.derived[child] = near[0]
    return left


def _pruned_from(kin: Kin, child: int, near: list[int], chosen: Thresholds) -> list[int]:
    """The nearest models, first the one whose entries are the child's wherever those are not 0."""
    own = kin.models[child]
    if own is None:
        return near
    same = {p: copies.prunes(own, m, list(kin.matrices)) for p in near[: chosen.neighbours] if (m := kin.models[p])}
    return sorted(near, key=lambda p: -same.get(p, 0.0))


def _margin(first: float, second: float) -> float:
    """How clearly the nearest is nearer than the next: 0.5 (not at all) to 1."""
    return float(1 / (1 + (first / second) ** 8)) if second > 0 else 0.5


def _finetunes(
    kin: Kin, core: list[int], found: Ancestry, base: int | None, ignore: Collection[str], chosen: Thresholds
) -> None:
    """The tree of the models that are neither copies nor merges, its root, and what hangs from merges."""
    if not core:
        return
    merges = {m.reading.child: m.reading.parents for m in found.merges}
    white = _increments(kin, sorted([*core, *merges]), ignore, chosen)
    pending = joins.partly(kin, core, white, chosen) if "merges" not in ignore else []
    core = [m for m in core if m not in {p.reading.child for p in pending}]
    w = white.sum(0)
    late = between(w, core, merges, chosen.between)
    core = [m for m in core if m not in late]
    edges = spanning_tree(unmerge.distances(w), core)
    chances = _votes(kin, core, edges, w, ignore, chosen).probabilities(core)
    root = base if base in core else max(core, key=lambda m: (chances[m], -m))
    parent = rooted(edges, root)
    parent = adopt(parent, merges, w, chosen.share_low, chosen.share_high)
    parent = attach(parent, late, [*core, *merges], unmerge.distances(w))
    found.root, found.root_confidence = root, 1.0 if base == root else chances[root]
    _draw(kin, parent, w, found, {} if base == root else chances, chosen)
    above: dict[int, Sequence[int]] = {**{child: [p] for child, p in parent.items()}, **merges}
    lines = {m: ancestors(above, m) for m in range(len(kin))}
    for merged in pending:
        joins.record(found, joins.settle(kin, merged, lines))


def _draw(
    kin: Kin, parent: Mapping[int, int], w: Array, found: Ancestry, chances: Mapping[int, float], chosen: Thresholds
) -> None:
    """Links of the fine-tune tree. chances: of each model, that it is the root."""
    d = unmerge.distances(w)
    sides = direction.below(parent, dict.fromkeys([*parent, *parent.values()], 0.0) | dict(chances))
    for child, above in sorted(parent.items()):
        rivals = [d[child, o] for o in parent if o not in (child, above) and parent.get(o) != child]
        sure = _margin(d[child, above], min(rivals)) if rivals else 0.6
        found.links.append(_finetune(kin, above, child, sure, 1 - sides[child], float(d[child, above]), chosen))


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
    """Inner products (tensors or blocks, n, n), of `members`, in which squared distances add best: whitened where there
    are members enough and their files can be read, else plain."""
    models = [m for m in (kin.models[i] for i in members) if m is not None]
    if "whitening" in ignore or len(models) < max(chosen.whiten_members, len(members)):
        return kin.table
    _, table = whitened_table(models, {name: name for name in (*kin.matrices, *kin.vectors)}, floor=chosen.whiten_floor)
    white = np.zeros((len(table), len(kin), len(kin)))
    white[np.ix_(range(len(table)), members, members)] = table
    return white


def _votes(
    kin: Kin, core: list[int], edges: list[tuple[int, int]], w: Array, ignore: Collection[str], chosen: Thresholds
) -> direction.Votes:
    """Log-odds of each model to be the root, from every source that is not to be ignored."""
    votes = direction.Votes()
    if "centrality" not in ignore:
        near = direction.centrality(unmerge.distances(w), core)
        votes.add("centrality", {m: chosen.central * s for m, s in near.items()})
        votes.add("degree", {m: chosen.degree * s for m, s in direction.degrees(edges, core).items()})
    if "turns" not in ignore:
        votes.add("turns", {m: chosen.agreement * s for m, s in direction.agreement(edges, w, core).items()})
    if kin.known:
        votes.add("known", direction.precedence(edges, kin.known, core))
    models = [m for m in (kin.models[i] for i in core) if m is not None]
    if "biases" not in ignore and len(models) == len(core):
        ages = direction.ages(models, kin.vectors)
        if ages is not None:
            votes.add("biases", {m: -chosen.age * float(a) for m, a in zip(core, ages, strict=True)})
    return votes
