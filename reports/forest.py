"""The order of the family tree's drawing: every node once, in columns, below its main parent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lineage.cluster_result import ClusterResult, Edge
from lineage.errors import LineageError


@dataclass(frozen=True)
class Node:
    """`kind`: "model", "adapter" or "unobserved". `parent`: index of the node it hangs from, -1 for a root; always
    earlier in the list. `column`: right of all its parents. `family`: index by falling size, -1 without one."""

    name: str
    kind: str
    family: int
    column: int
    parent: int


def family_order(result: ClusterResult) -> dict[str, int]:
    """Family name -> index: largest first, then by name. Colours follow it."""
    ranked = sorted(result.families, key=lambda f: (-len(f.members), f.name))
    return {f.name: i for i, f in enumerate(ranked)}


def forest(result: ClusterResult) -> list[Node]:
    """All models and unobserved ancestors, depth first: the largest tree first, families together, then by name."""
    names, kinds, families = _people(result)
    placed = _placed(names, _links(result.edges, {name: i for i, name in enumerate(names)}))
    parents = [parent for _, parent in placed]
    return [
        Node(names[i], kinds[i], families[i], placed[i][0], at)
        for i, at in _preorder(parents, [(families[i] if families[i] >= 0 else 1 << 30) for i in range(len(names))])
    ]


def _people(result: ClusterResult) -> tuple[list[str], list[str], list[int]]:
    index = family_order(result)
    rows = {m.name: (m.name, m.kind, index.get(m.family or "", -1)) for m in result.models}
    rows |= {u.name: (u.name, "unobserved", -1) for u in result.unobserved}
    names, kinds, families = zip(*(rows[name] for name in sorted(rows)), strict=True) if rows else ((), (), ())
    return list(names), list(kinds), list(families)


def _links(edges: Sequence[Edge], index: dict[str, int]) -> dict[int, list[tuple[tuple, int]]]:
    """Child -> [(rank, parent)], best first: large weights and sure edges lead. A swapped component only counts where
    nothing else says where a model belongs."""
    found: dict[int, list[tuple[tuple, int]]] = {}
    for i, e in enumerate(edges):
        for name in (e.parent, e.child):
            if name not in index:
                raise LineageError(f"result.edges[{i}]: no model is named {name!r}. Was the file edited? Run it again.")
        if e.parent != e.child:
            weight = 1.0 if e.weight is None else e.weight
            rank = (e.relation == "component", -weight, -e.confidence, index[e.parent])
            found.setdefault(index[e.child], []).append((rank, index[e.parent]))
    return {child: [x for x in sorted(links) if x[0][0] == min(links)[0][0]] for child, links in found.items()}


def _placed(names: list[str], links: dict[int, list[tuple[tuple, int]]]) -> list[tuple[int, int]]:
    """(column, main parent) of each node; parents come first, and a circle is broken at its first name."""
    waiting = {i: len({p for _, p in links.get(i, [])}) for i in range(len(names))}
    children: dict[int, set[int]] = {}
    for child, rows in links.items():
        for _, parent in rows:
            children.setdefault(parent, set()).add(child)
    placed: dict[int, tuple[int, int]] = {}
    ready = [i for i, n in waiting.items() if n == 0]
    while len(placed) < len(names):
        at = ready.pop() if ready else min(i for i in waiting if i not in placed)
        if at in placed:
            continue
        known = [parent for _, parent in links.get(at, []) if parent in placed]
        placed[at] = (1 + max((placed[p][0] for p in known), default=-1), known[0] if known else -1)
        for child in children.get(at, ()):
            waiting[child] -= 1
            if waiting[child] == 0:
                ready.append(child)
    return [placed[i] for i in range(len(names))]


def _preorder(parents: list[int], families: list[int]) -> list[tuple[int, int]]:
    """(old index, new index of its parent), depth first."""
    below: dict[int, list[int]] = {}
    for i, parent in enumerate(parents):
        below.setdefault(parent, []).append(i)
    walk = [-1]
    for at in walk:
        walk.extend(below.get(at, ()))
    size = dict.fromkeys(walk, 1)
    for at in reversed(walk[1:]):
        size[parents[at]] += size[at]
    order: list[tuple[int, int]] = []
    stack = [(i, -1) for i in _ranked(below.get(-1, []), families, size, roots=True)]
    while stack:
        at, parent = stack.pop()
        stack.extend((child, len(order)) for child in _ranked(below.get(at, []), families, size))
        order.append((at, parent))
    return order


def _ranked(nodes: list[int], families: list[int], size: dict[int, int], roots: bool = False) -> list[int]:
    """Last first, as a stack takes them."""
    return sorted(nodes, key=lambda i: (0 if roots else families[i], -size[i], i), reverse=True)
