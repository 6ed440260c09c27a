"""The tree of a merge as a drawing: original models left, each step to the right of all that it uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lineage.errors import LineageError
from lineage.results import MergeResult, MergeStep
from reports.page import Safe, h, shortened, visible
from reports.wording import number

COLUMN, WIDTH, GAP, PORT = 192, 148, 16, 22


@dataclass(frozen=True)
class Node:
    """One box: its place in pixels, its words, and for a step the node index and sign of each input."""

    column: int
    title: str
    words: str
    output: bool
    inputs: tuple[int, ...] = ()
    factors: tuple[str, ...] = ()
    y: float = 0.0

    @property
    def x(self) -> int:
        return self.column * COLUMN

    @property
    def height(self) -> int:
        return max(46, PORT * len(self.inputs) + 8)


def drawing(result: MergeResult) -> Safe:
    """The tree as SVG; its colours come from the page's style sheet."""
    nodes = _placed(_nodes(result))
    width = max((n.x + WIDTH for n in nodes), default=0) + 2
    height = max((n.y + n.height for n in nodes), default=0) + 2
    edges = [_edge(nodes[source], n, port) for n in nodes for port, source in enumerate(n.inputs)]
    frame = f"-1 -1 {width} {height:g}"
    label = f"Merge tree of {len(result.inputs)} models and {len(result.steps)} steps"
    return h("svg", edges, [_box(n) for n in nodes], viewBox=frame, style=f"--natural: {width}px", class_="tree",
             role="img", aria_label=label)  # fmt: skip


def factors(step: MergeStep) -> tuple[str, ...]:
    """What each operand of a step is multiplied with, as far as its default weight says."""
    w = step.weight
    known: dict[str, Sequence[float]] = {"weighted_sum": (1 - w, w), "add_difference": (1, w, -w), "copy": (1,)}
    found = [number(round(f, 6)) for f in known.get(step.method, ())][: len(step.inputs)]
    return (*found, *[""] * (len(step.inputs) - len(found)))


def _nodes(result: MergeResult) -> list[Node]:
    """Originals and adapters first, in the order the steps use them, then the steps; each is one node."""
    for i, step in enumerate(result.steps):
        _check(step, i)
    nodes = [Node(0, name, kind, False) for kind, name in _leaves(result)]
    index, first = {(n.words, n.title): i for i, n in enumerate(nodes)}, len(nodes)
    final = {o.step for o in result.outputs}
    for i, step in enumerate(result.steps):
        operands = zip(step.inputs, step.from_steps, factors(step), strict=True)
        links = [(index["original", n] if at is None else first + at, f) for n, at, f in operands]
        links += [(index["adapter", n], number(w)) for n, w in step.adapters.items()]
        used = tuple(source for source, _ in links)
        column = 1 + max((nodes[u].column for u in used), default=0)
        words = step.method.replace("_", " ")
        nodes.append(Node(column, step.name, words, i in final, used, tuple(f for _, f in links)))
    return nodes


def _check(step: MergeStep, i: int) -> None:
    """A step may use only earlier ones, or the drawing would not end."""
    if len(step.inputs) != len(step.from_steps) or any(at is not None and not 0 <= at < i for at in step.from_steps):
        raise LineageError(f"result.steps[{i}]: its inputs are not earlier steps. Was the file edited? Run it again.")


def _leaves(result: MergeResult) -> list[tuple[str, str]]:
    """("original" or "adapter", name), each once, by first use."""
    found: dict[tuple[str, str], None] = {}
    for s in result.steps:
        found |= {("original", n): None for n, at in zip(s.inputs, s.from_steps, strict=True) if at is None}
        found |= {("adapter", n): None for n in s.adapters}
    return list(found)


def _placed(nodes: list[Node]) -> list[Node]:
    """Give every node its height on the page: originals in order, steps at the middle of what they use."""
    placed: list[Node] = []
    bottom: dict[int, float] = {}
    for n in nodes:
        wanted = (
            sum(placed[u].y + placed[u].height / 2 for u in n.inputs) / len(n.inputs) - n.height / 2 if n.inputs else 0
        )
        y = max(wanted, bottom.get(n.column, 0.0))
        bottom[n.column] = y + n.height + GAP
        placed.append(Node(n.column, n.title, n.words, n.output, n.inputs, n.factors, y))
    return placed


def _edge(source: Node, target: Node, port: int) -> Safe:
    x0, y0 = source.x + WIDTH, source.y + source.height / 2
    x1, y1 = target.x, target.y + target.height / 2 + PORT * (port - (len(target.inputs) - 1) / 2)
    xb = x1 - (COLUMN - WIDTH)  # straight up to the last gap, so that few boxes are crossed
    bend = (x1 - xb) / 2
    path = f"M{x0} {y0:g}H{xb}C{xb + bend:g} {y0:g} {x1 - bend:g} {y1:g} {x1} {y1:g}"
    words = target.factors[port] if port < len(target.factors) else ""
    label = h("text", words, x=x1 - 4, y=f"{y1 - 4:g}", text_anchor="end", class_="factor") if words else None
    return h("g", h("path", d=path, class_="minus" if words.startswith("-") else "plus"), label)


def _box(n: Node) -> Safe:
    kind = "box output" if n.output else "box" if n.inputs else "box origin"
    middle = n.y + n.height / 2
    return h(
        "g",
        h("title", n.title),
        h("rect", x=n.x, y=f"{n.y:g}", width=WIDTH, height=n.height, rx=9, class_=kind),
        h("text", shortened(visible(n.title), 16), x=n.x + 12, y=f"{middle - 3:g}", class_="name"),
        h("text", n.words, x=n.x + 12, y=f"{middle + 14:g}", class_="kind"),
    )
