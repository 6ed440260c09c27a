"""The page of `lineage transfer-test`: what was found, matrices along the family tree, predictors, claims, pictures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Any

from lineage.transfer_measures import Readings, readings, retention_measure
from lineage.transfer_records import (
    CONTRADICTED,
    NOT_TESTABLE,
    SUPPORTED,
    UNDECIDED,
    VERDICTS,
    Hypothesis,
    PairPrediction,
    TransferResult,
    WorldFacts,
)
from reports.figures import Figure
from reports.kin_matrix import HALF, WHOLE, Branch, Entry, branches, kin_matrix
from reports.page import Page, Safe, footer, h, listing, panel, plot, section
from reports.transfer_figures import (
    effect_dots,
    pair_means,
    predictor_dots,
    same_root,
    scatter,
    shown_world,
    speed_curves,
)
from reports.transfer_pictures import pictures
from reports.transfer_pictures import sheets as picture_files
from reports.transfer_words import answer, findings
from reports.wording import UNKNOWN, count, number, percent

LISTED = 300
FORETOLD = "predicted"
SIDE_BY_SIDE = 18  # models up to which two matrices stand beside each other
TONES = {SUPPORTED: "held", CONTRADICTED: "fell", UNDECIDED: "open", NOT_TESTABLE: "untested"}
APART_HEADS = ("Of", "Measured by", "Targets", "tau", "95 % interval", "Share of halves", "Share of perfect", "Worlds")
SCORE_HEADS = (
    "Of", "Figure", "Predictor", "Mean", "95 % interval", "Median", "p", "Share of halves", "Share of perfect",
)  # fmt: skip
FIGURES = (
    ("tau", "Order of the bases", "Kendall's tau between predicted and measured order of the bases of one model."),
    (
        "centred",
        "Pairs alone",
        "Spearman after good bases and good models are taken out: what is left is the pair's own.",
    ),
    ("regret", "Cost of the advice", "Lift lost by training on the recommended base; less is better."),
)


@dataclass(frozen=True)
class View:
    """What all sections draw from: the readings, and the one world that matrices and pictures show."""

    result: TransferResult

    @cached_property
    def found(self) -> Readings:
        return readings(self.result.cells, self.result.worlds, self.result.design)

    @cached_property
    def world(self) -> WorldFacts | None:
        name = shown_world(self.result)
        return next((w for w in self.result.worlds if w.name == name), None)

    @cached_property
    def retention(self) -> str | None:
        return retention_measure(self.found)

    def ends(self, values: Mapping[Pair, float]) -> Ends:
        """Least and most among pairs of one root."""
        members = {m.name: m for m in self.world.models} if self.world else {}
        kin = [
            value for (x, y), value in values.items()
            if x in members and y in members and same_root(members[x], members[y])
        ]  # fmt: skip
        return min(kin, default=0.0), max(kin, default=1.0)

    def axis(self, names: Iterable[str]) -> list[Branch]:
        return branches(self.world, [*names]) if self.world else []


def transfer_page(result: TransferResult) -> Page:
    """All sections; pictures come from files beside the result, which `build` embeds."""
    v = View(result)
    figures: dict[str, Figure] = {}
    sheets = picture_files(result, v.world)
    body = (
        h("header", _eyebrow(result), h("h1", answer(result)), _findings(result), class_="top"),
        h(
            "main", _matrices(v), _scatters(v, figures), _scores(result, figures), _claims(result, figures),
            pictures(v.world, sheets), _speed(v, figures), _bars(result), _rest(result),
        ),
        h("dialog", h("p", h("b", id="large-name"), h("button", "Close", type="button", id="large-close")),
          h("img", alt="", id="large"), id="enlarged", aria_labelledby="large-name"),
        footer(result.provenance),
    )  # fmt: skip
    names = tuple(c.samples for c in sheets.values() if c.samples)
    return Page("Does the family tree predict transfer?", body, {"figures": figures}, ("transfer.js",), names)


def _eyebrow(result: TransferResult) -> Safe:
    s = result.statistics
    facts = f"{count(s.worlds, 'world')}, {count(s.cells, 'cell')}, {count(len(result.predictions), 'prediction')}"
    return h("p", h("span", "lineage transfer-test", class_="badge"), " ", h("b", facts), class_="eyebrow")


def _findings(result: TransferResult) -> Safe:
    return h("div", [h("p", said, class_="lead") for said in findings(result)], id="findings")


Pair = tuple[str, str]  # base, model
Ends = tuple[float, float]


def _matrices(v: View) -> Safe | None:
    foretold = {(p.base, p.model): p for p in v.result.predictions if v.world and p.world == v.world.name}
    tables = [*_tables(v, v.world.name, foretold)] if v.world else []
    if v.world is None or not tables:
        return None
    words = (
        f"World {v.world.name}: down the model an adapter was trained on, across the one it is applied to, both in the "
        "order of the family tree, a child indented below its parent. Measured strength is a lift: 1 is as good as the "
        "model's own adapter, orange made it worse; framed squares are a model's own. The other colours run from the "
        "least to the most among models of one root. Click a square for its numbers.",
    )
    measured = sorted({pair for _, values, name, _ in tables if name != FORETOLD for pair in values})
    rows, columns = (v.axis(dict.fromkeys(pair[i] for pair in measured)) for i in (0, 1))
    grids = [_grid(title, rows, columns, values, name, ends, foretold) for title, values, name, ends in tables]
    by_target = [_target(v, t, rows, columns, foretold) for t in v.world.targets]
    said = h("p", id="square", class_="note", aria_live="polite", hidden=True)
    side_by_side = "two" if len(columns) <= SIDE_BY_SIDE else "one"
    return section("Where an adapter works", words, h("div", grids, class_=side_by_side), by_target, said)


def _tables(
    v: View, world: str, foretold: dict[Pair, PairPrediction]
) -> Iterator[tuple[str, dict[Pair, float], str, Ends]]:
    """Title, values, what to call one, and the ends of the colours, of each matrix that can be drawn."""
    for of, measure, name in (("strength", "lift", "lift"), ("retention", v.retention, "kept")):
        found = _mean(pair_means(v.found, world, measure)) if measure else {}
        if found:
            values = {pair: getattr(p, of) for pair, p in foretold.items()}
            yield f"Measured {of}", found, name, (0.0, 1.0) if of == "strength" else v.ends(found)
            yield f"Predicted {of}", values, FORETOLD, v.ends(values)


def _mean(pairs: dict[Pair, list[float]]) -> dict[Pair, float]:
    return {pair: fmean(values) for pair, values in pairs.items()}


def _target(
    v: View, target: str, rows: list[Branch], columns: list[Branch], foretold: dict[Pair, PairPrediction]
) -> Safe | None:
    world = v.world
    values = _mean(pair_means(v.found, world.name, "lift", target)) if world else {}
    if world is None or not values:
        return None
    drawn = _grid(f"{world.targets[target].capitalize()} {target}", rows, columns, values, "lift", (0.0, 1.0), foretold)
    return h("details", h("summary", f"Measured strength, {world.targets[target]} {target} alone"), drawn)


def _grid(
    title: str, rows: list[Branch], columns: list[Branch], values: dict[Pair, float], name: str, ends: Ends,
    foretold: dict[Pair, PairPrediction],
) -> Safe:  # fmt: skip
    """One matrix; its colours run between `ends`."""
    low, high = ends

    def entry(x: str, y: str) -> Entry:
        value, p = values.get((x, y)), foretold.get((x, y))
        said = "" if p is None else f" {p.words[:1].upper()}{p.words[1:]}. {p.reason}"
        if x == y:
            return Entry(None, "", f"{x}: its own adapter.")
        if value is None:
            return Entry(None, "", f"{x} on {y}: not measured, or dropped.{said}")
        scaled = (value - low) / ((high - low) or 1.0)
        words = f"{x} on {y}: {name} {value:.3f}.{said}"
        return Entry(scaled if low == 0 else max(0.0, scaled), f"{value:.2f}", words)

    drawing = h(
        "div",
        kin_matrix(rows, columns, entry, title, HALF if len(columns) <= SIDE_BY_SIDE else WHOLE),
        class_="wide",
        tabindex="0",
    )
    return panel(h("h3", title), drawing, h("p", f"Pale {number(low)}, full {number(high)}.", class_="note"))


def _scatters(v: View, figures: dict[str, Figure]) -> Safe | None:
    wanted = [("strength", "lift")] + ([("retention", v.retention)] if v.retention else [])
    panels = []
    for of, measure in wanted:
        figure = scatter(v.result, v.found, of, measure)
        if figure["data"]:
            figures[of] = figure
            panels.append(panel(h("h3", of.capitalize()), plot(of, f"Predicted and measured {of}")))
    words = (
        "Each dot is a base and a model, the mean over targets; bars span the 95 % interval of that mean in the world "
        "shown. The prediction's scale is its own: only the order counts.",
    )
    return section("Predicted against measured", words, h("div", panels, class_="two")) if panels else None


def _scores(result: TransferResult, figures: dict[str, Figure]) -> Safe | None:
    panels = []
    for figure, title, words in FIGURES:
        scores = [s for s in result.statistics.scores if (s.of, s.figure) == ("strength", figure)]
        if scores:
            figures[f"score-{figure}"] = predictor_dots(scores)
            panels.append(panel(h("h3", title), h("p", words, class_="note"), plot(f"score-{figure}", title)))
    words = (
        "Of strength, within one root, own adapters left out. Small dots are worlds, large ones their mean with its "
        f"95 % interval. The band starts at what {result.statistics.ceiling_from} say of each other and ends at what a "
        "perfect prediction would reach.",
    )
    return section("The prediction and simpler ones", words, h("div", panels, class_="three")) if panels else None


def _claims(result: TransferResult, figures: dict[str, Figure]) -> Safe | None:
    if not result.hypotheses:
        return None
    words = (
        "Worlds are the units. A claim about strength needs three measures to agree: raw drop of the loss, gap to the "
        "model's own adapter, and lift. p is adjusted for the whole table (Holm). Open a claim for its test and its "
        "figures.",
    )
    drawn = None
    if any(x.effect is not None for x in result.hypotheses):
        figures["effects"] = effect_dots(result.hypotheses)
        drawn = panel(
            h("h3", "Effects"),
            h("p", "Right of zero: as the article says. Triangles: beyond 1 to either side.", class_="note"),
            plot("effects", "Effects of the claims"),
        )
    lists = [_verdict(v, [x for x in result.hypotheses if x.verdict == v]) for v in VERDICTS]
    return section("The article's claims", words, h("div", h("div", lists, class_="claims"), drawn, class_="explorer"))


def _verdict(verdict: str, found: Sequence[Hypothesis]) -> Safe | None:
    if not found:
        return None
    rows = [_claim(x) for x in found]
    if verdict == NOT_TESTABLE:
        return h("details", h("summary", f"Not testable in miniature ({len(found)})"), rows, class_="untested-claims")
    return h("div", h("h3", f"{verdict.capitalize()} ({len(found)})"), rows)


def _claim(x: Hypothesis) -> Safe:
    facts = [("Article", x.article), ("Compared", x.test), ("Why", x.reason)]
    facts += [("Adjusted p", number(x.adjusted_p))] if x.adjusted_p is not None else []
    facts += [("Worlds", number(x.worlds))] if x.worlds else []
    effects = [(e.measure, f"{e.effect:+.4f}", _span(e.low, e.high), number(e.p)) for e in x.effects]
    code = h("span", x.key, class_="code") if x.effect is not None else None  # as the figure calls it
    tone = h("span", x.verdict.split(" in ")[0], class_=f"tone {TONES.get(x.verdict, 'open')}")
    return h(
        "details",
        h("summary", tone, " ", x.claim, code),
        h("dl", [(h("dt", k), h("dd", d)) for k, d in facts if d], class_="facts rows"),
        listing(("Measure", "Effect", "95 % interval", "p"), effects),
        class_="claim",
    )  # fmt: skip


def _span(low: float | None, high: float | None) -> str:
    return UNKNOWN if low is None or high is None else f"{low:+.4f} to {high:+.4f}"


def _speed(v: View, figures: dict[str, Figure]) -> Safe | None:
    families = {name: i for i, name in enumerate(dict.fromkeys(m.family for m in (v.world.models if v.world else ())))}
    figure = speed_curves(v.result, v.found, families)
    if figure is None:
        return None
    figures["speed"] = figure
    legend = h(
        "p", [h("span", h("i", style=f"background:var(--f{i % 10})"), n) for n, i in families.items()], class_="legend"
    )
    words = (
        "Each line is a model's own adapter: the share of its final gain at every checkpoint, mean over targets. "
        "Colours are families.",
    )
    return section("How fast training goes", words, panel(plot("speed", "Share of the final gain by step"), legend))


def _bars(result: TransferResult) -> Safe:
    met = {True: "yes", False: "no", None: "not known"}
    bars = [(b.name, number(b.value), b.wanted, met[b.met]) for b in result.statistics.bars]
    controls = [
        (c.name, f"{c.lift:.3f}", _span(c.low, c.high), f"{c.true_lift:.3f}", c.words)
        for c in result.statistics.controls
    ]
    agreements = [(a.of, a.a, a.b, f"{a.value:.2f}", number(a.worlds)) for a in result.statistics.agreements]
    return h(
        "section",
        h("h2", "Requirements, controls, judges"),
        h("p", "What the prediction must reach, what must fail, and how far the judges agree.", class_="words"),
        listing(("Requirement", "Found", "Wanted", "Met"), bars),
        _fold("Styles and characters, losses and judges apart", _apart_rows(result), APART_HEADS),
        _fold("Controls", controls, ("Control", "Lift", "95 % interval", "True pairs", "Verdict")),
        _fold("Agreement of judges and losses", agreements, ("Of", "One", "Other", "Spearman", "Worlds")),
        _fold("All scores", _score_rows(result), SCORE_HEADS),
        class_="loose",
    )  # fmt: skip


def _apart_rows(result: TransferResult) -> list[tuple[Any, ...]]:
    return [
        (s.of, s.measure, f"{s.kind}s" if s.kind else "all", f"{s.mean:.3f}", _span(s.low, s.high), percent(s.share),
         percent(s.strict_share), number(len(s.worlds)))
        for s in result.statistics.apart
    ]  # fmt: skip


def _score_rows(result: TransferResult) -> list[tuple[Any, ...]]:
    partial = [result.statistics.partial] if result.statistics.partial else []
    return [
        (s.of, s.figure, s.predictor, f"{s.mean:.3f}", _span(s.low, s.high), f"{s.median:.3f}", number(s.p),
         percent(s.share), percent(s.strict_share))
        for s in (*result.statistics.scores, *partial)
    ]  # fmt: skip


def _fold(title: str, rows: Sequence[Sequence[Any]], heads: Sequence[str]) -> Safe:
    shown = rows[:LISTED]
    more = h("p", f"{len(rows) - LISTED} more are in result.json.", class_="note") if len(rows) > LISTED else None
    return h("details", h("summary", f"{title} ({len(rows)})"), listing(heads, shown) or h("p", "None."), more)


def _rest(result: TransferResult) -> Safe:
    dropped = [(d.world, d.target, d.model, number(d.headroom), number(d.error), d.reason) for d in result.dropped]
    failed = [(f.world, f.target, f.base, f.way, f.seed, f.reason) for f in result.failed]
    runs = [(r,) for r in result.runs]
    notes = h("ul", [h("li", n) for n in result.notes]) if result.notes else None
    permutation = result.statistics.permutation.get("tau")
    return h(
        "section",
        h("h2", "What lies behind"),
        h("p", "Predictions were fixed before the first training; sha256 ", h("code", result.predictions_hash), ". ",
          f"Models exchanged within their families are ranked as well with p = {number(permutation)}.", class_="words"),
        notes,
        _fold("Dropped", dropped, ("World", "Target", "Model", "Headroom", "Standard error", "Why")),
        _fold("Trainings that diverged", failed, ("World", "Target", "Base", "Way", "Seed", "Why")),
        _fold("Ledger of runs", runs, ("Run",)) if runs else None,
        _fold("Settings", [(k, str(x)) for k, x in result.config.items()], ("Name", "Value")),
        class_="rest loose",
    )  # fmt: skip
