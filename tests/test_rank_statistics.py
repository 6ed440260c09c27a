"""Figures and inference against scipy, brute force and simulation."""

from __future__ import annotations

from math import sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lineage.rank_statistics import (
    additive_fit,
    additive_residual,
    centred_spearman,
    column_tau,
    holm,
    interval,
    mean_p,
    partial_correlation,
    pooled_spearman,
    regret,
    share_upper,
    spearman,
    stepped_up,
    stepped_up_tau,
    world_means,
)

VECTORS = st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=3, max_size=12)


def table(seed: int, rows: int = 7, columns: int = 9) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Measured, predicted, and a mask without the diagonal; one entry of each is not known."""
    rng = np.random.default_rng(seed)
    measured, predicted = rng.normal(size=(2, rows, columns)).round(1)
    measured[2, 1] = predicted[3, 0] = np.nan
    return measured, predicted + 0.7 * np.nan_to_num(measured), ~np.eye(rows, columns, dtype=bool)


def tau_b(x: np.ndarray, y: np.ndarray) -> float:
    return column_tau(x[:, None], y[:, None], np.ones((len(x), 1), bool))


@given(VECTORS)
@settings(deadline=None)
def test_tau_and_spearman_are_scipys(pairs):
    """Kendall's tau-b, one column at a time."""
    x, y = np.array(pairs, float).T
    if np.ptp(x) == 0:
        assert np.isnan([tau_b(x, y), spearman(x, y)]).all()
    elif np.ptp(y) == 0:
        assert tau_b(x, y) == spearman(x, y) == 0
    else:
        assert tau_b(x, y) == pytest.approx(stats.kendalltau(x, y)[0])
        assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y)[0])


@pytest.mark.parametrize("seed", range(5))
def test_column_figures_are_loops_over_columns(seed):
    measured, predicted, mask = table(seed)
    taus, lost = [], []
    for y in range(mask.shape[1]):
        rows = [x for x in range(mask.shape[0]) if mask[x, y] and np.isfinite(measured[x, y] + predicted[x, y])]
        got, said = measured[rows, y], predicted[rows, y]
        taus.append(stats.kendalltau(got, said)[0])
        lost.append(max(got) - got[np.argmax(said)])
    assert column_tau(measured, predicted, mask) == pytest.approx(np.mean(taus))
    assert regret(measured, predicted, mask) == pytest.approx(np.mean(lost))


@pytest.mark.parametrize("seed", range(5))
def test_figures_by_column_see_nothing_but_order_within_columns(seed):
    measured, predicted, mask = table(seed)
    columns = np.random.default_rng(seed).normal(size=measured.shape[1]) * 100
    assert column_tau(measured + columns, predicted - columns, mask) == pytest.approx(
        column_tau(measured, predicted, mask)
    )
    assert column_tau(np.exp(measured), predicted**3, mask) == pytest.approx(column_tau(measured, predicted, mask))
    assert column_tau(measured, measured, mask) == 1
    assert column_tau(measured, -measured, mask) == -1
    assert regret(measured, measured, mask) == 0


def test_of_tied_recommendations_the_mean_counts():
    measured = np.array([[3.0], [1.0], [0.0], [2.0]])
    everyone = np.ones((4, 1), bool)
    assert regret(measured, np.zeros((4, 1)), everyone) == 3 - 1.5
    assert regret(measured, np.array([[1.0], [1.0], [0.0], [0.0]]), everyone) == 3 - 2
    assert regret(measured, -measured, everyone) == 3


@pytest.mark.parametrize("seed", range(5))
def test_the_centred_figure_does_not_see_row_and_column_effects(seed):
    measured, predicted, mask = table(seed)
    rng = np.random.default_rng(seed)
    effects = [np.add.outer(rng.normal(size=7) * 50, rng.normal(size=9) * 50) for _ in range(2)]
    plain = centred_spearman(measured, predicted, [mask])
    assert centred_spearman(measured + effects[0], predicted + effects[1], [mask]) == pytest.approx(plain)
    assert centred_spearman(measured, effects[0], [mask]) == 0
    assert centred_spearman(measured, measured + effects[0], [mask]) == pytest.approx(1)


def test_the_residual_of_a_full_table_is_the_doubly_centred_one():
    x = np.random.default_rng(0).normal(size=(5, 8))
    centred = x - x.mean(1, keepdims=True) - x.mean(0) + x.mean()
    assert additive_residual(x, np.ones_like(x, bool)) == pytest.approx(centred.ravel())


def test_the_residual_is_that_of_least_squares_whatever_is_missing():
    """Oracle: nothing of the residual is left along any row or column of the mask."""
    x, _, mask = table(3)
    mask = mask & np.isfinite(x)
    left = np.zeros_like(x)
    left[mask] = additive_residual(x, mask)
    assert left.sum(0) == pytest.approx(np.zeros(9), abs=1e-8)
    assert left.sum(1) == pytest.approx(np.zeros(7), abs=1e-8)


def test_an_additive_fit_fills_what_was_not_seen_and_owns_up_to_what_it_cannot():
    rng = np.random.default_rng(1)
    x = np.add.outer(rng.normal(size=5), rng.normal(size=6))
    mask = ~np.eye(5, 6, dtype=bool)
    mask[4] = False
    fitted = additive_fit(np.where(mask, x, np.nan), mask)
    assert fitted[:4] == pytest.approx(x[:4])
    assert np.isnan(fitted[4]).all()


def test_roots_are_centred_apart():
    """Two blocks of unlike height: over all pairs height alone decides, within roots it does not."""
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(2, 8, 8))
    height = np.kron(np.eye(2), np.full((4, 4), 40.0))
    blocks = [np.kron(np.diag(v), np.ones((4, 4))).astype(bool) & ~np.eye(8, dtype=bool) for v in ([1, 0], [0, 1])]
    assert pooled_spearman(x + height, y + height, np.ones((8, 8), bool)) > 0.6
    assert centred_spearman(x + height, y + height, blocks) == pytest.approx(centred_spearman(x, y, blocks))


def test_partial_correlation_is_that_of_regression_residuals():
    rng = np.random.default_rng(4)
    m, p, s = rng.normal(size=(3, 8, 6))
    m, p = m + s, p + s + 0.5 * m
    ranks = [(stats.rankdata(v, axis=0) - 4.5).ravel(order="F") for v in (m, p, s)]
    left = [v - ranks[2] * (v @ ranks[2]) / (ranks[2] @ ranks[2]) for v in ranks[:2]]
    wanted = np.corrcoef(*left)[0, 1]
    assert partial_correlation(m, p, s, np.ones((8, 6), bool)) == pytest.approx(wanted)
    assert np.isnan(partial_correlation(m, p, p, np.ones((8, 6), bool)))


def test_p_of_a_mean_is_students():
    values = np.random.default_rng(5).normal(0.3, 1, 9)
    assert mean_p(values.tolist()) == pytest.approx(stats.ttest_1samp(values, 0)[1])
    assert mean_p([1.0, 2.0]) is None
    assert mean_p([0.0] * 6) == 1
    assert mean_p([0.5] * 6) == 2 / 2**6


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Ten worlds, normal and skewed; plain percentiles would miss one time in ten."""
    rng = np.random.default_rng(6)
    for draw, truth in ((lambda: rng.normal(size=10), 0.0), (lambda: rng.beta(8, 2, size=10), 0.8)):
        found = [interval(draw().tolist()) for _ in range(300)]
        held = np.mean([low <= truth <= high for low, high in found if low is not None and high is not None])
        assert 0.91 <= held <= 0.99


def test_intervals_move_with_the_values_and_hold_the_mean():
    values = np.random.default_rng(7).normal(size=8)
    found, moved, turned = (interval(v.tolist()) for v in (values, 2 * values + 5, values[::-1]))
    assert (found[0] or 0) < values.mean() < (found[1] or 0)
    assert moved == pytest.approx([2 * (v or 0) + 5 for v in found])
    assert turned == pytest.approx(found, abs=0.1)
    assert interval([1.0, 2.0]) == (None, None)


def test_worlds_weigh_the_same_whatever_they_hold():
    assert world_means([("b", 1.0), ("a", 3.0), ("b", 2.0), ("a", float("nan"))]) == {"a": 3, "b": 1.5}


@given(st.lists(st.one_of(st.none(), st.floats(0, 1)), max_size=12))
def test_holm_is_its_definition(ps):
    known = [p for p in ps if p is not None]
    m = len(known)

    def adjusted(p: float | None) -> float | None:
        below = [min(1.0, (m - sum(q < r for q in known)) * r) for r in known if p is not None and r <= p]
        return None if p is None else max(below)

    assert holm(ps) == pytest.approx([adjusted(p) for p in ps])


@pytest.mark.parametrize(("hits", "trials"), [(0, 20), (3, 60), (59, 60), (60, 60)])
def test_the_upper_bound_of_a_share(hits, trials):
    bound = share_upper(hits, trials)
    assert stats.binom.cdf(hits, trials, bound) == pytest.approx(0.05 if hits < trials else 1)


def test_what_a_perfect_predictor_reaches_is_told_from_halves():
    """Simulation: two noisy halves, their mean against the truth."""
    rng = np.random.default_rng(8)
    truth = rng.normal(size=4000)
    a, b = (truth + rng.normal(size=4000) * 0.8 for _ in range(2))
    assert stepped_up(spearman(a, b)) == pytest.approx(spearman((a + b) / 2, truth), abs=0.02)
    few = slice(0, 1500)
    assert stepped_up_tau(tau_b(a[few], b[few])) == pytest.approx(tau_b(((a + b) / 2)[few], truth[few]), abs=0.02)
    assert stepped_up(1.0) == stepped_up_tau(1.0) == 1
    assert stepped_up(-0.2) == stepped_up_tau(-0.2) == 0
    assert stepped_up(0.5) == pytest.approx(sqrt(2 / 3))
