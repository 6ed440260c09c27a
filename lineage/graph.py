"""Fine-tune trees from squared distances that add along paths: who hangs from whom, and where a file is missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import networkx as nx
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Node = TypeVar("Node", int, str)


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


def turn(g: Array, at: int, a: int, b: int) -> float:
    """Cosine of the increments at -> a and at -> b from inner products (n, n): 0 where squared distances add, positive
    where both share a part, as children of a node no file occupies do. 0 for an increment of length 0."""
    u, v = g[a, a] - 2 * g[a, at] + g[at, at], g[b, b] - 2 * g[b, at] + g[at, at]
    inner = g[a, b] - g[a, at] - g[at, b] + g[at, at]
    return float(inner / np.sqrt(u * v)) if u > 0 and v > 0 else 0.0


def rooted(edges: Sequence[tuple[int, int]], root: int) -> dict[int, int]:
    """child -> parent of a tree, seen from its root."""
    tree = nx.Graph(list(edges))
    tree.add_node(root)
    return {child: parent for parent, child in nx.bfs_edges(tree, root, sort_neighbors=sorted)}


def share(g: Array, start: int, via: int, node: int) -> float:
    """How much of the increment start -> via a node holds: its coefficient in the node's own way from the start. About
    1 where the node descends from `via`, about 0 where it does not; what all training has in common adds to both."""
    inner = g[node, via] - g[node, start] - g[start, via] + g[start, start]
    return float(inner / max(g[via, via] - 2 * g[via, start] + g[start, start], 1e-300))


def adopt(
    parent: Mapping[int, int], hosts: Mapping[int, Sequence[int]], g: Array, low: float, high: float
) -> dict[int, int]:
    """Hang models from merges that are nearer than their parents and whose increment they hold whole (share from low
    to high). hosts: merge -> its parents; no model hangs from its own descendant. g: (n, n) inner products."""
    above: dict[int, Sequence[int]] = {child: [p] for child, p in parent.items()} | dict(hosts)
    moved = dict(parent)
    for child in sorted(parent):
        shares = {host: share(g, parent[child], host, child) for host in sorted(hosts)}
        fit = [h for h, s in shares.items() if low < s < high and child not in ancestors(above, h)]
        if fit:
            moved[child] = min(fit, key=lambda h: g[h, h] - 2 * g[h, child])
            above[child] = [moved[child]]
    return moved


def between(g: Array, members: Sequence[int], merges: Mapping[int, Sequence[int]], threshold: float) -> list[int]:
    """Members that lie between two parents of one merge (their turn is below -threshold), as what descends from the
    merge does and nothing else: in a spanning tree they would join the parents."""
    found = []
    for node in members:
        ends = [(a, b) for parents in merges.values() if node not in parents for a in parents for b in parents if a < b]
        if any(turn(g, node, a, b) < -threshold for a, b in ends):
            found.append(node)
    return found


def attach(parent: Mapping[int, int], late: Sequence[int], hosts: Sequence[int], d: Array) -> dict[int, int]:
    """Hang late models one by one, the nearest first, from hosts or from those hung before. d: (n, n)."""
    grown, left, there = dict(parent), sorted(late), sorted(hosts)
    while left and there:
        child, host = min(((c, h) for c in left for h in there), key=lambda pair: (d[pair], pair))
        grown[child] = host
        left.remove(child)
        there.append(child)
    return grown


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
