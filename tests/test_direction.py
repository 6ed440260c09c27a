"""Laws of the choice of a root: what training leaves behind points from parent to child."""

import numpy as np
import pytest
import torch

from lineage import direction

EDGES = [(0, 1), (0, 2), (2, 3), (2, 4)]


def test_the_middle_of_a_star_is_its_most_central_member():
    w = np.vstack([np.zeros(500), np.random.default_rng(0).normal(size=(4, 500))])
    d = ((w[:, None] - w[None]) ** 2).sum(2)
    scores = direction.centrality(d, range(5))
    assert max(scores, key=lambda m: scores[m]) == 0
    assert scores[1] == pytest.approx(-np.log(np.linalg.norm(w - w[1], axis=1).mean()))


def test_degrees_count_neighbours():
    assert direction.degrees(EDGES, range(5)) == {0: 2, 1: 1, 2: 3, 3: 1, 4: 1}


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


def test_vectors_that_did_not_start_small_tell_no_age():
    models = [{"b": torch.ones(64) * 0.2 + 0.001 * k} for k in range(3)]
    assert direction.ages(models, ["b"]) is None
