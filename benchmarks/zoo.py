"""A zoo of small networks with known lineage, and how well `lineage cluster` and its rivals read it.

    python benchmarks/zoo.py make [--size dev|full|large] [--plain]   trains; kill it at any time and run it again
    python benchmarks/zoo.py fit [--size ...] [--worlds WORLD ...]  lines of lineage/thresholds.py, from the tuning half
    python benchmarks/zoo.py score [--size ...] [--half tune] [-o docs/cluster_benchmark.md] [--failures FILE]

Networks lie in benchmarks/data/zoo-SIZE/{tune,report}, what was taken out of those folders in .../removed, and all that
is true of them in truth.json. sd-mecha and mergekit make some of the merges (`--plain`: all by the plain script).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import zoo_derive
import zoo_fit
import zoo_merges
import zoo_page
import zoo_train
import zoo_truth
from safetensors.torch import load_file, save_file
from torch import Tensor
from zoo_answers import ours, retold, theirs
from zoo_baselines import BASELINES
from zoo_plan import Spec, plan
from zoo_score import Answer, judge

from lineage.ancestry import SOURCES

SIZES = {
    "tiny": (2, 3, 7),
    "dev": (4, 8, 1),
    "full": (32, 12, 2026),
    "large": (100, 21, 2027),
}  # roots, fine-tunes of each, seed
OLD = 1_500_000_000  # every file's time


def path_of(spec: Spec, zoo: Path) -> Path:
    return zoo / ("removed" if spec.hidden else spec.half) / f"{spec.name}.safetensors"


def make(zoo: Path, specs: Sequence[Spec]) -> Iterator[Spec]:
    """Every network that is not there yet; yields it when its file is. Children start from their parents' files."""
    files = {s.name: path_of(s, zoo) for s in specs}
    for spec in specs:
        if not files[spec.name].exists():
            parents = [load_file(files[p]) for p in spec.parents]
            save(made(spec, parents), spec.dtype, files[spec.name])
        yield spec


def made(spec: Spec, parents: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of one network."""
    if spec.kind == "merge":
        return zoo_merges.merge(parents, spec.settings, spec.seed)
    if spec.kind in zoo_derive.DERIVED:
        return zoo_derive.DERIVED[spec.kind](spec.arch, parents[0], spec.settings, spec.seed)
    state = parents[0] if parents else zoo_train.start(spec.arch, spec.seed)
    return trained(spec, state)


def trained(spec: Spec, state: dict[str, Tensor]) -> dict[str, Tensor]:
    s = spec.settings
    lr = zoo_train.rate(s["optimizer"], s["change"], s["steps"], state) if s["change"] else 3e-3
    recipe = zoo_train.Recipe(
        s["optimizer"], lr, s["steps"], s["weight_decay"], s["task"], spec.seed, s.get("only", ""), s["share"]
    )
    if spec.relation == "adapter":
        return zoo_derive.adapt(spec.arch, state, recipe, spec.kind, s["rank"], s["weight"])
    return zoo_train.train(spec.arch, state, recipe)


def save(state: dict[str, Tensor], dtype: str, path: Path) -> None:
    """Whole or not at all, with a time that says nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    save_file({n: t.to(getattr(torch, dtype)).contiguous() for n, t in state.items()}, part)
    os.utime(part, (OLD, OLD))
    part.replace(path)


def truth(zoo: Path, specs: Sequence[Spec]) -> list[dict[str, Any]]:
    """All that is true of each network, with `delta` (relative to its nearest parent) and `ratio` (delta energy over
    the rounding of both files)."""
    files = {s.name: path_of(s, zoo) for s in specs}
    rows = []
    for s in specs:
        child = load_file(files[s.name])
        near = [moved(load_file(files[p]), child) for p in s.parents]
        delta, ratio = min(near, default=(None, None))
        weights = zoo_merges.coefficients(s.settings) if s.kind == "merge" else None
        rows.append(
            {**s.__dict__, "relation": s.relation, "half": s.half, "delta": delta, "ratio": ratio, "weights": weights}
        )
    return rows


def moved(parent: dict[str, Tensor], child: dict[str, Tensor]) -> tuple[float, float]:
    """(relative change, change over the rounding noise of both files; both are ratios of norms)."""
    delta = sum(float((child[n].double() - parent[n].double()).square().sum()) for n in child)
    norm = sum(float(t.double().square().sum()) for t in parent.values())
    noise = sum(rounding(t) for state in (parent, child) for t in state.values())
    return math.sqrt(delta / norm), math.sqrt(delta / noise)


def rounding(t: Tensor) -> float:
    """Energy sum ulp^2 / 12 of storing a tensor in its dtype."""
    ulp = torch.finfo(t.dtype).eps * torch.exp2(torch.floor(torch.log2(t.double().abs().clamp_min(1e-30))))
    return float(ulp.square().sum()) / 12


def write_truth(zoo: Path, rows: list[dict[str, Any]]) -> None:
    part = zoo / "truth.part"
    part.write_text(json.dumps(rows, indent=0), encoding="utf-8")
    part.replace(zoo / "truth.json")


def without_tools(spec: Spec) -> Spec:
    return Spec(**{**spec.__dict__, "settings": {**spec.settings, "tool": "plain"}}) if spec.kind == "merge" else spec


def build(options: argparse.Namespace) -> None:
    roots, finetunes, seed = SIZES[options.size]
    specs = plan(options.roots or roots, finetunes, seed)
    specs = [without_tools(s) for s in specs] if options.plain else specs
    for i, spec in enumerate(make(options.zoo, specs), 1):
        print(f"\r{i}/{len(specs)} tree {spec.tree} {spec.arch} {spec.kind:10}", end="", file=sys.stderr, flush=True)
    write_truth(options.zoo, truth(options.zoo, specs))
    print(f"\n{len(specs)} networks in {options.zoo}", file=sys.stderr)


def score(options: argparse.Namespace) -> None:
    if options.failures:
        return write_failures(options)
    text = document(options)
    options.output.write_text(text, encoding="utf-8") if options.output else print(text)


def write_failures(options: argparse.Namespace) -> None:
    truth, folder = zoo_truth.read(options.zoo, options.half), options.zoo / options.half
    judged = judge(truth, ours(folder, options.zoo / "cache"))

    @cache
    def load(name: str) -> dict[str, Tensor]:
        return load_file(folder / f"{name}.safetensors")

    text = zoo_page.failures(judged, lambda a, b: moved(load(a), load(b))[0])
    options.failures.write_text(text, encoding="utf-8")


def document(options: argparse.Namespace) -> str:
    """The page: everything is run anew."""
    truth, folder = zoo_truth.read(options.zoo, options.half), options.zoo / options.half
    kept = options.zoo / "cache"
    ask = partial(ours, folder, kept)
    ours(folder, kept)  # so that no run below is slower for filling the cache
    answer = ask()
    say("lineage")
    rivals = [theirs(m, folder, truth) for m in BASELINES if not say(m)]
    without = {"nothing": answer} | {s: ask(ignore=(s,)) for s in SOURCES if not say(f"without {s}")}
    others = {
        "sketches only": ask(sketch=True),
        "other names and order": renamed(folder, options.zoo / "renamed", truth),
    }
    command = f"python benchmarks/zoo.py score --size {options.size}"
    return zoo_page.page(command, truth, answer, rivals, without, others)


def renamed(folder: Path, copy: Path, truth: zoo_truth.Truth) -> Answer:
    """The answer about the same files under other names, told in the old ones."""
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir()
    old = {f"{hash_of(p.stem)}": p.stem for p in sorted(folder.glob("*.safetensors"))}
    for new, name in old.items():
        shutil.copy(folder / f"{name}.safetensors", copy / f"{new}.safetensors")
    return retold(ours(copy, copy / "cache"), old)


def hash_of(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:12]


def say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", nargs="?", choices=("make", "fit", "score"), help="default: one after the other")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--roots", type=int, help="fewer trees than the size has")
    parser.add_argument("--plain", action="store_true", help="make all merges by the plain script")
    parser.add_argument("-o", "--output", type=Path, help="the page; else it is printed")
    parser.add_argument("--half", choices=("tune", "report"), default="report")
    parser.add_argument("--worlds", type=Path, nargs="*", default=[], help="folders of `lineage world` to fit on too")
    parser.add_argument("--failures", type=Path, help="write every wrong edge here, and nothing else")
    options = parser.parse_args()
    options.zoo = zoo_train.DATA / f"zoo-{options.size}"
    torch.set_num_threads(1)
    if options.verb == "fit":
        truth = zoo_truth.read(options.zoo, "tune")
        return print(zoo_fit.fitted(options.zoo / "tune", options.zoo / "cache", truth, options.worlds))
    if options.verb != "score":
        build(options)
    if options.verb != "make":
        score(options)


if __name__ == "__main__":
    main()
