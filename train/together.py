"""Deltas of many small layers at once: on matrices this small, calls cost more than arithmetic.

Layers of equal shape are stacked when their model's forward pass starts: one batched product makes all their deltas,
and one those gradients of all factors, once each layer has its own. The function is train.factored's.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from train.factored import MERGEABLE, Op
from train.targets import Target

SMALL = 2**16  # entries of a weight, from which on its own products are worth their calls


class Layer(Protocol):
    """Factors on a target layer: left, right of one pair or two; scaled delta (out, columns), or None."""

    target: Target
    delta: Tensor | None

    @property
    def strength(self) -> float: ...

    def pairs(self) -> list[Tensor]: ...


class Together:
    """Gives the small ones among `layers` that lie in `model` their deltas while its forward pass runs."""

    def __init__(self, model: nn.Module, layers: Sequence[Layer]):
        inside, alike = {*model.modules()}, dict[Hashable, list[Layer]]()
        for layer in layers:
            weight = layer.target.module.weight
            if layer.target.module in inside and layer.target.pointwise and weight.numel() < SMALL:
                shapes = tuple(factor.shape for factor in layer.pairs())
                alike.setdefault((weight.shape, weight.device, layer.strength, shapes), []).append(layer)
        self.groups = [group for group in alike.values() if len(group) > 1]
        self.twice: list[Any] = [module for module in inside if hasattr(module, "gradient_checkpointing")]
        self.handles = [
            model.register_forward_pre_hook(lambda *_: self.begin()),
            model.register_forward_hook(lambda *_: self.end(), always_call=True),
        ]

    def begin(self) -> None:
        if any(module.training and module.gradient_checkpointing for module in self.twice):
            return  # checkpointed parts run again in the backward pass, when there are no deltas any more
        for group in self.groups:
            weight, strength = group[0].target.module.weight, group[0].strength
            if strength and weight.dtype in MERGEABLE and not torch.is_autocast_enabled(weight.device.type):
                pairs = [layer.pairs() for layer in group]
                made: Any = _Deltas.apply(strength, len(pairs[0]), *(factor for pair in pairs for factor in pair))
                for layer, delta in zip(group, made, strict=True):
                    layer.delta = delta

    def end(self) -> None:
        for group in self.groups:
            for layer in group:
                layer.delta = None

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


class _Deltas(torch.autograd.Function):
    """scale * delta of each of n layers with `each` factors."""

    @staticmethod
    def forward(ctx: Any, scale: float, each: int, *factors: Tensor) -> tuple[Tensor, ...]:
        ctx.scale, ctx.each = scale, each
        ctx.save_for_backward(*factors)
        products = [torch.bmm(left, right) for left, right in _stacked(factors, each)]
        whole = products[0].mul_(products[1]) if len(products) == 2 else products[0]
        return whole.mul_(scale).unbind()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        stacks, whole = _stacked(ctx.saved_tensors, ctx.each), torch.stack(grads).mul_(ctx.scale)
        products = [torch.bmm(left, right) for left, right in stacks] if len(stacks) == 2 else []
        found = []
        for i, (left, right) in enumerate(stacks):
            d = products[1 - i].mul_(whole) if products else whole
            found += [torch.bmm(d, right.mT).unbind(), torch.bmm(left.mT, d).unbind()]
        return None, None, *(grad for layer in zip(*found, strict=True) for grad in layer)


def _stacked(factors: tuple[Tensor, ...], each: int) -> list[tuple[Tensor, Tensor]]:
    """left (n, out, r), right (n, r, columns) of n layers, once for LoRA, twice for LoHa."""
    return [(torch.stack(factors[i::each]), torch.stack(factors[i + 1 :: each])) for i in range(0, each, 2)]


def shifted(x: Tensor, weight: Tensor, bias: Tensor | None, delta: Tensor, op: Op) -> Tensor:
    """op(x, weight + delta) + bias of a frozen layer, with gradients for x and delta (out, columns)."""
    return _Shifted.apply(op, x, weight, bias, delta)  # type: ignore[return-value]


class _Shifted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, op: Op, x: Tensor, weight: Tensor, bias: Tensor | None, delta: Tensor) -> Tensor:
        ctx.op = op
        ctx.save_for_backward(x, weight, delta)
        return op(x, weight + delta.view(weight.shape), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        x, weight, delta = ctx.saved_tensors
        dx = ctx.op.input_grad(g, weight + delta.view(weight.shape), x) if ctx.needs_input_grad[1] else None
        return None, dx, None, None, ctx.op.weight_grad(g, x, weight.shape).flatten(1)
