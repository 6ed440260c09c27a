"""Families of small models with a known past, made without training: for laws of `lineage cluster`."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

Weights = dict[str, torch.Tensor]
WIDTH = 48


def root(seed: int) -> Weights:
    """A fresh initialisation: four layers of two matrices, a norm and a bias."""
    g = torch.Generator().manual_seed(seed)
    found: Weights = {"embed.weight": torch.randn(64, WIDTH, generator=g) * 0.1}
    for i in range(4):
        found[f"layers.{i}.attn.weight"] = torch.randn(WIDTH, WIDTH, generator=g) * WIDTH**-0.5
        found[f"layers.{i}.mlp.weight"] = torch.randn(2 * WIDTH, WIDTH, generator=g) * WIDTH**-0.5
        found[f"layers.{i}.mlp.bias"] = 0.01 * torch.randn(2 * WIDTH, generator=g)
        found[f"layers.{i}.norm.weight"] = 1 + 0.01 * torch.randn(WIDTH, generator=g)
    return found


def tune(parent: Weights, seed: int, size: float = 0.04) -> Weights:
    """A fine-tune: every entry moves, by `size` of its tensor's rms. Independent steps of half that size leave the root
    of these small models nearly undecided."""
    g = torch.Generator().manual_seed(seed)
    return {k: w + size * w.square().mean().sqrt() * torch.randn(w.shape, generator=g) for k, w in parent.items()}


def mix(weights: dict[str, float], models: dict[str, Weights]) -> Weights:
    """An affine combination."""
    names = next(iter(models.values()))
    return {k: torch.stack([w * models[m][k] for m, w in weights.items()]).sum(0) for k in names}


def lora(parent: Weights, seed: int, rank: int = 2, size: float = 0.05) -> Weights:
    """An adapter baked in: a low-rank change of the matrices of the layers."""
    g = torch.Generator().manual_seed(seed)
    out = dict(parent)
    for k, w in parent.items():
        if w.dim() == 2 and k.startswith("layers"):
            delta = torch.randn(w.shape[0], rank, generator=g) @ torch.randn(rank, w.shape[1], generator=g)
            out[k] = w + size * w.norm() * delta / delta.norm()
    return out


def quantise(parent: Weights, levels: int = 127) -> Weights:
    """Each row of a matrix rounded to a grid and back."""
    steps = {k: w.abs().amax(-1, keepdim=True) / levels for k, w in parent.items() if w.dim() > 1}
    return {k: (w / steps[k]).round() * steps[k] if k in steps else w for k, w in parent.items()}


def prune(parent: Weights, share: float = 0.3) -> Weights:
    """The smallest entries of each matrix set to zero."""
    return {k: w * (w.abs() > w.abs().flatten().quantile(share)) if w.dim() > 1 else w for k, w in parent.items()}


def permute(parent: Weights, seed: int) -> Weights:
    """Hidden units of each layer in another order: the same function of another file."""
    g = torch.Generator().manual_seed(seed)
    out = dict(parent)
    for i in range(4):
        order = torch.randperm(2 * WIDTH, generator=g)
        for k in (f"layers.{i}.mlp.weight", f"layers.{i}.mlp.bias"):
            out[k] = parent[k][order]
    return out


def half(model: Weights) -> Weights:
    return {k: w.half() for k, w in model.items()}


def save(models: dict[str, Weights], folder: Path, metadata: dict[str, dict[str, str]] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, weights in models.items():
        said = (metadata or {}).get(name)
        save_file({k: w.contiguous() for k, w in weights.items()}, str(folder / f"{name}.safetensors"), said)
    return folder
