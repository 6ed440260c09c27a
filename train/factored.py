"""y = op(x, W + delta) of a frozen layer whose delta lies in factors, with gradients for x and the factors alone.

A pair is left (out, r), right (r, columns), columns = in * kernel. One pair is a LoRA: delta = left @ right. Two are a
LoHa: delta = (left1 @ right1) * (left2 @ right2), which is u^T v in Khatri-Rao factors u (R, out), v (R, columns),
R = r^2. Three forms of the same function; T positions, counted in multiply-adds times two:

    apart   y = op(x, W) + op(x, v) u                          6 T R (out + columns)
    merged  y = op(x, W + u^T v), factors' gradients as apart  4 T R (out + columns) + 4 R out columns
    built   y = op(x, W + delta), gradients from dL/d delta    2 T out columns + (16 r + passes) out columns

None keeps more for the backward pass than x, the factors and, apart, op(x, v) (T, R), whose recomputation would cost a
sixth of that form; delta, u and v are made anew. W + delta is only formed in float32 and float64: in half precision it
would round a small delta away, so there `built` applies delta to x beside W.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

Form: TypeAlias = Literal["apart", "merged", "built"]
Pairs: TypeAlias = list[tuple[Tensor, Tensor]]

MERGEABLE = (torch.float32, torch.float64)
HALF_SHIFT = 16.0  # moved from right to left in float16, where a left factor of a young network would be subnormal
TOUCH = 16  # operations in the time that one entry of a matrix in memory is read or written


class LinearOp:
    """What a Linear does with a weight (rows, columns); x is (..., columns)."""

    def positions(self, x: Tensor) -> int:
        return x.numel() // x.shape[-1]

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return functional.linear(x, weight, bias)

    def mix(self, z: Tensor, u: Tensor) -> Tensor:
        """(..., R) -> (..., out) by u (R, out)."""
        return z @ u

    def add_mix(self, y: Tensor, z: Tensor, u: Tensor) -> Tensor:
        y.view(-1, y.shape[-1]).addmm_(z.view(-1, z.shape[-1]), u)
        return y

    def input_grad(self, g: Tensor, weight: Tensor, x: Tensor) -> Tensor:
        return g @ weight

    def weight_grad(self, g: Tensor, x: Tensor, shape: Sequence[int]) -> Tensor:
        return g.flatten(0, -2).mT @ x.flatten(0, -2)

    def mix_grad(self, z: Tensor, g: Tensor) -> Tensor:
        return z.flatten(0, -2).mT @ g.flatten(0, -2)


@dataclass(frozen=True)
class ConvOp:
    """What a Conv2d does with a weight (rows, in, *kernel); x is (n, in, height, width)."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    def positions(self, x: Tensor) -> int:
        return x.numel() // x.shape[1] // math.prod(self.stride)

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return functional.conv2d(x, weight, bias, self.stride, self.padding, self.dilation)

    def mix(self, z: Tensor, u: Tensor) -> Tensor:
        return functional.conv2d(z, u.mT[..., None, None])

    def add_mix(self, y: Tensor, z: Tensor, u: Tensor) -> Tensor:
        return y.add_(self.mix(z, u))

    def input_grad(self, g: Tensor, weight: Tensor, x: Tensor) -> Tensor:
        return self._backward(g, x, weight, (True, False, False))[0]

    def weight_grad(self, g: Tensor, x: Tensor, shape: Sequence[int]) -> Tensor:
        return self._backward(g, x, x.new_empty(()).expand(g.shape[1], *shape[1:]), (False, True, False))[1]

    def mix_grad(self, z: Tensor, g: Tensor) -> Tensor:
        return torch.bmm(z.flatten(2), g.flatten(2).mT).sum(0)

    def _backward(self, g: Tensor, x: Tensor, weight: Tensor, mask: tuple[bool, bool, bool]) -> Any:
        settings = (self.stride, self.padding, self.dilation, False, (0, 0), 1)
        return torch.ops.aten.convolution_backward(g, x, weight, None, *settings, mask)


Op: TypeAlias = LinearOp | ConvOp


def op_of(module: nn.Linear | nn.Conv2d) -> Op:
    """The arithmetic of `module`, without its weights."""
    if isinstance(module, nn.Linear):
        return LinearOp()
    assert not isinstance(module.padding, str)
    return ConvOp(module.stride, module.padding, module.dilation)


def costs(positions: int, shape: Sequence[int], rank: int, pairs: int, mergeable: bool) -> dict[Form, float]:
    """Operations that each form adds to the frozen layer with a weight of `shape`, forward and backward."""
    out, columns = shape[0], math.prod(shape[1:])
    entries, wide = out * columns, rank**pairs
    expanding = 8 * TOUCH * wide * (out + columns) if pairs == 2 else 0
    narrow = positions * wide * (out + columns)
    building = (16 * rank if pairs == 2 else 8 * rank) * entries + 12 * TOUCH * entries
    found: dict[Form, float] = {
        "apart": 6 * narrow + expanding,
        "built": 2 * positions * entries + building,
    }
    if mergeable:
        return {**found, "merged": 4 * narrow + expanding + 4 * (wide + TOUCH) * entries}
    return {**found, "built": found["built"] + 4 * positions * entries}


def cheapest(positions: int, shape: Sequence[int], rank: int, pairs: int, mergeable: bool) -> Form:
    found = costs(positions, shape, rank, pairs, mergeable)
    return min(found, key=lambda form: found[form])


def adapted(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    factors: Sequence[Tensor],
    scale: float,
    op: Op,
    *,
    alone: bool = False,
    form: Form | None = None,
) -> Tensor:
    """op(x, weight + scale * delta) + bias, or without weight and bias where `alone`; factors: left, right of one pair
    or two. form None: the cheapest. Under autocast in its dtype, else in that of x."""
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    mergeable = not alone and x.dtype in MERGEABLE
    rank, pairs = factors[1].shape[0], len(factors) // 2
    form = form or cheapest(op.positions(x), weight.shape, rank, pairs, mergeable)
    call = _Call(op, scale, form if mergeable or form != "merged" else "apart", mergeable, alone)
    return _Adapted.apply(call, x, weight, bias, *factors)  # type: ignore[return-value]


@dataclass(frozen=True)
class _Call:
    op: Op
    scale: float
    form: Form
    mergeable: bool
    alone: bool

    def merged(self, weight: Tensor, u: Tensor, v: Tensor) -> Tensor:
        return torch.addmm(weight.flatten(1).to(v.dtype), u.mT, v).view(weight.shape)


class _Adapted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, x: Tensor, weight: Tensor, bias: Tensor | None, *factors: Tensor) -> Tensor:
        ctx.call, z = call, None
        with _as_written(x):
            pairs = _pairs(factors, call.scale, x.dtype)
            if call.form == "built":
                y = _built(call, x, weight, bias, pairs)
            else:
                y, z = _factored(call, x, weight, bias, pairs)
        ctx.save_for_backward(x, weight, z, *factors)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        x, weight, z, *factors = ctx.saved_tensors
        call, wanted = ctx.call, ctx.needs_input_grad[1]
        with _as_written(g):
            pairs = _pairs(factors, call.scale, x.dtype)
            back = _built_backward if call.form == "built" else _factored_backward
            dx, grads = back(call, g, x, weight, z, pairs, wanted)
            up, down = _shifts(call.scale, x.dtype)
            grads[0], grads[1] = grads[0] if up == 1 else grads[0] * up, grads[1].mul_(down)
        return None, dx, None, None, *grads


def _as_written(x: Tensor) -> AbstractContextManager:
    """No autocast inside: each product has the dtype that it is written with."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _shifts(scale: float, dtype: torch.dtype) -> tuple[float, float]:
    """What the first left and the first right factor are multiplied by; together `scale`."""
    shift = HALF_SHIFT if dtype == torch.float16 else 1.0
    return shift, scale / shift


def _pairs(factors: Sequence[Tensor], scale: float, dtype: torch.dtype) -> Pairs:
    """(left^T (r, out), right (r, columns)) per pair, the first scaled; long sides are contiguous."""
    lefts, rights = [left.mT.contiguous() for left in factors[::2]], list(factors[1::2])
    up, down = _shifts(scale, dtype)
    lefts[0], rights[0] = lefts[0] if up == 1 else lefts[0] * up, rights[0] * down
    return list(zip(lefts, rights, strict=True))


def _khatri_rao(pairs: Pairs, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """u (R, out), v (R, columns) with u^T v = delta."""
    u, v = pairs[0]
    if len(pairs) == 2:
        u, v = ((a[:, None] * b).flatten(0, 1) for a, b in zip(*pairs, strict=True))
    return u.to(dtype), v.to(dtype)


def _khatri_rao_backward(pairs: Pairs, du: Tensor, dv: Tensor) -> list[Tensor]:
    """Gradients of left1, right1, left2, right2 from those of u and v."""
    du, dv = du.to(pairs[0][0].dtype), dv.to(pairs[0][1].dtype)
    if len(pairs) == 1:
        return [du.mT, dv]
    first, second = [], []
    for d, a, b in zip((du, dv), *pairs, strict=True):
        d = d.view(len(a), len(b), -1)
        first.append((d * b).sum(1))
        second.append(d.mul_(a[:, None]).sum(0))
    return [first[0].mT, first[1], second[0].mT, second[1]]


def _factored(
    call: _Call, x: Tensor, weight: Tensor, bias: Tensor | None, pairs: Pairs
) -> tuple[Tensor, Tensor | None]:
    u, v = _khatri_rao(pairs, x.dtype)
    if call.form == "merged":
        return call.op(x, call.merged(weight, u, v), _as(bias, x)), None
    z = call.op(x, v.view(-1, *weight.shape[1:]))
    if call.alone:
        return call.op.mix(z, u), z
    return call.op.add_mix(call.op(x, weight.to(x.dtype), _as(bias, x)), z, u), z


def _factored_backward(
    call: _Call, g: Tensor, x: Tensor, weight: Tensor, z: Tensor | None, pairs: Pairs, wanted: bool
) -> tuple[Tensor | None, list[Tensor]]:
    u, v = _khatri_rao(pairs, x.dtype)
    kernels = v.view(-1, *weight.shape[1:])
    w, dx = call.op.mix(g, u.mT), None
    if wanted and call.form == "merged":
        dx = call.op.input_grad(g, call.merged(weight, u, v), x)
    elif wanted:
        dx = call.op.input_grad(w, kernels, x)
        dx = dx if call.alone else dx.add_(call.op.input_grad(g, weight.to(x.dtype), x))
    du = call.op.mix_grad(call.op(x, kernels) if z is None else z, g)
    dv = call.op.weight_grad(w, x, weight.shape).flatten(1)
    return dx, _khatri_rao_backward(pairs, du, dv)


def _built(call: _Call, x: Tensor, weight: Tensor, bias: Tensor | None, pairs: Pairs) -> Tensor:
    delta = _products(pairs)[0] if len(pairs) == 1 else torch.mul(*_products(pairs))
    if call.mergeable:
        return call.op(x, delta.view(weight.shape).add_(weight), _as(bias, x))
    y = call.op(x, delta.view(weight.shape).to(x.dtype))
    return y if call.alone else y.add_(call.op(x, weight.to(x.dtype), _as(bias, x)))


def _built_backward(
    call: _Call, g: Tensor, x: Tensor, weight: Tensor, z: None, pairs: Pairs, wanted: bool
) -> tuple[Tensor | None, list[Tensor]]:
    products, dx = _products(pairs), None
    if wanted:
        delta = (products[0] * (products[1] if len(pairs) == 2 else 1)).view(weight.shape)
        if call.mergeable:
            dx = call.op.input_grad(g, delta.add_(weight), x)
        else:
            dx = call.op.input_grad(g, delta.to(x.dtype), x)
            dx = dx if call.alone else dx.add_(call.op.input_grad(g, weight.to(x.dtype), x))
    whole = call.op.weight_grad(g, x, weight.shape).flatten(1).to(products[0].dtype)
    grads: list[Tensor] = []
    for (left, right), other in zip(pairs, products[::-1] if len(pairs) == 2 else [None], strict=True):
        d = whole if other is None else other.mul_(whole)
        grads += [d @ right.mT, left @ d]
    return dx, grads


def _products(pairs: Pairs) -> list[Tensor]:
    return [left.mT @ right for left, right in pairs]


def _as(bias: Tensor | None, x: Tensor) -> Tensor | None:
    return None if bias is None else bias.to(x.dtype)
