"""Two picks of readings compared within each world: the difference of their means over matched groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from lineage.transfer_measures import Readings
from lineage.transfer_records import DEFAULT, KINDS, Member, WorldFacts

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]
MAIN, FULL = "main", "full"  # weights of the design: the matrix's, the reference's
FINAL, EARLY = "final", "early"  # checkpoints


@dataclass(frozen=True)
class Pick:
    """Which readings. bases, models: roles, any where empty; but_bases, but_models: roles left out. relation: what X is
    to Y, a name of RELATIONS. kind: of the target, both where empty. network: the design's where empty."""

    bases: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    but_bases: tuple[str, ...] = ()
    but_models: tuple[str, ...] = ()
    relation: str = "another model"
    kind: str = ""
    setup: str = DEFAULT
    network: str = ""
    weight: str = MAIN
    moment: str = FINAL

    @property
    def words(self) -> str:
        """Which readings, for a sentence about what is missing."""
        said = [
            f"trained on {_listed(self.bases, self.but_bases)}",
            f"applied to {_listed(self.models, self.but_models)}",
        ]
        said += [] if self.relation == "another model" else [f"({self.relation})"]
        said += [f"for {self.kind}s"] if self.kind else []
        said += [f"by {self.network}"] if self.network else []
        said += [f"with {self.setup}"] if self.setup != DEFAULT else []
        said += ["at full weight"] if self.weight == FULL else []
        return " ".join([*said, *(["at an early checkpoint"] if self.moment == EARLY else [])])


def _listed(roles: tuple[str, ...], but: tuple[str, ...]) -> str:
    return ", ".join(roles) or "any" + (f" but {', '.join(but)}" if but else "")


@dataclass(frozen=True)
class Kinship:
    """What the worlds' truth says of all models, numbered; every table is (models, models), rows bases."""

    roles: tuple[str, ...]
    family: Ints
    relations: dict[str, Bools]

    def relabelled(self, order: Ints) -> Kinship:
        """Model i takes the place that model order[i] has in the tree."""
        tables = {name: table[np.ix_(order, order)] for name, table in self.relations.items()}
        return Kinship(tuple(self.roles[i] for i in order), self.family[order], tables)


@dataclass(frozen=True)
class Frame:
    """Readings as columns of equal length; world, target, base and model are numbers. names: of the worlds. shelves:
    models that may change places in a shuffle bear the same number: one world, one use."""

    names: tuple[str, ...]
    world: Ints
    target: Ints
    kind: Ints
    base: Ints
    model: Ints
    weight: NDArray[np.float64]
    moment: dict[str, Bools]
    how: dict[str, NDArray]
    values: dict[str, NDArray[np.float64]]
    kin: Kinship
    shelves: Ints
    weights: dict[str, float]
    network: str

    def shuffled(self, rng: np.random.Generator) -> Frame:
        """The same measurements on trees whose labels are dealt out anew within every world and use."""
        order = np.arange(len(self.shelves))
        for shelf in np.unique(self.shelves):
            at = np.flatnonzero(self.shelves == shelf)
            order[at] = rng.permutation(at)
        return replace(self, kin=self.kin.relabelled(order))

    def picked(self, pick: Pick) -> Bools:
        """Which rows `pick` means."""
        return (
            self.kin.relations[pick.relation][self.base, self.model]
            & _of(self.kin.roles, pick.bases, pick.but_bases)[self.base]
            & _of(self.kin.roles, pick.models, pick.but_models)[self.model]
            & ((self.kind == KINDS.index(pick.kind)) if pick.kind else True)
            & (self.how["setup"] == pick.setup)
            & (self.how["network"] == (pick.network or self.network))
            & (self.weight == self.weights[pick.weight])
            & self.moment[pick.moment]
        )


def _of(roles: Sequence[str], wanted: tuple[str, ...], but: tuple[str, ...]) -> Bools:
    return np.array([(not wanted or r in wanted) and r not in but for r in roles])


def frame(found: Readings) -> Frame:
    """Columns of all readings; models and worlds are numbered in the order of `found.worlds`."""
    index = {key: i for i, key in enumerate(found.members())}
    worlds = {w.name: i for i, w in enumerate(found.worlds)}
    targets = {key: i for i, key in enumerate(sorted({(r.world, r.target) for r in found.rows}))}
    rows = found.rows
    measures = sorted({name for r in rows for name in r.values})
    uses = sorted({(key[0], m.use) for key, m in found.members().items()})
    return Frame(
        tuple(worlds),
        np.array([worlds[r.world] for r in rows], int),
        np.array([targets[r.world, r.target] for r in rows], int),
        np.array([KINDS.index(r.kind) for r in rows], int),
        np.array([index[r.world, r.base] for r in rows], int),
        np.array([index[r.world, r.model] for r in rows], int),
        np.array([r.weight for r in rows], float),
        {FINAL: np.array([r.final for r in rows], bool), EARLY: np.array([r.early for r in rows], bool)},
        {"setup": np.array([r.setup for r in rows]), "network": np.array([r.network for r in rows])},
        {name: np.array([r.values.get(name, np.nan) for r in rows], float) for name in measures},
        kinship(found.worlds),
        np.array([uses.index((key[0], m.use)) for key, m in found.members().items()], int),
        {MAIN: found.design.weight, FULL: found.design.reference_weight},
        found.design.network,
    )


def kinship(worlds: Sequence[WorldFacts]) -> Kinship:
    """Relations of X (row) to Y (column), as RELATIONS names them. A permuted copy has none, nor have two models of
    different worlds; "another model" is no control."""
    members = [(w.name, m) for w in worlds for m in w.models]
    n = len(members)
    tables = {name: np.zeros((n, n), bool) for name in RELATIONS}
    families: dict[tuple[str, str], int] = {}
    family = np.array([families.setdefault((w, m.family), len(families)) for w, m in members], int)
    at = 0
    for world in worlds:
        above = _ancestors(world)
        for i, x in enumerate(world.models):
            for j, y in enumerate(world.models):
                for name in _relations(x, y, above):
                    tables[name][at + i, at + j] = True
        at += len(world.models)
    return Kinship(tuple(m.role for _, m in members), family, tables)


RELATIONS = (
    "another model", "the same model", "same root", "same family", "other family", "ancestor", "descendant",
    "merge of it", "no merge of it", "other root",
)  # fmt: skip


def _relations(x: Member, y: Member, above: dict[str, set[str]]) -> list[str]:
    if x.name == y.name:
        return ["the same model"]
    if "permuted" in (x.relation, y.relation):
        return []
    kin = [] if "control" in (x.use, y.use) else ["another model"]
    if x.root != y.root:
        return [*kin, "other root"]
    if not kin:
        return []
    kin += ["same root", "same family" if x.family == y.family else "other family"]
    kin += ["merge of it" if x.relation == "merge" and y.name in x.parents else "no merge of it"]
    kin += ["ancestor"] if x.name in above[y.name] else []
    return kin + (["descendant"] if y.name in above[x.name] else [])


def _ancestors(world: WorldFacts) -> dict[str, set[str]]:
    graph = nx.DiGraph([(p, m.name) for m in world.models for p in m.parents])
    graph.add_nodes_from(m.name for m in world.models)
    return {m.name: nx.ancestors(graph, m.name) for m in world.models}


def contrast(f: Frame, a: Pick, b: Pick, by: Sequence[str], measure: str) -> dict[str, float]:
    """World -> mean over groups of (mean of `a` - mean of `b`), for groups that hold both. by: what readings of one
    group share beside their world: "target", "base", "model", "pair" (whichever way round), "family" (of the base)."""
    if measure not in f.values:
        return {}
    value = f.values[measure]
    group = _groups(f, by)
    known = np.isfinite(value)
    first, second = (_means(group, value, f.picked(pick) & known) for pick in (a, b))
    differences: dict[int, list[float]] = {}
    span = int(np.prod([_sizes(f)[name] for name in by], dtype=np.int64))
    for key in sorted(first.keys() & second.keys()):
        differences.setdefault(key // span, []).append(first[key] - second[key])
    return {f.names[w]: float(np.mean(ds)) for w, ds in differences.items()}


def _means(group: Ints, value: NDArray[np.float64], rows: Bools) -> dict[int, float]:
    keys, inverse = np.unique(group[rows], return_inverse=True)
    return dict(zip(keys.tolist(), np.bincount(inverse, value[rows]) / np.bincount(inverse), strict=True))


def _groups(f: Frame, by: Sequence[str]) -> Ints:
    """One number per reading, equal within a group; the world is its leading digit."""
    group = f.world.copy()
    for name in by:
        group = group * _sizes(f)[name] + _codes(f, name)
    return group


def _codes(f: Frame, name: str) -> Ints:
    if name == "pair":
        n = len(f.kin.roles)
        return np.minimum(f.base, f.model) * n + np.maximum(f.base, f.model)
    return f.kin.family[f.base] if name == "family" else getattr(f, name)


def _sizes(f: Frame) -> dict[str, int]:
    n = len(f.kin.roles)
    return {"target": int(f.target.max(initial=0)) + 1, "base": n, "model": n, "family": n, "pair": n * n}
