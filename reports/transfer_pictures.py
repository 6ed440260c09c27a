"""The article's grids of pictures: a row per base, a column per model, in the order of the family tree."""

from __future__ import annotations

from lineage.transfer_records import DEFAULT, Cell, TransferResult, WorldFacts
from reports.kin_matrix import branches
from reports.page import Safe, h, section, visible

Place = tuple[str, str | None, str]  # target, base, model


def sheets(result: TransferResult, world: WorldFacts | None) -> dict[Place, Cell]:
    """The picture of each place in the grids: default training, last checkpoint, first seed, the matrix's weight."""
    d = result.design
    best: dict[Place, tuple[tuple, Cell]] = {}
    for c in result.cells:
        plain = c.base is None or (c.network, c.setup) == (d.network, DEFAULT)
        if world and c.world == world.name and c.samples and plain:
            rank = (c.weight == d.weight, c.step, -c.seed)
            place = (c.target, c.base, c.model)
            if place not in best or rank > best[place][0]:
                best[place] = rank, c
    return {place: c for place, (_, c) in sorted(best.items(), key=lambda kv: str(kv[0]))}


def pictures(world: WorldFacts | None, found: dict[Place, Cell]) -> Safe | None:
    if world is None or not found:
        return None
    words = (
        "Down: the model an adapter was trained on; across: the one it is applied to. The first row has no adapter. "
        "Prompts and noise are the same in every square. Click a picture for a large one.",
    )
    grids = [_grid(world, target, found, i == 0) for i, target in enumerate(sorted({place[0] for place in found}))]
    return section("Pictures", words, grids)


def _grid(world: WorldFacts, target: str, found: dict[Place, Cell], first: bool) -> Safe:
    places = [place for place in found if place[0] == target]
    rows = branches(world, [*{x for _, x, _ in places if x is not None}])
    columns = branches(world, [*{y for _, _, y in places}])
    bases: list[str | None] = [None, *(b.member.name for b in rows)]
    top = h(
        "thead", h("tr", h("th", "trained on", scope="col"), [h("th", b.member.name, scope="col") for b in columns])
    )
    body = [
        h("tr", h("th", "untouched" if x is None else x, scope="row"),
          [h("td", _thumbnail(found.get((target, x, b.member.name)), x, b.member.name, target)) for b in columns])
        for x in bases
    ]  # fmt: skip
    table = h("table", top, h("tbody", body), class_="grid")
    box = h("div", table, class_="scroll pictures", tabindex="0", role="region", aria_label=f"Pictures of {target}")
    kind = world.targets.get(target, "target")
    return h("details", h("summary", f"{kind.capitalize()} {target}"), box, open=first)


def _thumbnail(c: Cell | None, base: str | None, model: str, target: str) -> Safe | None:
    if c is None or c.samples is None:
        return None
    name = (
        f"{target}: {'no adapter' if base is None else f'trained on {base}'}, applied to {model}, weight {c.weight:g}"
    )
    return h("button", h("img", alt=name, data_picture=visible(c.samples)), type="button", class_="thumb")
