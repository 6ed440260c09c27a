"""What the confidences of `lineage cluster` are made of, fitted on the development half of the zoo and on miniature
worlds, whose models are larger and move further.

`python benchmarks/zoo.py fit --worlds WORLD ...` prints the lines of lineage/thresholds.py: ROOT, the log-odds that
speak for a root (conditional logit, McFadden 1974), `trust`, those of an edge (logistic regression), and MERGE_TRUST,
shares of merge parents that are right.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from zoo_truth import Truth

from lineage import ancestry, cluster
from lineage.cluster_result import ClusterResult
from lineage.thresholds import ROOT

Array = NDArray[np.float64]
RIDGE = 1.0  # half the squared length of weights per standard deviation
SOURCES = [s for s in ROOT if s != "known"]
Ballot = tuple[tuple[str, ...], Array]  # sha256 of the candidates, evidence (candidates, sources)


def fitted(folder: Path, cache: Path, truth: Truth, worlds: Sequence[Path] = ()) -> str:
    """The lines to write into lineage/thresholds.py. worlds: folders of `lineage world`; they count for roots only."""
    found, ballots = gathered(folder, cache)
    ends = {m.sha256 or "" for m in found.models if truth.of(truth.node[m.name])["kind"] == "root"}
    votes = cast(ballots, ends)
    for world in worlds:
        votes += cast(*of_world(world, cache))
    root = dict(zip(SOURCES, conditional_logit(votes), strict=True)) | {"known": ROOT["known"]}
    x, y = edges(found, truth)
    trust = tuple(round(float(w), 2) for w in logistic(x, y))
    lines = [f"ROOT = { ({s: round(float(w), 2) for s, w in root.items()}) }", f"trust = {trust}"]
    return "\n".join([*lines, f"MERGE_TRUST = {shares(found, truth)}"])


def cast(ballots: Sequence[Ballot], ends: Collection[str]) -> list[tuple[Array, int]]:
    """(evidence, which candidate is true) of each tree that has one. ends: sha256 of the true roots."""
    told = [(x, [s in ends for s in names]) for names, x in ballots if len(names) > 1]
    return [(x, true.index(True)) for x, true in told if any(true)]


def of_world(world: Path, cache: Path) -> tuple[list[Ballot], set[str]]:
    """The ballots on a world's models, and its true roots."""
    models = json.loads((world / "truth.json").read_text(encoding="utf-8"))["models"]
    found, ballots = gathered(world / "models", cache)
    roots = {m["name"] for m in models if not m["parents"]}
    return ballots, {m.sha256 for m in found.models if m.name in roots and m.sha256}


def gathered(folder: Path, cache: Path) -> tuple[ClusterResult, list[Ballot]]:
    """The answer about a folder, and what spoke for every candidate root of each tree."""
    ballots: list[Ballot] = []
    original = ancestry.votes

    def watched(grove, trees, ignore, chosen):
        found = original(grove, trees, ignore, chosen)
        names = tuple(grove.kin.prints[r].sha256 for r in sorted(trees))
        ballots.append((names, np.array([[found.by_source[s].get(r, 0.0) for s in SOURCES] for r in sorted(trees)])))
        return found

    ancestry.votes = watched
    try:
        return cluster(folder, metadata=False, cache=cache), ballots
    finally:
        ancestry.votes = original


def conditional_logit(votes: Sequence[tuple[Array, int]]) -> Array:
    """(k,) weights that make the true one of each set of candidates (n, k) likeliest."""
    votes = [(x - x.mean(0), true) for x, true in votes]
    scale = np.mean([x.std(0) for x, _ in votes], 0) + 1e-12

    def loss(w: Array) -> float:
        scores = [(x / scale @ w, true) for x, true in votes]
        return sum(float(np.logaddexp.reduce(s) - s[true]) for s, true in scores) + RIDGE * float(w @ w) / 2

    return minimize(loss, np.zeros(len(scale))).x / scale


def edges(found: ClusterResult, truth: Truth) -> tuple[Array, Array]:
    """(n, 3) constant, log gap and share of trees of each fine-tune edge, and (n,) whether the pair is true."""
    true = {frozenset(pair) for pair in truth.edges}
    rows = []
    for e in found.edges:
        pair = frozenset((truth.node[e.parent], truth.node[e.child]))
        values = {v.source: v.value for v in e.evidence}
        if e.relation in ("finetune", "adapter") and pair not in truth.neutral:
            gap, joined = values["distance"] or 0.0, values["trees"] or 0.0
            rows.append((1.0, float(np.log(max(gap, ancestry.NO_GAP))), joined, float(pair in true)))
    table = np.array(rows)
    return table[:, :3], table[:, 3]


def logistic(x: Array, y: Array) -> Array:
    """(k,) weights of a logistic regression, hardly shrunk."""
    return minimize(
        lambda w: float(np.logaddexp(0, np.where(y > 0, -1, 1) * (x @ w)).sum() + 0.01 * w @ w), np.zeros(x.shape[1])
    ).x


def shares(found: ClusterResult, truth: Truth) -> dict[str, float]:
    """Method -> share of the parents named for such merges that are parents of them: (k + 1) / (n + 2)."""
    counts: dict[str, list[bool]] = {}
    for m in found.merges:
        for p in m.parents:
            pair = truth.node[p.name], truth.node[m.child]
            if frozenset(pair) not in truth.neutral:
                counts.setdefault(m.method, []).append(pair in truth.edges)
    return {method: round((sum(hits) + 1) / (len(hits) + 2), 2) for method, hits in sorted(counts.items())}
