"""Merges of the zoo, none of them made by lineage: a plain script, sd-mecha, and mergekit's own functions.

Each takes the parents' tensors, in float32, and gives the child's. What a tool names otherwise is called by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

State = dict[str, Tensor]
Settings = Mapping[str, Any]
Parents = Sequence[Mapping[str, Tensor]]


def merge(parents: Parents, settings: Settings, seed: int) -> State:
    """settings: "method" and "tool", and what the method needs. SystemExit where the tool is not installed."""
    parents = [{n: t.float() for n, t in p.items()} for p in parents]
    torch.manual_seed(seed)  # mergekit draws from the global generator
    try:
        return MAKERS[settings["tool"]][settings["method"]](parents, settings)
    except ImportError as e:
        words = f"{e.name} is missing: pip install --no-deps sd-mecha mergekit, or make the zoo with --plain."
        raise SystemExit(words) from e


def each(rule: Callable[[list[Tensor], Settings, str], Tensor]) -> Callable[[Parents, Settings], State]:
    """A merge whose rule sees one parameter of all parents at a time."""

    def made(parents: Parents, settings: Settings) -> State:
        return {name: rule([p[name] for p in parents], settings, name) for name in parents[0]}

    return made


def weighted(t: list[Tensor], s: Settings, name: str) -> Tensor:
    return torch.stack([w * x for w, x in zip(s["weights"], t, strict=True)]).sum(0)


def add_difference(t: list[Tensor], s: Settings, name: str) -> Tensor:
    return t[0] + s["weight"] * (t[1] - t[2])


def chain(t: list[Tensor], s: Settings, name: str) -> Tensor:
    """A merge of a merge that was stored as float16 and thrown away."""
    between = ((1 - s["weight"]) * t[0] + s["weight"] * t[1]).half().float()
    return (1 - s["second"]) * between + s["second"] * t[2]


def slerp(t: list[Tensor], s: Settings, name: str) -> Tensor:
    """Shoemake 1985, on each tensor as one vector."""
    a, b = (x / x.norm().clamp_min(1e-12) for x in t)
    angle = torch.arccos((a * b).sum().clamp(-1, 1))
    if angle < 1e-4:
        return torch.lerp(t[0], t[1], s["weight"])
    first, second = torch.sin((1 - s["weight"]) * angle), torch.sin(s["weight"] * angle)
    return (first * t[0] + second * t[1]) / torch.sin(angle)


def ties(t: list[Tensor], s: Settings, name: str) -> Tensor:
    """Trim to the largest entries, elect signs, mean of those that agree (Yadav et al. 2023)."""
    deltas = torch.stack([_trimmed(x - t[0], s["density"]) for x in t[1:]])
    sign = torch.where(deltas.sum(0) >= 0, 1.0, -1.0)
    agree = (deltas.sign() == sign) & (deltas != 0)
    return t[0] + s["weight"] * (deltas * agree).sum(0) / agree.sum(0).clamp_min(1)


def _trimmed(delta: Tensor, density: float) -> Tensor:
    drop = int((1 - density) * delta.numel())
    return torch.where(delta.abs() > delta.abs().flatten().kthvalue(drop).values, delta, 0.0) if drop else delta


def dare(t: list[Tensor], s: Settings, name: str) -> Tensor:
    """Keep random entries of each delta, scaled up by as much as was dropped (Yu et al. 2024)."""
    kept = [(torch.rand_like(t[0]) < s["density"]) / s["density"] * (x - t[0]) for x in t[1:]]
    return t[0] + s["weight"] * torch.stack(kept).mean(0)


def blocks(t: list[Tensor], s: Settings, name: str) -> Tensor:
    """Another weight for each group of layers that shares the first two parts of its names."""
    stem = ".".join(name.split(".")[:2])
    w = (s["weight"] + 0.618 * sum(stem.encode())) % 1
    return torch.lerp(t[0], t[1], 0.1 + 0.8 * w)


def kit_slerp(t: list[Tensor], s: Settings, name: str) -> Tensor:
    from mergekit.merge_methods.slerp import slerp as theirs  # pyright: ignore[reportMissingImports]

    return theirs(torch.tensor([s["weight"]]), t[0][None], t[1][None])[0]


def kit_sparse(method: str, elect: bool) -> Callable[[list[Tensor], Settings, str], Tensor]:
    """TIES (magnitude, with election of signs) and DARE (random, without) of mergekit."""

    def rule(t: list[Tensor], s: Settings, name: str) -> Tensor:
        import mergekit.sparsify as sparsify  # pyright: ignore[reportMissingImports]
        from mergekit.merge_methods.generalized_task_arithmetic import (  # pyright: ignore[reportMissingImports]
            get_mask,
        )

        how, norm = sparsify.SparsificationMethod(method), None if elect else sparsify.RescaleNorm.l1
        deltas = torch.stack([sparsify.sparsify(x - t[0], s["density"], how, rescale_norm=norm) for x in t[1:]])
        mask = get_mask(deltas, "sum") if elect else torch.ones_like(deltas)
        divisor = mask.sum(0).clamp_min(1)
        return t[0] + s["weight"] * (deltas * mask).sum(0) / divisor

    return rule


def mecha(recipe: Callable[[Any, list[Any], Settings], Any]) -> Callable[[Parents, Settings], State]:
    """A merge by sd-mecha's executor, in float32."""

    def made(parents: Parents, settings: Settings) -> State:
        import logging

        import sd_mecha

        logging.getLogger().setLevel(logging.ERROR)
        nodes = [sd_mecha.model(dict(p)) for p in parents]
        out = sd_mecha.merge(recipe(sd_mecha, nodes, settings), merge_dtype=torch.float32, output_dtype=torch.float32,
                             threads=0, strict_merge_space="weight", tqdm=_silent())  # fmt: skip
        assert out is not None
        return {name: out[name] for name in parents[0]}

    return made


def _silent() -> Any:
    from tqdm import tqdm

    class Silent(tqdm):
        def __init__(self, *a: Any, **k: Any) -> None:
            super().__init__(*a, **{**k, "disable": True})

    return Silent


def mecha_weighted(m: Any, nodes: list[Any], s: Settings) -> Any:
    """sd-mecha's weighted sum takes two; more are chained, as its users do."""
    out, total = nodes[0], s["weights"][0]
    for node, w in zip(nodes[1:], s["weights"][1:], strict=True):
        total += w
        out = m.weighted_sum(out, node, alpha=w / total)
    return out


def mecha_chain(m: Any, nodes: list[Any], s: Settings) -> Any:
    return m.weighted_sum(m.weighted_sum(nodes[0], nodes[1], alpha=s["weight"]), nodes[2], alpha=s["second"])


def mecha_difference(m: Any, nodes: list[Any], s: Settings) -> Any:
    return m.add_difference(*nodes, alpha=s["weight"])


PLAIN = {"weighted": weighted, "add_difference": add_difference, "chain": chain, "slerp": slerp, "ties": ties,
         "dare": dare, "blocks": blocks}  # fmt: skip
MAKERS: dict[str, dict[str, Callable[[Parents, Settings], State]]] = {
    "plain": {name: each(rule) for name, rule in PLAIN.items()},
    "mergekit": {
        "slerp": each(kit_slerp),
        "ties": each(kit_sparse("magnitude", True)),
        "dare": each(kit_sparse("random", False)),
    },
    "sd-mecha": {
        "weighted": mecha(mecha_weighted),
        "add_difference": mecha(mecha_difference),
        "chain": mecha(mecha_chain),
    },
}


def coefficients(settings: Settings) -> list[float] | None:
    """The true weight of each parent, where the method has such."""
    w = settings.get("weight", 0.0)
    return {
        "weighted": lambda: settings["weights"],
        "add_difference": lambda: [1.0, w, -w],
        "chain": lambda: [(1 - settings["second"]) * (1 - w), (1 - settings["second"]) * w, settings["second"]],
    }.get(settings["method"], lambda: None)()
