"""A table of models against models as a drawing, both axes ordered by the family tree that is drawn along them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lineage.transfer_records import Member, WorldFacts
from reports.page import Safe, h, shortened, visible

INDENT, LETTER, LONGEST = 11, 7.1, 20
HALF, WHOLE = 590, 1240  # widths in px: of a panel beside another, of one alone
SMALL, LARGE, NUMBERED = 24, 40, 31  # px of a cell, and from which it holds its number


@dataclass(frozen=True)
class Branch:
    """One row of a tree drawn as an indented list. parent: row of the one it hangs from, -1 for the start of a tree."""

    member: Member
    depth: int
    parent: int


@dataclass(frozen=True)
class Entry:
    """One cell: value in [-1, 1] for its colour (None: nothing known), its number, and words for a click."""

    value: float | None
    text: str
    words: str


def branches(facts: WorldFacts, names: Sequence[str]) -> list[Branch]:
    """The models `names` in the order of the tree, each below its main parent, or that one's nearest kept ancestor."""
    members = {m.name: m for m in facts.models}
    kept = set(names)
    above = {name: _kept_parent(members, kept, name) for name in names}
    rows: list[Branch] = []

    def hang(name: str, depth: int, parent: int) -> None:
        rows.append(Branch(members[name], depth, parent))
        at = len(rows) - 1
        for child in (m.name for m in facts.models if above.get(m.name) == name):
            hang(child, depth + 1, at)

    for name in (m.name for m in facts.models if m.name in kept and above[m.name] is None):
        hang(name, 0, -1)
    return rows


def _kept_parent(members: Mapping[str, Member], kept: set[str], name: str) -> str | None:
    """A merge hangs from the first of its parents that is of its family; a circle in the file ends the way up."""
    seen = {name}
    while True:
        parents = [p for p in members[name].parents if p in members and p not in seen]
        if not parents:
            return None
        name = next((p for p in parents if members[p].family == members[name].family), parents[0])
        if name in kept:
            return name
        seen.add(name)


def kin_matrix(
    rows: Sequence[Branch], columns: Sequence[Branch], entry: Callable[[str, str], Entry], label: str, room: int = HALF
) -> Safe:
    """SVG of about `room` px, bases down, models across. Colours come from the style sheet; a click shows the words."""
    left, top = _strip(rows), _strip(columns)
    size = round(max(SMALL, min(LARGE, (room - left) / max(1, len(columns)))))
    cells = [
        _cell(
            entry(x.member.name, y.member.name), left + j * size, top + i * size, size, x.member.name == y.member.name
        )
        for i, x in enumerate(rows)
        for j, y in enumerate(columns)
    ]
    width, height = left + size * len(columns) + 2, top + size * len(rows) + 2
    across = h("g", _labels(columns, size), transform=f"translate({left} {top - 6}) rotate(-90)")
    down = h("g", _labels(rows, size), transform=f"translate(0 {top})")
    return h(
        "svg", across, down, cells, viewBox=f"0 0 {width:g} {height:g}", class_="kin-matrix",
        style=f"--natural: {width:g}px", role="img", aria_label=label,
    )  # fmt: skip


def _strip(found: Sequence[Branch]) -> float:
    """Room for the labels of one axis."""
    return max((b.depth * INDENT + LETTER * min(LONGEST, len(visible(b.member.name))) + 16 for b in found), default=0)


def _labels(found: Sequence[Branch], size: int) -> list[Safe]:
    """The tree as an indented list, `size` px a row: a stem from each parent, and the name at its depth."""
    made = []
    for i, b in enumerate(found):
        x, y = b.depth * INDENT + 8, (i + 0.5) * size
        if b.parent >= 0:
            stem = x - INDENT + 3
            made.append(h("path", d=f"M{stem:g} {(b.parent + 0.5) * size + 7:g}V{y:g}H{x - 2:g}"))
        text = h(
            "text", h("title", b.member.name), shortened(visible(b.member.name), LONGEST), x=f"{x:g}", y=f"{y + 4:g}"
        )
        made.append(text)
    return made


def _cell(e: Entry, x: float, y: float, size: int, own: bool) -> Safe:
    kind = "own" if own else "gap" if e.value is None else "minus" if e.value < 0 else "plus"
    strength = 0.0 if e.value is None else min(1.0, abs(e.value))
    inner = size - 2
    box = h(
        "rect", x=f"{x + 1:g}", y=f"{y + 1:g}", width=inner, height=inner, rx=3, fill_opacity=_opacity(kind, strength)
    )
    number = None
    if size >= NUMBERED and e.text:
        kind += " full" if strength > 0.55 and not own else ""
        number = h("text", e.text, x=f"{x + size / 2:g}", y=f"{y + size / 2 + 4:g}", text_anchor="middle")
    return h("g", h("title", e.words), box, number, class_=f"cell {kind}")


def _opacity(kind: str, strength: float) -> str | None:
    return f"{0.05 + 0.95 * strength:.3f}" if kind in ("plus", "minus") else None
