"""The page of `lineage cluster`: the answer, the family tree, distances, merges, and what took no part."""

from __future__ import annotations

from typing import Any

from lineage.cluster_result import ClusterModel, ClusterResult, Edge, FoundMerge
from reports.cluster_figures import COLOURS, block_data, heat_data, merge_bars
from reports.cluster_words import added, answer, edge_words, formula
from reports.figures import Figure
from reports.forest import family_order, forest
from reports.page import Page, Safe, footer, h, listing, panel, plot, section, visible
from reports.wording import UNKNOWN, count, number, percent, size

LEGEND = 16
BARS = 80


def cluster_page(result: ClusterResult) -> Page:
    """The graph is drawn by its script from `nodes` and `edges`, so that branches can fold; the rest is drawn here."""
    nodes = forest(result)
    index = {n.name: i for i, n in enumerate(nodes)}
    figures: dict[str, Figure] = {}
    merges = _merges(result, figures)
    data = {
        "figures": figures,
        "nodes": [[visible(n.name), n.kind, n.family, n.column, n.parent] for n in nodes],
        "facts": _facts(result),
        "chosen": index.get(result.added or "", 0),
        "edges": [_edge(e, index) for e in result.edges],
        "heat": heat_data(result),
        "similarity": block_data(result),
    }
    body = (
        h("header", _eyebrow(result), h("h1", _headline(result)), _lead(result), _warnings(result), class_="top"),
        h("main", _graph(result), merges, _distances(result), _tables(result), _rest(result)),
        footer(result.provenance),
    )
    return Page(f"{result.folder}: family tree", body, data, ("cluster.js", "pairs.js"))


def _eyebrow(result: ClusterResult) -> Safe:
    return h("p", h("span", "lineage cluster", class_="badge"), " ", h("b", result.folder), class_="eyebrow")


def _headline(result: ClusterResult) -> str:
    said = added(result)
    return answer(result) if said is None else f"{result.added}: {said}."


def _lead(result: ClusterResult) -> Safe:
    files = sum(result.counts.values())
    buckets = ", ".join(f"{bucket} {number(n)}" for bucket, n in sorted(result.counts.items()) if n)
    whole = f"{answer(result)} " if result.added is not None else ""
    shown = f" Drawn is what is at least {percent(result.min_confidence)} sure." if result.min_confidence else ""
    return h("p", f"{whole}{count(files, 'file')} ({buckets}). {result.choice.reason}{shown}", class_="lead")


def _warnings(result: ClusterResult) -> Safe | None:
    said = [f"{c.model}: the {c.source} says {c.claim}, the weights say {c.finding}." for c in result.contradictions]
    return h("ul", [h("li", s) for s in said], class_="warnings", aria_label="Contradictions") if said else None


def _graph(result: ClusterResult) -> Safe:
    words = (
        "Read from left to right: what a model was made from stands to its left. Colours are families; several lines "
        "into one model are a merge, with its coefficients. Hollow: an ancestor that no file is. A line without an "
        "arrow: which of the two came first is not known. Dashed: only declared by a file. Pale: less sure. Click a "
        "line or a model for the evidence; drag to move.",
    )
    tools = h(
        "div",
        h("label", "Find ", h("input", type="search", id="find", placeholder="model, family or file")),
        h("output", id="found", aria_live="polite"),
        h("span", _button("zoom-out", "−", "Smaller"), _button("zoom-in", "+", "Larger"),
          _button("fit", "Fit width", None), _button("unfold", "Unfold all", None), _button("fold", "Fold", None),
          class_="buttons"),
        class_="bar",
    )  # fmt: skip
    label = f"Family tree of {count(len(result.models), 'model')}; the table of relations below holds the same"
    canvas = h("div", id="forest", class_="canvas", tabindex="0", role="region", aria_label=label)
    left = panel(tools, canvas, _legend(result))
    return section("The family tree", words, h("div", left, _detail(), class_="explorer graph"))


def _button(id: str, text: str, label: str | None) -> Safe:
    return h("button", text, type="button", id=id, aria_label=label)


def _legend(result: ClusterResult) -> Safe | None:
    order = family_order(result)
    sizes = {f.name: len(f.members) for f in result.families}
    shown = [
        h("span", h("i", style=f"background:var(--f{i % COLOURS})"), name, h("small", f" {sizes[name]}"))
        for name, i in list(order.items())[:LEGEND]
    ]
    rest = len(order) - len(shown)
    more = h("span", f"and {count(rest, 'smaller family', 'smaller families')}; colours repeat") if rest > 0 else None
    return h("p", shown, more, class_="legend", aria_label="Families") if shown else None


def _detail() -> Safe:
    return h(
        "aside",
        h("div", _button("close", "Close", None), class_="bar detail-bar"),
        h("h3", "Click a line or a model", id="detail-name", tabindex="-1"),
        h("p", id="detail-where", class_="muted"),
        h("dl", id="detail-facts", class_="facts rows"),
        h("div", id="detail-list"),
        id="detail",
        class_="panel",
        aria_label="Evidence",
    )


def _merges(result: ClusterResult, figures: dict[str, Figure]) -> Safe | None:
    if not result.merges:
        return None
    order = family_order(result)
    family = {m.name: order.get(m.family or "", 0) for m in result.models}
    drawn = sorted(result.merges, key=lambda m: -(m.confidence or 0))[:BARS]
    figures["merges"] = merge_bars(drawn, family)
    words = (
        "Each bar is one merged file, cut by how much of each parent is in it; parts left of zero were subtracted, "
        "pale ones have no coefficient. Bars that fall short of 1 have a parent that is in no file here. "
        "The recipe of each runs with lineage merge.",
    )
    few = (
        h("p", f"The {BARS} surest of {len(result.merges)} are drawn.", class_="note")
        if len(drawn) < len(result.merges)
        else None
    )
    bars = h("div", plot("merges", "Merges and their parents"), class_="tall")
    return section("Merges", words, panel(bars, few), h("div", [_recipe(m) for m in result.merges], class_="recipes"))


def _recipe(m: FoundMerge) -> Safe:
    facts = [("Method", m.method.replace("_", " ")), ("Confidence", percent(m.confidence))]
    facts += [("Left over", percent(m.residual)), ("Over rounding", number(m.residual_ratio)), ("p", number(m.p_value))]
    terms = [(h("dt", k), h("dd", v)) for k, v in facts if v != UNKNOWN]
    rows = [(p.name, _weight(p.weight), _span(p.low, p.high)) for p in m.parents]
    blocks = [(b, ", ".join(f"{w:.3g}" for w in ws)) for b, ws in (m.blocks or {}).items()]
    text = (
        [
            h("pre", h("code", _lines(m.recipe))),
            h("button", "Copy the recipe", type="button", class_="copy"),
        ]
        if m.recipe
        else h("p", "No recipe: part of it is in no file, or its method leaves no coefficients.", class_="note")
    )
    return h(
        "details",
        h("summary", h("b", m.child), f" = {formula(m)}"),
        h("dl", terms, class_="facts rows"),
        listing(("Parent", "Coefficient", "Interval"), rows),
        listing(("Block", "Coefficients"), blocks),
        text,
    )


def _lines(text: str) -> list[tuple[str, Safe]]:
    return [(line, Safe("\n")) for line in text.splitlines()]


def _weight(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.4f}"


def _span(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"{low:.4f} to {high:.4f}"


def _distances(result: ClusterResult) -> Safe | None:
    if len(result.models) < 2:
        return None
    words = (
        "Distance of any two models, ‖A − B‖ relative to their size, on a logarithmic scale: dark pairs are nearly the "
        "same, bright ones share nothing. The brackets on top join the nearest first. Click a cell to see two models "
        "block by block.",
    )
    limited = (
        h("p", "Blocks are kept for each model's 20 nearest only.", class_="note")
        if not result.block_similarity.complete
        else None
    )
    choose = h(
        "div",
        h("label", "Model ", h("select", id="pair-a")),
        h("label", "and ", h("select", id="pair-b")),
        class_="bar",
    )
    two = h(
        "div",
        panel(plot("distances", "Distances of all models")),
        panel(h("h3", "Two models, block by block"), choose, plot("blocks", "Distance by block"),
              h("p", id="pair-words", class_="note", aria_live="polite"), limited),
        class_="explorer",
    )  # fmt: skip
    return section("Who is near to whom", words, two)


def _tables(result: ClusterResult) -> Safe:
    heads = ("Child", "Relation", "Confidence", "Distance", "Coefficient")
    rows = [_edge_row(i, e) for i, e in enumerate(result.edges)]
    top = h("thead", h("tr", [h("th", x, scope="col") for x in heads]))
    table = h("table", top, h("tbody", rows, id="rows"))
    relations = h("div", table, class_="scroll", tabindex="0", role="region", aria_label="Relations")
    families = [
        (f.name, f.root, number(len(f.members)), percent(f.stability), ", ".join(f.members)) for f in result.families
    ]
    roots = [
        (r.name, r.architecture, number(r.members), percent(r.confidence), "; ".join(e.words for e in r.evidence))
        for r in result.roots
    ]
    return h(
        "section",
        h("h2", "Tables"),
        h("p", "Every relation of the tree; choose one to see its evidence beside the tree.", class_="words"),
        relations,
        _fold("Models", len(result.models), listing(_MODEL, [_model_row(m) for m in result.models])),
        _fold("Families", len(families), listing(("Family", "Root", "Models", "Stability", "Members"), families)),
        _fold("Roots", len(roots), listing(("Root", "Architecture", "Models", "Confidence", "Why"), roots)),
    )


def _edge_row(i: int, e: Edge) -> Safe:
    name = h("td", h("button", e.child, type="button"), class_="name")
    cells = (edge_words(e), percent(e.confidence), number(e.distance), "" if e.weight is None else f"{e.weight:.3f}")
    return h("tr", name, [h("td", c) for c in cells], data_index=i)


_MODEL = ("Model", "File", "Size", "Architecture", "Root", "Family", "Leans to", "Licence", "sha256")


def _model_row(m: ClusterModel) -> tuple[Any, ...]:
    leans = ", ".join(f"{a.family} {a.weight:.2f}" for a in m.affinities)
    licence = m.license or "not declared"
    digest = h("code", (m.sha256 or UNKNOWN)[:12])
    return m.name, m.file, size(m.bytes), m.architecture, m.root or "", m.family or "", leans, licence, digest


def _fold(title: str, n: int, content: Any) -> Safe:
    return h("details", h("summary", f"{title} ({n})"), content or h("p", "None."))


def _rest(result: ClusterResult) -> Safe:
    skipped = listing(("File", "Kind", "Why"), [(s.file, s.bucket, s.reason) for s in result.skipped])
    unseen = listing(
        ("Ancestor", "Root", "Why", "Confidence"),
        [(u.name, u.root, u.words, percent(u.confidence)) for u in result.unobserved],
    )
    notes = h("ul", [h("li", n) for n in result.notes]) if result.notes else None
    return h(
        "section",
        h("h2", "What is not in the tree"),
        _fold("Files that take no part", len(result.skipped), skipped),
        _fold("Ancestors in no file", len(result.unobserved), unseen),
        _fold("Notes", len(result.notes), notes),
        class_="rest",
    )


def _facts(result: ClusterResult) -> dict[str, list[str]]:
    """Name -> what the panel shows of a model: root, family, file, size, licence, components shared with others."""
    return {
        visible(m.name): [visible(x) for x in (m.root or "", m.family or "", m.file, size(m.bytes), m.license or "")]
        for m in result.models
    }


def _edge(e: Edge, index: dict[str, int]) -> dict[str, Any]:
    """An edge as the script draws it: [parent, child] as node indices."""
    return {
        "ends": [index[e.parent], index[e.child]],
        "relation": visible(e.relation),
        "words": visible(edge_words(e)),
        "label": _label(e),
        "directed": e.directed,
        "declared": e.declared,
        "confidence": e.confidence,
        "interval": _span(e.low, e.high),
        "distance": e.distance,
        "evidence": [[visible(x.source), visible(x.words), x.value] for x in e.evidence],
    }


def _label(e: Edge) -> str:
    if e.weight is not None:
        return f"{e.weight:.2f}"
    if e.relation == "component":
        return visible(e.component or "part")[:9]
    return {"finetune": "", "adapter": f"rank {e.rank}" if e.rank else "adapter"}.get(e.relation, visible(e.relation))
