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


def slots(model: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return [model[n].double().flatten() for n in NAMES]


def kept(child, base, a, b) -> partial.Kept | None:
    steps = [ulp(child[n]).double().flatten() for n in NAMES]
    return partial.kept_whole([*zip(slots(child), slots(base), slots(a), slots(b), steps, strict=True)])


def sparse(base, a, b, random: bool, share: float = 0.5, weight: float = 0.7, seed: int = 0) -> dict[str, torch.Tensor]:
    """Each change kept at random (rescaled), or where it is large; a mean of those that are kept."""
    g = torch.Generator().manual_seed(seed)
    out = {}
    for n, w in base.items():
        changes = [m[n] - w for m in (a, b)]
        keep = [torch.rand(w.shape, generator=g) < share if random else c.abs() > c.abs().median() for c in changes]
        total = torch.stack(keep).mul(torch.stack(changes)).sum(0)
        out[n] = w + weight * (total / share / 2 if random else total / torch.stack(keep).sum(0).clamp_min(1))
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("random", [True, False])
def test_a_sparse_merge_shows_whole_changes_of_both_parents(random, dtype):
    base, a, b, _ = weights(2, 4, 0.1)
    child = {n: w.to(dtype) for n, w in sparse(base, a, b, random).items()}
    found = kept(child, base, a, b)
    assert found is not None
    assert found.share > 0.15
    assert found.random == random
    assert found.weights == pytest.approx((0.7, 0.7), rel=0.01)


def test_what_is_no_sparse_merge_does_not():
    base, a, b, c = weights(3, 4, 0.1)
    near = {n: w + 0.002 * torch.randn(w.shape, generator=torch.Generator().manual_seed(1)) for n, w in a.items()}
    linear = {n: 0.4 * base[n] + 0.3 * a[n] + 0.3 * b[n] for n in NAMES}
    for child, parents in ((c, (base, a, b)), (linear, (base, a, b)), (a, (base, near, c)), (base, (a, near, b))):
        found = kept(child, *parents)
        assert found is None or found.share < 0.05


def test_a_parent_that_is_not_one_does_not_pass():
    base, a, b, c = weights(4, 4, 0.1)
    found = kept(sparse(base, a, b, random=True), base, a, c)
    assert found is None or found.share < 0.05
