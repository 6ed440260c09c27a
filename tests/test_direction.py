"""Laws of the choice of a root: what training leaves behind points from parent to child."""

import numpy as np
import pytest
import torch

from lineage import direction

EDGES = [(0, 1), (0, 2), (2, 3), (2, 4)]


def test_rumor_centrality_counts_the_orders_of_growth():
    """Oracle: the number of ways a tree can have grown from each node, by brute force."""

    def ways(seen: frozenset[int]) -> int:
        reach = {b for e in EDGES for a, b in (e, e[::-1]) if a in seen and b not in seen}
        return sum(ways(seen | {r}) for r in reach) if reach else 1

    found = direction.centrality(EDGES, dict.fromkeys(range(5), 1))
    counts = [ways(frozenset([r])) for r in range(5)]
    assert [found[r] - found[0] for r in range(5)] == pytest.approx(np.log(np.array(counts) / counts[0]))


def test_a_copied_file_adds_to_its_models_mass():
    light, heavy = (direction.centrality(EDGES, {**dict.fromkeys(range(5), 1), 4: m}) for m in (1, 9))
    assert heavy[4] - heavy[0] > light[4] - light[0]


@pytest.mark.parametrize("root", [0, 2])
def test_increments_that_share_a_direction_agree_away_from_the_root(root):
    rng = np.random.default_rng(root)
    drift = rng.normal(size=2000)
    tree = {0: {1: 0, 2: 0, 3: 2, 4: 2}, 2: {0: 2, 3: 2, 4: 2, 1: 0}}[root]
    w = np.zeros((5, 2000))
    for child, parent in tree.items():
        w[child] = w[parent] + drift + rng.normal(size=2000)
    scores = direction.agreement(EDGES, w @ w.T, range(5))
    assert max(scores, key=lambda m: scores[m]) == root


def test_ages_grow_with_biases_and_scales():
    models = [{"b": torch.full((8,), 0.1 * k), "s": 1 + 0.1 * k * torch.arange(8.0)} for k in (1, 2, 4)]
    ages = direction.ages(models, ["b", "s"])
    assert ages is not None
    assert list(np.argsort(ages)) == [0, 1, 2]
    scores = direction.descent([(0, 1), (1, 2)], ages, range(3))
    assert max(scores, key=lambda m: scores[m]) == 0


def test_vectors_that_did_not_start_small_tell_no_age():
    models = [{"b": torch.ones(64) * 0.2 + 0.001 * k} for k in range(3)]
    assert direction.ages(models, ["b"]) is None


def steps(weights: torch.Tensor, count: int = 40, decay: float = 1e-4) -> torch.Tensor:
    """AdamW on a weight of which a third of the rows never gets a gradient; the real optimiser is the oracle."""
    p = torch.nn.Parameter(weights.clone())
    optimizer = torch.optim.AdamW([p], lr=1e-2, weight_decay=decay)
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        p.grad = torch.randn(p.shape, generator=generator)
        p.grad[: len(p) // 3] = 0
        optimizer.step()
    return p.detach()


def test_decay_tells_the_child():
    start = torch.randn(90, 64, generator=torch.Generator().manual_seed(0))
    end = steps(start)
    down, up = direction.decay({"w": start}, {"w": end}, ["w"]), direction.decay({"w": end}, {"w": start}, ["w"])
    assert down is not None
    assert up is not None
    assert down[0] == pytest.approx(0.999999**40 - 1, rel=0.05)
    assert up[0] > 0
    assert down[1] > 0.2


def test_without_decay_there_is_nothing_to_tell():
    start = torch.randn(90, 64, generator=torch.Generator().manual_seed(0))
    assert direction.decay({"w": start}, {"w": steps(start, decay=0.0)}, ["w"]) is None
    noisy = start + 1e-3 * torch.randn(90, 64, generator=torch.Generator().manual_seed(3))
    assert direction.decay({"w": start}, {"w": noisy}, ["w"]) is None
