"""Folders of models as `lineage cluster` would describe them, made without it: points in space, so that distances,
linkage and blocks agree with the tree that is drawn."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.hierarchy import linkage

from lineage.cluster_result import (
    Affinity,
    BlockSimilarity,
    Choice,
    ClusterModel,
    ClusterResult,
    Contradiction,
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
from lineage.results import provenance

STYLES = ("anime", "photo", "pastel", "ink", "comic", "clay", "retro", "noir", "water", "neon")
BLOCKS = (*(f"IN{i:02d}" for i in range(12)), "M00", *(f"OUT{i:02d}" for i in range(12)), "TE.00", "TE.11", "VAE")
DIMENSIONS = 64
HOSTILE_NAMES = (
    "</script><script>window.__pwned=1</script>",
    "<img src=x onerror=window.__pwned=2>",
    '=HYPERLINK("http://x","y")',
    'a"] --> b["x\u202egnp.\x00\x1b[31m',
    "@ink",
    "__proto__",
    "very_long_name_" * 20,
)


@dataclass
class World:
    """Grown models: name -> point; the records that tell how."""

    rng: random.Random
    points: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    home: dict[str, tuple[str, str]] = field(default_factory=dict)
    edges: list[Edge] = field(default_factory=list)
    merges: list[FoundMerge] = field(default_factory=list)

    def step(self, size: float) -> NDArray[np.float64]:
        return np.array([self.rng.gauss(0, size) for _ in range(DIMENSIONS)])


def cluster_result(models: int = 12, seed: int = 0, hostile: bool = False) -> ClusterResult:
    """Roots with families of fine-tunes at several depths, derived copies, merges, an unseen ancestor."""
    world = World(random.Random(seed))
    roots = [f"base-{i}" for i in range(max(1, min(12, models // 20 + 1)))]
    for root in roots:
        world.points[root], world.home[root] = world.step(1), (root, root)
    unseen = Unobserved("unobserved 1", roots[0], "Three models branch off here, and no file is it.", 0.8)
    world.points[unseen.name] = world.points[roots[0]] + world.step(0.02)
    world.home[unseen.name] = (roots[0], roots[0])
    world.edges.append(edge(world, roots[0], unseen.name, "finetune"))
    while len(world.points) <= models:
        grow(world, len(world.points))
    if hostile:
        rename(world, HOSTILE_NAMES)
    names = sorted(set(world.points) - {unseen.name})
    records = tuple(model(world, n) for n in names)
    grouped: dict[tuple[str, str], list[str]] = {}
    for n in names:
        grouped.setdefault(world.home[n], []).append(n)
    distances = between(world, names)
    joined = linkage(distances, "average").tolist() if len(names) > 1 else []
    made = provenance("lineage cluster models -o out", {}, seconds=61.2, seed=seed)
    return ClusterResult(
        made,
        "models",
        records,
        tuple(Family(f, r, tuple(m), 0.93) for (r, f), m in sorted(grouped.items())),
        tuple(sorted(world.edges, key=lambda e: (e.child, e.parent))),
        tuple(sorted(world.merges, key=lambda m: m.child)),
        (unseen,),
        tuple(
            Root(r, "sd1", sum(h[0] == r for h in world.home.values()), 0.9, (Evidence("base", "Largest degree."),))
            for r in roots
        ),
        (Skipped("vae-ft-mse.safetensors", "vae", "a lone VAE"), Skipped("x.ckpt", "unreadable", "cut at byte 12")),
        {"models": len(names), "vae": 1, "unreadable": 1},
        Choice("exact", "Exact: 25 GB, about 40 s to read side by side, within 900 s."),
        Distances(tuple(names), tuple(float(f"{v:.6g}") for v in distances)),
        tuple(tuple(row) for row in joined),
        similarity(world, names, complete=len(names) <= 100),
        (Contradiction(names[-1], "card", "trained from scratch", "a fine-tune"),),
        notes=("One note.",),
    )


def grow(world: World, i: int) -> None:
    """One more model: mostly fine-tunes, now and then a merge, a copy or another derived file."""
    rng, known = world.rng, sorted(world.points)
    kind = rng.choices(["finetune", "merge", "copy", "quantized", "adapter", "component"], [10, 4, 1, 1, 1, 1])[0]
    parent = rng.choice(known)
    root, family = world.home[parent]
    style = rng.choice(STYLES)
    name = f"{style}-{i:03d}"
    same = [n for n in known if world.home[n][0] == root and n != parent and not n.startswith("unobserved")]
    if kind == "merge" and len(same) > 1 and not parent.startswith("unobserved"):
        merge(world, name, [parent, *rng.sample(same, rng.choice([1, 1, 2]) if len(same) > 2 else 1)])
    else:
        if kind == "merge":
            kind = "finetune"
        world.points[name] = world.points[parent] + world.step({"finetune": 0.01, "copy": 0.0}.get(kind, 0.002))
        world.edges.append(edge(world, parent, name, kind))
    world.home[name] = (root, name if parent == root and kind == "finetune" else family)


def merge(world: World, name: str, parents: list[str]) -> None:
    cuts = sorted(world.rng.random() for _ in parents[1:])
    weights = [b - a for a, b in zip([0.0, *cuts], [*cuts, 1.0], strict=True)]
    world.points[name] = sum((w * world.points[p] for w, p in zip(weights, parents, strict=True)), world.step(1e-5))
    unseen = world.rng.random() < 0.15
    made = tuple(MergeParent(p, w, w - 0.01, w + 0.01) for p, w in zip(parents, weights, strict=True))
    recipe = None if unseen else f'[[merge]]\nname = "{name}"\nmethod = "linear"\n'
    world.merges.append(FoundMerge(name, made, 1e-5, 0.42, unseen, recipe, 1.02, "weighted_sum", 0.97))
    world.edges += [replace(edge(world, p.name, name, "merge"), weight=p.weight, low=p.low, high=p.high) for p in made]


def edge(world: World, parent: str, child: str, relation: str) -> Edge:
    rng = world.rng
    reasons = (
        Evidence("distance", "Nearest of all models of its tree.", 0.0123),
        Evidence("metadata", "Its header names the parent's hash."),
    )
    return Edge(
        parent, child, relation, None, None, None, rng.random() > 0.1, round(rng.uniform(0.4, 1), 3), reasons, 0.0123,
        16 if relation == "adapter" else None, "vae" if relation == "component" else None,
    )  # fmt: skip


def model(world: World, name: str) -> ClusterModel:
    root, family = world.home[name]
    parts = {"unet": f"{name}-unet"[:32], "vae": "a" * 32, "text_encoder": "b" * 32}
    near = (Affinity(family, 0.8), Affinity(root, 0.2))
    license = "CreativeML Open RAIL-M" if world.rng.random() < 0.5 else None
    return ClusterModel(name, f"{name}.safetensors", "ab" * 32, 2132625432, "sd1", root, family, near, parts,
                        license=license)  # fmt: skip


def rename(world: World, names: tuple[str, ...]) -> None:
    """Leaves get names that want to break the page."""
    parents = {e.parent for e in world.edges}
    leaves = [n for n in sorted(world.points) if n not in parents and not n.startswith(("base", "unobserved"))]
    new = dict(zip(leaves, names, strict=False))

    def named(n: str) -> str:
        return new.get(n, n)

    world.points = {named(n): p for n, p in world.points.items()}
    world.home = {named(n): (named(r), named(f)) for n, (r, f) in world.home.items()}
    world.edges = [replace(e, parent=named(e.parent), child=named(e.child)) for e in world.edges]
    world.merges = [
        replace(m, child=named(m.child), parents=tuple(replace(p, name=named(p.name)) for p in m.parents))
        for m in world.merges
    ]


def between(world: World, names: list[str]) -> NDArray[np.float64]:
    x = np.stack([world.points[n] for n in names])
    square = np.maximum(((x[:, None] - x[None]) ** 2).sum(-1), 0) if len(x) < 200 else _gram_distances(x)
    upper = np.triu_indices(len(x), 1)
    return np.sqrt(square[upper] / DIMENSIONS)


def _gram_distances(x: NDArray[np.float64]) -> NDArray[np.float64]:
    squares = (x**2).sum(1)
    return np.maximum(squares[:, None] + squares[None] - 2 * x @ x.T, 0)


def similarity(world: World, names: list[str], complete: bool) -> BlockSimilarity:
    x = np.stack([world.points[n] for n in names])
    parts = np.array_split(np.arange(DIMENSIONS), len(BLOCKS))
    pairs = []
    for i in range(len(names)):
        for j in range(i + 1, len(names) if complete else min(i + 11, len(names))):
            apart = [float(f"{np.sqrt(((x[i, p] - x[j, p]) ** 2).mean()):.5g}") for p in parts]
            pairs.append(PairBlocks(names[i], names[j], (*apart[:-1], None)))
    return BlockSimilarity(BLOCKS, tuple(pairs), complete)
