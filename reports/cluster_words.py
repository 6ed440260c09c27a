"""What a cluster result says, in sentences."""

from __future__ import annotations

from lineage.cluster_result import ClusterResult, Edge, FoundMerge
from reports.wording import count, number

_FEW = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
RELATIONS = {
    "finetune": "fine-tuned from",
    "merge": "merged from",
    "adapter": "an adapter baked into",
    "quantized": "quantized from",
    "pruned": "pruned from",
    "copy": "a copy of",
    "component": "has a component of",
    "permuted": "a permuted copy of",
}


def answer(result: ClusterResult) -> str:
    """ "23 models, 2 roots, 4 families; 5 merges, one with an unseen parent." """
    adapters = sum(m.kind == "adapter" for m in result.models)
    parts = [count(len(result.models) - adapters, "model")]
    parts += [count(adapters, "adapter")] if adapters else []
    parts += [count(len(result.roots), "root"), count(len(result.families), "family", "families")]
    return f"{', '.join(parts)}; {_merges(result)}{_ancestors(result)}."


def _merges(result: ClusterResult) -> str:
    unseen = sum(m.unseen_parent for m in result.merges)
    found = count(len(result.merges), "merge") if result.merges else "no merge"
    return f"{found}, {few(unseen)} with an unseen parent" if unseen else found


def _ancestors(result: ClusterResult) -> str:
    n = len(result.unobserved)
    return f"; {few(n)} {'ancestor is' if n == 1 else 'ancestors are'} in no file" if n else ""


def few(n: int) -> str:
    """Numbers below ten as words."""
    return _FEW[n] if 0 <= n < len(_FEW) else number(n)


def formula(merge: FoundMerge) -> str:
    """ "0.70 A + 0.30 B", with "+ an unseen parent" where part of it is in no file."""
    known = sorted(((p.weight, p.name) for p in merge.parents if p.weight is not None), key=lambda x: (-x[0], x[1]))
    if len(known) < len(merge.parents):
        names = " and ".join(p.name for p in merge.parents)
        text = f"a merge ({merge.method.replace('_', ' ')}) of {names}"
    else:
        text = " ".join(_term(w, name, i == 0) for i, (w, name) in enumerate(known))
    return f"{text} + an unseen parent".removeprefix(" + ") if merge.unseen_parent else text


def _term(weight: float, name: str, first: bool) -> str:
    sign = ("-" if weight < 0 else "") if first else ("- " if weight < 0 else "+ ")
    return f"{sign}{abs(weight):.2f} {name}"


def edge_words(edge: Edge) -> str:
    """ "fine-tuned from A", "VAE of A", "kin of A, direction unresolved"."""
    if edge.relation == "component" and edge.component:
        return f"its {edge.component} is that of {edge.parent}"
    if edge.declared:
        return f"declared to be made on {edge.parent}"
    if edge.relation == "adapter":
        return f"{edge.parent} with an adapter{f' of rank {edge.rank}' if edge.rank else ''} baked in"
    words = f"{RELATIONS.get(edge.relation, edge.relation)} {edge.parent}"
    return words if edge.directed else f"{words}, or the other way round"


def added(result: ClusterResult) -> str | None:
    """One sentence for the model of --add: what it is, and what its metadata says otherwise."""
    if result.added is None:
        return None
    said = [f"the {c.source} says {c.claim}" for c in result.contradictions if c.model == result.added]
    return "; ".join([_origin(result, result.added), *said])


def _origin(result: ClusterResult, name: str) -> str:
    merge = next((m for m in result.merges if m.child == name), None)
    if merge:
        return formula(merge)
    into = [e for e in result.edges if name in (e.parent, e.child) and (e.child == name or not e.directed)]
    if into:
        return "; ".join(edge_words(e) if e.child == name else f"kin of {e.child}" for e in into)
    out = sum(e.parent == name for e in result.edges)
    return f"a root, the parent of {count(out, 'model')} here" if out else "no relative of it is in this folder"
