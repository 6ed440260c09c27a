"""A cluster result -> figures as plain data: merges as bars, distances in the order of their dendrogram."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log10
from typing import Any

from lineage.cluster_result import ClusterResult, FoundMerge
from reports.figures import Figure, rows_axis
from reports.merge_page import block_order
from reports.page import plot_text, visible

COLOURS = 10
PAIRS = 25_000  # more make the page slow to open
NEVER_ZERO = 1e-7  # distances of copies, on a logarithmic scale
Linkage = Sequence[tuple[float, float, float, float]]


def merge_bars(merges: Sequence[FoundMerge], family: Mapping[str, int]) -> Figure:
    """One row per merge, its parents stacked by coefficient in their families' colours; subtracted ones to the left."""
    most = max((len(m.parents) for m in merges), default=0)
    layout = {
        "barmode": "relative",
        "uniformtext": {"mode": "hide", "minsize": 9},
        "showlegend": False,
        "xaxis": {"side": "top", "zeroline": True, "zerolinecolor": "@muted"},
        "yaxis": rows_axis([m.child for m in merges], 18),
        "bargap": 0.28,
        "height": 60 + 30 * max(2, len(merges)),
    }
    return {"data": [_segment(merges, k, family) for k in range(most)], "layout": layout}


def _segment(merges: Sequence[FoundMerge], k: int, family: Mapping[str, int]) -> Figure:
    """The k-th parent of every merge that has one; without coefficients the parents share the bar, pale."""
    rows = [(i, m, m.parents[k]) for i, m in enumerate(merges) if k < len(m.parents)]
    weights = [p.weight if p.weight is not None else 1 / len(m.parents) for _, m, p in rows]
    return {
        "type": "bar",
        "orientation": "h",
        "x": weights,
        "y": [i for i, _, _ in rows],
        "text": [f"{plot_text(p.name, 18)} {'?' if p.weight is None else f'{p.weight:.2f}'}" for _, _, p in rows],
        "textposition": "inside",
        "insidetextanchor": "middle",
        "textfont": {"size": 11, "color": "#ffffff"},
        "customdata": [[plot_text(p.name), _interval(p.low, p.high)] for _, _, p in rows],
        "marker": {
            "color": [f"@f{family.get(p.name, 0) % COLOURS}" for _, _, p in rows],
            "line": {"color": "@panel", "width": 2},
            "opacity": [0.45 if p.weight is None else 1 for _, _, p in rows],
        },
        "hovertemplate": "%{customdata[0]}: %{x:.4f}%{customdata[1]}<extra></extra>",
    }


def _interval(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f" ({low:.4f} to {high:.4f})"


def leaves(linkage: Linkage, n: int) -> list[int]:
    """The n leaves from left to right, as the dendrogram draws them."""
    stack, order = [n + len(linkage) - 1] if linkage else list(reversed(range(n))), []
    while stack:
        at = stack.pop()
        if at < n:
            order.append(at)
        else:
            a, b, _, _ = linkage[at - n]
            stack += [int(b), int(a)]
    return order


def dendrogram(linkage: Linkage, order: Sequence[int]) -> tuple[list[float | None], list[float | None]]:
    """x and log10 distance of the brackets as one broken line; leaves stand at the bottom of the scale."""
    place = {leaf: (float(x), NEVER_ZERO) for x, leaf in enumerate(order)}
    x: list[float | None] = []
    y: list[float | None] = []
    for i, (a, b, distance, _) in enumerate(linkage):
        (left, low), (right, other), top = place[int(a)], place[int(b)], max(distance, NEVER_ZERO)
        x += [left, left, right, right, None]
        y += [log10(low), log10(top), log10(top), log10(other), None]
        place[len(order) + i] = ((left + right) / 2, top)
    return x, y


def heat_data(result: ClusterResult) -> dict[str, Any] | None:
    """What the page's script needs to draw the map: the dendrogram and its order, and the condensed distances in the
    result's order; None where the result holds no distances."""
    found = result.distances
    n = len(found.models)
    if not found.values or len(found.values) != n * (n - 1) // 2:
        return None
    linkage = result.linkage if _fits(result.linkage, n) else ()
    order = leaves(linkage, n)
    x, y = dendrogram(linkage, order)
    return {
        "order": order,
        "values": [None if v is None else float(f"{v:.4g}") for v in found.values],
        "x": x,
        "y": [None if v is None else round(v, 4) for v in y],
    }


def _fits(linkage: Linkage, n: int) -> bool:
    """Whether the rows are those of a linkage of n models: each cluster is joined once, after it was made."""
    used = [int(v) for row in linkage for v in row[:2]]
    made_before = all(0 <= int(v) < n + i for i, row in enumerate(linkage) for v in row[:2])
    return len(linkage) == n - 1 and made_before and len(set(used)) == len(used)


def block_data(result: ClusterResult) -> dict[str, Any]:
    """Names in the result's order, blocks in model order, and per pair [a, b, distance of each block]; of very many
    pairs only those of parent and child."""
    found = result.block_similarity
    linked = {frozenset((e.parent, e.child)) for e in result.edges}
    pairs = [p for p in found.pairs if len(found.pairs) <= PAIRS or {p.a, p.b} in linked]
    others = sorted({name for p in pairs for name in (p.a, p.b)})
    names = list(dict.fromkeys([*result.distances.models, *others]))
    index = {name: i for i, name in enumerate(names)}
    kept = sorted(range(len(found.blocks)), key=lambda i: block_order(found.blocks[i]))
    return {
        "names": [visible(n) for n in names],
        "blocks": [visible(found.blocks[i]) for i in kept],
        "pairs": [[index[p.a], index[p.b], *(_cut(p.values[i]) for i in kept)] for p in pairs],
    }


def _cut(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.3g}")
