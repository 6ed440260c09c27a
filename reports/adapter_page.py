"""The page of `lineage extract` and `lineage resize`: what the new adapter holds of the change, and what it lacks."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence

from lineage.extract_result import AdaptedLayer, AdapterResult, LeftOut
from reports.figures import Figure, model_order, rows_axis
from reports.page import Page, Safe, footer, h, listing, panel, plot, plot_text, section
from reports.wording import count, number, percent, size

REASONS_SHOWN = 200


def adapter_page(result: AdapterResult) -> Page:
    """The share that is kept on top; kept by block; ranks; modules; what was left out and why."""
    figures = {"kept": kept_bars(result.layers), "errors": error_dots(result.layers)}
    body = (
        h("header", _eyebrow(result), h("h1", answer(result)), h("p", _lead(result), class_="lead"), class_="top"),
        h("main", _blocks(result), _modules(result), _left_out(result.left_out)),
        footer(result.provenance),
    )
    return Page(f"{result.file}: adapter", body, {"figures": figures})


def answer(result: AdapterResult) -> str:
    """One sentence: how much of what was kept, in how many modules."""
    of = f"the change from {result.base} to {result.source}" if result.base else result.source
    modules = count(len(result.layers), "module")
    return (
        f"{result.file} holds {percent(result.kept)} of the squared size of {of}, in {modules}, {size(result.bytes)}."
    )


def _eyebrow(result: AdapterResult) -> Safe:
    return h("p", h("span", f"lineage {result.provenance.command}", class_="badge"), " ", h("b", result.file))


def _lead(result: AdapterResult) -> str:
    best = [layer for layer in result.layers if layer.best_error is not None]
    beside = ""
    if best:
        total = sum(layer.frobenius**2 for layer in best)
        reach = 1 - sum((layer.best_error or 0) ** 2 * layer.frobenius**2 for layer in best) / total
        beside = f" The best matrices of rank dim squared would hold {percent(reach)} of its modules' change."
    cut = sum(layer.wanted is not None for layer in result.layers)
    small = f" {count(cut, 'module')} got fewer ranks than asked for, as their matrices have no more." if cut else ""
    return f"{result.algorithm}, {result.criterion}, stored as {result.dtype}.{beside}{small}"


def by_block(layers: Iterable[AdaptedLayer]) -> list[tuple[str, float, float]]:
    """(block, squared change, share of it that is kept), in the model's order."""
    groups: dict[tuple[str, str], list[AdaptedLayer]] = defaultdict(list)
    for layer in layers:
        groups[layer.component, layer.block].append(layer)
    rows = []
    for key in sorted(groups, key=lambda k: model_order(*k)):
        total = sum(x.frobenius**2 for x in groups[key])
        lost = sum((x.error * x.frobenius) ** 2 for x in groups[key])
        rows.append((key[1] or key[0], total, 1 - lost / total if total else 1.0))
    return rows


def kept_bars(layers: Sequence[AdaptedLayer]) -> Figure:
    """Share of each block's squared change that its modules hold."""
    rows = by_block(layers)
    bar = {
        "type": "bar",
        "orientation": "h",
        "x": [kept for _, _, kept in rows],
        "y": list(range(len(rows))),
        "customdata": [plot_text(name) for name, _, _ in rows],
        "marker": {"color": "@signal"},
        "hovertemplate": "%{customdata}: %{x:.1%}<extra></extra>",
    }
    layout = {
        "xaxis": {"side": "top", "tickformat": ".0%", "range": [0, 1.02]},
        "yaxis": rows_axis([name for name, _, _ in rows], 22),
        "bargap": 0.3,
        "height": 80 + 17 * max(3, len(rows)),
    }
    return {"data": [bar], "layout": layout}


def error_dots(layers: Sequence[AdaptedLayer]) -> Figure:
    """Size of the change against error, a dot per module."""
    dots = {
        "type": "scatter",
        "mode": "markers",
        "x": [layer.frobenius for layer in layers],
        "y": [layer.error for layer in layers],
        "customdata": [[plot_text(layer.name), layer.rank] for layer in layers],
        "marker": {"color": "@accent", "size": 7, "opacity": 0.6},
        "hovertemplate": "%{customdata[0]}<br>rank %{customdata[1]}, change %{x:.3g}, error %{y:.1%}<extra></extra>",
    }
    across = {"type": "log", "title": {"text": "size of the change"}, **_decades([x for x in dots["x"] if x > 0])}
    up = {"tickformat": ".0%", "rangemode": "tozero", "title": {"text": "error"}}
    return {"data": [dots], "layout": {"xaxis": across, "yaxis": up, "height": 420}}


def _decades(sizes: Sequence[float]) -> Figure:
    """Ticks at 1, 2 and 5 of every decade in which a size lies, written out."""
    if not sizes:
        return {}
    low, high = (math.floor(math.log10(f(sizes))) for f in (min, max))
    ticks = [digit * 10.0**power for power in range(low, high + 1) for digit in (1, 2, 5)]
    return {"tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}


def _blocks(result: AdapterResult) -> Safe:
    words = (
        "Left: the share of each block's squared change that the adapter reproduces. Right: every module, "
        "across by the size (Frobenius norm) of its change, up by its error, the size of what is missing over that; "
        "0 % is exact.",
    )
    left = panel(h("h3", "Kept, by block"), plot("kept", "Share kept by block"))
    right = panel(h("h3", "Change and error of every module"), plot("errors", "Change and error of modules"))
    return section("What it holds", words, h("div", left, right, class_="two"))


def _modules(result: AdapterResult) -> Safe:
    heads = ("Module", "Shape", "Rank", "Change", "Error", "Best of rank dim²")
    rows = [
        (x.module, "x".join(map(str, x.shape)), _rank(x), percent(x.relative), percent(x.error), _best(x))
        for x in sorted(result.layers, key=lambda x: -x.error * x.frobenius)
    ]
    shown = 6 if any(x.best_error is not None for x in result.layers) else 5
    words = ("Largest loss first. Change: its size over the size of the base's weight.",)
    return section("Modules", words, listing(heads[:shown], [row[:shown] for row in rows]))


def _best(layer: AdaptedLayer) -> str:
    return "" if layer.best_error is None else percent(layer.best_error)


def _rank(layer: AdaptedLayer) -> str:
    return number(layer.rank) + (f" of {number(layer.wanted)} asked" if layer.wanted else "")


def _left_out(left_out: Sequence[LeftOut]) -> Safe | None:
    if not left_out:
        return None
    rows = [(x.name, x.reason, percent(x.share)) for x in sorted(left_out, key=lambda x: -(x.share or 0))]
    words = [f"{count(len(rows), 'parameter')} that the adapter does not hold, with its share of the squared change. "]
    words += [f"The {REASONS_SHOWN} largest are listed; result.json has all."] if len(rows) > REASONS_SHOWN else []
    return section("Left out", words, listing(("Parameter", "Why", "Share"), rows[:REASONS_SHOWN]))
