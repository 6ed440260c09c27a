"""Laws of merges that are no single affine combination; oracles: what was planted, numpy's least squares."""

import numpy as np
import pytest
import torch

from lineage import partial
from lineage.rounding import ulp

NAMES: tuple[str, ...] = ("p", "q", "r", "s")


def weights(seed: int, count: int, size: float = 0.02) -> list[dict[str, torch.Tensor]]:
    """A base and its fine-tunes, float32."""
    g = torch.Generator().manual_seed(seed)
    base = {n: torch.randn(60, 50, generator=g) for n in NAMES}
    return [
        base,
        *({n: w + size * torch.randn(w.shape, generator=g) for n, w in base.items()} for _ in range(count - 1)),
    ]


def test_tensor_weights_are_least_squares_of_each_tensor():
    base, a, b = weights(0, 3)
    truth = dict(zip(NAMES, (0.1, 0.4, 0.8, 0.6), strict=True))
    child = {n: torch.lerp(a[n].double(), b[n].double(), w).float() for n, w in truth.items()}
    found, residual = partial.tensor_weights([child, a, b], NAMES)
    for n, w in found.items():
        way = (b[n] - a[n]).double().flatten().numpy()
        expected = np.linalg.lstsq(way[:, None], (child[n] - a[n]).double().flatten().numpy())[0][0]
        assert w == pytest.approx(expected, abs=1e-7)
        assert w == pytest.approx(truth[n], abs=1e-5)
    own = sum(float(ulp(t).double().square().sum()) / 12 for t in child.values())
    assert residual < 3 * own
    assert np.isnan(partial.tensor_weights([child, base, base], NAMES)[0]["p"])


def test_tensor_tables_are_inner_products_of_differences():
    models = weights(1, 4)
    table = partial.tensor_table(models, NAMES)
    for i, n in enumerate(NAMES):
        moved = torch.stack([(m[n].double() - models[1][n].double()).flatten() for m in models]).numpy()
        assert table[i] == pytest.approx(moved @ moved.T)
