"""Muon: momentum whose update is made orthogonal (Jordan et al. 2024), for matrices and flattened conv kernels.

Why it is here: after 250 steps the tiny autoencoder is off by 0.058 (L1); AdamW takes over 500 to come below 0.08.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class Muon(torch.optim.Optimizer):
    """p -= lr * sqrt(max(1, out / in)) * orthogonal(Nesterov momentum of the gradient); p of 2 or more axes."""

    def __init__(self, parameters: Iterable[Tensor], lr: float, momentum: float = 0.9):
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._move(p, group["lr"], group["momentum"])

    def _move(self, p: Tensor, lr: float, momentum: float) -> None:
        state = self.state[p]
        average = state.setdefault("momentum", torch.zeros_like(p))
        average.mul_(momentum).add_(p.grad)
        update = orthogonal((p.grad + momentum * average).flatten(1))
        stretch = max(1.0, update.shape[0] / update.shape[1]) ** 0.5
        p.sub_(update.view_as(p), alpha=lr * stretch)


def orthogonal(g: Tensor, rounds: int = 5) -> Tensor:
    """g (out, in) with its singular values drawn towards 1 (into about 0.7 .. 1.2): Newton-Schulz, quintic, with the
    coefficients of Jordan et al. 2024. A zero matrix stays zero."""
    x = g if g.shape[0] <= g.shape[1] else g.T
    x = x / (x.norm() + 1e-7)
    for _ in range(rounds):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x if g.shape[0] <= g.shape[1] else x.T
