"""An experiment cut in two, each half as if the other had not been made: what one tells of the other is the ceiling."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from statistics import fmean

from lineage.transfer_measures import Readings, readings
from lineage.transfer_records import DEFAULT, Cell, Design, WorldFacts

SPLITS = 10
Halves = tuple[tuple[Readings, Readings], ...]


def halves(cells: Sequence[Cell], worlds: Sequence[WorldFacts], design: Design) -> tuple[Halves, str]:
    """Pairs of readings of disjoint halves, and in words what was halved: the seeds of the main matrix, with one seed
    the held-out batches, else nothing. Adapters of one base are numbered in the order of their seeds, which need not be
    those of another base."""
    place = _places(cells)
    main = (design.network, DEFAULT)
    n = 1 + max((at for (adapter, _), at in place.items() if adapter[3:] == main), default=0)
    if n > 1:
        splits = [set(s) for s in combinations(range(n), n // 2) if n % 2 or 0 in s][:SPLITS]
        return tuple(_split(cells, worlds, design, place, s) for s in splits), f"halves of {n} seeds"
    if cells and all(len(c.losses) > 1 for c in cells if c.base is not None):
        odd, even = (readings(cells, worlds, design, lambda c, i=i: fmean(c.losses[i::2] or [c.loss])) for i in (0, 1))
        return ((odd, even),), "halves of the held-out batches"
    return (), "nothing: one seed, and no losses by batch"


Adapter = tuple[str, str, str | None, str, str]  # world, target, base, network, setup


def _adapter(c: Cell) -> Adapter:
    return c.world, c.target, c.base, c.network, c.setup


def _places(cells: Sequence[Cell]) -> dict[tuple[Adapter, int], int]:
    """(adapter, seed) -> which of its adapter's seeds that is."""
    seeds: dict[Adapter, set[int]] = {}
    for c in cells:
        seeds.setdefault(_adapter(c), set()).add(c.seed)
    return {(adapter, s): i for adapter, found in seeds.items() for i, s in enumerate(sorted(found))}


def _split(
    cells: Sequence[Cell], worlds: Sequence[WorldFacts], design: Design, place: dict, chosen: set[int]
) -> tuple[Readings, Readings]:
    """Untouched models belong to both halves."""
    one, other = (
        readings([c for c in cells if c.base is None or (place[_adapter(c), c.seed] in chosen) == side], worlds, design)
        for side in (True, False)
    )
    return one, other
