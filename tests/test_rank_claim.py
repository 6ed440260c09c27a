"""The rank claim put to its function: gains, energies, their null, the page; the rival of the extraction benchmark."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from typing import Any

import extract as benchmark
import plotly.graph_objects as go
import pytest
import rank_claim as script
import stable_diffusion
import torch
from safetensors.torch import load_file, save_file
from test_reports import Elements

import lineage
from lineage.extract_result import AdaptedLayer
from lineage.keys import to_ldm
from lineage.rank_records import Outcome, RankClaimResult, RankPair, RankPoint, answer
from lineage.records import restore
from lineage.results import dumps, provenance
from lineage.targets import targets
from reports.build import build
from reports.rank_page import gains, scores
from train.rank_claim import energy, null, short_side

RANKS = (1, 2, 4, 8)


def pair(
    gains: list[float], name: str = "child", trained: tuple[float, ...] = (), compressed: tuple[float, ...] = ()
) -> RankPair:
    """From a loss of 0.5 to one of 0.3; cut to RANKS and to all ranks it has the `gains`."""

    def at(gain: float, rank: int | None, **more) -> RankPoint:
        return RankPoint(rank, 100, Outcome(0.5 - 0.2 * gain, 0.1 + 0.6 * gain), **more)

    cut = [at(g, k, energy=0.5, gaussian=0.2) for g, k in zip(gains, (*RANKS, None), strict=True)]
    learned = tuple(at(g, k, lr=3e-3) for g, k in zip(trained, RANKS, strict=False))
    smaller = tuple(at(g, k) for g, k in zip(compressed, RANKS, strict=False))
    outcomes = {"base": Outcome(0.5, 0.1), "tuned": Outcome(0.3, 0.7)}
    facts: Any = {"steps": 9, "lr": 1e-4, "relative": 0.1, "median_side": 96, "effective_rank": 50.0, **outcomes}
    return RankPair(
        "quick-0", "parent", name, ("a",), **facts, extracted=tuple(cut), trained=learned, compressed=smaller
    )


def result(*pairs: RankPair) -> RankClaimResult:
    return RankClaimResult(provenance("rank_claim", {}), pairs, RANKS, 8, 24, answer(pairs))


def layer(delta: torch.Tensor, shape: tuple[int, ...], rank: int) -> AdaptedLayer:
    """The record of `delta` cut to `rank`."""
    s = torch.linalg.svdvals(delta.double())
    error, size = float(s[rank:].norm() / s.norm()), float(s.norm())
    return AdaptedLayer("unet.x", "x", "unet", "IN0", shape, rank, None, 0.1, size, error, None)


@pytest.mark.parametrize("measure", ["loss", "score"])
def test_gain_is_none_of_the_base_and_all_of_the_fine_tune(measure):
    found = pair([0.1, 0.25, 0.5, 0.75, 1.0])
    assert found.gain(found.base, measure) == 0
    assert found.gain(found.tuned, measure) == 1
    shares = [found.gain(point.outcome, measure) for point in found.extracted]
    assert shares == pytest.approx([0.1, 0.25, 0.5, 0.75, 1.0])


@pytest.mark.parametrize(
    ("shares", "rank"),
    [
        ([0.95, 0.96, 0.97, 0.98, 1.0], 1),
        ([0.2, 0.91, 0.92, 0.95, 1.0], 2),
        ([0.2, 0.95, 0.5, 0.95, 1.0], 8),  # a lucky rank below one that fails is not enough
        ([0.1, 0.2, 0.3, 0.4, 1.0], None),
        ([0.95, 0.95, 0.95, 0.95, 0.5], None),
    ],
)
def test_enough_is_the_smallest_rank_from_which_on_all_are_good(shares, rank):
    assert pair(shares).enough() == rank


def test_energy_is_that_of_all_layers_together():
    g = torch.Generator().manual_seed(0)
    deltas = [torch.randn(30, 50, generator=g), 5 * torch.randn(20, 27, generator=g)]
    layers = [layer(deltas[0], (30, 50), 4), layer(deltas[1], (20, 3, 3, 3), 6)]
    kept = sum(torch.linalg.svdvals(d)[:k].square().sum() for d, k in zip(deltas, (4, 6), strict=True))
    total = sum(d.square().sum() for d in deltas)
    assert energy(layers) == pytest.approx(float(kept / total), rel=1e-5)


def test_a_gaussian_change_holds_what_the_null_says():
    delta = torch.randn(300, 2700, generator=torch.Generator().manual_seed(1))
    made = [layer(delta, (300, 300, 3, 3), rank) for rank in (10, 100)]
    for one in made:
        assert energy([one]) == pytest.approx(null([one]), rel=0.03)


def test_the_short_side_is_the_largest_rank():
    for shape in ((40, 30), (16, 2, 3, 3), (50, 2, 3, 3)):
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(2))
        assert short_side(shape) == torch.linalg.matrix_rank(weight.flatten(1))


def test_the_answer_counts():
    few = pair([0.2, 0.95, 0.96, 0.97, 1.0], trained=(0.9, 0.5))
    none = pair([0.1, 0.2, 0.3, 0.4, 1.0], trained=(0.05, 0.9), compressed=(0.01,))
    said = answer([few, none])
    assert "from rank 2 of 96 on; in 1 of 2 no rank is enough" in said
    assert "in 2 of 4 cases" in said  # 0.9 over 0.2 and 0.9 over 0.2; 0.5 and 0.05 lie below
    assert "in 1 of 1 cases" in said
    assert answer([none]).startswith("No rank")


def test_the_page_shows_what_was_measured_and_no_markup_of_names():
    made = result(pair([0.2, 0.5, 0.7, 0.9, 1.0], "<b>x</b><script>1</script>", (0.6, 0.8)), pair([0.1] * 5))
    plain = json.loads(dumps(made))
    assert restore(RankClaimResult, plain) == made
    seen = Elements(build(plain))
    assert not any(tag == "b" for tag, _ in seen.found)
    assert "<b>x</b>" in "".join(seen.words)
    for figure in (gains(made), scores(made)):
        go.Figure(json.loads(re.sub(r'"@[a-z-]+"', '"#123456"', json.dumps(figure))))  # the page resolves colours
    line = next(t for t in gains(made)["data"] if t.get("name") == "fine-tune cut to k ranks")
    assert line["x"] == list(RANKS)
    assert line["y"] == pytest.approx([0.15, 0.3, 0.4, 0.5])


def test_a_table_has_a_column_for_each_adapter_that_has_the_reading():
    pairs = [pair([0.1, 0.2, 0.3, 0.4, 0.99], trained=(0.5, 0.6), compressed=(0.45,)), pair([0.1] * 5, "other")]
    heads, _, first, second = script.table(pairs, "gain").splitlines()
    assert heads == "| fine-tune | cut 1 | cut 2 | cut 4 | cut 8 | cut all | trained 1 | trained 2 | compressed 1 |"
    assert first.endswith("| 0.10 | 0.20 | 0.30 | 0.40 | 0.99 | 0.50 | 0.60 | 0.45 |")
    assert second.endswith("| 0.10 |  |  |  |")
    assert "trained" not in script.table(pairs, "energy")


def test_a_kept_pair_is_measured_again_under_another_protocol(tmp_path, monkeypatch):
    asked = []

    def examined(name, plan, missing, kept, protocol):
        asked.append([model.name for model in missing])
        for model in missing:
            found = {"protocol": script.asdict(protocol), "pair": script.asdict(pair([0.1] * 5, model.name))}
            kept[model.name].parent.mkdir(exist_ok=True)
            kept[model.name].write_text(json.dumps(found), encoding="utf-8")

    monkeypatch.setattr(script, "_examine", examined)
    for protocol in (script.SMALL, script.SMALL, replace(script.SMALL, draws=3)):
        found = script.measure("quick:0", tmp_path, protocol)
        assert [p.child for p in found] == ["source", "child", "other-source"]
    assert len(asked) == 2


@pytest.mark.usefixtures("no_sync")
def test_the_rival_cuts_exactly_and_ours_comes_within_its_bound(tmp_path, monkeypatch):
    base = to_ldm(stable_diffusion.states(stable_diffusion.tiny("sd1")), "sd1")
    g = torch.Generator().manual_seed(3)
    moved = {n: t + 0.01 * torch.randn(t.shape, generator=g) if t.dim() > 1 else t for n, t in base.items()}
    files = tmp_path / "base.safetensors", tmp_path / "flat.safetensors"
    for file, tensors in zip(files, (base, moved), strict=True):
        save_file(tensors, file)
    monkeypatch.setattr(benchmark.pairs, "DATA", tmp_path)
    theirs, ours = tmp_path / "kohya.safetensors", tmp_path / "ours.safetensors"
    benchmark.kohya(*files, theirs, 5)
    lineage.extract(*files, ours, rank=5)
    found = benchmark.worst("flat", [theirs, ours], theirs.with_suffix(".spectrum"), 5)
    assert [ratio for ratio, _ in found] == pytest.approx([1, 1], abs=benchmark.ERROR - 1)
    with lineage.open_checkpoint(files[0]) as opened:
        names = {target.module for target in targets(opened.specs).values()}
    assert {name.partition(".")[0] for name in load_file(theirs)} == names


def test_the_tail_is_what_a_cut_leaves():
    matrix = torch.randn(30, 40, generator=torch.Generator().manual_seed(4))
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    left = matrix - (u[:, :7] * s[:7]) @ vh[:7]
    assert benchmark.tail(s, 7) == pytest.approx(float(left.norm() / matrix.norm()), rel=1e-5)
    assert math.isclose(benchmark.tail(s, 30), 0)
