"""The zoo's measurement: scores against answers made by hand, merges against arithmetic, the same zoo from a seed."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
import zoo_derive
import zoo_merges
import zoo_train
from networkx import DiGraph, is_directed_acyclic_graph
from safetensors.torch import load_file
from scipy.stats import binomtest
from zoo_plan import HELD_OUT, Spec, plan
from zoo_score import (
    Answer,
    Claim,
    MergeClaim,
    bootstrap,
    calibration_error,
    directions,
    judge,
    merges,
    rand_index,
    rates,
    root_accuracy,
    unrelated,
    upper_bound,
    wilson,
)
from zoo_truth import Truth


def row(name: str, kind: str, *parents: str, tree: int = 0, **more: Any) -> dict[str, Any]:
    found = {"name": name, "kind": kind, "parents": list(parents), "tree": tree, "hidden": False, "weights": None}
    relation = {"root": "root", "merge": "merge", "duplicate": "copy", "int8": "quantized"}.get(kind, "finetune")
    return {**found, "relation": relation, "settings": {"method": "weighted"} if kind == "merge" else {}, **more}


def truth_of(*rows: dict[str, Any]) -> Truth:
    return Truth({r["name"]: r for r in rows})


FAMILY = (
    row("root", "root"),
    row("a", "short", "root"),
    row("b", "long", "a"),
    row("twin", "duplicate", "b"),
    row("m", "merge", "a", "b", weights=[0.3, 0.7]),
    row("other", "root", tree=1),
    row("c", "short", "other", tree=1),
)


def perfect(truth: Truth) -> Answer:
    """The answer that says what is true."""
    claims = [Claim(p, c, r) for (p, c), r in truth.edges.items()]
    tree = {n: str(r["tree"]) for n, r in truth.rows.items() if not r["hidden"]}
    found = {c: MergeClaim({p: (w, w - 1e-6, w + 1e-6) for p, w in ws.items()}, False) for c, ws in truth.linear()}
    return Answer("perfect", claims, tree, found, frozenset(truth.roots().values()))


def test_the_truth_itself_scores_full_marks():
    truth = truth_of(*FAMILY)
    answer = perfect(truth)
    judged = judge(truth, answer)
    assert rates(judged).f1 == directions(judged).accuracy == rand_index(truth, answer) == 1
    assert root_accuracy(truth, answer) == (2, 2)
    assert calibration_error(judged) == 0
    m = merges(truth, answer)
    assert (m.exact, m.inside, m.false, max(m.errors)) == (m.linear, 2, 0, 0)


def test_a_copy_and_what_it_copies_are_one_node():
    truth = truth_of(*FAMILY)
    answer = perfect(truth)
    other = [replace(c, parent="twin") if c.parent == "b" else c for c in answer.claims]
    judged = judge(truth, replace(answer, claims=[*other, Claim("b", "twin", "copy")]))
    assert "twin" not in truth.visible
    assert rates(judged).f1 == 1


def test_a_turned_edge_is_found_but_not_right():
    truth = truth_of(*FAMILY)
    answer = perfect(truth)
    turned = [Claim(c.child, c.parent) if (c.parent, c.child) == ("root", "a") else c for c in answer.claims]
    judged = judge(truth, replace(answer, claims=turned))
    assert rates(judged).f1 == 1
    assert (directions(judged).right, directions(judged).wrong) == (len(truth.edges) - 1, 1)
    left_open = [replace(c, directed=False) for c in turned]
    assert all(j.right for j in judge(truth, replace(answer, claims=left_open)))
    d = directions(judge(truth, replace(answer, claims=left_open)))
    assert (d.right, d.open) == (0, len(truth.edges))


def test_misses_and_false_claims_count_once_each():
    truth = truth_of(*FAMILY)
    claims = [*perfect(truth).claims[1:], Claim("root", "b"), Claim("b", "root"), Claim("a", "c")]
    answer = replace(perfect(truth), claims=claims)
    r, n = rates(judge(truth, answer)), len(truth.edges)
    assert (r.true, r.claimed, r.hits) == (n, n + 1, n - 1)
    assert math.isclose(r.f1, 2 * r.precision * r.recall / (r.precision + r.recall))
    assert unrelated(truth, answer) == (1, 4 * 2)


def test_children_of_a_missing_file_hang_from_its_ancestor():
    rows = [replace_row(r, "a", hidden=True) for r in FAMILY]
    truth = truth_of(*rows)
    assert truth.edges[("root", "b")] == "finetune"
    assert frozenset(("root", "m")) in truth.neutral
    assert ("root", "m") not in truth.edges
    judged = judge(truth, replace(perfect(truth), claims=[Claim("root", "b"), Claim("root", "m"), Claim("b", "m"),
                                                         Claim("other", "c")]))  # fmt: skip
    assert rates(judged).f1 == 1


def test_a_copy_stands_for_a_missing_file():
    truth = truth_of(*[replace_row(r, "b", hidden=True) for r in FAMILY])
    assert "twin" in truth.visible
    assert ("a", "twin") in truth.edges
    assert ("twin", "m") in truth.edges


def replace_row(row: dict[str, Any], name: str, **more: Any) -> dict[str, Any]:
    return {**row, **more} if row["name"] == name else row


def test_a_missing_parent_must_be_said():
    truth = truth_of(*[replace_row(r, "a", hidden=True) for r in FAMILY])
    guess = {"m": MergeClaim({"b": (0.7, 0.6, 0.8), "root": (0.3, 0.2, 0.4)}, False)}
    said = {"m": MergeClaim({"b": (0.7, 0.6, 0.8)}, True)}
    forced, honest = (merges(truth, replace(perfect(truth), merges=m)) for m in (guess, said))
    assert (forced.linear, forced.missing, forced.reported, forced.misled) == (0, 1, 0, 1)
    assert (honest.reported, honest.misled) == (1, 0)


def test_a_fine_tune_called_a_merge_is_counted():
    truth = truth_of(*FAMILY)
    answer = replace(perfect(truth), merges={"b": MergeClaim({"a": (1.0, None, None)}, False)})
    assert (merges(truth, answer).false, merges(truth, answer).finetunes, merges(truth, answer).exact) == (1, 3, 0)


@pytest.mark.parametrize(("k", "n"), [(0, 20), (3, 20), (50, 51), (1000, 1000)])
def test_intervals_are_those_of_scipy(k: int, n: int):
    theirs = binomtest(k, n).proportion_ci(method="wilson")
    assert wilson(k, n) == pytest.approx((theirs.low, theirs.high), abs=1e-6)
    one_sided = binomtest(k, n, alternative="less").proportion_ci(method="exact")
    assert upper_bound(k, n) == pytest.approx(one_sided.high)


def test_bootstrap_draws_whole_trees():
    truth = truth_of(*FAMILY)
    only_first = replace(perfect(truth), claims=[c for c in perfect(truth).claims if c.parent != "other"])
    judged = judge(truth, only_first)
    low, high = bootstrap(judged, lambda js: rates(js).recall)
    assert (low, high) == (0, 1)  # either tree may be drawn twice


TENSORS = [{"x.0.weight": torch.randn(6, 64), "x.1.bias": torch.randn(6)} for _ in range(3)]


def test_plain_merges_are_the_arithmetic_they_name():
    a, b, c = (t["x.0.weight"].double() for t in TENSORS)

    def made(method: str, parents: int = 3, **settings: Any) -> torch.Tensor:
        chosen = {"method": method, "tool": "plain", **settings}
        return zoo_merges.merge(TENSORS[:parents], chosen, 0)["x.0.weight"].double()

    torch.testing.assert_close(
        made("weighted", weights=[0.5, 0.3, 0.2]), 0.5 * a + 0.3 * b + 0.2 * c, atol=1e-6, rtol=0
    )
    torch.testing.assert_close(made("add_difference", weight=0.7), a + 0.7 * (b - c), atol=1e-6, rtol=0)
    between = (0.75 * a + 0.25 * b).half().double()
    torch.testing.assert_close(made("chain", weight=0.25, second=0.5), (between + c) / 2, atol=2e-3, rtol=0)
    torch.testing.assert_close(made("slerp", 2, weight=0.0), a, atol=1e-6, rtol=0)
    torch.testing.assert_close(made("ties", 2, weight=1.0, density=1.0), b, atol=1e-6, rtol=0)
    torch.testing.assert_close(made("dare", 2, weight=1.0, density=1.0), b, atol=1e-6, rtol=0)
    kept = (made("ties", 2, weight=1.0, density=0.25) - a).abs() > 1e-6
    assert int(kept.sum()) == a.numel() // 4


@pytest.mark.parametrize("method", ["weighted", "add_difference", "chain"])
def test_sd_mecha_and_the_plain_script_agree(method: str):
    pytest.importorskip("sd_mecha")
    settings = {"method": method, "weights": [0.5, 0.3, 0.2], "weight": 0.3, "second": 0.5}
    plain, theirs = (zoo_merges.merge(TENSORS, {**settings, "tool": tool}, 0) for tool in ("plain", "sd-mecha"))
    for name, tensor in plain.items():  # sd-mecha keeps what lies between two merges in float32
        torch.testing.assert_close(theirs[name], tensor, atol=2e-3 if method == "chain" else 1e-5, rtol=0)


def test_coefficients_are_those_of_the_merge():
    x = [{"x": torch.eye(3)[i]} for i in range(3)]
    for method in ("weighted", "add_difference", "chain"):
        settings = {"method": method, "tool": "plain", "weights": [0.5, 0.3, 0.2], "weight": 0.25, "second": 0.5}
        assert zoo_merges.merge(x, settings, 0)["x"].tolist() == pytest.approx(
            zoo_merges.coefficients(settings), abs=1e-3
        )


@pytest.mark.parametrize("arch", sorted(zoo_train.NETWORKS))
def test_a_permuted_network_computes_the_same(arch: str):
    state = zoo_train.start(arch, 0)
    other = zoo_derive.permute(arch, state, 1)
    inputs = {
        "bytes": (torch.arange(32)[None],),
        "denoiser": (torch.randn(2, 3, 16, 16), torch.tensor([0.2, 0.7])),
    }.get(arch, (torch.randn(2, 3, 16, 16),))
    net = zoo_train.NETWORKS[arch]()
    net.load_state_dict(state)
    before = net(*inputs)
    net.load_state_dict(other)
    torch.testing.assert_close(net(*inputs), before, atol=1e-5, rtol=1e-4)
    assert any(not torch.equal(state[n], other[n]) for n in state)


def test_quantised_and_pruned_networks_are_so():
    state = zoo_train.start("pixels", 0)
    rows = zoo_derive.quantise(state, 8)["blocks.0.fc1.weight"]
    assert all(len(row.unique()) <= 255 for row in rows)
    groups = zoo_derive.quantise(state, 4)["blocks.0.fc2.weight"].reshape(-1, zoo_derive.GROUP)
    assert all(len(group.unique()) <= 15 for group in groups)
    pruned = zoo_derive.prune(state, 0.3)["blocks.0.fc1.weight"]
    assert float((pruned == 0).float().mean()) == pytest.approx(0.3, abs=0.01)


def test_a_plan_is_its_seed_and_holds_out_what_it_says():
    specs = plan(16, 6, 0)
    assert specs == plan(16, 6, 0) != plan(16, 6, 1)
    assert is_directed_acyclic_graph(DiGraph([(p, s.name) for s in specs for p in s.parents]))
    assert len({s.name for s in specs}) == len(specs)
    held = [s for s in specs if held_out(s)]
    assert {s.half for s in held} == {"report"}
    assert len({held_out(s) for s in held}) > 1


def held_out(s: Spec) -> str:
    found = {"arch": s.arch, "kind": s.kind, **{k: s.settings.get(k) for k in ("optimizer", "method")}}
    return " ".join(k for k, v in HELD_OUT.items() if found[k] == v)


def test_a_stopped_zoo_goes_on_and_ends_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data = torch.arange(4000) % 97
    monkeypatch.setattr(zoo_train, "text", lambda task: data)
    root = Spec("r", 0, "bytes", "root", (), "float16", 0, 5, training(3, 0.0))
    child = Spec("c", 0, "bytes", "short", ("r",), "float32", 1, 6, training(2, 0.01))
    merge = Spec("m", 0, "bytes", "merge", ("r", "c"), "bfloat16", 2, 7,
                 {"method": "weighted", "tool": "plain", "weights": [0.5, 0.5]})  # fmt: skip
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert list(zoo.make(whole, [root, child, merge])) == [root, child, merge]
    next(zoo.make(stopped, [root, child, merge]))
    list(zoo.make(stopped, [root, child, merge]))
    for spec in (root, child, merge):
        assert zoo.path_of(spec, whole).read_bytes() == zoo.path_of(spec, stopped).read_bytes()
        assert zoo.path_of(spec, whole).stat().st_mtime == zoo.OLD
    rows = {r["name"]: r for r in zoo.truth(whole, [root, child, merge])}
    assert rows["r"]["delta"] is None
    start, end = (load_file(zoo.path_of(s, whole)) for s in (root, child))
    change = math.dist(*(torch.cat([s[n].flatten().double() for n in start]).tolist() for s in (start, end)))
    norm = math.hypot(*torch.cat([t.flatten().double() for t in start.values()]).tolist())
    assert rows["c"]["delta"] == pytest.approx(change / norm)


def training(steps: int, change: float) -> dict[str, Any]:
    return {"optimizer": "adamw", "steps": steps, "task": "x", "change": change, "weight_decay": 0.0, "share": 1.0}
