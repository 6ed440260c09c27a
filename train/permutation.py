"""The same Stable Diffusion with its hidden units in another order: what it computes stays, where it stands moves."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def permute(pipeline: Any, seed: int) -> None:
    """Shuffle, in place, the hidden channels of resnets (inside the groups of their norm), the hidden units of feed
    forward layers, and the heads of attention; in UNet and text encoder."""
    generator = torch.Generator().manual_seed(seed)
    for module in [*pipeline.unet.modules(), *pipeline.text_encoder.modules()]:
        match type(module).__name__:
            case "ResnetBlock2D":
                m: Any = module
                order = _order(m.conv1.out_channels, m.norm2.num_groups, generator)
                _move(order, [m.conv1, m.time_emb_proj, m.norm2], m.conv2)
            case "FeedForward":
                gate, _, out = module.net
                order = _order(out.in_features, 1, generator)
                _move(torch.cat([order, order + len(order)]), [gate.proj], None)
                _move(order, [], out)
            case "CLIPMLP":
                _move(_order(module.fc1.out_features, 1, generator), [module.fc1], module.fc2)
            case "Attention":
                order = _heads(module.to_q.out_features, module.heads, generator)
                _move(order, [module.to_q, module.to_k, module.to_v], module.to_out[0])
            case "CLIPAttention":
                order = _heads(module.q_proj.out_features, module.num_heads, generator)
                _move(order, [module.q_proj, module.k_proj, module.v_proj], module.out_proj)
            case _:
                pass


def _order(count: int, groups: int, generator: torch.Generator) -> Tensor:
    size = count // groups
    return torch.cat([i * size + torch.randperm(size, generator=generator) for i in range(groups)])


def _heads(width: int, heads: int, generator: torch.Generator) -> Tensor:
    return torch.arange(width).view(heads, -1)[torch.randperm(heads, generator=generator)].flatten()


def _move(order: Tensor, before: Iterable[nn.Module], after: nn.Module | None) -> None:
    """Rows of the layers that make the units, columns of the one that reads them."""
    for module in before:
        for parameter in module.parameters(recurse=False):
            parameter.copy_(parameter[order].clone())
    if after is not None:
        weight: Any = after.weight
        weight.copy_(weight[:, order].clone())
