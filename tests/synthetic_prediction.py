"""Family trees made of points in space, tiny UNets and adapters for them, and predictions with names that want to break
the page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from lineage.cluster_result import Edge
from lineage.predict_result import (
    OTHER_ARCHITECTURE,
    AdapterFacts,
    Forecast,
    ListedModel,
    PredictResult,
    TrainingBase,
)
from lineage.prediction import CONSTANTS, FamilyTree, code_hash
from lineage.results import provenance

Weights = dict[str, torch.Tensor]
WHERE = "model.diffusion_model."
ARTICLE = {
    "NAI": ("SD",), "AC": ("SD",), "BP": ("AC",), "NMFSAN": ("BP",), "Anything": ("NAI",), "AOM": ("NAI",),
    "AnyLora": ("Anything", "AOM"), "tmp1": ("NAI", "BP"),
}  # fmt: skip


def edge(parent: str, child: str, relation: str = "finetune", weight: float | None = None, **more) -> Edge:
    more = {"directed": True, "confidence": 0.9, **more}
    return Edge(parent, child, relation, weight, None, None, **more)


def article(seed: int = 0, size: float = 0.05) -> tuple[dict[str, NDArray], FamilyTree]:
    """Models of the article as points that fine-tuning moved in random directions, two strangers, one of them with a
    child, and a permuted copy of NAI with a child: (name -> point, their tree)."""
    rng = np.random.default_rng(seed)
    dimensions = 400

    def step(length: float) -> NDArray:
        return rng.normal(0, length / np.sqrt(dimensions), dimensions)

    points, edges = {"SD": step(1.0)}, []
    for child, parents in ARTICLE.items():
        if len(parents) == 1:
            points[child] = points[parents[0]] + step(size * rng.uniform(0.5, 1.5))
            edges.append(edge(parents[0], child))
        else:
            points[child] = sum((0.5 * points[p] for p in parents), np.zeros(dimensions))
            edges += [edge(p, child, "merge", 0.5) for p in parents]
    points["stranger"], points["other"] = step(1.0), step(1.0)
    points["NAI-permuted"] = rng.permutation(points["NAI"])
    for parent in ("stranger", "NAI-permuted"):
        points[f"{parent}-child"] = points[parent] + step(size)
        edges.append(edge(parent, f"{parent}-child"))
    edges.append(edge("NAI", "NAI-permuted", "permuted"))
    roots = {n: n if n == "other" else "stranger" if n.startswith("stranger") else "SD" for n in points}
    return points, tree_of(points, edges, roots)


def tree_of(points: Mapping[str, NDArray], edges: list[Edge], roots: Mapping[str, str]) -> FamilyTree:
    names = tuple(sorted(points))
    x = np.stack([points[n] for n in names])
    squares = ((x[:, None] - x[None]) ** 2).sum(-1)
    return FamilyTree(names, squares, tuple(edges), dict(roots))


def unet(seed: int, wide: int = 16, text: int = 24) -> Weights:
    """The attention of a tiny SD1 in one file."""
    g = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g) * shape[-1] ** -0.5

    made = {f"{WHERE}input_blocks.0.0.weight": random(wide, 4, 3, 3), f"{WHERE}input_blocks.0.0.bias": random(wide)}
    for name, width in _layers(wide, text).items():
        made[f"{WHERE}{name}.weight"] = random(wide, width)
    return made


def _layers(wide: int, text: int) -> dict[str, int]:
    """Name of each attention layer -> its inputs."""
    blocks = [f"{way}_blocks.1.1.transformer_blocks.0" for way in ("input", "output")]
    widths = {"attn1": (wide, wide, wide, wide), "attn2": (wide, text, text, wide)}
    parts = ("to_q", "to_k", "to_v", "to_out.0")
    return {f"{b}.{a}.{p}": w for b in blocks for a, ws in widths.items() for p, w in zip(parts, ws, strict=True)}


def tuned(parent: Weights, seed: int, size: float = 0.05) -> Weights:
    g = torch.Generator().manual_seed(seed)
    return {k: w + size * w.square().mean().sqrt() * torch.randn(w.shape, generator=g) for k, w in parent.items()}


def adapter(path: Path, metadata: Mapping[str, str] | None = None, wide: int = 16, text: int = 24) -> Path:
    """A LoRA of every attention layer of `unet`."""
    tensors: Weights = {}
    for name, width in _layers(wide, text).items():
        for ldm, diffusers in (("input_blocks.1.1", "down_blocks.0"), ("output_blocks.1.1", "up_blocks.0")):
            name = name.replace(ldm, f"{diffusers}.attentions.0")
        module = "lora_unet_" + name.replace(".", "_")
        tensors |= {
            f"{module}.lora_up.weight": torch.ones(wide, 2),
            f"{module}.lora_down.weight": torch.ones(2, width),
            f"{module}.alpha": torch.tensor(1.0),
        }
    save_file(tensors, path, dict(metadata or {}))
    return path


def predict_result(names: tuple[str, ...] = ("AC", "BP", "NMFSAN")) -> PredictResult:
    """A forecast per name: strengths fall, and the last two have none."""
    listed = tuple(ListedModel(n, f"{n}.safetensors", "sd1", names[0], names[0], i) for i, n in enumerate(names))
    forecasts = [_forecast(n, i, names) for i, n in enumerate(names)]
    base = TrainingBase(names[0], False, "certain", "ab" * 32, names[0], "its metadata names that file by its hash")
    facts = AdapterFacts("style", "style.safetensors", "loha", 192, "epsilon")
    made = provenance("predict", {}, seconds=1.0)
    return PredictResult(made, "models", listed, facts, base, tuple(forecasts), (), (), CONSTANTS, code_hash())


def _forecast(name: str, i: int, names: tuple[str, ...]) -> Forecast:
    if i >= len(names) - 2:
        return Forecast(name, OTHER_ARCHITECTURE, "refused: a layer has another shape there", 0.2)
    share = i / len(names)
    return Forecast(
        name, "works", f"{name} descends from {names[0]}", 1.0, (), 1 - share, share, "ancestor", 0.01 * i, 0.9
    )
