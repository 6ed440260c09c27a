"""Results -> plotly figures as plain data. Colours are names ("@signal") that the page resolves for light and dark."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from math import log10
from statistics import quantiles
from typing import Any

from lineage.results import BlockChange, Group, LayerSpectrum, SvdResult
from reports.page import plot_text

Figure = dict[str, Any]
_COMPONENTS = ("unet", "text_encoder", "text_encoder_2", "vae")


def short_side(shape: tuple[int, ...]) -> int:
    """Short side of a weight seen as the matrix (out, in * kh * kw): the largest rank it can have."""
    out, rest = (shape[0] if shape else 0), 1
    for n in shape[1:]:
        rest *= n
    return min(out, rest)


def natural(text: str) -> list[tuple[int, int | str]]:
    """Sorting key that reads digits as numbers: IN2 before IN10."""
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"([0-9]+)", text) if part]


def model_order(component: str, block: str) -> tuple:
    """Sorting key of a block: the usual components first, then by name, numbers read as numbers."""
    known = _COMPONENTS.index(component) if component in _COMPONENTS else len(_COMPONENTS)
    return (known, natural(component), natural(block))


def energy_ranks(layers: Iterable[LayerSpectrum]) -> list[int]:
    """All k at which any layer reports its energy, ascending."""
    return sorted({int(k) for layer in layers for k in layer.energy})


def energy_curves(result: SvdResult) -> Figure:
    """Energy in k ranks over the layers of short side > k: median, and the middle 80 % but for raw.

    A third band would hide the others.
    """
    layers = [x for x in result.layers if short_side(x.shape) > result.summary.k and x.frobenius > 0]
    raw = [{k: e.value for k, e in x.energy.items()} for x in layers]
    signal = [x.signal_energy for x in layers if x.signal_energy]
    ks = energy_ranks(layers)
    traces = [
        *_band(ks, [x.gaussian_energy for x in layers], "Gaussian null", "null", "dash"),
        *_band(ks, raw, "raw delta", "raw", "solid")[2:],
        *_band(ks, signal, "signal", "signal", "solid"),
    ]
    floor = noise_share(layers)
    return {"data": traces, "layout": _curve_layout(ks, result.summary.k, floor)}


def noise_share(layers: Iterable[LayerSpectrum]) -> float | None:
    """Share of the delta energy that rounding alone explains, over the layers where it is known; at most 1."""
    known = [(x.noise_energy, x.frobenius**2) for x in layers if x.noise_energy is not None and x.frobenius > 0]
    total = sum(energy for _, energy in known)
    return min(1.0, sum(noise for noise, _ in known) / total) if total else None


def _band(ks: list[int], curves: list[dict[str, float]], name: str, colour: str, dash: str) -> list[Figure]:
    rows = [(k, [c[str(k)] for c in curves if str(k) in c]) for k in ks]
    rows = [(k, _deciles(values)) for k, values in rows if values]
    if not rows:
        return []
    x = [k for k, _ in rows]
    edge = {
        "x": x,
        "mode": "lines",
        "line": {"width": 0},
        "hoverinfo": "skip",
        "showlegend": False,
        "legendgroup": name,
    }
    return [
        {**edge, "y": [q[0] for _, q in rows]},
        {**edge, "y": [q[2] for _, q in rows], "fill": "tonexty", "fillcolor": f"@{colour}-band"},
        {
            "x": x,
            "y": [q[1] for _, q in rows],
            "customdata": [[q[0], q[2]] for _, q in rows],
            "name": name,
            "legendgroup": name,
            "mode": "lines+markers",
            "line": {"color": f"@{colour}", "width": 2.5, "dash": dash},
            "marker": {"color": f"@{colour}", "size": 6},
            "hovertemplate": "%{y:.1%} (80 % of layers: %{customdata[0]:.1%} to %{customdata[1]:.1%})",
        },
    ]


def _deciles(values: list[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    q = quantiles(values, n=10, method="inclusive")
    return q[0], q[4], q[8]


def _curve_layout(ks: list[int], k: int, floor: float | None) -> Figure:
    lines = [_line({"x0": k, "x1": k, "y0": 0, "y1": 1, "yref": "paper"}, "@ink", "dot")]
    notes = [{"x": _log(k), "y": 0.5, "yref": "paper", "text": f"k = {k}", "xanchor": "right", "xshift": -5}]
    if floor is not None and floor > 0.0005:
        lines.append(_line({"x0": 0, "x1": 1, "xref": "paper", "y0": 1 - floor, "y1": 1 - floor}, "@raw", "dot"))
        notes.append(
            {"x": 0.01, "xref": "paper", "y": 1 - floor, "text": "noise floor", "xanchor": "left", "yshift": -9}
        )
    return {
        "xaxis": rank_axis(ks),
        "yaxis": {"range": [0, 1.02], "tickformat": ".0%", "title": {"text": "share of the delta's energy"}},
        "shapes": lines,
        "annotations": [{"showarrow": False, "font": {"color": "@muted", "size": 12}, **n} for n in notes],
        "hovermode": "x unified",
        "height": 380,
    }


def rank_axis(ks: list[int]) -> Figure:
    """A logarithmic axis of ranks whose ticks are the ranks `ks` themselves."""
    shown = [k for k in ks if k & (k - 1) == 0] or ks
    end = [_log(min(ks)) - 0.04, _log(max(ks)) + 0.06] if ks else [0, 1]
    return {
        "type": "log",
        "range": end,
        "tickvals": shown,
        "ticktext": [str(k) for k in shown],
        "title": {"text": "ranks kept, k"},
    }


def _log(x: float) -> float:
    return log10(x) if x > 0 else 0.0


def _line(place: Figure, colour: str, dash: str) -> Figure:
    return {"type": "line", "layer": "below", "line": {"color": colour, "width": 1.2, "dash": dash}, **place}


def relative_bars(blocks: list[tuple[str, Group]]) -> Figure:
    """||D||_F / ||W||_F per block, first block on top. `blocks` in display order."""
    bar = _bars(blocks, [g.relative for _, g in blocks], "@accent", "%{customdata}: changed by %{x:.2%}<extra></extra>")
    layout = _bar_layout(blocks, {"tickformat": ".1%", "rangemode": "tozero"})
    if all(g.relative is None for _, g in blocks):
        layout["annotations"] = [_note("Unknown: no base weights to compare with")]
    return {"data": [bar], "layout": layout}


def _note(words: str) -> Figure:
    place = {"xref": "paper", "yref": "paper", "x": 0.5, "y": 0.5, "showarrow": False}
    return {"text": words, "font": {"color": "@muted", "size": 13}, **place}


def energy_bars(blocks: list[tuple[str, Group]], k: int) -> Figure:
    """Energy-weighted share of each block's delta within k ranks: signal as bars, raw as ticks beside them."""
    signal = _bars(
        blocks, [g.signal_energy for _, g in blocks], "@signal", "%{customdata}: signal %{x:.1%}<extra></extra>"
    )
    raw = {
        **_bars(blocks, [g.energy for _, g in blocks], "@raw", "%{customdata}: raw %{x:.1%}<extra></extra>"),
        "type": "scatter",
        "mode": "markers",
        "name": "raw delta",
        "marker": {"symbol": "line-ns", "size": 11, "line": {"width": 3, "color": "@raw"}},
    }
    del raw["orientation"]
    layout = _bar_layout(blocks, {"tickformat": ".0%", "range": [0, 1.02]})
    return {
        "data": [{**signal, "name": "signal"}, raw],
        "layout": {**layout, "showlegend": True, "legend": {"orientation": "h", "x": 0, "y": 0, "yanchor": "top"}},
    }


def _bars(blocks: list[tuple[str, Group]], values: list[float | None], colour: str, hover: str) -> Figure:
    return {
        "type": "bar",
        "orientation": "h",
        "x": values,
        "y": list(range(len(blocks))),
        "customdata": [plot_text(name) for name, _ in blocks],
        "marker": {"color": colour},
        "hovertemplate": hover,
    }


def _bar_layout(blocks: list[tuple[str, Group]], x: Figure) -> Figure:
    return {
        "xaxis": {"side": "top", **x},
        "yaxis": rows_axis([name for name, _ in blocks], 22),
        "bargap": 0.3,
        "height": 80 + 17 * max(3, len(blocks)),
    }


def coefficient_bars(coefficients: Mapping[str, float]) -> Figure:
    """One bar per original model, in the order given; negative ones in the colour of a warning."""
    values = list(coefficients.values())
    bar = {
        "type": "bar",
        "orientation": "h",
        "x": values,
        "y": list(range(len(values))),
        "text": [f"{v:.5g}" for v in values],
        "textposition": "outside",
        "cliponaxis": False,
        "customdata": [plot_text(name) for name in coefficients],
        "marker": {"color": ["@raw" if v < 0 else "@signal" for v in values]},
        "hovertemplate": "%{customdata}: %{x}<extra></extra>",
    }
    span = max([*map(abs, values), 1e-9]) * 1.45
    layout = {
        "xaxis": {"range": [-span if min(values, default=0) < 0 else 0, span], "side": "top"},
        "yaxis": {**rows_axis([*coefficients], 24), "zeroline": False},
        "bargap": 0.35,
        "height": 60 + 30 * max(2, len(values)),
    }
    return {"data": [bar], "layout": layout}


def change_map(changes: Sequence[BlockChange], blocks: Sequence[str]) -> Figure:
    """Blocks down, originals across: ||output - input||_F / ||input||_F; a gap where it is unknown."""
    z = [[c.blocks.get(b) for c in changes] for b in blocks]
    names = [plot_text(c.input) for c in changes]
    heat = {
        "type": "heatmap",
        "z": z,
        "zmin": 0,
        "colorscale": "Cividis",
        "hoverongaps": False,
        "customdata": [[[plot_text(b), name] for name in names] for b in blocks],
        "hovertemplate": "%{customdata[0]} against %{customdata[1]}: %{z:.2%}<extra></extra>",
        "xgap": 1,
        "ygap": 1,
        "colorbar": {
            "thickness": 10,
            "outlinewidth": 0,
            "tickformat": ".1%",
            "tickfont": {"color": "@muted"},
            "xpad": 4,
        },
    }
    across = {"tickvals": list(range(len(names))), "ticktext": [plot_text(c.input, 16) for c in changes]}
    return {
        "data": [heat],
        "layout": {
            "xaxis": {**across, "side": "top", "tickangle": -35 if len(names) > 2 else 0, "showgrid": False},
            "yaxis": rows_axis(blocks, 18),
            "plot_bgcolor": "@gap",
            "height": 110 + 15 * max(3, len(blocks)),
        },
    }


def rows_axis(names: Sequence[str], limit: int) -> Figure:
    """A vertical axis with one named row per entry, first on top."""
    return {
        "tickvals": list(range(len(names))),
        "ticktext": [plot_text(name, limit) for name in names],
        "range": [len(names) - 0.4, -0.6],
        "showgrid": False,
    }
