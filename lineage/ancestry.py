"""The inference inside one tree: copies, then merges, then the fine-tune tree and its root, each claim with reasons.

Models are indices in an order fixed by their content, so neither names nor file order can matter.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lineage import copies, direction, joins, unmerge
from lineage.checkpoint import Checkpoint
from lineage.cluster_result import Evidence
from lineage.delta import svd
from lineage.graph import FAR, ancestors, cost, descent
from lineage.kin import Ancestry, Kin, Link
from lineage.thresholds import CHOSEN, Thresholds
from lineage.whitening import whitened_table

Array = NDArray[np.float64]

TURNED = 100  # models of a tree, above which the trees from all roots are one, turned round
NO_GAP = 1e-4  # nats per entry, below which a link is no better than the next best
SOURCES = ("whitening", "merges", "turns", "growth", "centrality")


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
    bits = np.array([copies.precision(p) for p in kin.prints])
    for child in sorted(left, key=lambda i: (bits[i], i)):
        within = d[child] <= chosen.copy_ratio * (kin.rounding + kin.rounding[child])
        close = [p for p in map(int, np.flatnonzero(within & (bits > bits[child]))) if p in left]
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
            near = {m: d[m, [o for o in left if o not in pair]].min(initial=np.inf) for m in pair}
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
        parent = near[0]
        if relation == "pruned" and (keeps := _keeps(kin, child, near, chosen)) is not None:
            parent, confidence = keeps, 0.97
        found.links.append(Link(parent, child, relation, max(0.6, confidence), (words,)))
        found.derived[child] = parent
    return left


def _keeps(kin: Kin, child: int, near: list[int], chosen: Thresholds) -> int | None:
    """The nearest model whose entries are the child's wherever those are not 0; None where there is none."""
    own, names = kin.models[child], list(kin.matrices)
    if own is None:
        return None
    held = ((p, kin.models[p]) for p in near[: chosen.neighbours])
    return next((p for p, m in held if m is not None and copies.prunes(own, m, names) > chosen.kept), None)


def _margin(first: float, second: float) -> float:
    """How clearly the nearest is nearer than the next: 0.5 (not at all) to 1."""
    return float(1 / (1 + (first / second) ** 8)) if second > 0 else 0.5


def _finetunes(
    kin: Kin, core: list[int], found: Ancestry, base: int | None, ignore: Collection[str], chosen: Thresholds
) -> None:
    """The tree of the models that are no copies, its root, and what hangs from merges."""
    if not core:
        return
    merges = {m.reading.child: m.reading.parents for m in found.merges}
    members = sorted([*core, *merges])
    table, sizes = _increments(kin, members, core, ignore, chosen)
    pending = joins.partly(kin, core, table, sorted(merges), chosen) if "merges" not in ignore else []
    merges |= {p.reading.child: p.reading.parents for p in pending}
    grove = _Grove(kin, members, merges, table, cost((g[np.ix_(members, members)] for g in table), sizes))
    core = [m for m in core if m not in merges]
    roots = [base] if base in core else _central(kin, core, chosen.roots)
    trees = grove.trees(roots)
    chances = votes(grove, trees, ignore, chosen).probabilities(sorted(trees))
    found.root = max(trees, key=lambda m: (chances[m], -m))
    found.root_confidence = chances[found.root]
    found.parent = trees[found.root]
    gaps = grove.gaps(found.parent)
    found.links += [_link(kin, child, gaps[child], trees, chances, found.root, chosen) for child in sorted(gaps)]
    above: dict[int, Sequence[int]] = {**{child: [p] for child, p in found.parent.items()}, **merges}
    lines = {m: ancestors(above, m) for m in range(len(kin))}
    for merged in pending:
        joins.record(found, joins.settle(merged, lines))


@dataclass(frozen=True)
class _Grove:
    """The models of a tree that are no copies, merges -> parents among them, inner products of their increments
    (parts, n, n), and the cost (members, members) of each as another's parent."""

    kin: Kin
    members: list[int]
    merges: Mapping[int, Sequence[int]]
    table: Array
    cost: Array

    def tree(self, root: int) -> dict[int, int]:
        """child -> parent of the likeliest tree from a root."""
        at = {m: i for i, m in enumerate(self.members)}
        hung = {at[m]: [at[p] for p in parents if p in at] for m, parents in self.merges.items() if m in at}
        grown = descent(self.cost, at[root], hung)
        return {self.members[c]: self.members[p] for c, p in grown.items()}

    def trees(self, roots: Sequence[int]) -> dict[int, dict[int, int]]:
        """root -> its likeliest tree; of many models the first root's, turned round: as costs are the same both ways,
        only merges, which keep their parents, make another tree likelier."""
        if len(self.members) <= TURNED:
            return {root: self.tree(root) for root in roots}
        first = self.tree(roots[0])
        turned = {root: _turned(first, roots[0], root) for root in roots}
        return {root: tree for root, tree in turned.items() if tree is not None}

    def gaps(self, tree: Mapping[int, int]) -> dict[int, float]:
        """child -> how much dearer the next best link would be between the two sides that its edge joins."""
        at = {m: i for i, m in enumerate(self.members)}
        above = {at[c]: at[p] for c, p in tree.items()} | {at[m]: at[ps[0]] for m, ps in self.merges.items()}
        below: dict[int, list[int]] = {}
        for c, p in above.items():
            below.setdefault(p, []).append(c)
        merged = [at[m] for m in self.merges]
        cost = self.cost.copy()
        cost[np.ix_(merged, merged)] = FAR
        return {c: _gap(cost, at[p], at[c], sorted(ancestors(below, at[c]))) for c, p in tree.items()}


def _turned(tree: Mapping[int, int], old: int, new: int) -> dict[int, int] | None:
    """The same tree from another root; None where a merge lies between."""
    found, node = dict(tree), new
    while node in tree:
        found[tree[node]] = node
        node = tree[node]
    found.pop(new, None)
    return found if node == old else None


def _gap(cost: Array, parent: int, child: int, inside: list[int]) -> float:
    """How much dearer the next best link is into what descends from the child."""
    across = cost[:, inside]
    own = across[parent, inside.index(child)]
    across[inside] = FAR
    across[parent, inside.index(child)] = FAR
    return float(across.min() - own)


def _central(kin: Kin, core: list[int], count: int) -> list[int]:
    """The members nearest to all others: those that can be roots of large trees."""
    near = direction.centrality(unmerge.distances(kin.g), core)
    return sorted(sorted(core, key=lambda m: (-near[m], m))[:count])


def _link(
    kin: Kin,
    child: int,
    gap: float,
    trees: Mapping[int, Mapping[int, int]],
    chances: Mapping[int, float],
    root: int,
    chosen: Thresholds,
) -> Link:
    """A link of the fine-tune tree: an adapter's where only matrices changed, in few ranks."""
    parent = trees[root][child]
    joined, forward = direction.forward(parent, child, trees, chances)
    words = [Evidence("distance", "likeliest increment of all that could join the two sides of the tree; the next best "
                      "is so much dearer per entry", gap)]  # fmt: skip
    words.append(Evidence("trees", "probability over roots that the likeliest tree joins the two", round(joined, 4)))
    words.append(Evidence("root", "probability that the parent is nearer the root of the tree", round(forward, 4)))
    directed = forward > chosen.directed
    rank = _baked_rank(kin, parent, child, chosen)
    if rank is not None:
        words.append(Evidence("rank", "only matrices differ, and in few ranks: an adapter baked in", rank))
    relation = "finetune" if rank is None else "adapter"
    sure = trust(gap, joined, chosen)
    return Link(parent, child, relation, sure * (forward if directed else 1), tuple(words), directed, rank=rank)


def trust(gap: float, joined: float, chosen: Thresholds = CHOSEN) -> float:
    """Calibrated probability that two models are parent and child. gap: as of `_Grove.gap`; joined: probability over
    roots that the tree joins them."""
    at = chosen.trust[0] + chosen.trust[1] * np.log(max(gap, NO_GAP)) + chosen.trust[2] * joined
    return float(1 / (1 + np.exp(-at)))


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


def _increments(
    kin: Kin, members: list[int], core: Sequence[int], ignore: Collection[str], chosen: Thresholds
) -> tuple[Array, Array]:
    """Inner products (parts, n, n) of `members`, in which squared distances add best, and the parts' entries: whitened,
    tensor by tensor, where the `core`, which is no merges, is large enough and the files can be read, else plain, block
    by block."""
    sizes = {t.name: t.entries for t in kin.prints[0].tensors}
    models = [m for m in (kin.models[i] for i in members) if m is not None]
    if "whitening" in ignore or len(core) < chosen.whiten_members or len(models) < len(members):
        blocks = [sum(sizes[n] for n, b in kin.matrices.items() if b == block) for block in kin.blocks]
        return kin.table, np.maximum(blocks, 1.0)
    names, table = whitened_table(
        models, {name: name for name in (*kin.matrices, *kin.vectors)}, floor=chosen.whiten_floor
    )
    white = np.zeros((len(table), len(kin), len(kin)))
    white[np.ix_(range(len(table)), members, members)] = table
    return white, np.array([sizes[n] for n in names], float)


def votes(
    grove: _Grove, trees: Mapping[int, Mapping[int, int]], ignore: Collection[str], chosen: Thresholds
) -> direction.Votes:
    """What speaks for each model as the root, from every source that is not to be ignored."""
    kin, roots = grove.kin, sorted(trees)
    found = direction.Votes(chosen.root)
    if "centrality" not in ignore:
        found.add("centrality", direction.centrality(unmerge.distances(kin.g), roots))
        found.add("degree", {r: float(sum(p == r for p in tree.values())) for r, tree in trees.items()})
    if "turns" not in ignore:
        whole = grove.table.sum(0)
        found.add("turns", {r: direction.agreement(tree, whole, kin.entries) for r, tree in trees.items()})
    if "growth" not in ignore:
        seen = unmerge.distances(kin.g), kin.squares, kin.rounding, kin.entries
        found.add("growth", {r: direction.growth(tree, *seen) for r, tree in trees.items()})
    if kin.known:
        lines = {r: {c: [p] for c, p in tree.items()} | dict(grove.merges) for r, tree in trees.items()}
        found.add("known", {r: direction.precedence(above, kin.known) for r, above in lines.items()})
    return found
