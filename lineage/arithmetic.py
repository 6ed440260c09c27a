"""The arithmetic of merging: METHODS are formulas on tensors; `webui` and `float32` are the two ways to round them.

webui: every operation in the stored dtype, as torch does it on the CPU, so fp16 rounds each time, and each line's
result is what a saved file would hold. float32: nothing is rounded before the output (float64 where an input is).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

import torch
from torch import Tensor

from lineage.errors import LineageError

Function = Callable[..., Tensor]


def weighted_sum(a: Tensor, b: Tensor, m: float) -> Tensor:
    """A (1 - M) + B M, elementwise; shapes equal."""
    return ((1 - m) * a) + (m * b)


def add_difference(a: Tensor, b: Tensor, c: Tensor, m: float) -> Tensor:
    """A + (B - C) M, elementwise; the difference is taken first."""
    return a + (m * (b - c))


def add_nothing(a: Tensor, b: Tensor, m: float) -> Tensor:
    """add_difference where C lacks the key: a zero difference, yet added (it decides the dtype and turns -0 to 0)."""
    return a + (m * torch.zeros_like(b))


METHODS: dict[str, Function] = {"weighted_sum": weighted_sum, "add_difference": add_difference}


def first_channels(function: Function) -> Function:
    """`function` on the leading input channels that all operands have; the first operand's further ones, and its dtype,
    stay (an inpainting or pix2pix model merged with a plain one)."""

    def merge(a: Tensor, *others: Tensor) -> Tensor:
        result = a.clone()
        result[:, : others[0].shape[1]] = function(a[:, : others[0].shape[1]], *others)
        return result

    return merge


def halved(function: Function) -> Function:
    """`function`, rounded to half."""
    return lambda *tensors: function(*tensors).half()


def unrounded(function: Function) -> Function:
    """`function` on operands widened to float32, or float64 where one of them is."""
    return lambda *tensors: function(*(t.to(wide(t.dtype for t in tensors)) for t in tensors))


def wide(dtypes) -> torch.dtype:
    """float64 if among `dtypes`, else float32."""
    return torch.float64 if torch.float64 in tuple(dtypes) else torch.float32


def formula(method: str, weight: float) -> Function:
    """The function of two or three tensors that `method` is at this weight."""
    return partial(add_nothing if method == "add_nothing" else METHODS[method], m=weight)


@lru_cache(maxsize=1024)
def result_dtype(method: str, dtypes: tuple[torch.dtype, ...]) -> torch.dtype:
    """What torch makes of operands of `dtypes`, found by doing it once on one entry.

    LineageError where torch has no such arithmetic on the CPU (float8)."""
    try:
        return formula(method, 0.5)(*(torch.ones(1, dtype=d) for d in dtypes)).dtype
    except RuntimeError as e:  # NotImplementedError is one
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise LineageError(f"the web UI's arithmetic cannot merge {names}. Add --arithmetic float32.") from e
