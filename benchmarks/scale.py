"""Time and memory of `lineage cluster` on the fingerprints of many simulated models, and whether its answer is right.

    python benchmarks/scale.py [--models 1000 3000 10000] [--tensors 4] [--seed 0] [--profile]

A simulated model is a fingerprint without a file: a sketch of 65,536 slots and the prints of its tensors. Of M models
the k-th of ROOTS trees holds a share ~ 1 / k. A tree has families that moved far from its root; inside them models are
fine-tuned (by 0.3 to 2 % of the weights' norm), merged of two or three, and copied, and all are stored in half
precision: the rounding is in the sketches. Increments are Gaussian, as those of dense changes nearly are in sketches.
Each number of models runs in a process of its own. Prints Markdown.
"""

from __future__ import annotations

import argparse
import cProfile
import hashlib
import pstats
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from sklearn.metrics import adjusted_rand_score

from lineage.cluster_records import Found, records
from lineage.cluster_result import ClusterResult
from lineage.clustering import Model, Options, forest
from lineage.exact import Choice
from lineage.fingerprint import Fingerprint, TensorPrint
from lineage.folder import Folder, Item
from lineage.sketch import allocate
from lineage.thresholds import CHOSEN

ROOTS, BLOCKS, ENTRIES = 20, 24, 36_000_000  # trees; blocks of a model; entries of a block
HALF = 2.0**-11 / 3**0.5  # rounding of half precision, relative to an entry, about
FAMILIES = 6  # of a tree with models enough
KINDS = {"finetune": 0.8, "merge": 0.15, "copy": 0.05}
SLOTS = tuple(allocate({f"block.{b:02}": ENTRIES for b in range(BLOCKS)}).items())


@dataclass(frozen=True)
class Truth:
    """One simulated model: its parents, tree and family (numbers)."""

    name: str
    kind: str
    parents: tuple[str, ...]
    tree: int
    family: int


def shares(models: int) -> list[int]:
    """Models of each tree, at least one."""
    weight = 1 / np.arange(1, ROOTS + 1)
    found = np.maximum(1, (models * weight / weight.sum()).astype(int))
    found[0] += models - found.sum()
    return found.tolist()


def simulate(models: int, tensors: int, seed: int) -> Iterator[tuple[Truth, Fingerprint]]:
    """Models with what is true of them, tree by tree."""
    for tree, size in enumerate(shares(models)):
        yield from _tree(tree, size, tensors, np.random.default_rng([seed, tree]))


def _tree(tree: int, size: int, tensors: int, rng: np.random.Generator) -> Iterator[tuple[Truth, Fingerprint]]:
    width = sum(n for _, n in SLOTS)
    unit = 1 / width**0.5  # a sketch of these entries has norm 1
    clean = rng.normal(0, unit, width)
    found, prints = [Truth(f"t{tree:02}-root", "root", (), tree, -1)], []
    prints.append(_print(found[0].name, _stored(clean, rng), tensors))
    home: dict[int, list[int]] = {f: [] for f in range(FAMILIES)}
    for i in range(1, size):
        family = i - 1 if i <= FAMILIES else int(rng.integers(FAMILIES))
        own, name = home[family], f"t{tree:02}-{i:05}"
        kind = str(rng.choice(list(KINDS), p=list(KINDS.values()))) if len(own) > 3 else "finetune"
        above = _parents(kind, own, rng)
        sketch = _made(kind, [prints[p].sketch for p in above], 0.05 if not own else rng.uniform(0.003, 0.02), rng)
        truth = Truth(name, kind, tuple(found[p].name for p in above), tree, family)
        if kind == "copy":
            prints.append(Fingerprint(**{**vars(prints[above[0]]), "sha256": _sha(name)}))
        else:
            prints.append(_print(name, sketch, tensors))
            own.append(i)
        found.append(truth)
    yield from zip(found, prints, strict=True)


def _parents(kind: str, own: list[int], rng: np.random.Generator) -> list[int]:
    """Of a merge two or three of the family; else one of its last or any; the tree's root for its founder."""
    if not own:
        return [0]
    count = int(rng.integers(2, 4)) if kind == "merge" else 1
    return sorted(map(int, rng.choice(own, count, replace=False)))


def _made(kind: str, parents: list[np.ndarray], step: float, rng: np.random.Generator) -> np.ndarray:
    if kind == "merge":
        weights = rng.dirichlet(np.full(len(parents), 8.0))
        return _stored(weights @ np.stack(parents).astype(float), rng, 1 + float(weights @ weights))
    width = len(parents[0])
    return _stored(parents[0] + rng.normal(0, step / width**0.5, width), rng)


def _stored(sketch: np.ndarray, rng: np.random.Generator, times: float = 1.0) -> np.ndarray:
    """With `times` the energy of rounding once."""
    return (sketch + rng.normal(0, HALF * (times / len(sketch)) ** 0.5, len(sketch))).astype(np.float32)


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _print(name: str, sketch: np.ndarray, tensors: int) -> Fingerprint:
    ends = np.cumsum([0, *(n for _, n in SLOTS)])
    slots = tuple((block, int(a), int(b)) for (block, _), a, b in zip(SLOTS, ends[:-1], ends[1:], strict=True))
    rows = [_tensor(name, block, t, tensors, sketch[a:b]) for block, a, b in slots for t in range(tensors)]
    return Fingerprint(_sha(name), 2 * BLOCKS * ENTRIES, "simulated", "sd1", None, {}, tuple(rows), sketch, slots)


def _tensor(model: str, block: str, t: int, tensors: int, sketch: np.ndarray) -> TensorPrint:
    """The last tensor of a block is a vector."""
    square = float(sketch.astype(float) @ sketch) / tensors
    side = 1000 if t < tensors - 1 else 1
    digest = _sha(f"{model} {block} {t}")[:32]
    shape = (ENTRIES // tensors // side, side) if side > 1 else (ENTRIES // tensors,)
    return TensorPrint(
        f"{block}.{t}", "unet", block, "", shape, "float16", digest, digest, square**0.5, 0.0, 1.0, 0.0, 3.0, 1.0, 0, 0,
        square * HALF**2,
    )  # fmt: skip


def clustered(simulated: list[tuple[Truth, Fingerprint]], seed: int) -> tuple[ClusterResult, float, float]:
    """(the answer, seconds for trees and graph, seconds for all)."""
    began = time.perf_counter()
    items = [Item(t.name, Path(f"{t.name}.safetensors"), "model", "sd1", group="sd1 unet") for t, _ in simulated]
    models = [Model(i.name, i.path, p, i) for i, (_, p) in zip(items, simulated, strict=True)]
    models.sort(key=lambda m: m.print.sha256)
    trees = list(forest(models, Options(False, None, (), seed, "cpu", CHOSEN)))
    between = time.perf_counter() - began
    found = Found(Folder(Path("simulated"), tuple(items)), models, trees, Choice(False, 0, ""), (), {}, 0, seed, 0)
    return records(found), between, time.perf_counter() - began


def row(models: int, tensors: int, seed: int) -> str:
    """One line of the table."""
    simulated = list(simulate(models, tensors, seed))
    before = memory()
    found, between, seconds = clustered(simulated, seed)
    truth = {t.name: t for t, _ in simulated}
    numbers = [between, seconds, before, memory(), *_scores(found, truth)]
    return f"| {models} | " + " | ".join(f"{n:.3g}" for n in numbers) + " |"


def _scores(found: ClusterResult, truth: dict[str, Truth]) -> Iterator[float]:
    """ARI of trees, of families; precision, recall, direction of edges; exact parent sets. Copies count once."""
    names = sorted(truth)
    model = {m.name: m for m in found.models}
    yield adjusted_rand_score([truth[n].tree for n in names], [model[n].root for n in names])
    inner = [n for n in names if truth[n].family >= 0]
    own = [f"{truth[n].tree} {truth[n].family}" for n in inner]
    yield adjusted_rand_score(own, [f"{model[n].root} {model[n].family}" for n in inner])
    first = {n: _original(n, truth) for n in names}
    true = {(first[p], n) for n, t in truth.items() if t.kind != "copy" for p in t.parents}
    claimed = {(first[e.parent], first[e.child]) for e in found.edges if e.relation != "copy"}
    hit = {frozenset(e) for e in true} & {frozenset(e) for e in claimed}
    yield len(hit) / max(1, len({frozenset(e) for e in claimed}))
    yield len(hit) / len({frozenset(e) for e in true})
    yield len(true & claimed) / max(1, len(hit))
    sets = {first[m.child]: {first[p.name] for p in m.parents} for m in found.merges}
    merges = [t for t in truth.values() if t.kind == "merge"]
    yield sum(sets.get(t.name) == {first[p] for p in t.parents} for t in merges) / max(1, len(merges))


def _original(name: str, truth: dict[str, Truth]) -> str:
    while truth[name].kind == "copy":
        name = truth[name].parents[0]
    return name


def memory() -> float:
    """Peak resident memory so far, GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)


HEAD = (
    "models", "trees and graph, s", "with records, s", "GiB simulated", "GiB at peak", "ARI of roots",
    "ARI of families",
    "edge precision", "edge recall", "direction", "exact parent sets",
)  # fmt: skip


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, nargs="+", default=[1000, 3000, 10_000])
    parser.add_argument("--tensors", type=int, default=4, help="of each of a model's 24 blocks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--profile", action="store_true", help="where the time goes, for the first of --models")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        return print(row(options.models[0], options.tensors, options.seed), flush=True)
    if options.profile:
        profile = cProfile.Profile()
        print(profile.runcall(row, options.models[0], options.tensors, options.seed))
        return pstats.Stats(profile).sort_stats("cumulative").print_stats(45) and None
    print("| " + " | ".join(HEAD) + " |\n|" + "---|" * len(HEAD), flush=True)
    more = ["--tensors", str(options.tensors), "--seed", str(options.seed), "--one"]
    for count in options.models:
        subprocess.run([sys.executable, __file__, "--models", str(count), *more], check=True)


if __name__ == "__main__":
    main()
