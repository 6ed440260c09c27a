"""The page of `lineage train --find-lr`: the loss over the learning rate, and which rate to take."""

from __future__ import annotations

from math import log10

from reports.figures import Figure
from reports.page import Page, footer, h, listing, panel, plot, section
from reports.wording import count, number
from train.rates import RatesResult


def rates_page(result: RatesResult) -> Page:
    """The answer, the curve, the points."""
    words = (
        f"One training step with {result.optimizer} per point, at a growing rate; after each, the loss of "
        f"{count(result.pictures, 'picture')} whose noise and timesteps stay the same. A sweep is short and its steps "
        "add up: take it as a hint for the order of magnitude.",
    )
    curve = panel(plot("rates", "Loss over the learning rate"))
    rows = [(f"{p.lr:.3e}", number(p.loss, 5)) for p in result.points]
    points = h("details", h("summary", count(len(rows), "point")), listing(("Learning rate", "Loss"), rows))
    body = (
        h("header", h("p", h("span", "lineage train --find-lr", class_="badge"), class_="eyebrow"),
          h("h1", result.answer), class_="top"),
        h("main", section("Loss over the learning rate", words, curve, points)),
        footer(result.provenance),
    )  # fmt: skip
    return Page("Learning rate", body, {"figures": {"rates": rate_curve(result)}})


def rate_curve(result: RatesResult) -> Figure:
    """The sweep; what lies far above the start is left out of view."""
    x, y = [p.lr for p in result.points], [p.loss for p in result.points]
    line = {"x": x, "y": y, "mode": "lines+markers", "name": "loss", "line": {"color": "@signal", "width": 2.5}}
    low, high = min([result.start, *y]), max([result.start, *(v for v in y if v < 1.5 * result.start)])
    room = 0.08 * (high - low or 1.0)
    marks = [(rate, text) for rate, text in ((result.suggestion, "try"), (result.lowest, "lowest")) if rate]
    return {
        "data": [{**line, "marker": {"color": "@signal", "size": 5}, "hovertemplate": "%{x:.2e}: %{y:.4f}"}],
        "layout": {
            "xaxis": {"type": "log", "title": {"text": "learning rate"}, "exponentformat": "e", "dtick": 1},
            "yaxis": {"title": {"text": "loss"}, "range": [low - room, high + room]},
            "shapes": [_rule(rate) for rate, _ in marks],
            "annotations": [_note(rate, text) for rate, text in marks],
            "height": 380,
        },
    }


def _rule(rate: float) -> Figure:
    line = {"color": "@ink", "width": 1, "dash": "dot"}
    return {"type": "line", "x0": rate, "x1": rate, "y0": 0, "y1": 1, "yref": "paper", "line": line}


def _note(rate: float, text: str) -> Figure:
    place = {"x": log10(rate), "y": 0.02, "yref": "paper", "xanchor": "right", "xshift": -5, "showarrow": False}
    return {**place, "text": f"{text}: {rate:.1e}", "font": {"color": "@muted", "size": 12}}
