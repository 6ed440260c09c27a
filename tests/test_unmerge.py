"""Laws of reading merges from inner products; oracles: numpy's least squares and brute force."""

from itertools import combinations

import numpy as np
import pytest

from lineage import unmerge
from lineage.thresholds import CHOSEN

ENTRIES = 4000


def weights_of(models: int, seed: int, scale: float = 0.05) -> np.ndarray:
    """A base and fine-tunes of it: (models, ENTRIES) float64."""
    rng = np.random.default_rng(seed)
    base = rng.normal(size=ENTRIES)
    return np.vstack([base, base + scale * rng.normal(size=(models - 1, ENTRIES))])


def inner(w: np.ndarray) -> np.ndarray:
    d = w - w[0]
    return d @ d.T


def half(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As stored in float16, and the rounding energies sum ulp^2 / 12."""
    stored = w.astype(np.float16)
    return stored.astype(np.float64), (np.spacing(np.abs(stored)).astype(np.float64) ** 2).sum(1) / 12


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_affine_is_the_least_squares_with_weights_summing_to_one(size):
    w = weights_of(8, size)
    sets = unmerge.subsets(range(1, 8), size)
    found, residual = unmerge.affine(inner(w), 0, sets)
    for row, members, r in zip(found, sets, residual, strict=True):
        directions = (w[members[1:]] - w[members[0]]).T
        expected = np.linalg.lstsq(directions, w[0] - w[members[0]])[0] if size > 1 else np.zeros(0)
        assert row[1:] == pytest.approx(expected, abs=1e-8)
        assert row.sum() == pytest.approx(1)
        assert r == pytest.approx(((w[0] - row @ w[members]) ** 2).sum(), rel=1e-8)


def test_a_dependent_set_has_no_weights():
    w = weights_of(4, 0)
    w[3] = 0.5 * w[1] + 0.5 * w[2]
    assert np.isinf(unmerge.affine(inner(w), 0, np.array([[1, 2, 3]]))[1][0])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("parents", [2, 3, 4, 5])
def test_exact_parents_among_distractors(parents, seed):
    w = weights_of(20, seed)
    rng = np.random.default_rng(seed)
    true = np.sort(rng.choice(np.arange(20), parents, replace=False))
    share = rng.dirichlet(np.full(parents, 4)) * 0.8 + 0.2 / parents
    stored, rounding = half(np.vstack([w, share @ w[true]]))
    stored[:20], rounding[:20] = w, 0  # parents as they were merged
    found = unmerge.readings(inner(stored), float(rounding[20]), ENTRIES, 20, range(20))
    assert next(r.parents for r in found) == tuple(true)
    assert found[0].weights == pytest.approx(share, abs=2e-3)
    assert found[0].residual == pytest.approx(found[0].own, rel=0.1)


def test_a_fine_tune_is_no_merge():
    w = weights_of(12, 1)
    child = w[3] + 0.01 * np.random.default_rng(5).normal(size=ENTRIES)
    stored, rounding = half(np.vstack([w, child]))
    assert unmerge.readings(inner(stored), float(rounding[12]), ENTRIES, 12, range(12)) == []


def test_a_missing_parent_gives_no_set():
    w = weights_of(12, 2)
    child = 0.5 * w[3] + 0.5 * w[4]
    stored, rounding = half(np.vstack([np.delete(w, 4, 0), child]))
    assert unmerge.readings(inner(stored), float(rounding[11]), ENTRIES, 11, range(11)) == []


def resolved(w: np.ndarray, rounding: np.ndarray) -> dict[int, tuple[int, ...]]:
    g, everyone = inner(w), range(len(w))
    found = [
        r
        for c in everyone
        for r in unmerge.readings(g, float(rounding[c]), ENTRIES, c, [i for i in everyone if i != c])
    ]
    return {c: r.parents for c, r in unmerge.resolve(found, g, everyone).items()}


def test_a_chain_of_merges_is_read_link_by_link():
    w = weights_of(8, 3)
    w = half(w)[0]
    first = half(np.array([0.5 * w[1] + 0.5 * w[2]]))[0][0]
    second = 0.6 * first + 0.4 * w[5]
    stored, rounding = half(np.vstack([w, first, second]))
    assert resolved(stored, rounding) == {8: (1, 2), 9: (5, 8)}


def test_two_merges_of_the_same_parents_both_name_the_parents():
    w = half(weights_of(8, 4))[0]
    stored, rounding = half(np.vstack([w, 0.7 * w[1] + 0.3 * w[2], 0.4 * w[1] + 0.6 * w[2]]))
    assert resolved(stored, rounding) == {8: (1, 2), 9: (1, 2)}


def test_an_added_difference_is_read_from_the_right_end():
    w = half(weights_of(8, 5))[0]
    stored, rounding = half(np.vstack([w, w[1] + 0.6 * (w[2] - w[0])]))
    assert resolved(stored, rounding) == {8: (0, 1, 2)}


def test_what_is_found_does_not_depend_on_the_order():
    w = half(weights_of(9, 6))[0]
    stored, rounding = half(np.vstack([w, 0.3 * w[1] + 0.7 * w[4], w[1] + 0.5 * (w[2] - w[0])]))
    shuffle = np.random.default_rng(0).permutation(len(stored))
    found = resolved(stored[shuffle], rounding[shuffle])
    back = {int(shuffle[c]): tuple(sorted(int(shuffle[p]) for p in ps)) for c, ps in found.items()}
    assert back == resolved(stored, rounding)


def test_candidates_hold_the_parents_in_a_large_pool():
    w = weights_of(60, 7)
    g = inner(np.vstack([w, 0.25 * w[10] + 0.25 * w[20] + 0.5 * w[30]]))
    assert {10, 20, 30} <= set(unmerge.candidates(g, 60, range(60), CHOSEN.merge_pool))


def test_the_affine_hull_is_as_near_as_its_best_point():
    w = weights_of(6, 8)
    rest = (w[2:] - w[1]).T
    expected = ((w[0] - w[1] - rest @ np.linalg.lstsq(rest, w[0] - w[1])[0]) ** 2).sum()
    assert unmerge.full_residual(inner(w), 0, range(1, 6)) == pytest.approx(expected, rel=1e-6)


def test_no_subset_is_nearer_than_the_hull():
    w = weights_of(7, 9)
    g = inner(w)
    whole = unmerge.full_residual(g, 0, range(1, 7))
    for size in range(1, 6):
        assert (unmerge.affine(g, 0, np.array(list(combinations(range(1, 7), size))))[1] >= whole * (1 - 1e-9)).all()


def test_many_steps_that_were_stored_leave_more_rounding_than_one():
    w = weights_of(9, 31)
    stored, _ = half(w)
    mixed = stored[1]
    for k, m in enumerate(stored[2:6], 2):
        mixed = half(((k - 1) / k * mixed + m / k)[None])[0][0]
    every = np.vstack([stored, mixed])
    own = half(every)[1][-1]
    equal = np.full((1, 5), 0.2)
    once, chained = (float(f[0]) * own for f in unmerge.floors(equal))
    residual = float(((mixed - stored[1:6].mean(0)) ** 2).sum())
    assert CHOSEN.merge_ratio * 1.2 * own < residual <= chained
    assert once < chained
    found = unmerge.readings(inner(every), own, ENTRIES, 9, range(9))
    assert {r.parents for r in found} == {(1, 2, 3, 4, 5)}


def test_differences_added_one_after_another_are_one_merge():
    w, _ = half(weights_of(12, 32))
    stored, energies = half(np.vstack([w, w[0] + 0.5 * (w[1:7] - w[0]).sum(0)]))
    found = unmerge.crowd(inner(stored), energies[12], ENTRIES, 12, range(12))
    assert found is not None
    assert found.parents == tuple(range(7))
    assert found.weights == pytest.approx((-2, *[0.5] * 6), abs=5e-3)


def test_what_was_made_of_a_merge_knows_its_rounding_but_is_no_parent_of_it():
    w = weights_of(6, 33)
    convex = unmerge.Reading(5, (1, 2, 3), (0.35, 0.35, 0.3), 2.0, 1.0, 2.0)
    backwards = unmerge.Reading(5, (0, 1, 2, 4), (-0.2, 0.3, 0.3, 0.6), 1.0, 1.0, 2.0)
    for found in ([convex, backwards], [backwards, convex]):
        assert unmerge.resolve(found, inner(w), range(6)) == {5: convex}
