"""Laws of the choice of a root: what training leaves behind points from parent to child."""

import numpy as np
import pytest

from lineage import direction


def test_the_middle_of_a_star_is_its_most_central_member():
    w = np.vstack([np.zeros(500), np.random.default_rng(0).normal(size=(4, 500))])
    d = ((w[:, None] - w[None]) ** 2).sum(2)
    scores = direction.centrality(d, range(5))
    assert max(scores, key=lambda m: scores[m]) == 0
    assert scores[1] == pytest.approx(-np.log(np.linalg.norm(w - w[1], axis=1).mean()))


@pytest.mark.parametrize("root", [0, 2])
def test_increments_that_share_a_direction_agree_away_from_the_root(root):
    rng = np.random.default_rng(root)
    drift = rng.normal(size=2000)
    trees = {0: {1: 0, 2: 0, 3: 2, 4: 2}, 2: {0: 2, 3: 2, 4: 2, 1: 0}, 3: {2: 3, 0: 2, 4: 2, 1: 0}}
    w = np.zeros((5, 2000))
    for child, parent in trees[root].items():
        w[child] = w[parent] + drift + rng.normal(size=2000)
    scores = {r: direction.agreement(tree, w @ w.T) for r, tree in trees.items()}
    assert max(scores, key=lambda r: scores[r]) == root


def test_agreement_is_the_mean_cosine_of_pairs():
    w = np.random.default_rng(1).normal(size=(4, 50))
    moves = np.array([w[1] - w[0], w[2] - w[1], w[3] - w[1]])
    unit = moves / np.linalg.norm(moves, axis=1, keepdims=True)
    expected = np.mean([unit[i] @ unit[j] for i in range(3) for j in range(3) if i != j])
    assert direction.agreement({1: 0, 2: 1, 3: 1}, w @ w.T) == pytest.approx(expected)


def test_an_order_that_is_known_counts_for_the_trees_that_keep_it():
    known = [(0, 2, 3.0), (1, 3, 1.0)]
    assert direction.precedence({1: [0], 2: [1], 3: [0]}, known) == 3.0
    assert direction.precedence({1: [2], 0: [1], 3: [1]}, known) == -2.0


def test_chances_of_an_edge_are_summed_over_roots():
    trees = {0: {1: 0, 2: 1}, 2: {1: 2, 0: 1}, 1: {0: 1, 2: 0}}
    joined, forward = direction.forward(0, 1, trees, {0: 0.5, 2: 0.3, 1: 0.2})
    assert (joined, forward) == pytest.approx((1.0, 0.5))
    assert direction.forward(0, 2, trees, {0: 0.5, 2: 0.3, 1: 0.2}) == pytest.approx((0.2, 1.0))
