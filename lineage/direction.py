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
WINDOW = 2e-6  # of child / parent - 1: entries without a gradient decay by one factor, up to float32 rounding
SAMPLE = 2**20  # entries per model pair looked at


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


def decay(
    parent: Mapping[str, Tensor], child: Mapping[str, Tensor], names: Sequence[str]
) -> tuple[float, float] | None:
    """(common factor - 1, share of entries that have it) among entries that changed by one factor without a gradient:
    weight decay shrinks them, so the factor is below 1 from parent to child. None where no factor stands out."""
    ratios = []
    for name in names:
        p, c = parent[name].flatten()[:SAMPLE].double(), child[name].flatten()[:SAMPLE].double()
        used = p.abs() > 1e-3 * p.abs().mean()
        ratios.append((c[used] / p[used] - 1).numpy())
    ratio = np.sort(np.concatenate(ratios)) if ratios else np.zeros(0)
    ratio = ratio[(np.abs(ratio) > 5 * WINDOW) & (np.abs(ratio) < 0.5)]
    if len(ratio) < 200:
        return None
    last = np.searchsorted(ratio, ratio + WINDOW, "right")
    counts = last - np.arange(len(ratio))
    at = int(counts.argmax())
    wide = np.searchsorted(ratio, [ratio[at] - 50 * WINDOW, ratio[at] + 51 * WINDOW])
    expected = (wide[1] - wide[0] - counts[at]) / 100
    if counts[at] < max(20.0, 8 * expected):
        return None
    return float(ratio[at] + WINDOW / 2), float(counts[at] / len(ratio))


def centrality(edges: Sequence[tuple[int, int]], mass: Mapping[int, int]) -> dict[int, float]:
    """Log-likelihood of each node as the first of a tree that grew by uniform attachment (rumor centrality, Shah &
    Zaman 2011): minus the sum of the logarithms of all subtrees' sizes. mass: node -> files it stands for."""
    scores = {}
    for root in mass:
        parent = rooted(edges, root)
        size = dict(mass)
        for child in reversed(parent):  # breadth first, so children come after their parents
            size[parent[child]] += size[child]
        scores[root] = -float(sum(np.log(s) for s in size.values()))
    return scores


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


def descent(edges: Sequence[tuple[int, int]], age: Array, members: Sequence[int]) -> dict[int, float]:
    """For each member as root, the mean over edges of the sign of the growth in age from parent to child."""
    if not edges:
        return dict.fromkeys(members, 0.0)
    return {
        root: float(np.mean([np.sign(age[c] - age[p]) for c, p in rooted(edges, root).items()])) for root in members
    }


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
