"""The page of `lineage predict`: the answer, a bar of strength and one of the own style per model, and the reasons."""

from __future__ import annotations

from collections.abc import Sequence

from lineage.predict_result import Advice, Forecast, ListedModel, Prediction, PredictResult
from reports.page import Page, Safe, footer, h, listing, panel, section
from reports.predict_words import MEANING, answer, constants_words, for_own_style, warnings
from reports.wording import UNKNOWN, number, percent

SHOWN = 12  # bases of a ranking that are drawn
DEEPEST = 6  # steps of indentation
THEORY = (
    "An adapter moves its base X to the trained style. On a model Y it misses that style by what lies between X and Y: "
    "the further apart, the weaker. Of Y's own style, the way from the first model of its tree to Y, it replaces what "
    "X had learned too; what X lacks comes through. Only the family tree and distances of weights are used."
)


def predict_page(result: PredictResult) -> Page:
    """No script: bars are drawn by the page itself, their reasons stand in it as text and as tooltips."""
    said = warnings(result)
    warned = h("ul", [h("li", w) for w in said], class_="warnings", aria_label="Warnings") if said else None
    eyebrow = h("p", h("span", "lineage predict", class_="badge"), " ", h("b", result.folder), class_="eyebrow")
    lead = None if result.base is None else h("p", f"Training base: {result.base.words}.", class_="lead")
    body = (
        h("header", eyebrow, h("h1", answer(result)), lead if not said else None, warned, class_="top"),
        h("main", _advice(result) if result.adapter is None else _forecasts(result), _how(result)),
        footer(result.provenance),
    )
    return Page(f"{result.folder}: prediction", body)


def _forecasts(result: PredictResult) -> tuple[Safe, Safe]:
    listed = {m.name: m for m in result.models}
    words = (
        "Every model, in the order of the family tree: indented is what was made from the one above. Strength: how "
        "much of the trained style arrives. Own style: how much of the model's own is left.",
    )
    rows = [_forecast(f, listed[f.model]) for f in result.forecasts]
    table = listing(_HEADS, [_row(f) for f in result.forecasts])
    picture = panel(_legend(result), h("ol", rows, class_="forecast", aria_label="Predictions"))
    return section("What to expect", words, picture), h("section", h("h2", "Reasons"), table)


_HEADS = ("Model", "Verdict", "Why", "Strength", "Own style", "Distance", "Relation", "Sure")


def _forecast(f: Forecast, m: ListedModel) -> Safe:
    who = h("span", h("b", f.model), h("small", f.reason), class_="who", style=f"--depth:{min(m.depth, DEEPEST)}")
    return h("li", who, _chip(f.verdict), _bars(f.strength, f.retention), title=f.reason)


def _chip(verdict: str) -> Safe:
    return h("span", verdict, class_=f"chip {verdict.split()[0].lower()}")


def _bars(strength: float | None, retention: float | None) -> Safe:
    return h("span", _bar("strength", strength, "signal"), _bar("own style", retention, "raw"), class_="pair")


def _bar(label: str, share: float | None, colour: str) -> Safe:
    width = 0.0 if share is None else 100 * share
    fill = h("i", class_=f"fill {colour}", style=f"width:{width:.1f}%")
    value = "–" if share is None else percent(round(share, 2))
    return h("span", h("small", label), h("span", fill, class_="track"), h("b", value, class_="num"), class_="gauge")


def _legend(result: PredictResult) -> Safe:
    found = {f.verdict for f in result.forecasts}
    items = [h("span", _chip(v), f" {MEANING[v]}") for v in MEANING if v in found]
    return h("p", items, class_="legend verdicts")


def _row(f: Forecast) -> tuple[object, ...]:
    numbers = (percent(f.strength), percent(f.retention), number(f.distance), f.relation or UNKNOWN)
    return f.model, _chip(f.verdict), h("span", f.reason, class_="why"), *numbers, percent(f.confidence)


def _advice(result: PredictResult) -> tuple[Safe | None, ...]:
    if not result.advice:
        return (h("p", "No model here shares training with the targets.", class_="words"),)
    near = ("Near the targets: what is trained there arrives on all of them. Ranked by mean strength.",)
    upstream = (
        "Upstream of the targets: the base lacks their style, so it comes back. Ranked by the mean of strength times "
        "own style left.",
    )
    pairs = [p for a in result.advice for p in a.pairs]
    table = listing(("Base", "Target", "Verdict", "Why", "Strength", "Own style"), [_pair(p) for p in pairs])
    return (
        section("If the trained style should stay", near, _ranking(result.advice, "stays")),
        section("If the targets’ own style should come through", upstream, _ranking(for_own_style(result), "through")),
        h("section", h("h2", "Reasons"), table),
    )


def _ranking(advice: Sequence[Advice], score: str) -> Safe:
    rows = [_advised(a, getattr(a, score), place) for place, a in enumerate(advice[:SHOWN], 1)]
    more = len(advice) - len(rows)
    rest = h("p", f"and {number(more)} more in the table below", class_="note") if more > 0 else None
    return panel(h("ol", rows, class_="forecast ranking"), rest)


def _advised(a: Advice, score: float, place: int) -> Safe:
    who = h("span", h("b", f"{place}. {a.base}"), h("small", a.words), class_="who", style="--depth:0")
    gauge = h("span", _bar("score", score, "signal"), class_="pair")
    return h("li", who, gauge, title="; ".join(p.reason for p in a.pairs))


def _pair(p: Prediction) -> tuple[object, ...]:
    why = h("span", p.reason, class_="why")
    return p.base, p.model, _chip(p.verdict), why, percent(p.strength), percent(p.retention)


def _how(result: PredictResult) -> Safe:
    predictor = h("p", "Predictor: sha256 ", h("code", result.code[:16]), class_="note")
    return section("How this is predicted", (THEORY,), h("p", constants_words(result), class_="words"), predictor)
