"""The page of `lineage svd`: what to read first, then every layer, then where the numbers come from."""

from __future__ import annotations

from collections import Counter
from typing import Any

from lineage.results import Group, LayerSpectrum, SvdResult, SvdSummary, VectorDelta, Within
from reports.figures import (
    energy_bars,
    energy_curves,
    energy_ranks,
    model_order,
    noise_share,
    relative_bars,
    short_side,
)
from reports.page import Page, Safe, footer, h, listing, panel, plot, section, visible
from reports.wording import UNKNOWN, count, number, percent

_COLUMNS = (
    ("name", "Layer", "text"),
    ("block", "Block", "text"),
    ("relative", "Change", "number"),
    ("signal_rank", "Signal rank", "number"),
    ("signal_at_k", "Signal at k", "number"),
    ("raw_at_k", "Raw at k", "number"),
    ("signal_k_90", "Signal k₉₀", "number"),
    ("k_90", "Raw k₉₀", "number"),
    ("noise_share", "Noise", "number"),
    ("role", "Role", "text"),
    ("shape", "Shape", "number"),
    ("solver", "Solver", "text"),
)


def svd_page(result: SvdResult) -> Page:
    """All sections, and one JSON of columns from which the scripts draw layers on demand."""
    s = result.summary
    blocks = _block_groups(result)
    figures = {
        "curves": energy_curves(result),
        "relative": relative_bars(blocks),
        "energy": energy_bars(blocks, s.k),
    }
    layers = sorted(result.layers, key=lambda x: model_order(x.component, x.block))
    data = {"figures": figures, "k": s.k, "ks": energy_ranks(layers), "layers": _columns(layers, s.k)}
    body = (
        h("header", _pair(result), h("h1", s.answer.replace(" %", "\u00a0%")), _scope(s), class_="top"),
        h("main", _cards(s), _curves(result), _explorer(layers, s.k), _blocks(s.k), _rest(result)),
        footer(result.provenance),
    )
    return Page(f"{result.tuned}: rank of the change", body, data, ("svd.js",))


def _pair(result: SvdResult) -> Safe:
    start = [h("b", result.base), h("span", " → ", class_="muted")] if result.base else []
    return h("p", h("span", "lineage svd", class_="badge"), " ", start, h("b", result.tuned), class_="eyebrow")


def _scope(s: SvdSummary) -> Safe:
    parts = [
        f"Judged on {count(s.matrices, 'matrix', 'matrices')} whose short side exceeds {s.k}, a smaller one "
        f"always fits. Apart from these: {count(s.small_matrices, 'small matrix', 'small matrices')} and "
        f"{count(s.vectors, 'vector')} (norms, biases)."
    ]
    return h("p", *parts, class_="lead")


def _cards(s: SvdSummary) -> Safe:
    k = s.k
    unknown = f"In {count(s.signal_rank_unknown, 'layer')} storage precision hides it." if s.signal_rank_unknown else ""
    return h(
        "section",
        _figure_card(
            "Median signal rank", number(s.median_signal_rank), f"Ranks that stand out of rounding noise. {unknown}"
        ),
        _meters(
            f"Layers that fit in {k} ranks", "Layers with 90 % of their change within them", s, "layers_90", "layers_99"
        ),
        _meters(
            "Share of the change in such layers",
            "Layers weighted by energy: large changes count more",
            s,
            "energy_90",
            "energy_99",
        ),
        _figure_card("Relative change", percent(s.relative), _relative_words(s)),
        _meters(f"Change inside {k} ranks, on average", "of the whole delta's energy", s, "mean_energy", None),
        _figure_card("Identical layers", _identical(s), _identical_words(s)),
        class_="cards",
        aria_label="Key figures",
    )


def _figure_card(title: str, value: str, words: str) -> Safe:
    small = "value word" if value == UNKNOWN else "value"
    return h("div", h("h2", title), h("p", value, class_=small), h("p", words, class_="note"), class_="card")


def _relative_words(s: SvdSummary) -> str:
    if s.relative is None:
        return "Unknown: no base weights to compare with."
    return "Size of the change against the base weights, ‖Δ‖ / ‖W‖, all parameters together."


def _identical(s: SvdSummary) -> str:
    return f"{number(s.identical_matrices)} of {number(s.matrices + s.small_matrices)}"


def _identical_words(s: SvdSummary) -> str:
    return (
        f"Matrices equal bit for bit: not trained. Also {number(s.identical_vectors)} of {count(s.vectors, 'vector')}."
    )


def _meters(title: str, words: str, s: SvdSummary, at_90: str, at_99: str | None) -> Safe:
    rows = (("signal", s.signal), ("raw", s.raw), ("null", s.gaussian))
    bars = [_meter(name, getattr(w, at_90), getattr(w, at_99) if at_99 else None) for name, w in rows]
    known = _known_words(s.signal, s.raw)
    tail = f"{words}; in brackets for 99 %.{known}" if at_99 else f"{words.capitalize()}.{known}"
    return h("div", h("h2", title), h("div", bars, class_="meters"), h("p", tail, class_="note"), class_="card")


def _known_words(signal: Within, raw: Within) -> str:
    hidden = raw.layers - signal.layers
    return f" Signal leaves out {count(hidden, 'layer')} below storage precision." if hidden > 0 else ""


def _meter(name: str, share: float | None, at_99: float | None) -> Safe:
    label = {"signal": "Signal", "raw": "Raw delta", "null": "Gaussian null"}[name]
    wide = min(100.0, max(0.0, 100 * share)) if share is not None else 0.0
    bar = h("span", h("i", class_=f"fill {name}", style=f"width:{wide:.1f}%"), class_="track", aria_hidden="true")
    bracket = h("small", f" ({percent(at_99)})") if at_99 is not None else None
    return h("div", h("span", label), bar, h("span", percent(share), bracket, class_="num"), class_="meter")


def _curves(result: SvdResult) -> Safe:
    floor = noise_share(x for x in result.layers if short_side(x.shape) > result.summary.k)
    k = result.summary.k
    noise = (
        f"Rounding to storage precision makes {percent(floor)} of the raw delta's energy: above the dotted "
        "noise floor the raw curve only gathers rounding noise. "
        if floor
        else "No rounding noise is known here, so raw and signal agree. "
    )
    words = (
        f"Read up from the line at k = {k}: the height of the blue curve is the share of the change that an adapter of "
        f"rank {k} could hold. Lines show the median layer, bands the middle 80 % of layers. ",
        noise,
        "The grey curve is what pure chance gives: a random Gaussian matrix of the same shapes. "
        "A change that is no lower in rank than chance would lie on it.",
    )
    return section("How much of the change fits in k ranks", words, panel(plot("curves", "Energy against ranks kept")))


def _explorer(layers: list[LayerSpectrum], k: int) -> Safe:
    words = (
        "Each thin row is one layer, each column a number of ranks kept; bright means that nearly all of the layer's "
        "change fits. Click a row here or in the table to see that layer's spectrum. Grey cells have no value: the "
        "layer is identical, or its change is below storage precision and has no signal to show.",
    )
    left = h("div", _heat_panel(layers), _table_panel(k), class_="left")
    return section("Layer by layer", words, h("div", left, _detail(), class_="explorer"))


def _heat_panel(layers: list[LayerSpectrum]) -> Safe:
    modes = [
        _choice("mode", value, label, value == "signal") for value, label in (("signal", "Signal"), ("raw", "Raw"))
    ]
    components = [("", "All"), *((c, c) for c in dict.fromkeys(x.component for x in layers))]
    options = [h("option", label, value=value) for value, label in components]
    bar = h(
        "div",
        h("fieldset", h("legend", "Energy of", class_="hidden"), modes, class_="switch"),
        h("label", "Component ", h("select", options, id="heat-component")),
        class_="bar",
    )
    return panel(bar, plot("heat", "Heat map of layers by energy at k; the table below holds the same layers"))


def _choice(group: str, value: str, label: str, on: bool) -> Safe:
    return h("label", h("input", type="radio", name=group, value=value, checked=on), h("span", label))


def _table_panel(k: int) -> Safe:
    states = (
        ("", "all states"),
        ("changed", "changed"),
        ("identical", "identical"),
        ("hidden", "below storage precision"),
    )
    bar = h(
        "div",
        h("label", "Filter ", h("input", type="search", id="filter", placeholder="name, block or role")),
        h("label", "Show ", h("select", [h("option", t, value=v) for v, t in states], id="state")),
        h("output", id="shown", aria_live="polite"),
        class_="bar",
    )
    heads = [_head(key, label.replace("at k", f"at {k}"), kind) for key, label, kind in _COLUMNS]
    table = h("table", h("thead", h("tr", heads)), h("tbody", id="rows"), id="layers")
    words = (
        "k₉₀: ranks that hold 90 % of the energy. Noise: share of the raw energy that rounding alone explains. "
        "≥ n: surely n or more, the solver stopped looking there. "
        "“below precision”: the change is smaller than what the file's number format can resolve. "
        "“unknown”: this solver cannot know it, or there is no base to compare with."
    )
    scroll = h("div", table, class_="scroll", tabindex="0", role="region", aria_label="Table of layers")
    return panel(bar, scroll, h("p", words, class_="note"))


def _head(key: str, label: str, kind: str) -> Safe:
    button = h("button", label, type="button", data_key=key)
    return h("th", button, scope="col", class_="n" if kind == "number" else None, aria_sort="none")


def _detail() -> Safe:
    bar = h(
        "div",
        h("button", "←", type="button", id="previous", aria_label="Previous layer"),
        h("button", "→", type="button", id="next", aria_label="Next layer"),
        h("button", "Close", type="button", id="close"),
        class_="bar detail-bar",
    )
    words = (
        "Top: singular values, both axes logarithmic. Those above the noise edge are signal; a cliff means low rank, a "
        "straight slope a long tail. Bottom: energy in k ranks; the shaded band is the certified interval, often too "
        "thin to see."
    )
    return h(
        "aside",
        bar,
        h("h3", id="detail-name", tabindex="-1"),
        h("p", id="detail-where", class_="muted"),
        h("dl", id="detail-facts", class_="facts"),
        plot("spectrum", "Singular values of the chosen layer"),
        plot("layer-energy", "Energy of the chosen layer in k ranks"),
        h("p", words, class_="note"),
        id="detail",
        class_="panel",
        aria_label="Chosen layer",
    )


def _blocks(k: int) -> Safe:
    words = (
        "Left: where the fine-tune moved the weights most, against their own size. Right: the share of each block's "
        f"change within {k} ranks; blue bars without rounding noise, orange ticks with it. A tick far left of its bar "
        "means that the raw change is mostly noise, not that the block learned something of high rank.",
    )
    two = h(
        "div",
        panel(h("h3", "Relative change"), plot("relative", "Relative change by block")),
        panel(h("h3", f"Change within {k} ranks"), plot("energy", "Energy at k by block")),
        class_="two",
    )
    return section("Block by block", words, two)


def _block_groups(result: SvdResult) -> list[tuple[str, Group]]:
    """Blocks with at least one matrix, in model order; the component is named only where two share a block's name."""
    places = {f"{x.component} {x.block}": (x.component, x.block) for x in (*result.layers, *result.vectors)}
    known = [(places[key], group) for key, group in result.summary.blocks.items() if key in places and group.layers]
    uses = Counter(block for (_, block), _ in known)
    known.sort(key=lambda row: model_order(*row[0]))
    return [(b if uses[b] == 1 and b else f"{c} {b}".strip(), group) for (c, b), group in known]


def _rest(result: SvdResult) -> Safe:
    changed = [v for v in result.vectors if v.frobenius > 0]
    vectors = [
        h("p", f"{count(len(changed), 'vector')} of {len(result.vectors)} changed. Norms and biases have no rank; an "
          "adapter without them leaves them out. Listed by size of change, at most 200."),
        listing(("Vector", "Block", "Length", "Change"), [_vector_row(v) for v in _largest(changed)]),
    ]  # fmt: skip
    unmatched = listing(
        ("Parameter", "Only in, or refused from", "Why"),
        [(u.get("name", ""), u.get("side", ""), u.get("reason", "")) for u in result.unmatched],
    )
    return h(
        "section",
        h("h2", "What is not in the figures above"),
        _fold(f"Vectors ({len(result.vectors)})", vectors),
        _fold(
            f"Unmatched parameters ({len(result.unmatched)})", unmatched or h("p", "None: every parameter was matched.")
        ),
        _fold(
            f"Notes ({len(result.notes)})",
            h("ul", [h("li", n) for n in result.notes]) if result.notes else h("p", "None."),
        ),
        class_="rest",
    )


def _fold(title: str, content: Any) -> Safe:
    return h("details", h("summary", title), content)


def _largest(vectors: list[VectorDelta]) -> list[VectorDelta]:
    return sorted(vectors, key=lambda v: -(v.relative if v.relative is not None else v.frobenius))[:200]


def _vector_row(v: VectorDelta) -> tuple[str, ...]:
    change = percent(v.relative) if v.relative is not None else f"{number(v.frobenius)} (base is zero or unknown)"
    return v.name, v.block, " × ".join(map(str, v.shape)) or "1", change


def _columns(layers: list[LayerSpectrum], k: int) -> dict[str, list]:
    """Layers as columns: names made visible, numbers cut to what a screen can show."""
    rows = [_row(x, k) for x in layers]
    return {name: [row[name] for row in rows] for name in rows[0]} if rows else {}


def _row(x: LayerSpectrum, k: int) -> dict[str, Any]:
    ks = [str(n) for n in energy_ranks([x])]
    at = x.energy.get(str(k))
    squared = x.frobenius**2
    return {
        **{f: visible(getattr(x, f)) for f in ("name", "component", "block", "role", "solver")},
        **{f: getattr(x, f) for f in _COUNTS},
        **{f: _cut(getattr(x, f)) for f in ("frobenius", "relative", "noise_edge", *_SHAPES)},
        "shape": list(x.shape),
        "short": short_side(x.shape),
        "hidden": x.below_storage_precision,
        "noise_share": _cut(min(1.0, x.noise_energy / squared)) if x.noise_energy is not None and squared else None,
        "raw_at_k": _cut(at.value) if at and squared else None,
        "signal_at_k": _cut(x.signal_energy.get(str(k))) if x.signal_energy and squared else None,
        "ks": [int(n) for n in ks],
        "raw": [_cut(x.energy[n].value, 6) for n in ks],
        "low": [_cut(x.energy[n].low, 6) for n in ks],
        "high": [_cut(x.energy[n].high, 6) for n in ks],
        "signal": [_cut(x.signal_energy.get(n)) for n in ks] if x.signal_energy else None,
        "null": [_cut(x.gaussian_energy.get(n)) for n in ks],
        "values": [_cut(v) for v in x.singular_values],
    }


_COUNTS = (
    "entries", "identical_entries", "signal_rank", "signal_rank_at_least", "numerical_rank",
    "k_90", "k_99", "k_90_at_least", "k_99_at_least", "signal_k_90", "signal_k_99",
)  # fmt: skip
_SHAPES = ("stable_rank", "effective_rank", "participation_ratio")


def _cut(value: float | None, digits: int = 4) -> float | None:
    return None if value is None else float(f"{value:.{digits}g}")
