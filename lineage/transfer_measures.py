"""Cells -> readings: what an adapter does to a model, averaged over seeds, in measures where larger is more.

drop: L_Y - L_Y(adapter). closeness: L_Y(adapter_Y) - L_Y(adapter), the gap to Y's own adapter turned round. lift:
drop over Y's headroom L_Y - L_Y(adapter_Y); 1 is as good as Y's own. judge: mean over judges of the target's score,
less the untouched model's. retention: mean over judges of the likeness to the untouched model's pictures. own: the
untouched model's loss on its own pictures less that with the adapter.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from lineage.errors import LineageError
from lineage.transfer_records import DEFAULT, NONE, Cell, Design, Dropped, Member, WorldFacts

STRENGTH = ("lift", "drop", "closeness")
RETENTION = ("retention", "own")
JUDGED = "judge"
Array = NDArray[np.float64]
Column = tuple[str, str, str]  # world, target, model


@dataclass(frozen=True)
class Reading:
    """An adapter on a model, averaged over seeds. values: measure -> value, without those that were not measured.
    final: the last checkpoint of its training; early: the first of several."""

    world: str
    target: str
    kind: str
    network: str
    setup: str
    base: str
    model: str
    weight: float
    final: bool
    early: bool
    values: dict[str, float]

    @property
    def column(self) -> Column:
        return self.world, self.target, self.model


@dataclass(frozen=True)
class Readings:
    """All of an experiment. members: (world, name) -> the model. untouched: loss of each column without an adapter;
    own: readings of models' own adapters at the reference weight. dropped: columns without strength."""

    design: Design
    worlds: tuple[WorldFacts, ...]
    rows: tuple[Reading, ...]
    untouched: dict[Column, float]
    dropped: tuple[Dropped, ...]

    def members(self) -> dict[tuple[str, str], Member]:
        return {(w.name, m.name): m for w in self.worlds for m in w.models}

    def main(self) -> list[Reading]:
        """X on Y, X not Y, by the design's network and weight after the default training."""
        d = self.design
        return [
            r
            for r in self.rows
            if (r.network, r.setup, r.weight, r.final) == (d.network, DEFAULT, d.weight, True) and r.base != r.model
        ]


def readings(
    cells: Iterable[Cell], worlds: Sequence[WorldFacts], design: Design, losses: Callable[[Cell], float] | None = None
) -> Readings:
    """Group `cells` over seeds and derive every measure. `losses` replaces a cell's mean loss (half of its batches).

    LineageError where a cell names a world or model that `worlds` lacks.
    """
    loss = losses or (lambda c: c.loss)
    grouped = _grouped(cells, worlds)
    untouched = {key[0]: group for key, group in grouped.items() if key[2] is None}
    own = _own_adapters(grouped, design)
    columns = sorted({key[0] for key in grouped if key[2] is not None})
    dropped = [d for d in (_fault(c, untouched.get(c), own.get(c), design) for c in columns) if d]
    weak = {(d.world, d.target, d.model) for d in dropped}
    rows = []
    steps = _checkpoints(grouped)
    for key, group in sorted(grouped.items(), key=lambda kv: str(kv[0])):
        column, how, base, weight, step = key
        if base is None or column not in untouched:
            continue
        values = _retention(group, untouched[column])
        if column not in weak:
            values |= _strength(group, untouched[column], own[column], loss)
        first, last = steps[column[:2], how, base]
        rows.append(
            Reading(
                *column[:2], group[0].kind, *how, base, column[2], weight, step == last, step == first < last, values
            )
        )
    return Readings(
        design, tuple(worlds), tuple(rows), {c: _mean(g, loss) for c, g in untouched.items()}, tuple(dropped)
    )


Key = tuple[Column, tuple[str, str], str | None, float, int]
Groups = dict[Key, list[Cell]]


def _grouped(cells: Iterable[Cell], worlds: Sequence[WorldFacts]) -> Groups:
    known = {(w.name, m.name) for w in worlds for m in w.models}
    groups: Groups = defaultdict(list)
    for c in sorted(cells, key=lambda c: c.seed):
        for name in filter(None, (c.base, c.model)):
            if (c.world, name) not in known:
                raise LineageError(f"cells: world {c.world!r} has no model {name!r}. Cells of another experiment?")
        how = (NONE, DEFAULT) if c.base is None else (c.network, c.setup)
        groups[(c.world, c.target, c.model), how, c.base, c.weight, c.step].append(c)
    return groups


def _own_adapters(grouped: Groups, design: Design) -> dict[Column, list[Cell]]:
    """Each column's last default checkpoint trained on the model itself, at the reference weight; else the matrix's."""
    found: dict[Column, tuple[tuple, list[Cell]]] = {}
    for (column, how, base, weight, step), group in grouped.items():
        if (
            base == column[2]
            and how == (design.network, DEFAULT)
            and weight in (design.reference_weight, design.weight)
        ):
            rank = (weight == design.reference_weight, step)
            if column not in found or rank > found[column][0]:
                found[column] = rank, group
    return {column: group for column, (_, group) in found.items()}


def _checkpoints(grouped: Groups) -> dict[tuple, tuple[int, int]]:
    """(world, target), (network, setup), base -> first and last step."""
    steps: dict[tuple, list[int]] = defaultdict(list)
    for column, how, base, _, step in grouped:
        steps[column[:2], how, base].append(step)
    return {key: (min(found), max(found)) for key, found in steps.items()}


def _fault(column: Column, untouched: list[Cell] | None, own: list[Cell] | None, design: Design) -> Dropped | None:
    if untouched is None or own is None:
        lacking = "the untouched model" if untouched is None else "the model's own adapter"
        return Dropped(*column, None, None, f"{lacking} was not measured")
    rise = fmean(untouched[0].loss - c.loss for c in own)
    error = fmean(_difference_error(untouched[0], c) for c in own)
    if rise > 0 and rise >= design.headroom_errors * error:
        return None
    return Dropped(*column, rise, error, f"its own adapter gains less than {design.headroom_errors:g} standard errors")


def _difference_error(a: Cell, b: Cell) -> float:
    """Standard error of the difference of two losses: paired over batches where both were kept."""
    if len(a.losses) == len(b.losses) > 1:
        return float(np.std(np.subtract(a.losses, b.losses), ddof=1)) / sqrt(len(a.losses))
    return sqrt(a.loss_error**2 + b.loss_error**2)


def _mean(group: Sequence[Cell], value: Callable[[Cell], float]) -> float:
    return fmean(value(c) for c in group)


def _strength(
    group: list[Cell], untouched: list[Cell], own: list[Cell], loss: Callable[[Cell], float]
) -> dict[str, float]:
    before, after, best = (_mean(g, loss) for g in (untouched, group, own))
    found = {"drop": before - after, "closeness": best - after}
    if before > best:  # half of the batches can turn a small headroom round
        found["lift"] = (before - after) / (before - best)
    judged = {name: _mean(group, lambda c, n=name: c.strength_judges[n]) for name in _shared(group, "strength_judges")}
    plain = {
        name: _mean(untouched, lambda c, n=name: c.strength_judges[n]) for name in _shared(untouched, "strength_judges")
    }
    rises = {f"judge {name}": judged[name] - plain[name] for name in sorted(judged.keys() & plain.keys())}
    return found | rises | ({JUDGED: fmean(rises.values())} if rises else {})


def _retention(group: list[Cell], untouched: list[Cell]) -> dict[str, float]:
    names = sorted(_shared(group, "retention_judges"))
    found = {f"retention {n}": _mean(group, lambda c, n=n: c.retention_judges[n]) for n in names}
    if found:
        found["retention"] = fmean(found.values())
    with_adapter, without = ([c.own_loss for c in g if c.own_loss is not None] for g in (group, untouched))
    if with_adapter and without:
        found["own"] = fmean(without) - fmean(with_adapter)
    return found


def _shared(group: Sequence[Cell], of: str) -> set[str]:
    return set.intersection(*(set(getattr(c, of)) for c in group))


@dataclass(frozen=True)
class Matrix:
    """One world and target: rows are bases, columns models; nan where not measured, on the diagonal too."""

    world: str
    target: str
    kind: str
    bases: tuple[str, ...]
    models: tuple[str, ...]
    values: Array

    def filled(self, value: Callable[[str, str], float]) -> Array:
        """The same shape from a function of (base, model)."""
        return np.array([[value(x, y) for y in self.models] for x in self.bases], float).reshape(self.values.shape)


def matrices(found: Readings, measure: str) -> list[Matrix]:
    """The main matrix of every world and target that has `measure`, in the order of names."""
    rows: dict[tuple[str, str, str], dict[tuple[str, str], float]] = defaultdict(dict)
    for r in found.main():
        if measure in r.values:
            rows[r.world, r.target, r.kind][r.base, r.model] = r.values[measure]
    return [_matrix(key, rows[key]) for key in sorted(rows)]


def _matrix(key: tuple[str, str, str], values: dict[tuple[str, str], float]) -> Matrix:
    bases, models = (tuple(sorted({pair[i] for pair in values})) for i in (0, 1))
    table = [[values.get((x, y), np.nan) for y in models] for x in bases]
    return Matrix(*key, bases, models, np.array(table, float))


def retention_measure(found: Readings) -> str | None:
    """The measure that retention is scored by: the judges', else the models' own loss, else none."""
    return next((m for m in RETENTION if any(m in r.values for r in found.main())), None)
