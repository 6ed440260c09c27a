"""Predicted transfer, before any training: an adapter trained on model X, applied to model Y. Read are the family tree
and the distances between models, nothing else: no name, no picture, no metadata.

An adapter moves X to its target T. On Y that gives Y + (T - X) = T + (Y - X). So Y misses the target by Y - X:
STRENGTH falls with the distance of X and Y. And Y - X carries, of Y's style vector (the way Y - R from its tree's first
model R), the share that X lacks, 1 - <X - R, Y - R> / ||Y - R||^2: so much of Y's own style comes through, RETENTION.
This is the "style vector" of alea31415's notes on LoRA transfer (2023) in one line of algebra.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import exp, sqrt
from pathlib import Path
from typing import TYPE_CHECKING

import networkx as nx
import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import squareform

from lineage.cluster_result import ClusterResult, Edge
from lineage.errors import LineageError
from lineage.predict_result import Constants, Features, Prediction
from lineage.prediction_words import (
    ANCESTOR,
    COUSIN,
    DESCENDANT,
    KIN,
    LOSES,
    MERGE,
    OTHER_ROOT,
    PERMUTED,
    SAME,
    SIBLING,
    STRANGERS,
    WEAK,
    WORKS,
    Way,
    reason,
)

if TYPE_CHECKING:
    from lineage.gram import Gram

NO_KIN = ("component", "permuted")  # relations that carry no training from one model to the other
FARTHEST = 2.0  # relative distance that stands for what cannot be compared
MANY_STEPS = 99  # steps that stand for no way

Array = NDArray[np.float64]


CONSTANTS = Constants(
    scale=0.064,
    weak=0.4,
    loses=0.25,
    source="the scale is fitted to four miniature worlds, not to Stable Diffusion; the limits are chosen",
)
"""scale: least squares of lift at weight 0.65 over the pairs of one root in the quick worlds 0 and 1 and the small
worlds 0 and 1, each world weighing the same (0.057 to 0.070 with one of them left out)."""


BASELINES: dict[str, Callable[[Features], float]] = {
    "constant": lambda f: 0.0,
    "weight cosine": lambda f: 1 - _far(f) ** 2 / 2,  # exact where norms are equal
    "delta cosine": lambda f: f.cosine,
    "minus distance": lambda f: -_far(f),
    "tree distance": lambda f: -float(MANY_STEPS if f.steps is None else f.steps),
}
"""Plain predictors over the same features, larger for more."""


def _far(f: Features) -> float:
    return FARTHEST if f.distance is None else f.distance


def code_hash() -> str:
    """sha256 of this file's text: another predictor has another one. Wording is not part of it."""
    return hashlib.sha256(Path(__file__).read_text(encoding="utf-8").encode()).hexdigest()


@dataclass(frozen=True)
class FamilyTree:
    """All that a prediction reads. squares: (n, n) squared relative distances, nan where models cannot be compared.
    edges: those found in weights; roots: model -> first model of its tree."""

    names: tuple[str, ...]
    squares: Array
    edges: tuple[Edge, ...]
    roots: dict[str, str]

    @cached_property
    def at(self) -> dict[str, int]:
        """Model -> its row."""
        return {name: i for i, name in enumerate(self.names)}

    @cached_property
    def descent(self) -> nx.DiGraph:
        """Parent -> child, where that order is known."""
        graph = nx.DiGraph()
        graph.add_nodes_from(sorted(self.names))
        graph.add_edges_from((e.parent, e.child, {"edge": e}) for e in self.edges if _kin(e) and e.directed)
        return graph

    @cached_property
    def ways(self) -> nx.Graph:
        """Models connected by training; a part of a tree that hangs from nothing known hangs from its root, unless it
        grew from a permuted copy."""
        graph = nx.Graph()
        graph.add_nodes_from(sorted(self.names))
        graph.add_edges_from((e.parent, e.child, {"confidence": e.confidence}) for e in self.edges if _kin(e))
        copies = {e.child for e in self.edges if e.relation == "permuted"}
        for part in list(nx.connected_components(graph)):
            roots = {self.roots[name] for name in part & self.roots.keys()}
            if not part & (roots | copies):
                graph.add_edges_from((min(part), root) for root in roots)
        return graph

    @cached_property
    def frames(self) -> dict[str, frozenset[str]]:
        """Model -> those whose weights mean the same as its own, entry by entry."""
        return {name: frozenset(group) for group in nx.connected_components(self.ways) for name in group}

    @cached_property
    def reach(self) -> Array:
        """(n,) squared length of each style vector. It starts at the first model of a frame or, where that is in no
        file, at the centre of all that grew from it."""
        reach = np.zeros(len(self.names))
        for frame in set(self.frames.values()):
            members = sorted(frame & self.at.keys())
            rows = [self.at[m] for m in members]
            own, start = self.squares[np.ix_(rows, rows)], self._start(members, frame)
            reach[rows] = np.maximum(own @ start - start @ own @ start / 2, 0)
        return reach

    def _start(self, members: Sequence[str], frame: frozenset[str]) -> Array:
        """The origin as weights of the members, which sum to 1."""
        heads = [m for m in members if self.roots[m] == m]
        heads = heads or [m for m in members if not frame.intersection(self.descent.predecessors(m))]
        chosen = heads if len(heads) == 1 else members
        return np.array([m in chosen for m in members], np.float64) / len(chosen)

    def kin(self, x: str, y: str) -> bool:
        """Whether weights of x mean the same in y."""
        return y in self.frames[x] and not np.isnan(self.square(x, y))

    def square(self, x: str, y: str) -> float:
        """Squared relative distance; nan where they cannot be compared."""
        return float(self.squares[self.at[x], self.at[y]])

    def common(self, x: str, y: str) -> str | None:
        """The nearest model that both descend from."""
        up = self.descent.reverse(copy=False)
        a, b = (nx.single_source_shortest_path_length(up, name) for name in (x, y))
        return min(a.keys() & b.keys(), key=lambda n: (a[n] + b[n], n), default=None)


def _kin(edge: Edge) -> bool:
    return edge.relation not in NO_KIN


def family_tree(found: ClusterResult, grams: Sequence[Gram] = ()) -> FamilyTree:
    """What predictions read of `lineage cluster`'s result; distances from `grams` (each of models that can be compared)
    where they are given. LineageError where there are none: beyond 1,000 models a result keeps none."""
    roots = {m.name: m.root or m.name for m in found.models if m.kind == "model"}
    names = tuple(n for g in grams for n in g.names) or found.distances.models or tuple(roots)
    squares = _measured(grams) if grams else _kept(found)
    if set(names) != set(roots) or len(squares) != len(names):
        raise LineageError(
            f"{found.folder}: the result keeps no distances of all its models; predict from their files."
        )
    return FamilyTree(names, squares, tuple(e for e in found.edges if not e.declared), roots)


def _measured(grams: Sequence[Gram]) -> Array:
    n, start = sum(len(g.names) for g in grams), 0
    squares = np.full((n, n), np.nan)
    for g in grams:
        own = slice(start, start + len(g.names))
        squares[own, own], start = 2 * g.relative() ** 2, own.stop
    return squares


def _kept(found: ClusterResult) -> Array:
    values = np.array([np.nan if v is None else v for v in found.distances.values], np.float64)
    return squareform(values**2, checks=False) if len(values) else np.zeros((1, 1))


def predictions(
    found: FamilyTree | ClusterResult, bases: Sequence[str], models: Sequence[str], constants: Constants = CONSTANTS
) -> tuple[Prediction, ...]:
    """Every base on every model, bases first; see predict_pair."""
    tree = found if isinstance(found, FamilyTree) else family_tree(found)
    return tuple(predict_pair(tree, x, y, constants) for x in bases for y in models)


def predict_pair(tree: FamilyTree, base: str, model: str, constants: Constants = CONSTANTS) -> Prediction:
    """What an adapter trained on `base` will do on `model`. LineageError for names that are no model of the tree."""
    if missing := [name for name in (base, model) if name not in tree.at]:
        raise LineageError(f"{missing[0]!r}: no model of the family tree.")
    way = _way(tree, base, model)
    relation, f = _relation(tree, base, model, way), features(tree, base, model)
    strength = 0.0 if relation in STRANGERS else _strength(f, constants)
    verdict = _verdict(relation, strength, f.lacks, constants)
    words = reason(base, model, relation, verdict, way, f.distance, f.lacks)
    sure = _confidence(tree, base, model)
    return Prediction(base, model, strength, f.lacks, relation, verdict, words, sure, f)


def features(tree: FamilyTree, x: str, y: str) -> Features:
    """Of an adapter trained on x and applied to y."""
    square = tree.square(x, y)
    if not tree.kin(x, y):
        return Features(None if np.isnan(square) else sqrt(square), None)
    xx, yy = (float(tree.reach[tree.at[name]]) for name in (x, y))
    inner = (xx + yy - square) / 2
    return Features(
        distance=sqrt(square),
        steps=_steps(tree, x, y),
        beyond=xx - inner,
        missing=yy - inner,
        lacks=min(1.0, max(0.0, 1 - inner / yy)) if yy > 0 else 0.0,
        cosine=max(-1.0, min(1.0, inner / sqrt(xx * yy))) if xx * yy > 0 else 0.0,
    )


def _strength(f: Features, c: Constants) -> float:
    return exp(-_far(f) / c.scale)


def _verdict(relation: str, strength: float, retention: float, c: Constants) -> str:
    if relation in STRANGERS:
        return relation
    if relation == SAME:
        return WORKS
    return WEAK if strength < c.weak else LOSES if retention < c.loses else WORKS


def _way(tree: FamilyTree, x: str, y: str) -> Way:
    for elder, younger in ((x, y), (y, x)):
        if x != y and nx.has_path(tree.descent, elder, younger):
            line = tuple(nx.shortest_path(tree.descent, elder, younger))
            last: Edge = tree.descent.edges[line[-2], line[-1]]["edge"]
            return Way(line, len(line) == 2 and last.relation == "merge", last.weight)
    return Way(common=tree.common(x, y))


def _relation(tree: FamilyTree, x: str, y: str, way: Way) -> str:
    if x == y or tree.square(x, y) == 0:
        return SAME
    if not tree.kin(x, y):
        return PERMUTED if tree.roots[x] == tree.roots[y] else OTHER_ROOT
    if way.line:
        return MERGE if way.merged else ANCESTOR if way.line[0] == x else DESCENDANT
    if way.common is None:
        return KIN
    return SIBLING if all(tree.descent.has_edge(way.common, name) for name in (x, y)) else COUSIN


def _confidence(tree: FamilyTree, x: str, y: str) -> float | None:
    if not tree.kin(x, y):
        return 1.0
    way = nx.shortest_path(tree.ways, x, y)
    sure: list[float | None] = [tree.ways.edges[step].get("confidence") for step in pairwise(way)]
    return None if None in sure else min([1.0, *(s for s in sure if s is not None)])


def _steps(tree: FamilyTree, x: str, y: str) -> int:
    return len(nx.shortest_path(tree.ways, x, y)) - 1
