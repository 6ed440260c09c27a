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
    scores = {r: direction.agreement(tree, w @ w.T, 2000) for r, tree in trees.items()}
    assert max(scores, key=lambda r: scores[r]) == root


def test_agreement_counts_the_pairs_that_agree_beyond_chance():
    rng = np.random.default_rng(1)
    shared, moves = rng.normal(size=400), rng.normal(size=(4, 400))
    moves[0] += 2 * shared
    moves[1] += 2 * shared
    moves[2] -= 2 * shared
    w = np.vstack([np.zeros(400), moves])  # a star: 0 and 1 agree, 2 is against both, 3 has nothing to do with them
    assert direction.agreement({1: 0, 2: 0, 3: 0, 4: 0}, w @ w.T, 400) == pytest.approx((1 - 2) / np.sqrt(6))
    assert direction.agreement({1: 0}, w @ w.T, 400) == 0


def test_norms_that_grow_by_their_steps_tell_a_tree_from_its_reversal():
    rng = np.random.default_rng(2)
    w = np.cumsum(rng.normal(size=(4, 3000)), 0)
    d = ((w[:, None] - w[None]) ** 2).sum(2)
    seen = (d, (w**2).sum(1), np.zeros(4), 3000)
    there, back = (direction.growth(tree, *seen) for tree in ({1: 0, 2: 1, 3: 2}, {0: 1, 1: 2, 2: 3}))
    assert there > 1
    assert back < -1
    assert direction.growth({1: 0, 2: 1}, d, (w**2).sum(1), np.full(4, 1e9), 3000) == 0


def test_an_order_that_is_known_counts_for_the_trees_that_keep_it():
    known = [(0, 2, 3.0), (1, 3, 1.0)]
    assert direction.precedence({1: [0], 2: [1], 3: [0]}, known) == 3.0
    assert direction.precedence({1: [2], 0: [1], 3: [1]}, known) == -2.0


def test_chances_of_an_edge_are_summed_over_roots():
    trees = {0: {1: 0, 2: 1}, 2: {1: 2, 0: 1}, 1: {0: 1, 2: 0}}
    joined, forward = direction.forward(0, 1, trees, {0: 0.5, 2: 0.3, 1: 0.2})
    assert (joined, forward) == pytest.approx((1.0, 0.5))
    assert direction.forward(0, 2, trees, {0: 0.5, 2: 0.3, 1: 0.2}) == pytest.approx((0.2, 1.0))
