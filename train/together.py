"""Adapted weights of many small layers at once: on matrices this small, calls cost more than arithmetic.

Layers of equal shape are stacked when their model's forward pass starts: one batched product makes all their deltas,
and one the gradients of all factors, once each layer has its own. The function is train.factored's.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from train.factored import MERGEABLE, ConvOp, Op
from train.targets import Target

SMALL = 100_000  # entries of a weight, from which on its own products are worth their calls; SD1 has none below


class Layer(Protocol):
    """Factors on a target layer: left, right of one pair or two. weight: with the delta, or None."""

    target: Target
    weight: Tensor | None

    @property
    def strength(self) -> float: ...

    def pairs(self) -> list[Tensor]: ...


class Together:
    """Gives the small ones among `layers` that lie in `model` their weights while its forward pass runs."""

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
            return  # checkpointed parts run again in the backward pass, when there are no weights any more
        for group in self.groups:
            weights, strength = [layer.target.module.weight for layer in group], group[0].strength
            kind, dtype = weights[0].device.type, weights[0].dtype
            if strength and dtype in MERGEABLE and not torch.is_autocast_enabled(kind):
                factors = (factor for layer in group for factor in layer.pairs())
                made: Any = _Weights.apply(strength, len(group), *weights, *factors)
                for layer, weight in zip(group, made, strict=True):
                    layer.weight = weight

    def end(self) -> None:
        for group in self.groups:
            for layer in group:
                layer.weight = None

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


class _Weights(torch.autograd.Function):
    """weight + scale * delta of each of n layers, from n weights and then the layers' factors."""

    @staticmethod
    def forward(ctx: Any, scale: float, n: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        weights, factors = tensors[:n], tensors[n:]
        ctx.scale, ctx.n = scale, n
        ctx.save_for_backward(*factors)
        products = [torch.bmm(left, right) for left, right in _stacked(factors, n)]
        delta = products[0].mul_(products[1]) if len(products) == 2 else products[0]
        whole = torch.stack(weights)
        return whole.add_(delta.view(whole.shape), alpha=scale).unbind()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        stacks, whole = _stacked(ctx.saved_tensors, ctx.n), torch.stack(grads).flatten(2).mul_(ctx.scale)
        products = [torch.bmm(left, right) for left, right in stacks] if len(stacks) == 2 else []
        found = []
        for i, (left, right) in enumerate(stacks):
            d = products[1 - i].mul_(whole) if products else whole
            found += [torch.bmm(d, right.mT).unbind(), torch.bmm(left.mT, d).unbind()]
        return None, None, *[None] * ctx.n, *(grad for layer in zip(*found, strict=True) for grad in layer)


def _stacked(factors: tuple[Tensor, ...], n: int) -> list[tuple[Tensor, Tensor]]:
    """left (n, out, r), right (n, r, columns) of n layers, once for LoRA, twice for LoHa."""
    each = len(factors) // n
    return [(torch.stack(factors[i::each]), torch.stack(factors[i + 1 :: each])) for i in range(0, each, 2)]


def applied(x: Tensor, weight: Tensor, bias: Tensor | None, op: Op) -> Tensor:
    """op(x, weight) + bias, with gradients for x and weight: a convolution's by torch, which makes both in one call, a
    product's by train.factored's faster ones."""
    return op(x, weight, bias) if isinstance(op, ConvOp) else _Applied.apply(op, x, weight, bias)  # type: ignore[return-value]


class _Applied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, op: Op, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.op = op
        ctx.save_for_backward(x, weight)
        return op(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        dx = ctx.op.input_grad(g, weight, x) if ctx.needs_input_grad[1] else None
        return None, dx, ctx.op.weight_grad(g, x, weight.shape).view(weight.shape), None
