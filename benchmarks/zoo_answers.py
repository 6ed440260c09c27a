"""Answers of `lineage cluster` and of the baselines about one folder of the zoo."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

from safetensors.torch import load_file
from zoo_baselines import BASELINES, Group
from zoo_score import Answer, Claim, MergeClaim
from zoo_truth import Truth

from lineage.cluster_result import ClusterResult


def ours(folder: Path, cache: Path, ignore: Collection[str] = (), sketch: bool | None = None) -> Answer:
    """What `lineage cluster` says, metadata off."""
    from lineage import cluster

    began = time.perf_counter()
    found = cluster(folder, metadata=False, cache=cache, ignore=ignore, sketch=sketch)
    return of_result(found, time.perf_counter() - began)


def of_result(found: ClusterResult, seconds: float = 0.0) -> Answer:
    """Children of unobserved ancestors hang from the nearest ancestor that is a file; adapters are not in the zoo."""
    unseen = {u.name for u in found.unobserved}
    above: dict[str, list[str]] = {}
    for e in found.edges:
        above.setdefault(e.child, []).append(e.parent)

    def files(name: str) -> list[str]:
        return [f for p in above.get(name, []) for f in files(p)] if name in unseen else [name]

    claims = [
        Claim(p, e.child, e.relation, e.directed, e.confidence)
        for e in found.edges
        if e.child not in unseen
        for p in files(e.parent)
    ]
    merges = {
        m.child: MergeClaim({p.name: (p.weight, p.low, p.high) for p in m.parents}, m.unseen_parent)
        for m in found.merges
    }
    tree = {m.name: m.root or m.name for m in found.models}
    return Answer("lineage", claims, tree, merges, frozenset(r.name for r in found.roots), seconds)


def retold(answer: Answer, names: Mapping[str, str]) -> Answer:
    """The same answer in other names."""
    return Answer(
        answer.method,
        [replace(c, parent=names[c.parent], child=names[c.child]) for c in answer.claims],
        {names[n]: t for n, t in answer.tree.items()},
        {names[c]: MergeClaim({names[p]: w for p, w in m.parents.items()}, m.unseen)
         for c, m in answer.merges.items()},
        frozenset(names[r] for r in answer.roots if r in names),
        answer.seconds,
    )  # fmt: skip


def theirs(method: str, folder: Path, truth: Truth) -> Answer:
    """What a baseline says of each architecture's files, together."""
    began = time.perf_counter()
    claims, tree, roots = [], {}, set()
    for arch, group in groups(folder, truth).items():
        found, clusters = BASELINES[method](group)
        claims += found
        tree |= {group.names[m]: f"{arch} {i}" for i, members in enumerate(clusters) for m in members}
        roots |= set(group.names) - {c.child for c in found}
    return Answer(method, claims, tree, roots=frozenset(roots), seconds=time.perf_counter() - began)


def groups(folder: Path, truth: Truth) -> dict[str, Group]:
    """Architecture -> its files and the true number of trees. Identical files are seen once."""
    by_arch: dict[str, list[str]] = {}
    for name in truth.visible:
        by_arch.setdefault(truth.of(name)["arch"], []).append(name)
    return {
        arch: Group(
            {n: {k: t.float() for k, t in load_file(folder / f"{n}.safetensors").items()} for n in names},
            len({truth.of(n)["tree"] for n in names}),
        )
        for arch, names in sorted(by_arch.items())
    }
