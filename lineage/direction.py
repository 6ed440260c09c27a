"""Which model of a tree came first. One root orients every edge, so all the evidence goes into that one choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lineage.graph import ancestors, rooted

Array = NDArray[np.float64]


@dataclass
class Votes:
    """Log-odds that each model (index) is the root, by source; `weights` of the sources are chosen on other roots."""

    by_source: dict[str, dict[int, float]] = field(default_factory=dict)

    def add(self, source: str, scores: Mapping[int, float]) -> None:
        self.by_source[source] = dict(scores)

    def total(self, members: Sequence[int]) -> dict[int, float]:
        return {m: sum(s.get(m, 0.0) for s in self.by_source.values()) for m in members}

    def probabilities(self, members: Sequence[int]) -> dict[int, float]:
        """Softmax of the totals: how sure each member is the root."""
        total = self.total(members)
        top = max(total.values())
        raised = {m: float(np.exp(total[m] - top)) for m in members}
        return {m: r / sum(raised.values()) for m, r in raised.items()}


def ages(models: Sequence[Mapping[str, Tensor]], names: Sequence[str]) -> Array | None:
    """(n,) how far each model's one-dimensional parameters are from their usual start, 0 for biases and 1 for the
    scales of norms: the mean over parameters of squared distance over the largest one. None where none started so."""
    shares = []
    for name in names:
        stack = torch.stack([m[name].double().flatten() for m in models])
        stack = stack - 1 if float(stack.mean()) > 0.5 else stack
        far = stack.square().sum(1)
        if far.max() > 0 and far.min() < 0.8 * far.max():
            shares.append((far / far.max()).numpy())
    return np.mean(shares, 0) if shares else None


def centrality(d: Array, members: Sequence[int]) -> dict[int, float]:
    """Minus the logarithm of the mean distance to the other members. d: (n, n) squared distances."""
    rows = np.sqrt(d[np.ix_(members, members)]).mean(1)
    return {m: -float(np.log(max(r, 1e-300))) for m, r in zip(members, rows, strict=True)}


def degrees(edges: Sequence[tuple[int, int]], members: Sequence[int]) -> dict[int, float]:
    """How many neighbours each member has in the tree."""
    return {m: float(sum(m in edge for edge in edges)) for m in members}


def agreement(edges: Sequence[tuple[int, int]], g: Array, members: Sequence[int]) -> dict[int, float]:
    """For each member as root, the mean cosine of all pairs of increments, each taken away from the root: training
    moves weights in partly the same directions, whatever it starts from. g: (n, n) inner products."""
    if len(edges) < 2:
        return dict.fromkeys(members, 0.0)
    rows = np.zeros((len(edges), len(g)))
    for i, (a, b) in enumerate(edges):
        rows[i, a], rows[i, b] = -1, 1
    inner = rows @ g @ rows.T
    norm = np.sqrt(np.maximum(np.diag(inner), 1e-300))
    cosine = inner / norm[:, None] / norm[None]
    scores = {}
    for root in members:
        parent = rooted(edges, root)
        sign = np.array([1.0 if parent.get(b) == a else -1.0 for a, b in edges])
        scores[root] = float((sign @ cosine @ sign - len(edges)) / (len(edges) * (len(edges) - 1)))
    return scores


def precedence(
    edges: Sequence[tuple[int, int]], known: Sequence[tuple[int, int, float]], members: Sequence[int]
) -> dict[int, float]:
    """For each member as root, the log-odds of known pairs (earlier, later, log-odds): added where the earlier lies on
    the later's way to the root, taken off where it is the other way round."""
    scores = {}
    for root in members:
        above = {child: [parent] for child, parent in rooted(edges, root).items()}
        line = {m: ancestors(above, m) for m in members}
        scores[root] = sum(
            w * ((a in line[b]) - (b in line[a])) for a, b, w in known if a in line and b in line and a != b
        )
    return scores


def below(parent: Mapping[int, int], chances: Mapping[int, float]) -> dict[int, float]:
    """Probability that the true root lies at or below each child, so that its edge points the other way."""
    held = dict(chances)
    for child in reversed(parent):
        held[parent[child]] += held[child]
    return {child: held[child] for child in parent}
