"""A cluster result in the formats of others: GraphML, Mermaid, CSV, and the YAML of model cards.

Names come from strangers' files: each writer escapes what its format, or the program that opens it, would interpret.
"""

from __future__ import annotations

import csv
import io
import json
from collections import defaultdict
from collections.abc import Callable, Sequence

from lineage.cluster_result import ClusterResult, Edge
from lineage.results import Result
from lineage.transfer_records import Cell, TransferResult

FORMULA = ("=", "+", "-", "@", "\t", "\r")
# What the Hugging Face hub knows as base_model_relation; it has no word for the rest
HUB = {"finetune": "finetune", "pruned": "finetune", "merge": "merge", "quantized": "quantized"}
COLUMNS = (
    "parent", "child", "relation", "component", "weight", "low", "high", "directed", "confidence", "distance", "rank",
    "declared", "parent_license", "child_license", "evidence",
)  # fmt: skip


def exports(result: Result) -> dict[str, str]:
    """File name -> text of each export: of a graph, and the cells of a transfer experiment."""
    if isinstance(result, TransferResult):
        return {"cells.csv": cells_csv(result.cells)}
    return {name: write(result) for name, write in EXPORTS.items()} if isinstance(result, ClusterResult) else {}


def legible(text: str) -> str:
    """`text` with control, bidirectional, line-breaking and unpaired characters spelled out: XML and YAML need it."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def graphml(result: ClusterResult) -> str:
    """A directed multigraph: nodes with root, family, kind and licence; directed=false where that is unknown."""
    import networkx

    graph = networkx.MultiDiGraph()
    for m in result.models:
        facts = {"kind": m.kind, "root": m.root, "family": m.family, "license": m.license, "sha256": m.sha256}
        graph.add_node(legible(m.name), architecture=m.architecture, **_known(facts))
    for u in result.unobserved:
        graph.add_node(legible(u.name), kind="unobserved", root=legible(u.root))
    for e in result.edges:
        facts = {k: getattr(e, k) for k in ("relation", "weight", "confidence", "directed", "distance", "component")}
        graph.add_edge(legible(e.parent), legible(e.child), evidence=_reasons(e), **_known(facts))
    return '<?xml version="1.0" encoding="utf-8"?>\n' + "\n".join(networkx.generate_graphml(graph)) + "\n"


def _known(facts: dict) -> dict:
    return {k: legible(v) if isinstance(v, str) else v for k, v in facts.items() if v is not None}


def _reasons(edge: Edge) -> str:
    return legible("; ".join(e.words for e in edge.evidence))


def mermaid(result: ClusterResult) -> str:
    """A flowchart for Markdown: hollow nodes are unobserved, dotted arrows declared, plain lines undirected."""
    names = [m.name for m in result.models] + [u.name for u in result.unobserved]
    ids = {name: f"n{i}" for i, name in enumerate(names)}
    lines = ["flowchart LR"]
    lines += [f'  {ids[m.name]}["{_entities(m.name)}"]' for m in result.models]
    lines += [f'  {ids[u.name]}(["{_entities(u.name)}"]):::unobserved' for u in result.unobserved]
    lines += [f'  {ids[e.parent]} {_arrow(e)}|"{_label(e)}"| {ids[e.child]}' for e in result.edges]
    lines.append("  classDef unobserved fill:none,stroke-dasharray:4 3")
    return "\n".join(lines) + "\n"


def _entities(text: str) -> str:
    """Mermaid's own entity codes for all but letters, digits and a few harmless signs."""
    return "".join(c if c.isalnum() or c in " _.-" else f"#{ord(c)};" for c in legible(text))


def _arrow(edge: Edge) -> str:
    return "---" if not edge.directed else "-.->" if edge.declared else "-->"


def _label(edge: Edge) -> str:
    return edge.relation if edge.weight is None else f"{edge.relation} {edge.weight:.3g}"


def edges_csv(result: ClusterResult) -> str:
    """One row per edge, with both licences where cards declare them."""
    licenses = {m.name: m.license for m in result.models}
    text = io.StringIO(newline="")
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(COLUMNS)
    for e in result.edges:
        more = {
            "parent_license": licenses.get(e.parent),
            "child_license": licenses.get(e.child),
            "evidence": _reasons(e),
        }
        rows.writerow([_cell(more[c] if c in more else getattr(e, c)) for c in COLUMNS])
    return text.getvalue()


CELL_FIELDS = (
    "world", "seed", "target", "kind", "network", "setup", "base", "model", "weight", "step",
    "loss", "loss_error", "own_loss",
)  # fmt: skip


def cells_csv(cells: Sequence[Cell]) -> str:
    """One row per cell, judges as columns "strength NAME" and "retention NAME"; empty where not measured."""
    judges = [
        (of, name)
        for of in ("strength", "retention")
        for name in sorted({n for c in cells for n in getattr(c, f"{of}_judges")})
    ]
    text = io.StringIO(newline="")
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow([*CELL_FIELDS, *(_cell(f"{of} {name}") for of, name in judges)])
    for c in cells:
        scores = [getattr(c, f"{of}_judges").get(name) for of, name in judges]
        rows.writerow([_cell(v) for v in (*(getattr(c, name) for name in CELL_FIELDS), *scores)])
    return text.getvalue()


def _cell(value: object) -> object:
    """Text that a spreadsheet would run as a formula begins with an apostrophe; numbers are left as they are."""
    if not isinstance(value, str):
        return "" if value is None else str(value).lower() if isinstance(value, bool) else value
    return f"'{legible(value)}" if value.startswith(FORMULA) else legible(value)


def model_cards(result: ClusterResult) -> str:
    """One YAML document per model with known parents: the front matter of its card. A name in quotes is JSON, which
    YAML reads as it is."""
    origins = _origins(result)
    return "".join(_card(m.name, origins[m.name]) for m in result.models if m.name in origins)


def _origins(result: ClusterResult) -> dict[str, list[Edge]]:
    """Child -> directed edges from models at hand; the components swapped into it are no base."""
    here, found = {m.name for m in result.models}, defaultdict(list)
    for e in result.edges:
        if e.directed and e.parent in here and e.relation != "component":
            found[e.child].append(e)
    return found


def _card(name: str, edges: list[Edge]) -> str:
    lines = [f"--- # {legible(name)}", "base_model:"]
    lines += [f"- {_quoted(parent)}" for parent in dict.fromkeys(e.parent for e in edges)]
    relation = _hub_relation(edges)
    return "\n".join([*lines, *([f"base_model_relation: {relation}"] if relation else [])]) + "\n"


def _hub_relation(edges: list[Edge]) -> str | None:
    """An adapter file is an `adapter`; a model into which one was baked is a fine-tune."""
    first = edges[0]
    return ("adapter" if first.declared else "finetune") if first.relation == "adapter" else HUB.get(first.relation)


def _quoted(text: str) -> str:
    return json.dumps(legible(text), ensure_ascii=False)


EXPORTS: dict[str, Callable[[ClusterResult], str]] = {
    "graph.graphml": graphml,
    "graph.mmd": mermaid,
    "edges.csv": edges_csv,
    "model_cards.yaml": model_cards,
}
