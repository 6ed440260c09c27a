"""Networks made from others without plain training: baked adapters, quantised, pruned, permuted files."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import zoo_train
from torch import Tensor, nn
from torch.func import functional_call
from zoo_networks import NETWORKS
from zoo_train import Recipe, State

GROUP = 32  # entries that share an int4 scale


def adapt(arch: str, state: Mapping[str, Tensor], recipe: Recipe, kind: str, rank: int, weight: float) -> State:
    """A LoRA or LoHa trained on all weight matrices and baked in at `weight`."""
    g = torch.Generator().manual_seed(recipe.seed)
    start = {n: t.float() for n, t in state.items()}
    factors = {n: _factors(kind, t, rank, g) for n, t in start.items() if n.endswith("weight") and t.dim() > 1}
    net, loss_of = NETWORKS[arch](), zoo_train.objective(arch, recipe)
    optimizer = torch.optim.AdamW([f for fs in factors.values() for f in fs], lr=recipe.lr, weight_decay=0.0)

    class Adapted(nn.Module):
        def forward(self, *inputs: Tensor) -> Tensor:
            return functional_call(net, {n: w + _delta(factors[n], w) if n in factors else w for n, w in start.items()},
                                   inputs)  # fmt: skip

    for _ in range(recipe.steps):
        optimizer.zero_grad()
        loss_of(Adapted(), g).backward()
        optimizer.step()
    return {n: (w + weight * _delta(factors[n], w)).detach() if n in factors else w for n, w in start.items()}


def _factors(kind: str, w: Tensor, rank: int, g: torch.Generator) -> list[Tensor]:
    """down, up of a LoRA; twice of a LoHa. The first up is 0, so training starts at the parent."""
    rows, columns = w.flatten(1).shape
    rank = min(rank, rows, columns)
    made = []
    for i in range(1 if kind == "lora" else 2):
        scale = columns**-0.5 if kind == "lora" else 0.3
        made += [scale * torch.randn(rank, columns, generator=g), i * 0.3 * torch.randn(rows, rank, generator=g)]
    return [f.requires_grad_() for f in made]


def _delta(factors: list[Tensor], w: Tensor) -> Tensor:
    products = [up @ down for down, up in zip(factors[::2], factors[1::2], strict=True)]
    return (products[0] * products[1] if len(products) > 1 else products[0]).view_as(w)


def quantise(state: Mapping[str, Tensor], bits: int) -> State:
    """Matrices on a symmetric grid and back: int8 a scale per row, int4 a scale per GROUP entries."""
    return {n: _on_grid(t.float(), bits) if t.dim() > 1 else t.float() for n, t in state.items()}


def _on_grid(w: Tensor, bits: int) -> Tensor:
    rows = w.flatten(1)
    if bits == 4 and rows.shape[1] % GROUP == 0:
        rows = rows.reshape(-1, GROUP)
    step = rows.abs().amax(1, keepdim=True).clamp_min(1e-12) / (2 ** (bits - 1) - 1)
    return ((rows / step).round() * step).view_as(w)


def prune(state: Mapping[str, Tensor], share: float) -> State:
    """The smallest `share` of each matrix's entries set to 0."""

    def cut(w: Tensor) -> Tensor:
        edge = w.abs().flatten().kthvalue(max(1, int(share * w.numel()))).values
        return torch.where(w.abs() > edge, w, 0.0)

    return {n: cut(t.float()) if t.dim() > 1 else t.float() for n, t in state.items()}


def permute(arch: str, state: Mapping[str, Tensor], seed: int) -> State:
    """The same function with hidden units in another order: of each MLP, or inside each GroupNorm's groups."""
    out = {n: t.clone() for n, t in state.items()}
    g = torch.Generator().manual_seed(seed)
    for before, norm, after in _hidden(arch, out):
        order = _shuffled(len(out[f"{before}.weight"]), 8 if norm else 1, g)
        tensors = [f"{m}.{leaf}" for m in (before, norm) if m for leaf in ("weight", "bias")]
        tensors += [f"{before.rpartition('.')[0]}.time.{leaf}" for leaf in ("weight", "bias") if "conv1" in before]
        for name in tensors:
            out[name] = out[name][order]
        out[f"{after}.weight"] = out[f"{after}.weight"][:, order]
    return out


def _hidden(arch: str, state: Mapping[str, Tensor]) -> list[tuple[str, str, str]]:
    """(layer that makes hidden units, norm between or "", layer that reads them)."""
    if arch == "convolutions":
        return [(f"convs.{i}", f"norms.{i}", f"convs.{i + 1}") for i in range(3)] + [("fc", "", "head")]
    if arch == "denoiser":
        stems = sorted(n.removesuffix(".conv1.weight") for n in state if n.endswith(".conv1.weight"))
        return [(f"{s}.conv1", f"{s}.norm2", f"{s}.conv2") for s in stems]
    stems = sorted(n.removesuffix(".fc1.weight") for n in state if n.endswith(".fc1.weight"))
    return [(f"{s}.fc1", "", f"{s}.fc2") for s in stems]


def _shuffled(count: int, groups: int, g: torch.Generator) -> Tensor:
    size = count // groups
    return torch.cat([i * size + torch.randperm(size, generator=g) for i in range(groups)])


def round_trip(state: Mapping[str, Tensor]) -> State:
    return {n: t.float() for n, t in state.items()}


DERIVED: dict[str, Callable[[str, Mapping[str, Tensor], dict, int], State]] = {
    "int8": lambda arch, state, settings, seed: quantise(state, 8),
    "int4": lambda arch, state, settings, seed: quantise(state, 4),
    "pruned": lambda arch, state, settings, seed: prune(state, settings["share"]),
    "permuted": lambda arch, state, settings, seed: permute(arch, state, seed),
    "retyped": lambda arch, state, settings, seed: round_trip(state),
    "duplicate": lambda arch, state, settings, seed: round_trip(state),
}
