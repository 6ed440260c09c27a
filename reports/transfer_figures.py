"""A transfer experiment -> figures: predicted against measured, predictors beside their ceiling, effects, speed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from math import inf, sqrt
from statistics import fmean, stdev

from lineage.transfer_measures import Readings
from lineage.transfer_records import (
    CONTRADICTED,
    DEFAULT,
    SUPPORTED,
    UNDECIDED,
    Design,
    Hypothesis,
    Member,
    PairPrediction,
    Score,
    TransferResult,
)
from reports.figures import Figure, rows_axis
from reports.page import plot_text

Pair = tuple[str, str]
COLOURS = 10
REACH = 1.0  # of effects: a whole lift
VERDICT_COLOURS = {SUPPORTED: "@f2", CONTRADICTED: "@mark", UNDECIDED: "@null"}


def pair_means(found: Readings, world: str, measure: str, target: str | None = None) -> dict[Pair, list[float]]:
    """(base, model) -> the measure in each target of `world` (or the one named), off the diagonal."""
    values: dict[Pair, list[float]] = defaultdict(list)
    for r in found.main():
        if r.world == world and target in (None, r.target) and measure in r.values:
            values[r.base, r.model].append(r.values[measure])
    return dict(values)


def scatter(result: TransferResult, found: Readings, of: str, measure: str) -> Figure:
    """One dot per pair of one world, its mean over targets with a 95 % interval of targets; other worlds pale."""
    members = found.members()
    foretold = {(p.world, p.base, p.model): p for p in result.predictions}
    shown = shown_world(result)
    groups: dict[str, list[tuple[PairPrediction, list[float]]]] = {"other": [], "shown": [], "root": []}
    for world in result.worlds:
        for (x, y), values in sorted(pair_means(found, world.name, measure).items()):
            p = foretold.get((world.name, x, y))
            if p is not None:
                kin = same_root(members[world.name, x], members[world.name, y])
                groups[("shown" if world.name == shown else "other") if kin else "root"].append((p, values))
    style = {
        "other": ("other worlds", "@null", 5, 0.35),
        "shown": (shown, "@signal", 8, 0.9),
        "root": ("other root or control", "@raw", 6, 0.6),
    }
    traces = [_dots(rows, of, *style[key], key == "shown") for key, rows in groups.items() if rows]
    kin = [getattr(p, of) for key in ("other", "shown") for p, _ in groups[key]]
    axes = {
        "xaxis": {"title": {"text": f"predicted {of}"}, "range": _range([x for t in traces for x in t["x"]], kin)},
        "yaxis": {"title": {"text": "measured lift" if of == "strength" else "measured retention"}},
    }
    return {"data": traces, "layout": {**axes, "height": 420, "hovermode": "closest"}}


def _range(values: Sequence[float], kin: Sequence[float]) -> list[float] | None:
    """All of the kin, and what lies no farther from them than they are wide."""
    low, high = min(kin, default=0.0), max(kin, default=1.0)
    near = [v for v in values if low - (high - low) <= v <= high + (high - low)]
    room = 0.05 * (max(near) - min(near)) if near else 0.0
    return [min(near) - room, max(near) + room] if room else None


def same_root(x: Member, y: Member) -> bool:
    """Whether a pair counts: of one root, no control."""
    return x.root == y.root and "control" not in (x.use, y.use)


def _dots(
    rows: list[tuple[PairPrediction, list[float]]],
    of: str,
    name: str,
    colour: str,
    size: int,
    opacity: float,
    bars: bool,
) -> Figure:
    dots = {
        "type": "scatter",
        "mode": "markers",
        "name": plot_text(name, 32),
        "x": [getattr(p, of) for p, _ in rows],
        "y": [fmean(values) for _, values in rows],
        "customdata": [[plot_text(p.base, 30), plot_text(p.model, 30), plot_text(p.world, 24)] for p, _ in rows],
        "marker": {"color": colour, "size": size, "opacity": opacity},
        "hovertemplate": "%{customdata[0]} on %{customdata[1]} (%{customdata[2]})<br>predicted %{x:.3g}, "
        "measured %{y:.3g}<extra></extra>",
    }
    if bars:
        spread = [1.96 * stdev(v) / sqrt(len(v)) if len(v) > 1 else 0 for _, v in rows]
        dots["error_y"] = {"type": "data", "array": spread, "color": colour, "thickness": 1, "width": 0}
    return dots


def shown_world(result: TransferResult) -> str:
    """The world that is drawn: the result's choice, else the one with most models."""
    names = [w.name for w in result.worlds]
    largest = max(result.worlds, key=lambda w: len(w.models), default=None)
    return result.shown if result.shown in names else largest.name if largest else ""


def predictor_dots(scores: Sequence[Score]) -> Figure:
    """One row per predictor, best on top: the mean over worlds with its interval, each world a small dot."""
    rows = sorted(scores, key=lambda s: s.mean if s.figure == "regret" else -s.mean)
    worlds = {
        "type": "scatter",
        "mode": "markers",
        "name": "one world",
        "x": [v for s in rows for v in s.worlds.values()],
        "y": [i for i, s in enumerate(rows) for _ in s.worlds],
        "customdata": [plot_text(w) for s in rows for w in s.worlds],
        "marker": {"color": "@null", "size": 6, "opacity": 0.45},
        "hovertemplate": "%{customdata}: %{x:.3f}<extra></extra>",
    }
    means = _interval_dots(
        [(s.predictor, s.mean, s.low, s.high) for s in rows],
        ["@signal" if s.predictor == "predicted" else "@ink" for s in rows],
        "mean over worlds",
    )
    layout = {
        "yaxis": {**rows_axis([_short(s.predictor) for s in rows], 26), "zeroline": False},
        "xaxis": {"side": "top", "zeroline": True, "zerolinecolor": "@muted"},
        "height": 110 + 30 * max(3, len(rows)),
        "shapes": [_ceiling(s) for s in rows[:1] if s.ceiling is not None],
        "showlegend": False,
    }
    return {"data": [worlds, means], "layout": layout}


def _short(name: str) -> str:
    return name.split(" (")[0]


def _ceiling(s: Score) -> Figure:
    """A band from what half of the seeds tells of the other to what a perfect predictor would reach."""
    ends = sorted((s.ceiling or 0, s.strict_ceiling if s.strict_ceiling is not None else s.ceiling or 0))
    place = {"type": "rect", "x0": ends[0], "x1": ends[1], "y0": 0, "y1": 1, "yref": "paper", "layer": "below"}
    return {**place, "fillcolor": "@signal-band", "line": {"width": 0}}


def _interval_dots(
    rows: Sequence[tuple[str, float, float | None, float | None]],
    colours: Sequence[str],
    name: str,
    reach: float = inf,
) -> Figure:
    """What lies beyond `reach`, to either side, is a triangle there."""

    def cut(x: float) -> float:
        return max(-reach, min(reach, x))

    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": [cut(mean) for _, mean, _, _ in rows],
        "y": list(range(len(rows))),
        "customdata": [[plot_text(what), f"{mean:.3f}{_span(low, high)}"] for what, mean, low, high in rows],
        "error_x": {
            "type": "data",
            "symmetric": False,
            "array": [0 if high is None else cut(high) - cut(mean) for _, mean, _, high in rows],
            "arrayminus": [0 if low is None else cut(mean) - cut(low) for _, mean, low, _ in rows],
            "color": "@muted",
            "thickness": 1.6,
            "width": 0,
        },
        "marker": {"color": list(colours), "size": 10, "symbol": [_symbol(mean, reach) for _, mean, _, _ in rows]},
        "hovertemplate": "%{customdata[0]}: %{customdata[1]}<extra></extra>",
    }


def _symbol(x: float, reach: float) -> str:
    return "circle" if abs(x) <= reach else "triangle-left" if x < 0 else "triangle-right"


def _span(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f" ({low:.3f} to {high:.3f})"


def effect_dots(hypotheses: Iterable[Hypothesis]) -> Figure:
    """Claims that could be measured, largest effect on top, coloured by verdict; right of zero is as claimed."""
    rows = sorted((h for h in hypotheses if h.effect is not None), key=lambda h: -(h.effect or 0))
    dots = _interval_dots(
        [(h.claim, h.effect or 0, h.low, h.high) for h in rows],
        [VERDICT_COLOURS.get(h.verdict, "@null") for h in rows],
        "effect",
        REACH,
    )
    layout = {
        "yaxis": {**rows_axis([h.key for h in rows], 24), "zeroline": False},
        "xaxis": {"side": "top", "zeroline": True, "zerolinecolor": "@ink"},
        "height": 90 + 24 * max(3, len(rows)),
        "showlegend": False,
    }
    return {"data": [dots], "layout": layout}


def speed_curves(result: TransferResult, found: Readings, families: Mapping[str, int]) -> Figure | None:
    """Models' own adapters at each checkpoint: share of the final gain, mean over targets; None without checkpoints."""
    gains = _gains(result, found)
    if max((len(steps) for steps in gains.values()), default=0) < 2:
        return None
    members = {m.name: m for w in result.worlds if w.name == shown_world(result) for m in w.models}
    traces = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": plot_text(name, 32),
            "x": [0, *sorted(steps)],
            "y": [0, *(fmean(steps[s]) for s in sorted(steps))],
            "line": {"color": f"@f{families.get(members[name].family, 0) % COLOURS}", "width": 1.8},
            "hovertemplate": f"{plot_text(name, 30)}, %{{x}} steps: %{{y:.0%}}<extra></extra>",
        }
        for name, steps in sorted(gains.items())
    ]
    axes = {
        "xaxis": {"title": {"text": "training steps"}, "rangemode": "tozero"},
        "yaxis": {"tickformat": ".0%", "title": {"text": "share of its final gain"}},
    }
    return {"data": traces, "layout": {**axes, "height": 400, "showlegend": False, "hovermode": "closest"}}


def _gains(result: TransferResult, found: Readings) -> dict[str, dict[int, list[float]]]:
    """Model -> step -> share of the gain of its last checkpoint, per target, seeds averaged."""
    world, d = shown_world(result), result.design
    dropped = {(x.world, x.target, x.model) for x in result.dropped}
    losses: dict[tuple[str, str], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for c in result.cells:
        if c.world == world and c.base == c.model and _own(c, d) and (world, c.target, c.model) not in dropped:
            losses[c.model, c.target][c.step].append(c.loss)
    gains: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for (model, target), steps in losses.items():
        before = found.untouched.get((world, target, model))
        last = fmean(steps[max(steps)])
        if before is not None and before > last:
            for step, values in steps.items():
                gains[model][step].append((before - fmean(values)) / (before - last))
    return gains


def _own(c, d: Design) -> bool:
    return (c.network, c.setup, c.weight) == (d.network, DEFAULT, d.reference_weight)
