"""Laws of predicted transfer; oracles are coordinates, which the predictor does not see, and networkx."""

from __future__ import annotations

import hashlib
import random
from dataclasses import fields, replace
from pathlib import Path

import kin
import networkx as nx
import numpy as np
import pytest
from synthetic_cluster import cluster_result
from synthetic_prediction import article, edge, tree_of

import lineage
from lineage import prediction
from lineage.cluster_result import Choice, ClusterResult, Distances, Evidence
from lineage.errors import LineageError
from lineage.prediction import BASELINES, CONSTANTS, FamilyTree, code_hash, family_tree, predict_pair, predictions

SEEDS = range(4)


@pytest.fixture(scope="module", params=SEEDS)
def world(request):
    return article(request.param)


def pairs(tree: FamilyTree, **changes):
    return predictions(tree, tree.names, tree.names, replace(CONSTANTS, **changes))


def related(tree: FamilyTree, **changes):
    return [p for p in pairs(tree, **changes) if p.relation not in ("other root", "permuted")]


def first_of(tree: FamilyTree, name: str) -> str:
    return "NAI-permuted" if name.startswith("NAI-permuted") else tree.roots[name]


def test_numbers_lie_between_zero_and_one(world):
    for p in pairs(world[1]):
        assert 0 <= p.strength <= 1
        assert 0 <= p.retention <= 1
        assert p.confidence is None or 0 <= p.confidence <= 1


def test_its_own_base_is_strongest(world):
    for p in pairs(world[1]):
        assert (p.strength == 1) == (p.relation == "same") == (p.base == p.model)
        assert p.relation != "same" or p.verdict == "works"


def test_strength_falls_with_distance(world):
    points, tree = world
    found = related(tree)
    apart = [float(np.linalg.norm(points[p.base] - points[p.model])) for p in found]
    assert [p.features.distance for p in found] == pytest.approx(apart, rel=1e-6, abs=1e-7)
    order = np.argsort(apart)
    assert np.all(np.diff([found[i].strength for i in order]) <= 1e-12)
    assert len({round(p.strength, 6) for p in found}) > 10


def test_retention_is_the_share_of_the_style_vector_that_the_base_lacks(world):
    points, tree = world
    for p in related(tree):
        r = first_of(tree, p.model)
        x, y = points[p.base] - points[r], points[p.model] - points[r]
        expected = np.clip(1 - x @ y / (y @ y), 0, 1) if y @ y else 0
        assert p.retention == pytest.approx(expected, abs=1e-6)


def test_upstream_lets_more_of_the_style_come_through(world):
    _, tree = world
    chain = ["SD", "AC", "BP", "NMFSAN"]
    through = [predict_pair(tree, x, "NMFSAN").retention for x in chain]
    assert through == sorted(through, reverse=True)
    assert (through[0], through[-1]) == (1, 0)
    strong = [predict_pair(tree, x, "NMFSAN").strength for x in chain]
    assert strong == sorted(strong)


def test_another_root_never_works(world):
    _, tree = world
    for p in pairs(tree):
        if tree.roots[p.base] != tree.roots[p.model]:
            assert (p.strength, p.verdict, p.relation) == (0, "other root", "other root")
        else:
            assert p.verdict != "other root"


def test_another_root_does_not_work_however_near_it_lies():
    points = {"a": np.zeros(3), "b": np.full(3, 1e-3)}
    tree = tree_of(points, [], {"a": "a", "b": "b"})
    assert predict_pair(tree, "a", "b").strength == 0


def test_a_permuted_copy_fails_both_ways_and_so_does_what_was_made_of_it(world):
    _, tree = world
    for copy in ("NAI-permuted", "NAI-permuted-child"):
        for other in ("SD", "NAI", "Anything", "AnyLora"):
            for p in (predict_pair(tree, copy, other), predict_pair(tree, other, copy)):
                assert (p.strength, p.verdict) == (0, "permuted")
    assert predict_pair(tree, "NAI-permuted", "NAI-permuted-child").strength > 0


def test_relations(world):
    _, tree = world
    told = {
        ("SD", "NMFSAN"): "ancestor", ("NMFSAN", "AC"): "descendant", ("Anything", "AOM"): "sibling",
        ("BP", "Anything"): "cousin", ("AnyLora", "AOM"): "merge", ("BP", "tmp1"): "merge", ("NAI", "NAI"): "same",
        ("AC", "tmp1"): "ancestor", ("other", "SD"): "other root", ("NAI", "NAI-permuted"): "permuted",
    }  # fmt: skip
    assert {pair: predict_pair(tree, *pair).relation for pair in told} == told


def test_a_folder_of_files_is_read_as_it_was_made(tmp_path):
    """From files to words: a fine-tune, a permuted copy of it, a stranger."""
    made = {"base": kin.root(0), "stranger": kin.root(1)}
    made["tuned"] = kin.tune(made["base"], 2)
    made["shuffled"] = kin.permute(made["tuned"], 3)
    found = lineage.cluster(kin.save(made, tmp_path / "models"), base="base")
    verdict = {(p.base, p.model): p.verdict for p in predictions(found, list(made), list(made))}
    for x in ("base", "tuned"):
        assert verdict[x, "shuffled"] == verdict["shuffled", x] == "permuted"
        assert verdict[x, "stranger"] == verdict["stranger", x] == "other root"
    assert verdict["base", "tuned"] == "works"


def test_reasons_are_sentences_about_the_tree(world):
    _, tree = world
    near = replace(CONSTANTS, scale=10.0, loses=0.0)
    for base, way in (("AC", "AC through BP"), ("SD", "SD through AC, BP")):
        p = predict_pair(tree, base, "NMFSAN", near)
        share = "" if p.retention >= 0.5 else f"{100 * p.retention:.0f} % of "
        assert p.reason == f"NMFSAN descends from {way}: {share}its style comes through"
    assert "tmp1 is a merge that holds 0.50 of BP" in predict_pair(tree, "BP", "tmp1").reason
    assert "both descend from NAI" in predict_pair(tree, "AOM", "Anything").reason
    assert "share no training" in predict_pair(tree, "AOM", "other").reason
    assert "another order" in predict_pair(tree, "AOM", "NAI-permuted").reason


def test_an_order_that_is_not_known_is_not_claimed():
    points = {"a": np.zeros(3), "b": np.full(3, 0.01)}
    tree = tree_of(points, [edge("a", "b", directed=False, confidence=0.6)], {"a": "a", "b": "a"})
    for p in pairs(tree):
        assert p.relation == ("same" if p.base == p.model else "kin")
        assert "descend" not in p.reason
        assert p.confidence == (1.0 if p.base == p.model else 0.6)


def test_confidence_is_that_of_the_least_sure_edge():
    points = {n: np.full(3, 0.01 * i) for i, n in enumerate("abcd")}
    edges = [edge("a", "b", confidence=0.9), edge("b", "c", confidence=0.5)]
    tree = tree_of(points, edges, dict.fromkeys("abcd", "a"))
    assert predict_pair(tree, "a", "c").confidence == 0.5
    assert predict_pair(tree, "b", "a").confidence == 0.9
    assert predict_pair(tree, "a", "d").confidence is None


def test_a_tree_whose_first_model_is_in_no_file_starts_at_its_centre(world):
    points, _ = world
    known = {n: points[n] for n in ("NAI", "AC", "BP")}
    edges = [edge("unseen", "AC"), edge("unseen", "NAI"), edge("AC", "BP")]
    tree = tree_of(known, edges, dict.fromkeys(known, "unseen"))
    centre = sum(known.values()) / 3
    for p in related(tree):
        x, y = known[p.base] - centre, known[p.model] - centre
        assert p.retention == pytest.approx(np.clip(1 - x @ y / (y @ y), 0, 1), abs=1e-6)
    assert predict_pair(tree, "BP", "NAI").relation == "cousin"


def test_parts_of_a_tree_without_a_known_way_are_kin_all_the_same():
    points = {n: np.full(3, 0.01 * i) for i, n in enumerate("abcde")}
    tree = tree_of(points, [edge("a", "b"), edge("c", "d")], dict.fromkeys("abcde", "a"))
    for p in pairs(tree):
        assert p.strength > 0
        apart = not any({p.base, p.model} <= known for known in ({"a", "b"}, {"c", "d"}, {"e"}))
        assert (p.confidence is None) == (p.relation == "kin") == apart


def test_names_and_order_carry_no_signal(world):
    points, tree = world
    rng = random.Random(1)
    new = dict(zip(tree.names, rng.sample(sorted(f"m{i:02d}" for i in range(len(points))), len(points)), strict=True))
    edges = [replace(e, parent=new[e.parent], child=new[e.child]) for e in rng.sample(tree.edges, len(tree.edges))]
    turned = tree_of({new[n]: p for n, p in points.items()}, edges, {new[n]: new[r] for n, r in tree.roots.items()})
    for p in pairs(tree):
        q = predict_pair(turned, new[p.base], new[p.model])
        assert (q.strength, q.retention) == pytest.approx((p.strength, p.retention), rel=1e-9)
        assert (q.relation, q.verdict, q.confidence) == (p.relation, p.verdict, p.confidence)


def test_only_tree_and_distances_are_read():
    """Everything else in a cluster result may say what it wants."""
    found = cluster_result(12)
    blank = {"file": "", "sha256": None, "bytes": 0, "family": None, "affinities": (), "license": None}
    lie = {"evidence": (Evidence("metadata", "lies", 1.0),), "distance": 9.0, "low": 0.0, "high": 1.0}
    liar = replace(
        found,
        **dict.fromkeys(("families", "merges", "skipped", "contradictions", "linkage", "unobserved"), ()),
        choice=Choice("sketch", ""),
        models=tuple(replace(m, **blank) for m in found.models),
        edges=tuple(replace(e, **lie) for e in found.edges),
    )
    names = [m.name for m in found.models]
    assert predictions(liar, names, names) == predictions(found, names, names)


def test_a_cluster_result_is_read_as_its_points_lie():
    found = cluster_result(12)
    tree = family_tree(found)
    squared = dict(zip(((a, b) for i, a in enumerate(found.distances.models) for b in found.distances.models[i + 1 :]),
                       found.distances.values, strict=True))  # fmt: skip
    for (a, b), d in squared.items():
        assert d is not None
        assert tree.square(a, b) == tree.square(b, a) == pytest.approx(d**2)
    assert {f.name for f in fields(FamilyTree)} == {"names", "squares", "edges", "roots"}


def test_edges_that_only_a_file_declares_are_not_believed():
    found = cluster_result(12)
    declared = replace(found, edges=tuple(replace(e, declared=True) for e in found.edges))
    assert family_tree(declared).edges == ()


def test_models_without_distances_are_refused():
    found: ClusterResult = replace(cluster_result(12), distances=Distances((), ()))
    with pytest.raises(LineageError, match="keeps no distances"):
        family_tree(found)
    with pytest.raises(LineageError, match="'nobody': no model"):
        predict_pair(family_tree(cluster_result(12)), "nobody", "nobody")


def test_baselines(world):
    """minus distance and weight cosine rank alike; tree distance is networkx' shortest way."""
    points, tree = world
    found = related(tree)
    near, alike = ([BASELINES[b](p.features) for p in found] for b in ("minus distance", "weight cosine"))
    assert np.all(np.diff(np.array(alike)[np.argsort(near)]) >= 0)
    ways = nx.Graph((e.parent, e.child) for e in tree.edges)
    ways.add_nodes_from(tree.names)
    for p in found:
        assert BASELINES["tree distance"](p.features) == -nx.shortest_path_length(ways, p.base, p.model)
        r = points[first_of(tree, p.model)]
        x, y = points[p.base] - r, points[p.model] - r
        scale = np.linalg.norm(x) * np.linalg.norm(y)
        assert BASELINES["delta cosine"](p.features) == pytest.approx(x @ y / scale if scale else 0, abs=1e-6)
    far = predict_pair(tree, "other", "SD").features
    assert all(BASELINES[b](far) < min(BASELINES[b](p.features) for p in found) for b in
               ("minus distance", "tree distance", "weight cosine"))  # fmt: skip
    assert {BASELINES["constant"](p.features) for p in pairs(tree)} == {0}


def test_the_predictor_is_known_by_its_source():
    text = Path(prediction.__file__).read_text(encoding="utf-8")
    assert code_hash() == hashlib.sha256(text.encode()).hexdigest()
