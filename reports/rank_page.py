"""The page of the functional test of the rank claim: what fine-tunes still do when only k ranks of them are kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean

from lineage.rank_records import MOST, RankClaimResult, RankPair, RankPoint
from reports.figures import Figure, rank_axis
from reports.page import Page, Safe, footer, h, listing, panel, plot, plot_text, section
from reports.wording import UNKNOWN, count, number, percent

Reading = Callable[[RankPair, RankPoint], float | None]
KINDS = {
    "extracted": "fine-tune cut to k ranks",
    "trained": "trained at rank k",
    "compressed": "widest trained, cut to k ranks",
}
COLOURS = {"extracted": "@signal", "trained": "@mark", "compressed": "@muted"}


def rank_page(result: RankClaimResult) -> Page:
    """The answer, gain beside energy, the judge, one row per fine-tune and rank."""
    body = (
        h("header", h("p", h("span", "benchmarks/rank_claim.py", class_="badge"), class_="eyebrow"),
          h("h1", "Does a fine-tune live in few ranks?"), h("p", result.answer, class_="lead"), class_="top"),
        h("main", _gains(result), _scores(result), _summary(result.pairs), _points(result.pairs)),
        footer(result.provenance),
    )  # fmt: skip
    return Page("Ranks put to their function", body, {"figures": {"gain": gains(result), "score": scores(result)}})


def _gains(result: RankClaimResult) -> Safe:
    shown = f"{count(result.pictures, 'picture')} of each style, each with {count(result.draws, 'timestep')} and noises"
    words = (
        f"Up: the share of what a fine-tune gains over its base in held-out loss, on {shown}; none was trained on, and "
        "every model meets the same. Lines: means over the fine-tunes; dots: single ones. Dashed: the share of the "
        "squared change that the adapter holds, and what it would hold of a Gaussian change.",
    )
    return section("Gain beside energy", words, panel(plot("gain", "Share of gain and of energy over the rank")))


def _scores(result: RankClaimResult) -> Safe:
    words = ("The probability that a judge gives to the style asked for, in pictures that each model draws.",)
    return section("What a judge sees", words, panel(plot("score", "Score of the judge over the rank")))


def gains(result: RankClaimResult) -> Figure:
    """Share of the gain in loss, extracted and trained, with the energies."""
    gain: Reading = lambda pair, point: pair.gain(point.outcome)  # noqa: E731
    traces = [*_both(result, gain, ".1%")]
    for name, colour, read in (
        ("energy", "@raw", lambda _, point: point.energy),
        ("energy of a Gaussian change", "@null", lambda _, point: point.gaussian),
    ):
        traces += _mean(result.pairs, "extracted", read, name, colour, ".1%", "dash")
    end = {"type": "line", "x0": 0, "x1": 1, "xref": "paper", "y0": 1, "y1": 1}
    layout = _layout(result, "share", ".0%")
    return {"data": traces, "layout": {**layout, "shapes": [{**end, "line": {"color": "@ink", "width": 1}}]}}


def scores(result: RankClaimResult) -> Figure:
    """The judge's score, with the means of base and fine-tune as rules."""
    shapes, notes = [], []
    for name, outcomes in (("base", [p.base for p in result.pairs]), ("fine-tune", [p.tuned for p in result.pairs])):
        y = fmean(o.score for o in outcomes) if outcomes else 0.0
        line = {"color": "@muted", "width": 1, "dash": "dot"}
        shapes.append({"type": "line", "x0": 0, "x1": 1, "xref": "paper", "y0": y, "y1": y, "line": line})
        text = {"x": 0.42, "xref": "paper", "y": y, "text": name, "yshift": 9, "showarrow": False}
        notes.append({**text, "font": {"color": "@muted", "size": 12}})
    layout = _layout(result, "judge's score", ".2f")
    traces = _both(result, lambda _, point: point.outcome.score, ".3f")
    return {"data": traces, "layout": {**layout, "shapes": shapes, "annotations": notes}}


def _both(result: RankClaimResult, read: Reading, form: str) -> list[Figure]:
    found = []
    for kind, colour in COLOURS.items():
        found += _mean(result.pairs, kind, read, KINDS[kind], colour, form, "solid")
        found += _dots(result.pairs, kind, read, colour, form)
    return found


def _layout(result: RankClaimResult, title: str, form: str) -> Figure:
    axis = {"tickformat": form, "title": {"text": title}}
    return {"xaxis": rank_axis(list(result.ranks)), "yaxis": axis, "height": 420}


def _readings(pairs: Sequence[RankPair], kind: str, read: Reading) -> list[tuple[int, float, str]]:
    """(rank, value, fine-tune) of all that has both."""
    points = [(pair, point) for pair in pairs for point in getattr(pair, kind)]
    found = [(point.rank, read(pair, point), pair.name) for pair, point in points]
    return [(rank, value, name) for rank, value, name in found if rank is not None and value is not None]


def _mean(
    pairs: Sequence[RankPair], kind: str, read: Reading, name: str, colour: str, form: str, dash: str
) -> list[Figure]:
    found = _readings(pairs, kind, read)
    x = sorted({rank for rank, _, _ in found})
    y = [fmean(value for rank, value, _ in found if rank == k) for k in x]
    line = {"color": colour, "width": 2.5, "dash": dash}
    hover = f"{name}, k = %{{x}}: %{{y:{form}}}<extra></extra>"
    return [{"x": x, "y": y, "mode": "lines", "name": name, "line": line, "hovertemplate": hover}] if x else []


def _dots(pairs: Sequence[RankPair], kind: str, read: Reading, colour: str, form: str) -> list[Figure]:
    found = _readings(pairs, kind, read)
    dots = {
        "x": [rank for rank, _, _ in found],
        "y": [value for _, value, _ in found],
        "customdata": [plot_text(name) for _, _, name in found],
        "mode": "markers",
        "showlegend": False,
        "marker": {"color": colour, "size": 7, "opacity": 0.55},
        "hovertemplate": f"%{{customdata}}<br>k = %{{x}}: %{{y:{form}}}<extra></extra>",
    }
    return [dots] if found else []


def _summary(pairs: Sequence[RankPair]) -> Safe:
    heads = (
        "Fine-tune",
        "Styles",
        "Size of change",
        "Short side",
        "Effective rank",
        f"Ranks for {MOST:.0%} of the gain",
    )
    rows = [
        (p.name, ", ".join(p.styles), percent(p.relative), p.median_side, number(p.effective_rank), number(p.enough()))
        for p in pairs
    ]
    words = (
        "Size: norm of the change over that of the base. Short side and effective rank (exponential of the entropy of "
        f"the singular values) are medians over the layers. {UNKNOWN.capitalize()}: no rank asked for is enough.",
    )
    return section("Fine-tunes", words, listing(heads, rows))


def _points(pairs: Sequence[RankPair]) -> Safe:
    heads = ("Fine-tune", "Adapter", "Rank", "Entries", "Energy", "Loss", "Gain", "Score", "Learning rate")
    rows = [
        (pair.name, KINDS[kind], "all" if p.rank is None else p.rank, number(p.parameters), _known(p.energy),
         number(p.outcome.loss, 5), percent(pair.gain(p.outcome)), number(p.outcome.score), p.lr or "")
        for pair in pairs for kind in KINDS for p in getattr(pair, kind)
    ]  # fmt: skip
    words = ("Gain: share of the fine-tune's own in held-out loss. All ranks: what adapters can hold at most.",)
    return section("Every adapter", words, listing(heads, rows))


def _known(share: float | None) -> str:
    return "" if share is None else percent(share)
