"""How well a prediction made before training agrees with what was measured: within roots, over worlds.

tau: mean over models Y of Kendall's tau over bases X. centred: Spearman after row and column means are removed. regret:
lift of the best base less that of the recommended one. Measured strength is lift: within a model every measure of
strength ranks the bases alike. The diagonal and the controls are in none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from statistics import fmean

import numpy as np

from lineage.contrasts import frame
from lineage.halving import Halves, halves
from lineage.predictors import (
    Members,
    Places,
    Predictor,
    foretold,
    predictors,
    root_masks,
    within,
)
from lineage.rank_statistics import (
    centred_spearman,
    column_tau,
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
from lineage.requirements import requirements
from lineage.transfer_controls import controls
from lineage.transfer_measures import JUDGED, RETENTION, Array, Matrix, Readings, matrices, readings, retention_measure
from lineage.transfer_records import (
    KINDS,
    PREDICTED,
    Agreement,
    Cell,
    Comparison,
    Design,
    FalsePositives,
    PairPrediction,
    Score,
    Statistics,
    WorldFacts,
)
from lineage.verdicts import ALPHA, table_false_positives

Progress = Callable[[int, int, str], None]
Figure = Callable[[Matrix, Array, Array], float]  # shape, measured, predicted -> score of one matrix
SEED = 0


@dataclass(frozen=True)
class Evidence:
    """Everything the figures are made from. halves: pairs of readings of disjoint halves of the seeds."""

    found: Readings
    predictions: tuple[PairPrediction, ...]
    members: Members
    halves: Halves
    halved: str

    def figures(self) -> dict[str, Figure]:
        members = self.members
        return {
            "tau": lambda m, a, b: column_tau(a, b, within(m, members)),
            "centred": lambda m, a, b: centred_spearman(a, b, root_masks(m, members)),
            "regret": lambda m, a, b: regret(a, b, within(m, members)),
            "all pairs": lambda m, a, b: pooled_spearman(a, b, np.isfinite(a)),
        }


def statistics(
    cells: Sequence[Cell],
    worlds: Sequence[WorldFacts],
    predictions: Sequence[PairPrediction],
    design: Design,
    shuffles: int = 200,
    permutations: int = 499,
    progress: Progress | None = None,
) -> Statistics:
    """All figures. `shuffles`: deals of the tree's labels for the rate of false positives; `permutations`: exchanges
    of models within their families; 0 leaves either out.

    LineageError where a cell names a world or model that `worlds` lacks."""
    found = readings(cells, worlds, design)
    parts, halved = halves(cells, worlds, design)
    e = Evidence(found, tuple(predictions), found.members(), parts, halved)
    strength, kept = "lift", retention_measure(found)
    scores = [*_scores(e, "strength", strength), *(_scores(e, "retention", kept) if kept else [])]
    comparisons = [*_comparisons(scores)]
    failing = tuple(controls(found))
    rate = _false_positives(e, shuffles, progress) if shuffles else None
    return Statistics(
        len({r.world for r in found.rows}), len(cells), halved, tuple(scores), tuple(comparisons), failing,
        tuple(_agreements(e)), _partial(e, kept), _permutations(e, permutations), rate,
        tuple(requirements(scores, comparisons, failing, rate)), tuple(_apart(e)),
    )  # fmt: skip


def _scores(e: Evidence, of: str, measure: str) -> Iterator[Score]:
    """Every predictor in every figure."""
    measured = matrices(e.found, measure)
    halves = _halved(e, measure)
    for figure, score in e.figures().items():
        ceiling = _ceiling(halves, score) if figure in ("tau", "centred") else None
        for name, predictor in predictors(e.found, e.predictions, of, measured).items():
            found = _scored(name, of, figure, score, predictor, measured, halves, ceiling)
            if found:
                yield found


def _apart(e: Evidence) -> Iterator[Score]:
    """The prediction alone, for styles and characters apart, and against every other measure of the same thing."""
    names = {name for r in e.found.main() for name in r.values}
    cases = [("strength", m) for m in ("lift", JUDGED)] + [("retention", m) for m in RETENTION]
    for of, measure in cases:
        measured, halves = matrices(e.found, measure), _halved(e, measure)
        for kind in ("", *KINDS) if measure in names else ():
            part = [m for m in measured if kind in ("", m.kind)]
            both = [tuple(_only(half, kind) for half in pair) for pair in halves]
            score = e.figures()["tau"]
            found = _scored(PREDICTED, of, "tau", score, foretold(e.predictions, of), part, both, _ceiling(both, score))
            if found:
                yield replace(found, measure=measure, kind=kind)


def _only(half: Index, kind: str) -> Index:
    return {key: m for key, m in half.items() if kind in ("", m.kind)}


def _halved(e: Evidence, measure: str) -> list[tuple[Index, ...]]:
    return [tuple(_index(matrices(half, measure)) for half in pair) for pair in e.halves]


def _scored(
    name: str, of: str, figure: str, score: Figure, predictor: Predictor, measured: Sequence[Matrix],
    halves: Sequence[tuple[Index, ...]], ceiling: float | None,
) -> Score | None:  # fmt: skip
    """The score over worlds; None without a world."""
    worlds = world_means((m.world, score(m, m.values, predictor(m))) for m in measured)
    if not worlds:
        return None
    half = _against_halves(halves, score, predictor) if ceiling is not None else None
    return _score(name, of, figure, worlds, ceiling, half)


Index = dict[tuple[str, str], Matrix]


def _index(found: Sequence[Matrix]) -> Index:
    return {(m.world, m.target): m for m in found}


def _ceiling(halves: Sequence[tuple[Index, ...]], score: Figure) -> float | None:
    """What one half of the seeds, as a predictor, would score against the other; mean over worlds."""
    pairs = ((key[0], _shared(a[key], b[key], score)) for a, b in halves for key in sorted(a.keys() & b.keys()))
    worlds = world_means(iter(pairs))
    return fmean(worlds.values()) if worlds else None


def _shared(a: Matrix, b: Matrix, score: Figure) -> float:
    at = {(x, y): b.values[i, j] for i, x in enumerate(b.bases) for j, y in enumerate(b.models)}
    return score(a, a.values, a.filled(lambda x, y: at.get((x, y), np.nan)))


def _against_halves(halves: Sequence[tuple[Index, ...]], score: Figure, predictor: Predictor) -> float | None:
    each = ((m.world, score(m, m.values, predictor(m))) for ab in halves for half in ab for m in half.values())
    worlds = world_means(iter(each))
    return fmean(worlds.values()) if worlds else None


def _score(
    name: str, of: str, figure: str, worlds: dict[str, float], ceiling: float | None = None, half: float | None = None
) -> Score:
    values = [*worlds.values()]
    mean = fmean(values)
    low, high = interval(values)
    strict = None if ceiling is None else (stepped_up_tau if figure == "tau" else stepped_up)(ceiling)
    share = half / ceiling if half is not None and ceiling and ceiling > 0 else None
    strict_share = mean / strict if strict else None
    p = None if figure == "regret" else mean_p(values)
    return Score(
        name, of, figure, mean, float(np.median(values)), low, high, p, ceiling, share, strict, strict_share, worlds
    )


def _comparisons(scores: Sequence[Score]) -> Iterator[Comparison]:
    """The prediction against every other predictor, in the three main figures; positive: the prediction is better."""
    table = {(s.of, s.figure, s.predictor): s for s in scores}
    for (of, figure, name), other in table.items():
        mine = table.get((of, figure, PREDICTED))
        if mine is None or name == PREDICTED or figure == "all pairs":
            continue
        sign = -1 if figure == "regret" else 1
        ds = [sign * (mine.worlds[w] - other.worlds[w]) for w in mine.worlds if w in other.worlds]
        if ds:
            yield Comparison(PREDICTED, name, of, figure, fmean(ds), *interval(ds), mean_p(ds))


def _agreements(e: Evidence) -> Iterator[Agreement]:
    """Every two judges of one thing, and judges against losses."""
    names = sorted({name for r in e.found.main() for name in r.values})
    for of, sole in (("strength", "lift"), ("retention", "own")):
        judges = [n for n in names if n.startswith("judge " if of == "strength" else "retention ")]
        mean = [JUDGED if of == "strength" else "retention"]
        for a, b in [*combinations(judges, 2), *((m, sole) for m in mean if m in names and sole in names)]:
            worlds = _agreement(e, a, b)
            if worlds:
                yield Agreement(of, a, b, fmean(worlds.values()), len(worlds))


def _agreement(e: Evidence, a: str, b: str) -> dict[str, float]:
    second = _index(matrices(e.found, b))

    def rho(m: Matrix, x: Array, y: Array) -> float:
        both = within(m, e.members) & np.isfinite(x) & np.isfinite(y)
        return spearman(x[both], y[both]) if both.sum() > 2 else float("nan")

    pairs = (
        (m.world, _shared(m, second[key], rho)) for key, m in _index(matrices(e.found, a)).items() if key in second
    )
    return world_means(iter(pairs))


def _partial(e: Evidence, kept: str | None) -> Score | None:
    if kept is None:
        return None
    strength = _index(matrices(e.found, "lift"))
    predictor = foretold(e.predictions, "retention")

    def beyond(m: Matrix) -> float:
        return _shared(
            m, strength[m.world, m.target],
            lambda m, kept, lift: partial_correlation(kept, predictor(m), lift, within(m, e.members)),
        )  # fmt: skip

    measured = [m for m in matrices(e.found, kept) if (m.world, m.target) in strength]
    worlds = world_means((m.world, beyond(m)) for m in measured)
    return _score(PREDICTED, "retention", "beyond strength", worlds) if worlds else None


def _tau_worlds(e: Evidence, measured: Sequence[Matrix], places: Places | None) -> list[float]:
    predictor = foretold(e.predictions, "strength", places)
    score = e.figures()["tau"]
    return [*world_means((m.world, score(m, m.values, predictor(m))) for m in measured).values()]


def _dealt(e: Evidence, rng: np.random.Generator, families: bool) -> Places:
    """Names dealt out anew within every world and use, and within families where `families`."""
    shelves: dict[tuple, list[str]] = {}
    for (world, name), m in e.members.items():
        shelves.setdefault((world, m.use, m.family if families else ""), []).append(name)
    return {
        (shelf[0], name): names[i]
        for shelf, names in shelves.items()
        for name, i in zip(names, rng.permutation(len(names)), strict=True)
    }


def _permutations(e: Evidence, times: int) -> dict[str, float | None]:
    """p that models exchanged within their families are ranked as well."""
    rng = np.random.default_rng(SEED)
    measured = matrices(e.found, "lift")
    values = _tau_worlds(e, measured, None)
    if not values or not times:
        return {"tau": None}
    dealt = (_tau_worlds(e, measured, _dealt(e, rng, True)) for _ in range(times))
    better = sum(fmean(found) >= fmean(values) for found in dealt if found)
    return {"tau": (better + 1) / (times + 1)}


def _false_positives(e: Evidence, shuffles: int, progress: Progress | None) -> FalsePositives:
    rng = np.random.default_rng(SEED)
    seen = (lambda i: progress(i, shuffles, "shuffled trees")) if progress else None
    table = table_false_positives(frame(e.found), shuffles, rng, seen=seen)
    measured = matrices(e.found, "lift")
    ps = [mean_p(_tau_worlds(e, measured, _dealt(e, rng, False))) for _ in range(shuffles)]
    hits = sum(p is not None and p <= ALPHA for p in ps)
    return FalsePositives(shuffles, ALPHA, table, share_upper(table, shuffles), hits, share_upper(hits, shuffles))
