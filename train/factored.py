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
import platform
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

Form: TypeAlias = Literal["apart", "merged", "built"]

MERGEABLE = (torch.float32, torch.float64)
ONEDNN = platform.machine() in ("x86_64", "AMD64") and hasattr(torch.ops.mkldnn, "_linear_pointwise")
ONEDNN_FROM = 2**20  # multiply-adds, under which its start costs more than it saves
START = 2**23  # operations in the time that the calls for Khatri-Rao factors and their gradients take
TOUCH = 16  # operations in the time that one entry of a matrix in memory is read or written


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a (m, k) @ b (k, n) + bias (n,). Large float32 products on an x86 processor go through oneDNN, which torch takes
    for convolutions: MKL, which it takes for matrices, needed about twice the time on an AMD processor."""
    if _onednn(a, b):
        return torch.ops.mkldnn._linear_pointwise(a, b.mT, bias, "none", [], "")
    return a @ b if bias is None else torch.addmm(bias, a, b)


def transposed_product(a: Tensor, b: Tensor) -> Tensor:
    """a^T b of a (T, m), b (T, n). Where T is long, oneDNN's gradient of a 1x1 kernel, which spares turning them."""
    if not _onednn(a.mT, b) or len(a) < max(a.shape[1], b.shape[1]):
        return product(a.mT, b)
    g, x = (t.reshape(1, len(t), 1, -1).permute(0, 3, 1, 2) for t in (a, b))
    return POINT.weight_grad(g, x, (a.shape[1], b.shape[1], 1, 1)).flatten(1)


def _onednn(a: Tensor, b: Tensor) -> bool:
    large = a.numel() * b.shape[1] >= ONEDNN_FROM
    return ONEDNN and large and a.dtype == torch.float32 and a.device.type == "cpu"


class LinearOp:
    """What a Linear does with a weight (rows, columns); x is (..., columns)."""

    def positions(self, x: Tensor) -> int:
        return x.numel() // x.shape[-1]

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return product(x.flatten(0, -2), weight.mT, bias).view(*x.shape[:-1], -1)

    def mix(self, z: Tensor, u: Tensor) -> Tensor:
        """(..., R) -> (..., out) by u (R, out)."""
        return self(z, u.mT)

    def add_mix(self, y: Tensor, z: Tensor, u: Tensor) -> Tensor:
        y.view(-1, y.shape[-1]).addmm_(z.view(-1, z.shape[-1]), u)
        return y

    def input_grad(self, g: Tensor, weight: Tensor, x: Tensor) -> Tensor:
        return self(g, weight.mT)

    def weight_grad(self, g: Tensor, x: Tensor, shape: Sequence[int]) -> Tensor:
        return transposed_product(g.flatten(0, -2), x.flatten(0, -2))

    def mix_grad(self, z: Tensor, g: Tensor) -> Tensor:
        return self.weight_grad(z, g, ())


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
POINT = ConvOp((1, 1), (0, 0), (1, 1))


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
    expanding = 8 * TOUCH * wide * (out + columns) + START if pairs == 2 else 0
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


class _Adapted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, x: Tensor, weight: Tensor, bias: Tensor | None, *factors: Tensor) -> Tensor:
        ctx.call, z = call, None
        with _as_written(x):
            bias = None if bias is None else bias.to(x.dtype)
            if call.form == "built":
                y = _built(call, x, weight, bias, factors)
            else:
                y, z = _factored(call, x, weight, bias, factors)
        ctx.save_for_backward(x, weight, z, *factors)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        x, weight, z, *factors = ctx.saved_tensors
        back = _built_backward if ctx.call.form == "built" else _factored_backward
        with _as_written(g):
            dx, grads = back(ctx.call, g, x, weight, z, factors, ctx.needs_input_grad[1])
        return None, dx, None, None, *grads


def _as_written(x: Tensor) -> AbstractContextManager:
    """No autocast inside: each product has the dtype that it is written with."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _factored(
    call: _Call, x: Tensor, weight: Tensor, bias: Tensor | None, factors: Sequence[Tensor]
) -> tuple[Tensor, Tensor | None]:
    u, v = _expanded(factors, call.scale, x.dtype)
    if call.form == "merged":
        return call.op(x, _merged(weight, u, v), bias), None
    z = call.op(x, v.view(-1, *weight.shape[1:]))
    if call.alone:
        return call.op.mix(z, u), z
    return call.op.add_mix(call.op(x, weight.to(x.dtype), bias), z, u), z


def _factored_backward(
    call: _Call, g: Tensor, x: Tensor, weight: Tensor, z: Tensor | None, factors: Sequence[Tensor], wanted: bool
) -> tuple[Tensor | None, list[Tensor]]:
    u, v = _expanded(factors, call.scale, x.dtype)
    kernels = v.view(-1, *weight.shape[1:])
    w, dx = call.op.mix(g, u.mT), None
    if wanted and call.form == "merged":
        dx = call.op.input_grad(g, _merged(weight, u, v), x)
    elif wanted:
        dx = call.op.input_grad(w, kernels, x)
        dx = dx if call.alone else dx.add_(call.op.input_grad(g, weight.to(x.dtype), x))
    du = call.op.mix_grad(call.op(x, kernels) if z is None else z, g)
    dv = call.op.weight_grad(w, x, weight.shape).flatten(1)
    return dx, _expanded_backward(factors, call.scale, du, dv)


def _merged(weight: Tensor, u: Tensor, v: Tensor) -> Tensor:
    return torch.addmm(weight.flatten(1).to(v.dtype), u.mT, v).view(weight.shape)


def _expanded(factors: Sequence[Tensor], scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """u (R, out), v (R, columns) with u^T v = scale * delta: the factors themselves, or their Khatri-Rao products."""
    u, v = factors[0].mT, factors[1] * scale
    if len(factors) == 4:
        u, v = _khatri_rao(u.contiguous(), factors[2].mT.contiguous()), _khatri_rao(v, factors[3])
    return u.to(dtype), v.to(dtype)


def _expanded_backward(factors: Sequence[Tensor], scale: float, du: Tensor, dv: Tensor) -> list[Tensor]:
    """Gradients of the factors from those of u and v, which are used up."""
    du, dv = du.to(factors[0].dtype), dv.to(factors[1].dtype).mul_(scale)
    if len(factors) == 2:
        return [du.mT, dv]
    left1, left2 = _khatri_rao_backward(du, factors[0].mT.contiguous(), factors[2].mT.contiguous())
    right1, right2 = _khatri_rao_backward(dv, factors[1], factors[3])
    return [left1.mT, right1, left2.mT, right2]


def _khatri_rao(a: Tensor, b: Tensor) -> Tensor:
    """Column-wise Kronecker product of (r, n) and (s, n): (r * s, n)."""
    return (a[:, None] * b).flatten(0, 1)


def _khatri_rao_backward(d: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of a and b from that of their product, which is used up."""
    d = d.view(len(a), len(b), -1)
    return (d * b).sum(1), d.mul_(a[:, None]).sum(0)


def _built(call: _Call, x: Tensor, weight: Tensor, bias: Tensor | None, factors: Sequence[Tensor]) -> Tensor:
    products = _products(factors)
    if call.mergeable:
        return call.op(x, _sum(weight, products, call.scale), bias)
    y = call.op(x, _delta(products, call.scale, weight, x))
    return y if call.alone else y.add_(call.op(x, weight.to(x.dtype), bias))


def _built_backward(
    call: _Call, g: Tensor, x: Tensor, weight: Tensor, z: None, factors: Sequence[Tensor], wanted: bool
) -> tuple[Tensor | None, list[Tensor]]:
    products, dx = _products(factors), None
    if wanted and call.mergeable:
        dx = call.op.input_grad(g, _sum(weight, products, call.scale), x)
    elif wanted:
        dx = call.op.input_grad(g, _delta(products, call.scale, weight, x), x)
        dx = dx if call.alone else dx.add_(call.op.input_grad(g, weight.to(x.dtype), x))
    whole = call.op.weight_grad(g, x, weight.shape).flatten(1).to(factors[0].dtype).mul_(call.scale)
    grads: list[Tensor] = []
    for i, (left, right) in enumerate(zip(factors[::2], factors[1::2], strict=True)):
        d = products[1 - i].mul_(whole) if len(products) == 2 else whole
        grads += [product(d, right.mT), product(left.mT, d)]
    return dx, grads


def _products(factors: Sequence[Tensor]) -> list[Tensor]:
    return [product(left, right) for left, right in zip(factors[::2], factors[1::2], strict=True)]


def _sum(weight: Tensor, products: list[Tensor], scale: float) -> Tensor:
    """weight + scale * delta, in the dtype of the factors."""
    matrix = weight.flatten(1).to(products[0].dtype)
    if len(products) == 1:
        return torch.add(matrix, products[0], alpha=scale).view(weight.shape)
    return torch.addcmul(matrix, *products, value=scale).view(weight.shape)


def _delta(products: list[Tensor], scale: float, weight: Tensor, x: Tensor) -> Tensor:
    """scale * delta in the dtype of x."""
    delta = products[0] * scale if len(products) == 1 else torch.mul(*products).mul_(scale)
    return delta.view(weight.shape).to(x.dtype)
