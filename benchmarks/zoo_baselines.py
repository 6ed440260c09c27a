"""Rivals of `lineage cluster`, written anew from their papers' descriptions; docstrings say where we had to choose.

All see the same files, those of one architecture at a time. The number of trees is given to each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import networkx as nx
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from torch import Tensor
from zoo_score import Claim

Array = NDArray[np.float64]
LAMBDA = 0.3  # of MoTHer, weight of the direction
RANKED = 4  # matrices whose difference's rank is taken


@dataclass(frozen=True)
class Group:
    """Files of one architecture, name -> tensors (float32), and how many trees they are."""

    models: Mapping[str, Mapping[str, Tensor]]
    trees: int

    @cached_property
    def names(self) -> list[str]:
        return sorted(self.models)

    @cached_property
    def matrices(self) -> list[str]:
        first = self.models[self.names[0]]
        return sorted(n for n, t in first.items() if t.dim() > 1)

    @cached_property
    def flat(self) -> Array:
        """(models, entries)."""
        order = sorted(self.models[self.names[0]])
        return np.stack([torch.cat([self.models[n][k].flatten() for k in order]).double().numpy() for n in self.names])

    @cached_property
    def squared(self) -> Array:
        """Squared L2 distances, from differences to the mean, which keeps the digits of near models."""
        x = self.flat - self.flat.mean(0)
        g = x @ x.T
        own = np.diag(g)
        return np.maximum(own[:, None] + own - 2 * g, 0) * (1 - np.eye(len(x)))

    @cached_property
    def clusters(self) -> list[list[int]]:
        """As many trees as there are, by average linkage of L2 distances."""
        return cut(np.sqrt(self.squared), self.trees)


def cut(d: Array, count: int) -> list[list[int]]:
    """`count` clusters by average linkage of distances (n, n)."""
    if len(d) < 2:
        return [[0]]
    labels = fcluster(linkage(squareform(d, checks=False), "average"), count, "maxclust")
    return [np.flatnonzero(labels == k).tolist() for k in np.unique(labels)]


Found = tuple[list[Claim], list[list[int]]]


def spanning(group: Group) -> Found:
    """Plain minimum spanning tree of L2 distances in each cluster, rooted at its most central model."""
    return _span(group, np.sqrt(group.squared), group.clusters), group.clusters


def _span(group: Group, d: Array, clusters: Sequence[Sequence[int]], root: Callable | None = None) -> list[Claim]:
    claims = []
    for members in clusters:
        graph = nx.Graph()
        graph.add_nodes_from(members)
        graph.add_weighted_edges_from((a, b, d[a, b] + 1e-12) for a in members for b in members if a < b)
        start = root(members) if root else min(members, key=lambda m: float(d[m, members].sum()))
        tree = nx.minimum_spanning_tree(graph)
        claims += [Claim(group.names[a], group.names[b]) for a, b in nx.bfs_edges(tree, start)]
    return claims


def kurtosis(t: Tensor) -> float:
    x = t.double().flatten() - t.double().mean()
    return float((x**4).mean() / (x**2).mean().clamp_min(1e-300) ** 2)


def mother(group: Group, distance: Callable[[Group, Sequence[int]], Array], growing: bool) -> Found:
    """MoTHer (Horwitz, Shul, Hoshen, ICLR 2025): Edmonds on D + lambda mean(D) T, where T is 1 against the direction
    in which kurtosis changes: `growing` from parent to child or falling (the paper ties the sign to the training stage,
    which nobody gives us: both are run). Clusters by L2; kurtosis summed over matrices."""
    claims = []
    score = [sum(kurtosis(group.models[n][k]) for k in group.matrices) for n in group.names]
    for members in group.clusters:
        d = distance(group, members)
        s = np.array([score[m] for m in members]) * (1 if growing else -1)
        cost = d + LAMBDA * d.mean() * (s[:, None] > s[None])
        graph = nx.DiGraph([(a, b, {"weight": float(cost[a, b])}) for a in range(len(members))
                            for b in range(len(members)) if a != b])  # fmt: skip
        if len(members) > 1:
            tree = nx.minimum_spanning_arborescence(graph)
            claims += [Claim(group.names[members[a]], group.names[members[b]]) for a, b in sorted(tree.edges)]
    return claims, group.clusters


def largest_entry(group: Group, members: Sequence[int]) -> Array:
    """Mean over matrices of the largest absolute entry of the difference."""
    d = np.zeros((len(members), len(members)))
    for k in group.matrices:
        x = torch.stack([group.models[group.names[m]][k].flatten() for m in members])
        d += np.stack([(x - row).abs().amax(1).double().numpy() for row in x])
    return d / len(group.matrices)


def rank_of_difference(group: Group, members: Sequence[int]) -> Array:
    """Mean of torch.linalg.matrix_rank of the difference over the RANKED largest matrices (the paper: all layers)."""
    first = group.models[group.names[0]]
    chosen = sorted(group.matrices, key=lambda k: (-first[k].numel(), k))[:RANKED]
    d = np.zeros((len(members), len(members)))
    for k in chosen:
        x = torch.stack([group.models[group.names[m]][k].flatten(1) for m in members])
        for i, row in enumerate(x):
            d[i, i:] += torch.linalg.matrix_rank(x[i:] - row).double().numpy()
    return (d + d.T) / RANKED


def profiles(group: Group) -> Found:
    """TensorLock's steps from weights alone: profile of standard deviation, skewness and kurtosis of every tensor,
    standardised; clusters and spanning tree of profile distances; root is the model of largest spectral entropy
    (Roy & Vetterli's effective rank, mean over matrices). Its steps that read metadata, and its merge detector, which
    starts from model cards, are left out."""
    names = sorted(group.models[group.names[0]])
    rows = np.array([[v for k in names for v in moments(group.models[n][k])] for n in group.names])
    rows = (rows - rows.mean(0)) / np.maximum(rows.std(0), 1e-12)
    d = np.sqrt(((rows[:, None] - rows[None]) ** 2).sum(-1))
    clusters = cut(d, group.trees)
    rank = [np.mean([effective_rank(group.models[n][k]) for k in group.matrices]) for n in group.names]
    return _span(group, d, clusters, lambda members: max(members, key=lambda m: rank[m])), clusters


def moments(t: Tensor) -> tuple[float, float, float]:
    """Standard deviation, skewness, kurtosis."""
    x = t.double().flatten() - t.double().mean()
    deviation = float((x**2).mean().sqrt())
    return deviation, float((x**3).mean()) / max(deviation, 1e-30) ** 3, kurtosis(t)


def effective_rank(w: Tensor) -> float:
    s = torch.linalg.svdvals(w.flatten(1))
    p = s / s.sum().clamp_min(1e-30)
    return float(torch.exp(-(p * p.clamp_min(1e-30).log()).sum()))


def asimilarity(group: Group) -> Found:
    """ASimilarityCalculatior: the answers of attention layers (for networks without: of matrices) to one random input,
    compared by cosine; 8 layers at most. It gives one number per pair, so the tree is that of 1 - similarity."""
    g = torch.Generator().manual_seed(114514)
    stems = [k.removesuffix(".q.weight") for k in group.matrices if k.endswith(".q.weight")]
    answers = [_attention(group, stem, g) for stem in stems] or [_linear(group, k, g) for k in group.matrices[:8]]
    similar = np.mean([_cosine(a) for a in answers[:8]], 0)
    d = np.maximum(1 - similar, 0) * (1 - np.eye(len(similar)))
    clusters = cut(d, group.trees)
    return _span(group, d, clusters), clusters


def _attention(group: Group, stem: str, g: torch.Generator) -> Tensor:
    """(models, tokens, width): attention of `stem` on random tokens."""
    q, k, v = (torch.stack([group.models[n][f"{stem}.{x}.weight"] for n in group.names]) for x in "qkv")
    x = torch.randn(32, q.shape[-1], generator=g)
    weights = torch.softmax((x @ q.mT) @ (x @ k.mT).mT, -1)
    return weights @ (x @ v.mT)


def _linear(group: Group, key: str, g: torch.Generator) -> Tensor:
    w = torch.stack([group.models[n][key].flatten(1) for n in group.names])
    return torch.randn(32, w.shape[-1], generator=g) @ w.mT


def _cosine(answers: Tensor) -> Array:
    """(models, models) mean cosine of the answers (models, tokens, width)."""
    x = torch.nn.functional.normalize(answers.double(), dim=-1)
    return torch.einsum("mtw,ntw->mn", x, x).numpy() / answers.shape[1]


BASELINES: dict[str, Callable[[Group], Found]] = {
    "spanning tree (L2)": spanning,
    "MoTHer, largest entry, kurtosis grows": lambda g: mother(g, largest_entry, True),
    "MoTHer, largest entry, kurtosis falls": lambda g: mother(g, largest_entry, False),
    "MoTHer, matrix_rank, kurtosis grows": lambda g: mother(g, rank_of_difference, True),
    "MoTHer, matrix_rank, kurtosis falls": lambda g: mother(g, rank_of_difference, False),
    "TensorLock, weights only": profiles,
    "ASimilarity": asimilarity,
}
