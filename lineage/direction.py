"""Which model of a tree came first. One root orients every edge, so all the evidence goes into that one choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lineage.graph import ancestors

Array = NDArray[np.float64]
CHANCE = 3.0  # standard deviations of a random cosine
FREE = 0.1  # share of the steps that neither decay nor gradients along the weights disturb
VISIBLE = 4.0  # squared length of a step over the rounding of its ends, for its effect on norms to be told


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


def _increments(parent: Mapping[int, int], g: Array) -> Array:
    """Inner products of a tree's increments."""
    children = sorted(parent)
    parents = [parent[c] for c in children]
    inner = g[np.ix_(children, children)] - g[np.ix_(children, parents)] - g[np.ix_(parents, children)]
    return inner + g[np.ix_(parents, parents)]


def agreement(parent: Mapping[int, int], g: Array, entries: int) -> float:
    """Sign test of the cosines of a tree's increments, in standard deviations: training moves weights in partly the
    same directions, whatever it starts from, so they agree most when they lead away from the true root. Cosines as
    random steps of so many entries have do not count."""
    inner = _increments(parent, g)
    norm = np.sqrt(np.maximum(np.diag(inner), 1e-300))
    signs = np.sign(inner) * (np.abs(inner) > CHANCE / np.sqrt(entries) * norm[:, None] * norm)
    pairs = len(signs) * (len(signs) - 1) / 2
    return float((signs.sum() - np.trace(signs)) / 2 / np.sqrt(pairs)) if pairs else 0.0


def growth(parent: Mapping[int, int], d: Array, squares: Array, noise: Array, entries: int) -> float:
    """Log-odds of a tree's edges against their reversal, from the norms: a step at a right angle to the weights it
    starts from adds its own square to theirs (0 as the outgroup of all models). Decay of weights, or gradients along
    them, changes norms by far more than that; such steps tell nothing.

    d: (n, n) squared distances; squares, noise: (n,) ||W||^2 and rounding energy; entries: of a model, by which the
    chance is told that a random step is at no right angle."""
    edges = [(p, c) for c, p in sorted(parent.items()) if d[p, c] > VISIBLE * (noise[p] + noise[c])]
    gained = np.array([(squares[c] - squares[p]) / d[p, c] for p, c in edges])
    spread = np.sqrt([0.09 + 4 * squares[p] / d[p, c] / entries for p, c in edges])
    return float(np.log(_gain_density(gained, spread) / _gain_density(-gained, spread)).sum())


def _gain_density(gained: Array, spread: Array) -> Array:
    """Of (||child||^2 - ||parent||^2) / ||child - parent||^2: near 1 for a share of the steps, anything for others."""
    free = np.exp(-(((gained - 0.8) / spread) ** 2) / 2) / (spread * np.sqrt(2 * np.pi))
    return FREE * free + (1 - FREE) * 5 / (10 + np.abs(gained)) ** 2


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
