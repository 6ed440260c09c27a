"""Models in disguise: whether `lineage cluster` still says where they come from, or says that it cannot.

    python benchmarks/adversaries.py [--seeds 6] [--first 0] [--half report] [--attack NAME ...]

Takes transformers of benchmarks/zoo.py (benchmarks/data/zoo-full, `zoo.py make`): all files of the tree of one model,
of another tree of its architecture, and a disguised copy of the model. "found": the copy hangs from the model, or is
joined to it without a direction. "hidden": the copy has no parent, or is said to have an unseen one. "wrong": anything
else has been named its parent, or it that of its model. The last column counts models that were hung from the copy.
Metadata is off. Prints Markdown.
"""

from __future__ import annotations

import argparse
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import zoo_derive
import zoo_train
import zoo_truth
from safetensors.torch import load_file, save_file
from torch import Tensor

import lineage
from lineage.cluster_result import ClusterResult

State = dict[str, Tensor]
Attack = Callable[[State, State, torch.Generator], State]
ZOO = zoo_train.DATA / "zoo-full"
ARCHITECTURES, HEADS = ("bytes", "pixels"), 4
STRENGTH = (0.001, 0.003, 0.01)  # rms of the noise over that of the tensor
GRAFT = 0.05  # of the layers, at least one


def layers(state: State) -> list[str]:
    """What precedes ".weight" in the names of matrices."""
    return sorted(n.removesuffix(".weight") for n, t in state.items() if n.endswith(".weight") and t.dim() > 1)


def blocks(state: State) -> list[str]:
    return sorted({".".join(n.split(".")[:2]) for n in state if n.startswith("blocks.")})


def heads(state: State, _: State, g: torch.Generator) -> State:
    """Heads of every attention in another order: the same function."""
    out = dict(state)
    for block in blocks(state):
        width = len(state[f"{block}.q.weight"])
        order = (
            torch.randperm(HEADS, generator=g)[:, None] * (width // HEADS) + torch.arange(width // HEADS)
        ).flatten()
        out |= {
            f"{block}.{m}.{leaf}": state[f"{block}.{m}.{leaf}"][order] for m in "qkv" for leaf in ("weight", "bias")
        }
        out[f"{block}.o.weight"] = state[f"{block}.o.weight"][:, order]
    return out


def hidden_units(state: State, _: State, g: torch.Generator) -> State:
    """Hidden units of every MLP in another order: the same function."""
    return zoo_derive.permute("bytes", state, int(torch.randint(1 << 31, (), generator=g)))


def norm_scales(state: State, _: State, g: torch.Generator) -> State:
    """Scale moved from every norm into the layers that read it: the same function."""
    out = dict(state)
    for block in blocks(state):
        for norm, readers in (("norm1", "qkv"), ("norm2", ("fc1",))):
            scale = torch.exp(torch.randn(len(state[f"{block}.{norm}.weight"]), generator=g) / 2)
            out |= {f"{block}.{norm}.{leaf}": state[f"{block}.{norm}.{leaf}"] * scale for leaf in ("weight", "bias")}
            out |= {f"{block}.{m}.weight": state[f"{block}.{m}.weight"] / scale for m in readers}
    return out


def noise(strength: float) -> Attack:
    """Gaussian noise on every tensor."""

    def added(state: State, _: State, g: torch.Generator) -> State:
        size = {n: strength * t.square().mean().sqrt() for n, t in state.items()}
        return {n: t + size[n] * torch.randn(t.shape, generator=g) for n, t in state.items()}

    return added


def graft(state: State, other: State, g: torch.Generator) -> State:
    """A share of the layers of a model of another root."""
    names = layers(state)
    chosen = [names[i] for i in torch.randperm(len(names), generator=g)[: max(1, round(GRAFT * len(names)))]]
    return state | {n: t for n, t in other.items() if n.rpartition(".")[0] in chosen}


def shuffled_layers(state: State, _: State, __: torch.Generator) -> State:
    """Blocks in reverse order."""
    new = dict(zip(blocks(state), reversed(blocks(state)), strict=True))
    return {
        n: state[n.replace(b, new[b], 1)] if (b := ".".join(n.split(".")[:2])) in new else t for n, t in state.items()
    }


ATTACKS: dict[str, Attack] = {
    "heads permuted": heads,
    "hidden units permuted": hidden_units,
    "norm scales moved": norm_scales,
    **{f"noise {100 * s:g} %": noise(s) for s in STRENGTH},
    "5 % of the layers grafted": graft,
    "layers shuffled": shuffled_layers,
}


def trial(attack: Attack, truth: zoo_truth.Truth, half: str, seed: int) -> tuple[str, int]:
    """(found, hidden or wrong; models that hang from the copy)."""
    rng = random.Random(seed)
    groves: dict[str, dict[int, list[str]]] = {arch: {} for arch in ARCHITECTURES}
    for name in truth.visible:
        if (row := truth.of(name))["arch"] in groves:
            groves[row["arch"]].setdefault(row["tree"], []).append(name)
    trees = groves[rng.choice([arch for arch, found in groves.items() if len(found) > 1])]
    own, other = rng.sample(sorted(trees), 2)
    model = rng.choice([n for n in trees[own] if truth.of(n)["kind"] not in zoo_derive.DERIVED])
    path = {n: ZOO / half / f"{n}.safetensors" for n in trees[own] + trees[other]}
    stored, donor = load_file(path[model]), load_file(path[rng.choice(trees[other])])
    state, other_state = ({k: t.float() for k, t in found.items()} for found in (stored, donor))
    copy = attack(state, other_state, torch.Generator().manual_seed(seed))
    with tempfile.TemporaryDirectory(dir=ZOO) as folder:
        for name, source in path.items():
            shutil.copy(source, Path(folder, f"{name}.safetensors"))
        save_file({k: t.to(stored[k].dtype).contiguous() for k, t in copy.items()}, Path(folder, "copy.safetensors"))
        return verdict(lineage.cluster(folder, metadata=False, cache=ZOO / "cache"), model)


def verdict(found: ClusterResult, model: str) -> tuple[str, int]:
    unseen = {m.child for m in found.merges if m.unseen_parent} | {u.name for u in found.unobserved}
    above = {e.parent for e in found.edges if e.child == "copy"}
    beside = {e.child for e in found.edges if e.parent == "copy" and not e.directed}
    below = {e.child for e in found.edges if e.parent == "copy" and e.directed}
    if above | beside <= {model} and model not in below:
        return ("found" if above | beside else "hidden"), len(below)
    return ("hidden" if "copy" in unseen and model in above else "wrong"), len(below)


def row(name: str, seeds: Sequence[int], half: str) -> str:
    truth = zoo_truth.read(ZOO, half)
    told = [trial(ATTACKS[name], truth, half, seed) for seed in seeds]
    count = Counter(words for words, _ in told)
    return f"| {name} | {count['found']} | {count['hidden']} | {count['wrong']} | {sum(n for _, n in told)} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--half", choices=("tune", "report"), default="report")
    parser.add_argument("--attack", choices=ATTACKS, nargs="+", default=list(ATTACKS))
    options = parser.parse_args()
    print("| disguise | found | hidden | wrong | hung from it |\n|---|---|---|---|---|", flush=True)
    for name in options.attack:
        print(row(name, range(options.first, options.first + options.seeds), options.half), flush=True)


if __name__ == "__main__":
    main()
