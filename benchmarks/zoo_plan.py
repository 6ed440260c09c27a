"""What the zoo holds: every network's parents and making, decided from a seed before anything is trained.

Even trees are for tuning, odd ones for the report; HELD_OUT occurs in odd trees only. Kind, settings, dtype and name
of a file are drawn independently of one another and of its depth.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from zoo_train import OPTIMIZERS, tasks

HELD_OUT = {"arch": "pixels", "optimizer": "rmsprop", "kind": "permuted", "method": "dare"}
RELATION = {
    "short": "finetune", "long": "finetune", "continued": "finetune", "sparse": "finetune",
    "lora": "adapter", "loha": "adapter", "int8": "quantized", "int4": "quantized", "pruned": "pruned",
    "retyped": "copy", "duplicate": "copy", "permuted": "permuted", "merge": "merge", "root": "root",
}  # fmt: skip
TRAINED = {"root", "short", "long", "continued", "sparse", "lora", "loha", "merge"}
LINEAR = {"weighted", "add_difference", "chain"}  # merges with one set of coefficients
PARTS = {
    "bytes": ("blocks.1.", "norm", "fc", ".v."),
    "pixels": ("blocks.1.", "norm", "fc", ".v."),
    "convolutions": ("convs.3", "norms", "fc", "convs.2"),
    "denoiser": ("middle", "norm", "time", "up."),
}
TOOLS = {
    "weighted": ("plain", "sd-mecha"), "add_difference": ("plain", "sd-mecha"), "slerp": ("plain", "mergekit"),
    "ties": ("plain", "mergekit"), "dare": ("plain", "mergekit"), "chain": ("plain", "sd-mecha"), "blocks": ("plain",),
}  # fmt: skip
DTYPES = {"float32": 5, "float16": 3, "bfloat16": 2}
DEEPEST = 5


@dataclass(frozen=True)
class Spec:
    """One network. parents: names; for TIES and DARE the base first, for an add-difference a + w (b - c). settings:
    what its making needs. hidden: its file is taken out of the folder."""

    name: str
    tree: int
    arch: str
    kind: str
    parents: tuple[str, ...]
    dtype: str
    depth: int
    seed: int
    settings: dict[str, Any] = field(default_factory=dict)
    hidden: bool = False

    @property
    def relation(self) -> str:
        return RELATION[self.kind]

    @property
    def half(self) -> str:
        return ("tune", "report")[self.tree % 2]


def plan(roots: int, finetunes: int, seed: int) -> list[Spec]:
    """All networks, parents before children. finetunes: of each tree."""
    return [spec for tree in range(roots) for spec in _Tree(tree, finetunes, seed).specs()]


class _Tree:
    def __init__(self, tree: int, finetunes: int, seed: int) -> None:
        self.rng = random.Random(f"{seed}/{tree}")
        self.tree, self.finetunes = tree, finetunes
        archs = ("bytes", "convolutions", "denoiser", "pixels")[: 4 if tree % 2 else 3]
        self.arch = archs[tree // 2 % len(archs)]
        self.optimizers = [o for o in OPTIMIZERS if tree % 2 or o != HELD_OUT["optimizer"]]
        self.tasks = tasks(self.arch, self.rng)
        self.made: dict[str, Spec] = {}

    def specs(self) -> list[Spec]:
        """The root, a few fine-tunes of it, then everything else in random order; perhaps one parent hidden."""
        self._add("root", (), self._training("+".join(self.tasks), self.rng.choice((400, 600, 800)), 0.0))
        for kind in self._order():
            self._grow(kind)
        if self.tree // 2 % 3 == 2:
            self._hide()
        return list(self.made.values())

    def _order(self) -> list[str]:
        rng, report = self.rng, self.tree % 2
        first = max(3, self.finetunes // 3)
        tuned = rng.choices(("short", "long", "continued", "sparse"), (8, 4, 3, 2), k=self.finetunes)
        derived = ["int8", "int4", "pruned", "retyped", "duplicate"] + ["permuted"] * 2 * report
        rest = tuned[first:] + rng.sample(derived, 3) + ["lora", "loha"] + ["merge"] * max(3, self.finetunes // 3)
        rng.shuffle(rest)
        return tuned[:first] + rest

    def _grow(self, kind: str) -> None:
        if kind == "merge":
            return self._merge()
        pool = [s for s in self.made.values() if s.kind in TRAINED and s.depth < DEEPEST]
        parent = self.rng.choice(pool[:1] + pool[-6:] + pool)
        if kind == "retyped" and parent.dtype == "bfloat16":
            kind = "duplicate"
        self._add(kind, (parent.name,), self._settings(kind, parent), self._dtype(kind, parent))

    def _settings(self, kind: str, parent: Spec) -> dict[str, Any]:
        rng = self.rng
        if kind in ("lora", "loha"):
            return {**self._training(rng.choice(self.tasks), rng.randint(25, 45), 0.0), "rank": rng.choice((1, 2, 4)),
                    "optimizer": "adamw", "weight": rng.choice((0.5, 0.8, 1.0))}  # fmt: skip
        if kind == "pruned":
            return {"share": rng.choice((0.1, 0.3, 0.5))}
        if RELATION[kind] != "finetune":
            return {}
        steps, largest = (rng.randint(60, 110), -0.8) if kind == "long" else (rng.randint(12, 40), -1.5)
        task = parent.settings.get("task", "+".join(self.tasks)) if kind == "continued" else rng.choice(self.tasks)
        only = rng.choice(PARTS[self.arch]) if kind == "sparse" else ""
        return {**self._training(task, steps, 10 ** rng.uniform(-2.7, largest)), "only": only}

    def _training(self, task: str, steps: int, change: float) -> dict[str, Any]:
        """change: what the learning rate aims at, see zoo_train.rate; 0 for a root. A decay of 10 shrinks norms."""
        optimizer = self.rng.choice(self.optimizers) if change else "adamw"
        decay = self.rng.choice((0.0, 0.01, 0.1, *((1.0, 10.0) if change else ())))
        return {"optimizer": optimizer, "steps": steps, "task": task, "change": change,
                "share": self.rng.choice((0.2, 0.4, 0.8)) if change else 1.0,
                "weight_decay": decay if optimizer == "adamw" else decay * 1e-3}  # fmt: skip

    def _merge(self) -> None:
        rng = self.rng
        methods = ["weighted"] * 4 + ["add_difference"] * 2 + ["chain", "slerp", "ties", "blocks"]
        method = rng.choice(methods + ["dare"] * 2 * (self.tree % 2))
        pool = [s for s in self.made.values() if s.kind in TRAINED and (s.kind != "merge" or rng.random() < 0.4)]
        count = {"weighted": rng.choice((2, 2, 2, 3, 3, 4, 5)), "slerp": 2, "blocks": 2}.get(method, 3)
        chosen = [s.name for s in rng.sample(pool, min(count, len(pool)))]
        settings: dict[str, Any] = {"method": method, "tool": rng.choice(TOOLS[method])}
        if method in ("ties", "dare"):
            root = next(iter(self.made))
            chosen = [root, *[n for n in chosen if n != root][:2]]
            settings |= {"density": rng.choice((0.3, 0.5, 0.7)), "weight": rng.choice((0.7, 1.0))}
        elif method == "weighted":
            parts = [rng.randint(2, 12) for _ in chosen]
            settings["weights"] = [p / sum(parts) for p in parts]
        else:
            settings["weight"] = rng.choice((0.25, 0.3, 0.5, 0.6, 0.75))
            settings["second"] = rng.choice((0.3, 0.5, 0.7))
        self._add("merge", tuple(chosen), settings, self._dtype("merge", None))

    def _dtype(self, kind: str, parent: Spec | None) -> str:
        if parent and kind == "retyped":
            return self.rng.choice(("float16", "bfloat16")) if parent.dtype == "float32" else "bfloat16"
        if parent and kind in ("duplicate", "permuted"):
            return parent.dtype
        return self.rng.choices(list(DTYPES), list(DTYPES.values()))[0]

    def _add(self, kind: str, parents: tuple[str, ...], settings: dict[str, Any], dtype: str = "") -> None:
        depth = 1 + max(self.made[p].depth for p in parents) if parents else 0
        name, seed = f"{self.rng.getrandbits(40):010x}", self.rng.getrandbits(31)
        dtype = dtype or self._dtype(kind, None)
        self.made[name] = Spec(name, self.tree, self.arch, kind, parents, dtype, depth, seed, settings)

    def _hide(self) -> None:
        """Take one parent of a linear merge away, that is not the root."""
        merges = [s for s in self.made.values() if s.settings.get("method") in LINEAR]
        parents = [p for s in merges for p in s.parents if self.made[p].kind not in ("root", "merge")]
        if parents:
            name = self.rng.choice(parents)
            self.made[name] = Spec(**{**self.made[name].__dict__, "hidden": True})
