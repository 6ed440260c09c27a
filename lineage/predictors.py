"""What may foretell a matrix of transfer: the prediction, plain baselines, oracles that have seen other answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from lineage.rank_statistics import additive_fit, additive_residual, rounded
from lineage.transfer_measures import Matrix, Readings
from lineage.transfer_records import ADDITIVE, PREDICTED, TAUGHT, Member, PairPrediction

CONSTANT = "constant"
LOSS_OF_MODEL, LOSS_OF_BASE = "loss of the model (one forward pass)", "loss of the base (one forward pass)"
Array = NDArray[np.float64]
Bools = NDArray[np.bool_]
Predictor = Callable[[Matrix], Array]
Members = Mapping[tuple[str, str], Member]
Places = Mapping[tuple[str, str], str]  # (world, name) -> the name whose place in the tree it takes


def predictors(
    found: Readings, predictions: Sequence[PairPrediction], of: str, measured: Sequence[Matrix]
) -> dict[str, Predictor]:
    """Name -> values for a matrix, nan where it says nothing. of: "strength" or "retention"."""
    table = {(p.world, p.base, p.model): p for p in predictions}
    names = sorted({name for p in predictions for name in p.baselines})
    members = found.members()
    return {
        PREDICTED: foretold(predictions, of),
        CONSTANT: lambda m: np.zeros_like(m.values),
        **{name: (lambda m, n=name: m.filled(lambda x, y: _baseline(table.get((m.world, x, y)), n))) for name in names},
        LOSS_OF_MODEL: lambda m: m.filled(lambda _, y: found.untouched.get((m.world, m.target, y), np.nan)),
        LOSS_OF_BASE: lambda m: m.filled(lambda x, _: -found.untouched.get((m.world, m.target, x), np.nan)),
        ADDITIVE: lambda m: _additive(m, measured, members),
        TAUGHT: lambda m: _taught(m, foretold(predictions, of)(m), members),
    }


def foretold(predictions: Sequence[PairPrediction], of: str, places: Places | None = None) -> Predictor:
    """The prediction itself; with `places` that of shuffled trees."""
    table = {(p.world, p.base, p.model): getattr(p, of) for p in predictions}

    def value(m: Matrix, x: str, y: str) -> float:
        if places is not None:
            x, y = places[m.world, x], places[m.world, y]
        return table.get((m.world, x, y), np.nan)

    return lambda m: m.filled(lambda x, y: value(m, x, y))


def _baseline(p: PairPrediction | None, name: str) -> float:
    return np.nan if p is None else p.baselines.get(name, np.nan)


def _additive(matrix: Matrix, measured: Sequence[Matrix], members: Members) -> Array:
    """Row effect + column effect fitted to the other targets of this world, same kind first; nan without another."""
    others = [m for m in measured if m.world == matrix.world and m.target != matrix.target]
    others = [m for m in others if m.kind == matrix.kind] or others
    if not others:
        return np.full_like(matrix.values, np.nan)
    tables = [_at(m, matrix) for m in others]
    seen = np.isfinite(tables)
    mean = np.where(seen, tables, 0).sum(0) / np.maximum(seen.sum(0), 1)
    mask = seen.any(0) & within(matrix, members)
    return additive_fit(np.where(mask, mean, np.nan), mask) if mask.any() else np.full_like(matrix.values, np.nan)


def _taught(matrix: Matrix, predicted: Array, members: Members) -> Array:
    """slope * prediction + row effect, each column's fitted to all other columns: what the prediction would be worth to
    somebody who knew how good the bases are for this target. Of mean 0 in each column."""
    kin, told = within(matrix, members) & np.isfinite(predicted), np.full_like(matrix.values, np.nan)
    mask = kin & np.isfinite(matrix.values)
    for y, rows in enumerate(kin.T):
        others = mask.copy()
        others[:, y] = False
        if others[rows].any():
            left, said = additive_residual(matrix.values, others), additive_residual(predicted, others)
            slope = left @ said / (said @ said or 1.0)
            seen = others[rows].any(0).argmax()  # a column of the same root
            column = slope * predicted[:, y] + additive_fit(matrix.values - slope * predicted, others)[:, seen]
            told[rows, y] = column[rows] - np.nanmean(column[rows])
    return rounded(told, float(np.ptp(matrix.values[mask])) if mask.any() else 0.0)


def _at(source: Matrix, shape: Matrix) -> Array:
    rows, columns = ({name: i for i, name in enumerate(names)} for names in (source.bases, source.models))
    return shape.filled(lambda x, y: source.values[rows[x], columns[y]] if x in rows and y in columns else np.nan)


def within(matrix: Matrix, members: Members) -> Bools:
    """Pairs of one root, no control, X not Y."""
    return np.logical_or.reduce([np.zeros_like(matrix.values, bool), *root_masks(matrix, members)])


def root_masks(matrix: Matrix, members: Members) -> list[Bools]:
    """One mask per root: X not Y, neither a control."""
    x, y = (np.array([_root(members[matrix.world, n]) for n in ns], str) for ns in (matrix.bases, matrix.models))
    same = x[:, None] == y
    other = np.array(matrix.bases, str)[:, None] != np.array(matrix.models, str)
    return [same & other & (x[:, None] == root) for root in sorted(set(x) - {""})]


def _root(member: Member) -> str:
    return "" if member.use == "control" else member.root
