"""Laws of roots and families; oracles: scikit-learn's silhouette, what was planted."""

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score, silhouette_score

from lineage import families
from lineage.unmerge import distances

BLOCKS, ENTRIES = 6, 400


def planted(seed: int, groups: int = 3, each: int = 5) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """(table (blocks, n, n), norms (n, blocks), label): an origin, then fine-tunes sharing a direction by group."""
    rng = np.random.default_rng(seed)
    base = rng.normal(size=(BLOCKS, ENTRIES))
    shared = 0.05 * rng.normal(size=(groups, BLOCKS, ENTRIES))
    w, label = [base], [-1]
    for group in range(groups):
        for _ in range(each):
            w.append(base + shared[group] + 0.03 * rng.normal(size=(BLOCKS, ENTRIES)))
            label.append(group)
    stack = np.array(w).transpose(1, 0, 2)
    moved = stack - stack[:, :1]
    return moved @ moved.transpose(0, 2, 1), np.linalg.norm(stack, axis=2).T, label


def partition(found: list[families.Family], n: int) -> list[int]:
    return [next((k for k, f in enumerate(found) if m in f.members), -1) for m in range(n)]


@pytest.mark.parametrize("seed", range(3))
def test_planted_families_are_found_and_stable(seed):
    table, _, label = planted(seed)
    found = families.families(table, 0, range(16))
    assert adjusted_rand_score(label[1:], partition(found, 16)[1:]) == 1
    assert all(f.stability > 0.95 for f in found)


def test_without_structure_there_is_one_family():
    table, _, _ = planted(0, groups=1, each=12)
    assert len(families.families(table, 0, range(13))) == 1


def test_families_do_not_depend_on_the_order():
    table, _, _ = planted(1)
    order = np.random.default_rng(0).permutation(16)
    mixed = families.families(table[:, order][:, :, order], int(np.flatnonzero(order == 0)[0]), range(16))
    back = sorted(tuple(sorted(int(order[m]) for m in f.members)) for f in mixed)
    assert back == sorted(f.members for f in families.families(table, 0, range(16)))


def test_a_merge_of_two_families_belongs_to_both():
    table, _, _ = planted(2)
    n = table.shape[1]
    mix = np.zeros((n + 1, n))
    mix[:n] = np.eye(n)
    mix[n, [1, 6]] = 0.5
    table = np.array([mix @ t @ mix.T for t in table])
    found = families.families(table, 0, range(n))
    shares = families.affinities(table.sum(0), 0, found)[n]
    first, second = (partition(found, n)[m] for m in (1, 6))
    assert min(shares[first], shares[second]) > 0.3
    assert sum(shares) == pytest.approx(1)


@pytest.mark.parametrize("seed", range(3))
def test_silhouette_is_scikit_learns(seed):
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(12, 3))
    apart = np.linalg.norm(points[:, None] - points[None], axis=2)
    labels = rng.integers(0, 3, 12)
    assert families.silhouette(apart, labels) == pytest.approx(silhouette_score(apart, labels, metric="precomputed"))


def roots(*seeds: int, damage: float = 0.0) -> list[tuple[int, ...]]:
    rng = np.random.default_rng(9)
    w = [base + 0.1 * rng.normal(size=(BLOCKS, ENTRIES)) for s in seeds for base in [weights(s)]]
    if damage:
        for block in w[0][: round(damage * BLOCKS)]:
            rng.shuffle(block)
    stack = np.array(w).transpose(1, 0, 2)
    moved = stack - stack[:, :1]
    d = np.array([distances(b @ b.transpose()) for b in moved])
    return families.trees(families.kin(d, np.linalg.norm(stack, axis=2).T, np.full(BLOCKS, float(ENTRIES))))


def weights(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(BLOCKS, ENTRIES))


def test_each_initialisation_is_a_tree():
    assert roots(1, 2, 1, 1, 2, 3) == [(0, 2, 3), (1, 4), (5,)]


def test_a_damaged_copy_stays_with_its_root():
    assert roots(1, 2, 1, damage=0.5) == [(0, 2), (1,)]
