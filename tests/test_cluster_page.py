"""The page of `lineage cluster`: its sentences, the order of its tree, its figures, and hostile names."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import networkx
import numpy as np
import pytest
from scipy.cluster.hierarchy import dendrogram as scipys_dendrogram
from scipy.cluster.hierarchy import leaves_list
from synthetic_cluster import HOSTILE_NAMES, cluster_result
from test_reports import Elements

from lineage.cluster_result import ClusterResult, Contradiction, Edge, FoundMerge, MergeParent
from lineage.errors import LineageError
from lineage.records import restore
from lineage.results import dumps, to_json
from reports.build import build
from reports.cluster_figures import block_data, dendrogram, heat_data, leaves, merge_bars
from reports.cluster_words import added, answer, edge_words, few, formula
from reports.forest import forest
from reports.page import visible

SIZES = (1, 2, 12, 60)


@pytest.fixture(scope="module", params=SIZES)
def result(request) -> ClusterResult:
    return cluster_result(request.param, hostile=request.param == 12)


@pytest.fixture(scope="module")
def text(result) -> str:
    return build(json.loads(dumps(result)))


def payload(text: str) -> dict:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert found
    return json.loads(found[1])


def test_the_record_survives_its_json(result):
    assert to_json(restore(ClusterResult, json.loads(dumps(result)))) == to_json(result)


def test_every_model_is_in_the_tree_once_below_a_parent(result):
    nodes = forest(result)
    assert sorted(n.name for n in nodes) == sorted(m.name for m in (*result.models, *result.unobserved))
    assert all(n.parent < i for i, n in enumerate(nodes))
    parents = {(nodes[n.parent].name, n.name) for n in nodes if n.parent >= 0}
    assert parents <= {(e.parent, e.child) for e in result.edges}


def test_columns_are_longest_ways_from_a_root(result):
    """Oracle: networkx, over the edges that move a model."""
    graph = networkx.DiGraph([(e.parent, e.child) for e in result.edges])
    only = {e.child for e in result.edges} - {e.child for e in result.edges if e.relation != "component"}
    graph.remove_edges_from(
        [(e.parent, e.child) for e in result.edges if e.relation == "component" and e.child not in only]
    )
    graph.add_nodes_from(n.name for n in forest(result))
    for depth, layer in enumerate(networkx.topological_generations(graph)):
        assert {n.name for n in forest(result) if n.column == depth} == set(layer)


def test_the_tree_does_not_depend_on_order(result):
    turned = replace(
        result, models=result.models[::-1], edges=result.edges[::-1], families=result.families[::-1],
    )  # fmt: skip
    assert forest(turned) == forest(result)


def test_circles_are_drawn_and_strangers_refused():
    pair = cluster_result(2)
    a, b = (m.name for m in pair.models)
    ring = tuple(Edge(x, y, "finetune", None, None, None, False, 0.5) for x, y in ((a, b), (b, a), (a, a)))
    assert [n.name for n in forest(replace(pair, edges=ring, unobserved=()))] == [a, b]
    nodes = forest(replace(pair, edges=(replace(ring[1], child=b), ring[1]), unobserved=()))
    assert [(n.name, n.parent) for n in nodes] == [(b, -1), (a, 0)]
    stranger = replace(ring[0], parent="stranger")
    with pytest.raises(LineageError, match=r"edges\[0\].*'stranger'"):
        forest(replace(pair, edges=(stranger,)))


def test_a_borrowed_component_is_no_parent():
    some = cluster_result(12)
    a, b, c = [m.name for m in some.models][:3]
    borrowed = Edge(a, c, "component", None, None, None, True, 1.0, component="vae")
    own = Edge(b, c, "finetune", None, None, None, True, 0.2)
    for edges, parent in (((borrowed, own), b), ((borrowed,), a)):
        nodes = forest(replace(some, edges=edges))
        assert nodes[next(n.parent for n in nodes if n.name == c)].name == parent


def test_the_answer_counts(result):
    said = answer(result)
    assert said.startswith(f"{len(result.models)} model")
    assert f"{len(result.roots)} root" in said
    unseen = sum(m.unseen_parent for m in result.merges)
    assert ("with an unseen parent" in said) == bool(unseen)


@pytest.mark.parametrize(("n", "word"), [(0, "no"), (1, "one"), (9, "nine"), (10, "10"), (1234, "1 234")])
def test_few_are_words(n, word):
    assert few(n) == word


def merge(*parents: tuple[str, float | None], unseen: bool = False, method: str = "weighted_sum") -> FoundMerge:
    made = tuple(MergeParent(n, w, None, None) for n, w in parents)
    return FoundMerge("x", made, 0.0, None, unseen, None, method=method)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (merge(("B", 0.3), ("A", 0.7)), "0.70 A + 0.30 B"),
        (merge(("A", 0.3), ("B", 0.7)), "0.70 B + 0.30 A"),
        (merge(("A", 1.0), ("B", 0.5), ("C", -0.5)), "1.00 A + 0.50 B - 0.50 C"),
        (merge(("A", 0.6), unseen=True), "0.60 A + an unseen parent"),
        (merge(unseen=True), "an unseen parent"),
        (merge(("A", None), ("B", None), method="slerp"), "a merge (slerp) of A and B"),
    ],
)
def test_a_merge_as_a_sum(found, said):
    assert formula(found) == said


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"relation": "finetune"}, "fine-tuned from A"),
        ({"relation": "finetune", "directed": False}, "fine-tuned from A, or the other way round"),
        ({"relation": "adapter", "rank": 16}, "A with an adapter of rank 16 baked in"),
        ({"relation": "adapter", "declared": True}, "declared to be made on A"),
        ({"relation": "component", "component": "vae"}, "its vae is that of A"),
    ],
)
def test_an_edge_in_words(fields, said):
    edge = Edge(**{"parent": "A", "child": "x", "weight": None, "low": None, "high": None, "directed": True,
                   "confidence": 1.0, **fields})  # fmt: skip
    assert edge_words(edge) == said


def test_added_says_what_it_is_and_what_the_card_says():
    whole = cluster_result(60)
    assert added(whole) is None
    child = whole.merges[0].child
    other = (Contradiction(child, "card", "trained from scratch", "a merge"),)
    said = added(replace(whole, added=child, contradictions=other))
    assert said == f"{formula(whole.merges[0])}; the card says trained from scratch"
    alone = replace(whole, edges=(), merges=(), contradictions=(), added=child)
    assert added(alone) == "no relative of it is in this folder"
    assert "parent of" in (added(replace(whole, added="base-0", contradictions=())) or "")


def test_leaves_are_scipys(result):
    rows = result.linkage
    if len(rows):
        assert leaves(rows, len(rows) + 1) == leaves_list(np.array(rows)).tolist()


def test_brackets_stand_over_what_they_join(result):
    n = len(result.distances.models)
    order = leaves(result.linkage, n)
    x, y = dendrogram(result.linkage, order)
    found = zip(x[0::5], x[2::5], y[1::5], strict=True)
    wanted = []
    if n > 1:
        oracle = scipys_dendrogram(np.array(result.linkage), no_plot=True)
        tops = [math.log10(max(top, 1e-7)) for _, top, _, _ in oracle["dcoord"]]
        sides = [((i[0] - 5) / 10, (i[2] - 5) / 10) for i in oracle["icoord"]]
        wanted = [(*side, top) for side, top in zip(sides, tops, strict=True)]
    assert np.array(sorted(found)) == pytest.approx(np.array(sorted(wanted)))


def test_a_linkage_that_does_not_fit_is_left_out():
    whole = cluster_result(12)
    for rows in (whole.linkage[:-1], whole.linkage[::-1], (*whole.linkage[:-1], (0.0, 99.0, 1.0, 2.0))):
        found = heat_data(replace(whole, linkage=rows))
        assert found
        assert found["order"] == list(range(12))
        assert found["x"] == []
    assert heat_data(replace(whole, distances=replace(whole.distances, values=()))) is None


def test_pairs_name_their_models(result):
    found = block_data(result)
    kept = {(p.a, p.b): p for p in result.block_similarity.pairs}
    for a, b, *values in found["pairs"]:
        names = result.distances.models[a], result.distances.models[b]
        at = dict(zip(result.block_similarity.blocks, kept[names].values, strict=True))
        wanted = [at[b] for b in found["blocks"]]
        assert [v is None for v in values] == [v is None for v in wanted]
        assert [v for v in values if v is not None] == pytest.approx([v for v in wanted if v is not None], rel=1e-2)


def test_of_very_many_pairs_those_of_relatives_are_kept(monkeypatch):
    whole = cluster_result(12)
    monkeypatch.setattr("reports.cluster_figures.PAIRS", 10)
    found = block_data(whole)
    kept = {frozenset(found["names"][i] for i in (a, b)) for a, b, *_ in found["pairs"]}
    models = {m.name for m in whole.models}
    assert kept == {pair for e in whole.edges if (pair := frozenset((e.parent, e.child))) <= models}


def test_stacked_bars_hold_every_coefficient():
    found = [merge(("A", 0.7), ("B", 0.3)), merge(("A", 1.0), ("B", 0.5), ("<b>", -0.5)), merge(("A", None))]
    data = merge_bars(found, {"A": 0, "B": 11})["data"]
    assert [sorted(zip(t["y"], t["x"], strict=True)) for t in data] == [
        [(0, 0.7), (1, 1.0), (2, 1.0)], [(0, 0.3), (1, 0.5)], [(1, -0.5)],
    ]  # fmt: skip
    assert data[0]["marker"]["opacity"] == [1, 1, 0.45]
    assert "<b>" not in json.dumps(data)


def test_the_page_says_all(result, text):
    rows = re.findall(r"<tr data-index", text)
    assert len(rows) == len(result.edges)
    for skipped in result.skipped:
        assert skipped.reason in text
    for m in result.merges:
        assert m.recipe is None or f"name = &quot;{m.child}&quot;" in text or m.child in HOSTILE_NAMES
    data = payload(text)
    assert {n[0] for n in data["nodes"]} == {visible(m.name) for m in (*result.models, *result.unobserved)}
    assert len(data["edges"]) == len(result.edges)


def test_hostile_names_make_no_element(text):
    made = [tag for tag, _ in Elements(text).found]
    assert not {"img", "a", "iframe", "object", "u"} & set(made)
    assert made.count("script") == 5


def test_the_asked_for_model_stands_on_top():
    whole = cluster_result(12)
    child = whole.merges[0].child
    text = build(to_json(replace(whole, added=child)))
    data = payload(text)
    assert data["nodes"][data["chosen"]][0] == child
    assert f"<h1>{child}: {formula(whole.merges[0])}.</h1>" in text
    assert answer(whole) in text


def test_what_was_not_kept_is_said():
    large = build(to_json(cluster_result(120)))
    assert "nearest only" in large
    assert "nearest only" not in build(to_json(cluster_result(12)))
