"""What must fail: adapters from another root, from a permuted copy, of random factors; each beside true pairs."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean

from lineage.rank_statistics import interval, world_means
from lineage.transfer_measures import Column, Reading, Readings
from lineage.transfer_records import DEFAULT, RANDOM, Control, Member

OTHER_ROOT, PERMUTED, NORM_MATCHED = "a base of another root", "a permuted copy", "a random adapter of equal norm"
TRUE = "true pairs"


def controls(found: Readings) -> Iterator[Control]:
    """One record per control that was measured, by name; lifts are compared within the same model and target."""
    members, d = found.members(), found.design
    groups: dict[str, dict[Column, list[float]]] = {TRUE: {}}
    for r in found.rows:
        plain = (r.weight, r.final, r.setup) == (d.weight, True, DEFAULT) and r.network in (d.network, RANDOM)
        name = _group(r, members[r.world, r.base], members[r.world, r.model]) if plain else None
        if name and "lift" in r.values:
            groups.setdefault(name, {}).setdefault(r.column, []).append(r.values["lift"])
    true = groups.pop(TRUE)
    for name, columns in sorted(groups.items()):
        shared = [c for c in columns if c in true]
        lifts, trues = (world_means((c[0], fmean(g[c])) for c in shared) for g in (columns, true))
        if lifts:
            yield _control(name, [*lifts.values()], fmean(trues.values()))


def _group(r: Reading, x: Member, y: Member) -> str | None:
    if y.use == "control":
        return None
    if r.network == RANDOM:
        return NORM_MATCHED
    if x.relation == "permuted":
        return PERMUTED
    if x.root != y.root:
        return OTHER_ROOT
    return TRUE if x.name != y.name and x.use != "control" else None


def _control(name: str, lifts: list[float], true: float) -> Control:
    """It fails where its interval lies below half of the true pairs' lift; unknown with fewer than three worlds."""
    low, high = interval(lifts)
    fails = None if high is None else high < true / 2
    words = {None: "too few worlds", True: "fails, as it should", False: "does not clearly fail"}[fails]
    return Control(name, fmean(lifts), low, high, true, fails, words)
