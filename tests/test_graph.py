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


def cost_of(w: np.ndarray, parts: int = 3) -> np.ndarray:
    blocks = np.array_split(w, parts, axis=1)
    return graph.cost(np.array([b @ b.T for b in blocks]), np.array([b.shape[1] for b in blocks], float))


@pytest.mark.parametrize("seed", range(4))
def test_additive_distances_give_the_tree_back(seed):
    parent, w = random_tree(14, seed)
    assert graph.spanning_tree(distances(w @ w.T), range(14)) == pairs(parent)
    assert graph.descent(cost_of(w), 0, {}) == parent


@pytest.mark.parametrize("seed", range(3))
def test_a_part_in_which_all_moves_agree_does_not_hide_the_tree(seed):
    """One long direction that siblings share spoils the sum of distances, but only one of many parts."""
    parent, w = random_tree(12, seed)
    shared = np.zeros((12, 4))
    shared[1:] = 90 * np.random.default_rng(seed).uniform(1, 2, (11, 1))
    assert graph.spanning_tree(distances(np.hstack([shared, w]) @ np.hstack([shared, w]).T), range(12)) != pairs(parent)
    table = np.array([x @ x.T for x in (shared, *np.array_split(w, 5, axis=1))])
    assert graph.descent(graph.cost(table, np.array([4.0, *[600] * 5])), 0, {}) == parent


@pytest.mark.parametrize("seed", range(30))
def test_the_cheapest_arborescence_is_networkx_own(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 12))
    cost = rng.random((n, n)) if seed % 2 else (lambda x: x + x.T)(rng.random((n, n)))
    root = int(rng.integers(n))
    whole = nx.DiGraph()
    whole.add_nodes_from(range(n))
    whole.add_weighted_edges_from((p, c, float(cost[p, c])) for p in range(n) for c in range(n) if c not in (p, root))
    best = nx.minimum_spanning_arborescence(whole) if n > 1 else nx.DiGraph()
    found = graph.arborescence(cost, root)
    assert nx.is_arborescence(nx.DiGraph([(p, c) for c, p in found.items()])) if n > 1 else not found
    assert sum(cost[p, c] for c, p in found.items()) == pytest.approx(
        sum(d["weight"] for *_, d in best.edges(data=True))
    )


def merge_family() -> np.ndarray:
    """A base, two fine-tunes, their average, a near and a far fine-tune of that, and a child of the near one."""
    rng = np.random.default_rng(2)
    a, b, c, e, f = rng.normal(size=(5, 5000))
    middle = (a + b) / 2
    return np.array([0 * a, a, b, middle, middle + 0.3 * c, middle + 1.5 * e, middle + 0.3 * c + 0.2 * f])


def test_models_hang_from_a_merge_but_its_parents_do_not():
    assert graph.descent(cost_of(merge_family()), 0, {3: (1, 2)}) == {1: 0, 2: 0, 4: 3, 5: 3, 6: 4}


def test_nothing_descends_from_itself_through_a_merge():
    """The second parent of a merge is nearest to the merge's child, and still cannot hang from it."""
    rng = np.random.default_rng(4)
    a, b, near = rng.normal(size=(3, 4000))
    w = np.array([0 * a, a, 1.0 * b, (a + b) / 2, (a + b) / 2 + 0.2 * near + 0.4 * (b - a)])
    found = graph.descent(cost_of(w), 0, {3: (1, 2)})
    above = {c: [p] for c, p in found.items()} | {3: [1, 2]}
    assert nx.is_directed_acyclic_graph(nx.DiGraph([(p, c) for c, ps in above.items() for p in ps]))
    assert 2 in found


def test_ancestors_go_through_merges():
    assert graph.ancestors({4: [3], 3: [1, 2], 2: [0]}, 4) == {0, 1, 2, 3, 4}
