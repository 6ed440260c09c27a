"""Laws of the whitened inner products."""

import numpy as np
import pytest
import torch

from lineage.unmerge import distances
from lineage.whitening import SLOTS, inverse_root, sampled, steps, whiten, whitened_table


def test_the_inverse_root_squares_to_the_inverse():
    a = torch.randn(6, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    covariance = a @ a.T
    root = inverse_root(covariance, 1e-9)
    assert torch.allclose(root @ root @ covariance, torch.eye(6, dtype=torch.float64), atol=1e-4)


def test_whitening_keeps_the_mean_square_at_one_and_centres():
    stack = torch.randn(7, 5, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    white = whiten(stack)
    assert float(white.square().mean()) == pytest.approx(1)
    assert torch.allclose(white.sum(0), torch.zeros(5, 9, dtype=torch.float64), atol=1e-9)
    assert not whiten(torch.ones(3, 4, 4)).any()


def siblings(seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """A base and ten children; the increments share three rank-one directions by random amounts."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    base, left, right = draw(24, 24), draw(24, 3), draw(3, 24)
    return [{"w": base}] + [{"w": base + left * (1 + draw(3)) @ right + 1.5 * draw(24, 24)} for _ in range(10)]


def worst_turn(g: np.ndarray) -> float:
    """Largest cosine between increments from the base: 0 where distances add."""
    d = distances(g)
    inner = (d[0][:, None] + d[0][None] - d)[1:, 1:] / 2
    norm = np.sqrt(np.diag(inner))
    return float(np.median((inner / norm[:, None] / norm[None])[~np.eye(10, dtype=bool)]))


def test_what_siblings_share_weighs_less():
    models = siblings()
    stack = torch.stack([m["w"].flatten() for m in models]).double()
    plain = (stack @ stack.T).numpy()
    _, table = whitened_table(models, {"w": "block"})
    assert worst_turn(table.sum(0)) < 0.5 * worst_turn(plain)


def test_blocks_are_kept_apart_and_orders_do_not_matter():
    models = [{"a": torch.randn(4, 4), "b": torch.randn(4, 6)} for _ in range(5)]
    blocks, table = whitened_table(models, {"b": "y", "a": "x"})
    assert blocks == ("x", "y")
    assert table.shape == (2, 5, 5)
    back = whitened_table(models[::-1], {"a": "x", "b": "y"})[1][:, ::-1, ::-1]
    assert np.allclose(table, back)


def test_steps_go_to_the_nearest_that_differs():
    stack = torch.tensor([0.0, 0.0, 1.0, 5.0], dtype=torch.float64)[:, None, None].expand(4, 1, 1)
    assert steps(stack).flatten().tolist() == [-1, -1, 1, 1]


@pytest.mark.parametrize("shape", [(3000, 700), (100, 90, 3, 3), (49408, 8), (5000,), (12, 40)])
def test_large_matrices_are_looked_at_in_a_bounded_number_of_places(shape):
    w = torch.arange(torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)
    some = sampled(w)
    assert some.numel() <= SLOTS
    assert max(some.shape) <= 1024
    assert torch.isin(some, w).all()
    assert some.numel() == min(w.numel(), some.numel())
    assert torch.equal(some, sampled(w))
    if w.numel() < 1024:
        assert some.numel() == w.numel()


def test_a_sampled_tensor_counts_by_all_its_entries():
    g = torch.Generator().manual_seed(4)
    models = [{"w": torch.randn(600, 500, generator=g)} for _ in range(6)]
    table = whitened_table(models, {"w": "w"})[1][0]
    assert np.trace(table) == pytest.approx(6 * 300_000)
