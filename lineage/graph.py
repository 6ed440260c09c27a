"""Trees of descent: the likeliest one, given how far models are apart part by part and which of them are merges."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import networkx as nx
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Node = TypeVar("Node", int, str)
FAR = 1e6  # cost of what cannot be
ANEW = 5e7  # pairs that are looked at to find a tree anew without its loops, before what is left of them is only moved
EQUAL = 1e-9  # of the mean squared distance of a part: models nearer than that are equal there


def spanning_tree(d: Array, members: Sequence[int]) -> list[tuple[int, int]]:
    """Minimum spanning tree of `members` by squared distances (n, n): pairs, smaller index first, sorted. O(m^2)."""
    left = sorted(members)
    if not left:
        return []
    first, left = left[0], np.array(left[1:], int)
    nearest, via = d[first, left].copy(), np.full(len(left), first)
    edges = []
    while len(left):
        at = int(np.argmin(nearest))
        new, old = int(left[at]), int(via[at])
        edges.append((min(new, old), max(new, old)))
        left, nearest, via = np.delete(left, at), np.delete(nearest, at), np.delete(via, at)
        closer = d[new, left] < nearest
        nearest[closer], via[closer] = d[new, left][closer], new
    return sorted(edges)


def cost(table: Iterable[Array], sizes: Array) -> Array:
    """(n, n) mean over entries of the log variance of the increment between two models: minus twice the likelihood of
    one having grown out of the other, every part's variance being its own. 0 on the diagonal.

    table: (n, n) inner products of each part; sizes: (parts,) entries. Parts where all are equal tell nothing."""
    total: Any = 0.0
    for g, size in zip(table, sizes, strict=True):
        own = np.diag(g)
        d = np.maximum(own[:, None] + own - 2 * g, 0)
        total = total + (size * np.log(d / d.mean() + EQUAL) if d.any() else np.zeros_like(d))
    np.fill_diagonal(total, 0)
    return total / sizes.sum()


def arborescence(cost: Array, root: int) -> dict[int, int]:
    """child -> parent of the cheapest tree that grows from the root (Chu & Liu 1965; Edmonds 1967). cost: (n, n), of a
    parent (row) and its child; finite."""
    return _arborescence(cost.copy(), root)


def _arborescence(cost: Array, root: int) -> dict[int, int]:
    """Uses up `cost`: of thousands of models every copy counts."""
    np.fill_diagonal(cost, FAR)
    best = cost.argmin(0)
    best[root] = -1
    loops = _loops(best)
    parent = {child: int(p) for child, p in enumerate(best) if p >= 0}
    if not loops:
        return parent
    inside = sorted(i for loop in loops for i in loop)
    cost[:, inside] -= cost[best[inside], inside]  # what is left is beyond what a node of a loop costs inside it
    members = [*loops, *([i] for i in sorted({*range(len(cost))}.difference(inside)))]
    order, starts = np.concatenate(members), np.cumsum([0, *map(len, members[:-1])])
    small = np.minimum.reduceat(np.minimum.reduceat(cost[np.ix_(order, order)], starts, 0), starts, 1)
    for into, out in _arborescence(small, next(k for k, m in enumerate(members) if root in m)).items():
        first, last = members[out][0], members[into][0]
        if len(members[out]) > 1 or len(members[into]) > 1:
            ways = cost[np.ix_(members[out], members[into])]
            i, j = np.unravel_index(ways.argmin(), ways.shape)
            first, last = members[out][i], members[into][j]
        parent[last] = first
    return parent


def _loops(parent: NDArray[np.intp]) -> list[list[int]]:
    """The loops of a map node -> parent (-1: none)."""
    seen = np.full(len(parent), -1)
    found = []
    for start in range(len(parent)):
        path, node = [], start
        while node >= 0 and seen[node] < 0:
            seen[node] = start
            path.append(node)
            node = int(parent[node])
        if node >= 0 and seen[node] == start:
            found.append(path[path.index(node) :])
    return found


def descent(cost: Array, root: int, merges: Mapping[int, Sequence[int]]) -> dict[int, int]:
    """child -> parent of the cheapest tree from the root in which merges keep the parents they have (they are left out
    of what is returned) and no model descends from itself, through whatever parent. cost: (n, n). Where many would, the
    last of them are hung elsewhere and the rest stays as it is."""
    cost = cost.copy()
    for merge, parents in merges.items():
        cost[:, merge] = FAR
        cost[list(parents), merge] = -FAR
        cost[merge, list(parents)] = FAR
    above = _above(arborescence(cost, root), merges, root)
    for _ in range(int(ANEW / len(cost) ** 2)):
        faulty = _faulty(cost, above, merges)
        if not faulty:
            break
        for parent, child, _ in faulty:
            cost[parent, child] = FAR
        above = _above(arborescence(cost, root), merges, root)
    while faulty := _faulty(cost, above, merges):
        _, child, instead = faulty[0]  # one at a time: two moves could make a loop together
        above[child] = (instead,)
    return {child: p for child, (p, *_) in sorted(above.items()) if child not in merges}


def _above(grown: Mapping[int, int], merges: Mapping[int, Sequence[int]], root: int) -> dict[int, Sequence[int]]:
    """child -> all its parents."""
    above: dict[int, Sequence[int]] = {child: (p,) for child, p in grown.items() if child not in merges}
    return above | {m: tuple(p) for m, p in merges.items() if m != root}


def _faulty(
    cost: Array, above: Mapping[int, Sequence[int]], merges: Mapping[int, Sequence[int]]
) -> list[tuple[int, int, int]]:
    """Of a loop in each tangle of models that descend from themselves, the (parent, child) that loses least when the
    child hangs from what does not descend from it, and that best other parent."""
    drawn = nx.DiGraph((p, child) for child, parents in sorted(above.items()) for p in parents)
    tangles = [drawn.subgraph(sorted(t)) for t in nx.strongly_connected_components(drawn) if len(t) > 1]
    loops = [[edge for edge in nx.find_cycle(t, min(t)) if edge[1] not in merges] for t in tangles]

    def moved(parent: int, child: int) -> tuple[float, int, int, int]:
        others = sorted({*range(len(cost))} - nx.descendants(drawn, child) - {child})
        instead = others[int(cost[others, child].argmin())]
        return float(cost[instead, child] - cost[parent, child]), parent, child, instead

    return sorted(min(moved(*edge) for edge in loop)[1:] for loop in loops if loop)


def ancestors(above: Mapping[Node, Sequence[Node]], node: Node) -> set[Node]:
    """Every model a model descends from, itself included. above: child -> its parents."""
    seen: set[Node] = set()
    open_ = [node]
    while open_:
        at = open_.pop()
        if at not in seen:
            seen.add(at)
            open_ += above.get(at, [])
    return seen
