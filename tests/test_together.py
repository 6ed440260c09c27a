"""Small layers whose adapted weights are made together: plain autograd of the same function is the oracle."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from train.factored import op_of
from train.together import SMALL, Together, applied

STRENGTH = 0.7


@dataclass(eq=False)
class Factored:
    """Stands in for a network's layer, and replaces its module's forward."""

    module: nn.Module
    factors: list[torch.Tensor]
    strength: float = STRENGTH
    weight: torch.Tensor | None = None

    @property
    def target(self) -> Any:
        return SimpleNamespace(module=self.module, pointwise=True)

    def pairs(self) -> list[torch.Tensor]:
        return self.factors

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        assert self.weight is not None, "no weight in the pass"
        m: Any = self.module
        return applied(x, self.weight, m.bias, op_of(m))


def dressed(pairs: int, sizes: tuple[tuple[int, int], ...]) -> tuple[nn.Sequential, list[Factored], Together]:
    """A chain of frozen float64 layers, (in, out) each, with random factors of rank 2."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(*(nn.Linear(i, o) for i, o in sizes)).double().requires_grad_(False)
    layers = []
    for module, (i, o) in zip(model, sizes, strict=True):
        shapes = [(o, 2), (2, i)] * pairs
        made = [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]
        layers.append(Factored(module, made))
        module.forward = layers[-1]
    return model, layers, Together(model, layers)


def plainly(model: nn.Sequential, layers: list[Factored], x: torch.Tensor) -> torch.Tensor:
    for module, layer in zip(model, layers, strict=True):
        f, m = layer.factors, module
        delta = f[0] @ f[1] * (f[2] @ f[3] if len(f) == 4 else 1)
        x = functional.linear(x, m.weight + STRENGTH * delta, m.bias)  # type: ignore[arg-type]
    return x


@pytest.mark.parametrize("pairs", [1, 2], ids=["lora", "loha"])
def test_together_they_are_the_plain_function_with_its_gradients(pairs):
    model, layers, _ = dressed(pairs, ((6, 4), (4, 6), (6, 4), (4, 6), (6, 4)))
    factors = [f for layer in layers for f in layer.factors]
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    ours, wanted = model(x), plainly(model, layers, x)
    torch.testing.assert_close(ours, wanted)
    g = torch.randn_like(wanted)
    found, oracle = (torch.autograd.grad(y, [x, *factors], g) for y in (ours, wanted))
    torch.testing.assert_close(found, oracle, rtol=1e-9, atol=1e-9)


def test_a_layer_that_the_pass_left_out_has_no_gradient_and_spoils_none():
    model, layers, _ = dressed(2, ((5, 5),) * 3)
    skipped = layers.pop(1)
    model.forward = lambda x: model[2](model[0](x))  # type: ignore[method-assign]
    x = torch.randn(2, 5, dtype=torch.float64)
    model(x).square().sum().backward()
    used = [f for layer in layers for f in layer.factors]
    wanted = torch.autograd.grad(plainly(nn.Sequential(model[0], model[2]), layers, x).square().sum(), used)
    torch.testing.assert_close([f.grad for f in used], list(wanted))
    assert not any(bool(f.grad.any()) for f in skipped.factors if f.grad is not None)


def test_weights_live_as_long_as_the_pass_even_if_it_fails():
    model, layers, together = dressed(2, ((5, 5),) * 2)
    x = torch.randn(2, 5, dtype=torch.float64)
    model(x)
    assert all(layer.weight is None for layer in layers)
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 7, dtype=torch.float64))
    assert all(layer.weight is None for layer in layers)
    together.remove()
    with pytest.raises(AssertionError, match="no weight"):
        model(x)


def test_the_lone_the_large_and_the_switched_off_are_left_to_themselves():
    wide = SMALL // 16
    _, layers, together = dressed(1, ((5, 5), (5, 5), (5, 7), (7, 16), (16, wide), (wide, 16), (16, wide)))
    together.begin()
    assert [layer.weight is not None for layer in layers] == [True, True, False, False, False, False, False]
    together.end()
    for layer in layers:
        layer.strength = 0.0
    together.begin()
    assert all(layer.weight is None for layer in layers)
