"""What was found in the trees of a folder, as the records of a ClusterResult."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import squareform

from lineage import exact
from lineage.cluster_result import (
    ALL_DISTANCES,
    ALL_PAIRS,
    NEAREST,
    Affinity,
    BlockSimilarity,
    Choice,
    ClusterModel,
    ClusterResult,
    Distances,
    Edge,
    Evidence,
    Family,
    FoundMerge,
    MergeParent,
    PairBlocks,
    Root,
    Skipped,
    Unobserved,
)
from lineage.copies import donors
from lineage.evidence import Declared, not_from_scratch, reconcile
from lineage.families import affinities, families
from lineage.fingerprint import Fingerprint
from lineage.folder import Folder, declared_parent
from lineage.found_recipe import toml
from lineage.gram import Gram
from lineage.hashing import own_short_hash
from lineage.kin import Merged
from lineage.results import Interval, provenance
from lineage.thresholds import CHOSEN

if TYPE_CHECKING:
    from lineage.clustering import Model, Tree

Array = NDArray[np.float64]
PARTS = ("text_encoder", "text_encoder_2", "vae")  # what is taken from another model whole


@dataclass(frozen=True)
class Found:
    """All that is known when the inference is done."""

    folder: Folder
    models: Sequence[Model]
    trees: Sequence[Tree]
    choice: exact.Choice
    said: Sequence[Declared]
    days: Mapping[str, date]
    min_confidence: float
    seed: int
    seconds: float
    added: str | None = None
    metadata: bool = True


def records(found: Found) -> ClusterResult:
    """The result: every list sorted by name."""
    rows = [_tree_records(tree, found) for tree in found.trees]
    root_of = {m.name: m.root for row in rows for m in row.models}
    drawn = [e for row in rows for e in row.edges]
    edges, against = reconcile([*drawn, *_swaps(found, drawn)], found.said, root_of)
    claims = {m.name: m.item.declared.get("scratch", "") for m in found.models} if found.metadata else {}
    against += not_from_scratch(claims, edges)
    edges = [e for e in [*edges, *_declared(found)] if e.confidence >= found.min_confidence]
    inputs = {m.name: {"path": m.path.name, "bytes": m.print.bytes, "sha256": m.print.sha256} for m in found.models}
    distances, joined = _distances(found)
    return ClusterResult(
        provenance("cluster", inputs, "cpu", seed=found.seed, seconds=round(found.seconds, 3)),
        found.folder.path.resolve().name,
        tuple(sorted([*(m for row in rows for m in row.models), *_adapters(found.folder)], key=lambda m: m.name)),
        tuple(sorted((f for row in rows for f in row.families), key=lambda f: f.name)),
        tuple(sorted(edges, key=lambda e: (e.child, e.parent, e.relation))),
        tuple(sorted((m for row in rows for m in row.merges), key=lambda m: m.child)),
        tuple(u for row in rows for u in row.unobserved),
        tuple(sorted((row.root for row in rows), key=lambda r: r.name)),
        _skipped(found.folder),
        found.folder.counts,
        Choice("exact" if found.choice.exact else "sketch", found.choice.reason),
        distances,
        joined,
        _similarity(found),
        contradictions=tuple(against),
        min_confidence=found.min_confidence,
        added=found.added,
    )


def _adapters(folder: Folder) -> Iterator[ClusterModel]:
    """Files of factors: no root and no family is theirs, weights do not tell them."""
    for i in folder.of("adapter"):
        size = i.path.stat().st_size if i.path.is_file() else 0
        yield ClusterModel(
            i.name,
            _inside(i.path, folder.path),
            None,
            size,
            i.kind,
            None,
            None,
            kind="adapter",
            license=i.licence or None,
        )


def _declared(found: Found) -> Iterator[Edge]:
    """Adapters below the models that they say they were trained on."""
    adapters = found.folder.of("adapter") if found.metadata else ()
    known = {m.name: m.print.sha256 for m in found.models}
    asked = any("short_hash" in item.declared for item in adapters)
    short = {m.name: own_short_hash(m.path) for m in found.models} if asked else {}
    for item in adapters:
        if parent := declared_parent(item, known, short):
            words = Evidence("metadata", "its metadata or card names the model it was trained on")
            yield Edge(parent, item.name, "adapter", None, None, None, True, 0.9, (words,), declared=True)


def _inside(path: Path, folder: Path) -> str:
    """A path as seen from the folder; the file's name alone where it lies elsewhere."""
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.name


def _skipped(folder: Folder) -> tuple[Skipped, ...]:
    rest = [i for i in folder.items if i.bucket not in ("model", "adapter")]
    return tuple(Skipped(_inside(i.path, folder.path), i.bucket, i.reason) for i in rest)


def _swaps(found: Found, edges: Sequence[Edge]) -> Iterator[Edge]:
    """Components that came from another model than the rest."""
    held = {m.name: {c: d for c, d in components(m.print).items() if c in PARTS} for m in found.models}
    parent = {e.child: e.parent for e in edges if e.relation != "merge"}
    grams = {m.name: tree.whole for tree in found.trees for m in tree.members}
    own = {m.name: m.print for m in found.models}
    for donor, model, component in donors(held, parent):
        blocks = {t.block for t in own[model].tensors if t.component == component}
        if _rounded(grams[model], model, parent[model], blocks):
            continue
        words = Evidence("bytes", f"its {component} is bit for bit that of {donor}, not that of {parent[model]}")
        yield Edge(donor, model, "component", None, None, None, True, 0.9, (words,), component=component)


def _rounded(gram: Gram, model: str, parent: str, blocks: Collection[str]) -> bool:
    """Whether what lies in these blocks of two models differs by no more than storing it did: merging equal weights
    rounds them anew, and swaps nothing."""
    if model not in gram.names or parent not in gram.names:
        return False
    rows = [i for i, block in enumerate(gram.blocks) if block in blocks]
    a, b = gram.names.index(model), gram.names.index(parent)
    apart = sum(float(gram.distances(gram.blocks[i])[a, b]) for i in rows)
    return bool(rows) and apart <= CHOSEN.copy_ratio * float(gram.rounding[[a, b]][:, rows].sum())


@dataclass(frozen=True)
class _Rows:
    """The records of one tree."""

    models: list[ClusterModel]
    families: list[Family]
    edges: list[Edge]
    merges: list[FoundMerge]
    unobserved: list[Unobserved]
    root: Root


def _tree_records(tree: Tree, found: Found) -> _Rows:
    names = [m.name for m in tree.members]
    root = names[tree.ancestry.root] if tree.ancestry.root is not None else min(names)
    groups = families(tree.kin.table, tree.ancestry.root, range(len(names)), found.seed)
    d = tree.gram.distances()
    titles = [_central(tree, d, list(group.members), names) for group in groups]
    home = {m: title for group, title in zip(groups, titles, strict=True) for m in group.members}
    models, shares = [], affinities(tree.kin.g, tree.ancestry.root, groups)
    for i, (m, weights) in enumerate(zip(tree.members, shares.tolist(), strict=True)):
        models.append(
            ClusterModel(
                m.name,
                _inside(m.path, found.folder.path),
                m.print.sha256,
                m.print.bytes,
                m.print.architecture,
                root,
                home.get(i, titles[0] if titles else root),
                tuple(Affinity(t, round(w, 4)) for t, w in zip(titles, weights, strict=True) if w > 0),
                components(m.print),
                license=m.item.licence or m.print.metadata.get("modelspec.license"),
            )
        )
    kept = [
        Family(t, root, tuple(sorted(names[i] for i in g.members)), round(g.stability, 4))
        for t, g in zip(titles, groups, strict=True)
    ]
    start = Root(root, tree.members[0].print.architecture, len(names), tree.ancestry.root_confidence)
    merges = [_merge(tree, merged, names) for merged in tree.ancestry.merges]
    return _Rows(models, kept or [Family(root, root, (root,), None)], _edges(tree, names), merges, [], start)


def _central(tree: Tree, d: Array, members: list[int], names: Sequence[str]) -> str:
    """A family goes by the name of the member nearest to all its others. d: (n, n) squared distances."""
    far = dict(zip(members, d[np.ix_(members, members)].sum(1).tolist(), strict=True))
    return names[min(members, key=lambda m: (far[m], tree.members[m].print.sha256))]


def components(p: Fingerprint) -> dict[str, str]:
    """Component -> digest of its tensors' names and bytes, of the dtypes as they are."""
    found: dict[str, list[str]] = {}
    for t in p.tensors:
        found.setdefault(t.component, []).append(f"{t.name} {t.hash}")
    return {c: hashlib.sha256("\n".join(rows).encode()).hexdigest()[:32] for c, rows in sorted(found.items())}


def _edges(tree: Tree, names: Sequence[str]) -> list[Edge]:
    relative = tree.gram.relative() * np.sqrt(2)
    found = []
    for link in tree.ancestry.links:
        a, b = link.parent, link.child
        if not link.directed:
            a, b = sorted((a, b), key=lambda i: names[i])
        found.append(
            Edge(
                names[a],
                names[b],
                link.relation,
                link.weight,
                link.low,
                link.high,
                bool(link.directed),
                round(link.confidence, 4),
                link.evidence,
                distance=float(relative[a, b]),
                rank=link.rank,
            )
        )
    return found


def _merge(tree: Tree, merged: Merged, names: Sequence[str]) -> FoundMerge:
    reading, g = merged.reading, tree.kin.g
    local = [names[p] for p in reading.parents]
    spans = [Interval(low, w, high) for w, (low, high) in zip(reading.weights, merged.intervals, strict=False)]
    near = min(g[p, p] + g[reading.child, reading.child] - 2 * g[p, reading.child] for p in reading.parents)
    half = any(t.dtype == "float16" for t in tree.kin.prints[reading.child].tensors)
    name = names[reading.child]
    recipe = toml(name, local, spans, half=half, blocks=merged.blocks) if spans else None
    seen = [
        MergeParent(n, w if merged.unseen else None, None, None) for n, w in zip(local, reading.weights, strict=True)
    ]
    if spans:
        seen = [MergeParent(n, s.value, s.low, s.high) for n, s in zip(local, spans, strict=True)]
    return FoundMerge(
        name,
        tuple(seen),
        float(reading.residual / near) if near > 0 else None,
        merged.p_value,
        merged.unseen,
        recipe,
        residual_ratio=float(reading.ratio),
        method=merged.method,
        confidence=merged.confidence,
        blocks=merged.blocks,
    )


def _distances(found: Found) -> tuple[Distances, tuple[tuple[float, float, float, float], ...]]:
    """Relative distances of all models, and their average linkage; models of different groups are 1.5 apart there."""
    names = sorted(m.name for m in found.models)
    if not 1 < len(names) <= ALL_DISTANCES:
        return Distances((), ()), ()
    at = {name: i for i, name in enumerate(names)}
    known = np.full((len(names), len(names)), np.nan)
    for gram in {id(t.whole): t.whole for t in found.trees}.values():
        rows = [at[name] for name in gram.names]
        known[np.ix_(rows, rows)] = gram.relative() * np.sqrt(2)
    upper = np.triu_indices(len(names), 1)
    values = tuple(None if np.isnan(v) else round(float(v), 7) for v in known[upper])
    filled = np.where(np.isnan(known), 2.0, known)
    np.fill_diagonal(filled, 0)
    joined = linkage(squareform((filled + filled.T) / 2, checks=False), "average")
    return Distances(tuple(names), values), tuple((float(a), float(b), float(d), float(n)) for a, b, d, n in joined)


def _similarity(found: Found) -> BlockSimilarity:
    """Relative distances per block of all pairs of a group, or of each model's nearest."""
    complete = len(found.models) <= ALL_PAIRS
    blocks = sorted({b for t in found.trees for b in t.whole.blocks})
    pairs: dict[tuple[str, str], tuple[float | None, ...]] = {}
    for gram in {id(t.whole): t.whole for t in found.trees}.values():
        first, second = _near(gram.relative(), len(gram.names) if complete else NEAREST)
        values = np.full((len(first), len(blocks)), np.nan)
        for b in gram.blocks:
            values[:, blocks.index(b)] = np.round(gram.relative(b)[first, second] * np.sqrt(2), 6)
        for i, j, row in zip(first.tolist(), second.tolist(), values.tolist(), strict=True):
            a, b = sorted((gram.names[i], gram.names[j]))
            pairs[a, b] = tuple(None if v != v else v for v in row)
    return BlockSimilarity(tuple(blocks), tuple(PairBlocks(a, b, v) for (a, b), v in sorted(pairs.items())), complete)


def _near(far: Array, count: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """(smaller, larger) indices of the pairs of which one is among the other's `count` nearest, each once.
    far: (n, n)."""
    chosen = np.zeros(far.shape, bool)
    for near, row in zip(chosen, far, strict=True):
        near[np.argsort(row, kind="stable")[: count + 1]] = True
    first, second = np.nonzero(np.triu(chosen | chosen.T, 1))
    return first, second
