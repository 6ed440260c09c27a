"""The graph in other programs' formats: read back with their own readers, hostile names and all."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace
from xml.etree import ElementTree

import networkx
import pytest
from synthetic_cluster import HOSTILE_NAMES, cluster_result

from lineage.cluster_result import ClusterResult, Edge
from lineage.exports import EXPORTS, edges_csv, exports, graphml, legible, mermaid, model_cards
from lineage.results import provenance

RESULTS = {n: cluster_result(n, hostile=n == 12) for n in (1, 2, 12, 60)}
EMPTY = replace(RESULTS[1], models=(), families=(), edges=(), merges=(), unobserved=(), roots=())


@pytest.fixture(params=RESULTS)
def result(request) -> ClusterResult:
    return RESULTS[request.param]


def pairs(result: ClusterResult) -> list[tuple[str, str, str]]:
    return sorted((legible(e.parent), legible(e.child), e.relation) for e in result.edges)


def test_graphml_is_read_back_by_networkx(result):
    graph = networkx.parse_graphml(graphml(result), force_multigraph=True)
    assert sorted((a, b, d["relation"]) for a, b, d in graph.edges(data=True)) == pairs(result)
    known = {legible(m.name): m for m in result.models}
    hollow = {n for n, d in graph.nodes(data=True) if d["kind"] == "unobserved"}
    assert set(graph) - hollow == set(known)
    assert hollow == {u.name for u in result.unobserved}
    assert all(d.get("license") == known[n].license for n, d in graph.nodes(data=True) if n in known)
    assert {d["directed"] for *_, d in graph.edges(data=True)} == {e.directed for e in result.edges}


def test_csv_holds_every_edge_with_its_licences(result):
    rows = list(csv.DictReader(io.StringIO(edges_csv(result))))
    licences = {m.name: m.license or "" for m in result.models}
    assert len(rows) == len(result.edges)
    for row, e in zip(rows, result.edges, strict=True):
        assert row["relation"] == e.relation
        assert row["parent_license"] == licences.get(e.parent, "")
        assert (float(row["weight"]) if row["weight"] else None) == e.weight


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r", "\n="])
def test_no_cell_of_the_csv_is_a_formula(start):
    edge = Edge(f"{start}1+1", f"{start}cmd|x", "merge", -0.5, None, None, True, 1.0)
    rows = list(csv.reader(io.StringIO(edges_csv(replace(EMPTY, edges=(edge,))))))
    assert not [cell for row in rows for cell in row if cell.startswith(("=", "+", "@", "\t", "\r", "\n"))]
    assert [cell for row in rows for cell in row if cell.startswith("-")] == ["-0.5"]


def test_mermaid_draws_one_arrow_per_edge_whatever_the_names(result):
    lines = mermaid(result).splitlines()
    assert lines[0] == "flowchart LR"
    arrows = [line for line in lines if re.fullmatch(r'  n\d+ (-->|---|-\.->)\|"[\w .#;-]*"\| n\d+', line)]
    nodes = [
        line for line in lines if re.fullmatch(r'  n\d+(\["[^"<>\[\]]*"\]|\(\["[^"<>\[\]]*"\]\):::unobserved)', line)
    ]
    assert len(arrows) == len(result.edges)
    assert len(nodes) == len(result.models) + len(result.unobserved)
    assert len(lines) == 2 + len(arrows) + len(nodes)
    assert sum("---" in a for a in arrows) == sum(not e.directed for e in result.edges)


def read_cards(text: str) -> list[dict]:
    """The few lines of YAML that are written, read by the letter; each quoted name is JSON."""
    found: list[dict] = []
    for line in text.splitlines():
        if line.startswith("--- # "):
            found.append({"name": line[6:], "base_model": []})
        elif line.startswith("- "):
            found[-1]["base_model"].append(json.loads(line[2:]))
        elif line != "base_model:":
            assert re.fullmatch(r"base_model_relation: (finetune|merge|adapter|quantized)", line)
            found[-1]["base_model_relation"] = line.split(": ")[1]
    return found


def test_cards_name_the_known_parents_alone(result):
    here = {m.name for m in result.models}
    wanted = {}
    for e in result.edges:
        if e.directed and e.parent in here and e.child in here and e.relation != "component":
            wanted.setdefault(legible(e.child), set()).add(legible(e.parent))
    cards = read_cards(model_cards(result))
    assert {c["name"]: set(c["base_model"]) for c in cards} == wanted
    merged = {legible(m.child) for m in result.merges}
    assert all(c["name"] in merged for c in cards if c.get("base_model_relation") == "merge")


@pytest.mark.parametrize(
    ("relation", "declared", "word"),
    [("finetune", False, "finetune"), ("pruned", False, "finetune"), ("quantized", False, "quantized"),
     ("adapter", True, "adapter"), ("adapter", False, "finetune"), ("merge", False, "merge"), ("copy", False, None),
     ("permuted", False, None)],
)  # fmt: skip
def test_relations_in_the_hubs_words(relation, declared, word):
    pair = RESULTS[2]
    a, b = (m.name for m in pair.models)
    edge = Edge(a, b, relation, None, None, None, True, 1.0, declared=declared)
    (card,) = read_cards(model_cards(replace(pair, edges=(edge,))))
    assert (card["base_model"], card.get("base_model_relation")) == ([a], word)


def test_hostile_names_arrive_whole_and_harmless():
    found = exports(RESULTS[12])
    names = {legible(n) for n in HOSTILE_NAMES} & {legible(m.name) for m in RESULTS[12].models}
    assert len(names) >= 5
    for text in found.values():
        assert all(c.isprintable() or c == "\n" for c in text)
    ids = {
        node.get("id") for node in ElementTree.fromstring(found["graph.graphml"]).iter() if node.tag.endswith("node")
    }
    assert names <= ids


@pytest.mark.parametrize("name", EXPORTS)
def test_an_empty_folder_is_no_fault(name):
    assert EXPORTS[name](EMPTY) is not None


def test_other_results_have_no_exports():
    class Other:
        kind = "svd"
        provenance = provenance("x", {})

    assert exports(Other()) == {}
