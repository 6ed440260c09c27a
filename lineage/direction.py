"""Which model of a tree came first. One root orients every edge, so all the evidence goes into that one choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lineage.graph import ancestors

Array = NDArray[np.float64]


@dataclass
class Votes:
    """What speaks for each candidate (index) to be the root, by source, and what a unit of it weighs in log-odds."""

    weight: Mapping[str, float]
    by_source: dict[str, dict[int, float]] = field(default_factory=dict)

    def add(self, source: str, scores: Mapping[int, float]) -> None:
        self.by_source[source] = dict(scores)

    def total(self, members: Sequence[int]) -> dict[int, float]:
        weighed = [(self.weight[source], scores) for source, scores in self.by_source.items()]
        return {m: sum(w * scores.get(m, 0.0) for w, scores in weighed) for m in members}

    def probabilities(self, members: Sequence[int]) -> dict[int, float]:
        """Softmax of the totals: how sure each member is the root (conditional logit, McFadden 1974)."""
        total = self.total(members)
        top = max(total.values())
        raised = {m: float(np.exp(total[m] - top)) for m in members}
        return {m: r / sum(raised.values()) for m, r in raised.items()}


def centrality(d: Array, members: Sequence[int]) -> dict[int, float]:
    """Minus the logarithm of the mean distance to the other members. d: (n, n) squared distances."""
    rows = np.sqrt(d[np.ix_(members, members)]).mean(1)
    return {m: -float(np.log(max(r, 1e-300))) for m, r in zip(members, rows, strict=True)}


def cosines(parent: Mapping[int, int], g: Array) -> Array:
    """Cosines of all pairs of increments of a tree (child -> parent). g: (n, n) inner products."""
    children = sorted(parent)
    parents = [parent[c] for c in children]
    inner = g[np.ix_(children, children)] - g[np.ix_(children, parents)] - g[np.ix_(parents, children)]
    inner = inner + g[np.ix_(parents, parents)]
    norm = np.sqrt(np.maximum(np.diag(inner), 1e-300))
    return (inner / norm[:, None] / norm)[np.triu_indices(len(children), 1)]


def agreement(parent: Mapping[int, int], g: Array) -> float:
    """Mean cosine of a tree's increments: training moves weights in partly the same directions, whatever it starts
    from, so they agree most when they lead away from the true root."""
    return float(cosines(parent, g).mean()) if len(parent) > 1 else 0.0


def tangle(parent: Mapping[int, int], g: Array) -> float:
    """Mean squared cosine of a tree's increments: those of the true tree are the most independent."""
    return float((cosines(parent, g) ** 2).mean()) if len(parent) > 1 else 0.0


def precedence(above: Mapping[int, Sequence[int]], known: Sequence[tuple[int, int, float]]) -> float:
    """Log-odds of known pairs (earlier, later, log-odds): added where the later descends from the earlier, taken off
    where it is the other way round. above: child -> its parents."""
    line = {m: ancestors(above, m) for a, b, _ in known for m in (a, b)}
    return float(sum(w * ((a in line[b]) - (b in line[a])) for a, b, w in known if a != b))


def forward(
    parent: int, child: int, trees: Mapping[int, Mapping[int, int]], chances: Mapping[int, float]
) -> tuple[float, float]:
    """(probability that the two are joined, probability that the parent came first if they are), over trees that each
    start from another root. chances: root -> its probability."""
    one = sum(p for root, p in chances.items() if trees[root].get(child) == parent)
    other = sum(p for root, p in chances.items() if trees[root].get(parent) == child)
    joined = one + other
    return joined, one / joined if joined > 0 else 0.5
