"""Laws of trees from squared distances; oracle: networkx."""

import networkx as nx
import numpy as np
import pytest

from lineage import graph
from lineage.unmerge import distances


def random_tree(n: int, seed: int, entries: int = 3000) -> tuple[dict[int, int], np.ndarray]:
    """child -> parent, and weights (n, entries) whose increments are independent."""
    rng = np.random.default_rng(seed)
    parent, w = {}, np.zeros((n, entries))
    for child in range(1, n):
        parent[child] = int(rng.integers(child))
        w[child] = w[parent[child]] + rng.uniform(0.2, 2) * rng.normal(size=entries)
    return parent, w


def pairs(parent: dict[int, int]) -> list[tuple[int, int]]:
    return sorted((min(c, p), max(c, p)) for c, p in parent.items())


@pytest.mark.parametrize("seed", range(5))
def test_the_spanning_tree_is_networkx_own(seed):
    rng = np.random.default_rng(seed)
    d = rng.random((15, 15))
    d = d + d.T
    members = sorted(rng.choice(15, 11, replace=False).tolist())
    whole = nx.Graph()
    whole.add_weighted_edges_from((a, b, float(d[a, b])) for a in members for b in members if a < b)
    assert graph.spanning_tree(d, members) == sorted(
        (min(e), max(e)) for e in nx.minimum_spanning_edges(whole, data=False)
    )


def test_a_tree_of_none_or_one():
    assert graph.spanning_tree(np.zeros((0, 0)), []) == [] == graph.spanning_tree(np.zeros((3, 3)), [1])


@pytest.mark.parametrize("seed", range(4))
def test_additive_distances_give_the_tree_back(seed):
    parent, w = random_tree(14, seed)
    g = w @ w.T
    edges = graph.spanning_tree(distances(g), range(14))
    assert edges == pairs(parent)
    assert graph.rooted(edges, 0) == parent


def test_a_turn_is_a_cosine():
    _, w = random_tree(5, 0)
    u, v = w[1] - w[4], w[3] - w[4]
    assert graph.turn(w @ w.T, 4, 1, 3) == pytest.approx(u @ v / np.linalg.norm(u) / np.linalg.norm(v))
    assert graph.turn(np.ones((3, 3)), 0, 1, 2) == 0


def test_a_descendant_holds_the_increment_whole_and_a_sibling_does_not():
    _, w = random_tree(3, 1, entries=20000)
    w[1], w[2] = w[1] - w[0], w[1] - w[0] + (w[2] - w[1])
    stranger = np.random.default_rng(3).normal(size=w.shape[1])
    g = np.vstack([w, stranger]) @ np.vstack([w, stranger]).T
    inner = lambda a, b: (a @ b) / (w[1] @ w[1])  # noqa: E731
    assert graph.share(g, 0, 1, 2) == pytest.approx(inner(w[2], w[1]))
    assert graph.share(g, 0, 1, 3) == pytest.approx(inner(stranger, w[1]))


def merge_family() -> np.ndarray:
    """A base, two fine-tunes, their average, a near and a far fine-tune of that, and a child of the near one."""
    rng = np.random.default_rng(2)
    a, b, c, e, f = rng.normal(size=(5, 5000))
    middle = (a + b) / 2
    return np.array([0 * a, a, b, middle, middle + 0.3 * c, middle + 1.5 * e, middle + 0.3 * c + 0.2 * f])


def test_what_descends_from_a_merge_lies_between_its_parents():
    w = merge_family()
    assert graph.between(w @ w.T, [0, 1, 2, 4, 5, 6], {3: (1, 2)}, 0.1) == [4, 6]


def test_models_hang_from_a_merge_but_its_parents_do_not():
    w = merge_family()
    d = distances(w @ w.T)
    parent = graph.rooted(graph.spanning_tree(d, [0, 1, 2, 5]), 0)
    parent = graph.adopt(parent, {3: (1, 2)}, w @ w.T, 0.8, 1.2)
    assert graph.attach(parent, [4, 6], [0, 1, 2, 3, 5], d) == {1: 0, 2: 0, 4: 3, 5: 3, 6: 4}


def test_ancestors_go_through_merges():
    assert graph.ancestors({4: [3], 3: [1, 2], 2: [0]}, 4) == {0, 1, 2, 3, 4}
