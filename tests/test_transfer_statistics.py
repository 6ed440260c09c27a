"""Measures, scores and controls on experiments whose answer is known."""

from __future__ import annotations

import csv
import io
import json
import random
from dataclasses import replace
from math import sqrt

import numpy as np
import pytest
from scipy import stats
from synthetic_transfer import Drawn, Plan, draw, transfer_result

from lineage.errors import LineageError
from lineage.exports import cells_csv, exports
from lineage.predictors import CONSTANT, LOSS_OF_MODEL, predictors, within
from lineage.records import restore
from lineage.results import dumps, to_json
from lineage.transfer_measures import Readings, matrices, readings
from lineage.transfer_records import (
    ADDITIVE,
    PREDICTED,
    TAUGHT,
    Cell,
    Design,
    Member,
    Score,
    TransferResult,
    WorldFacts,
    predictions_hash,
    world_facts,
)
from lineage.transfer_statistics import statistics

FACTS = WorldFacts("w", (Member("X", "NAI", "X", "f"), Member("Y", "AC", "X", "f", ("X",))), {"ink": "style"})


def cell(base: str | None, model: str, loss: float, **more) -> Cell:
    known = {"seed": 0, "network": "loha" if base else "none", "weight": 1.0 if base == model else 0.65, "step": 200}
    return Cell(**{"world": "w", "target": "ink", "kind": "style", "base": base, "model": model, "loss": loss,
                   "loss_error": 0.001, **known, **more})  # fmt: skip


UNTOUCHED = [cell(None, "X", 0.30, weight=0.0, step=0), cell(None, "Y", 0.50, weight=0.0, step=0)]
OWN = [cell("X", "X", 0.20), cell("Y", "Y", 0.40)]


def read(*cells: Cell, **design) -> Readings:
    return readings([*UNTOUCHED, *OWN, *cells], [FACTS], Design(**design))


def values(found: Readings, base: str, model: str) -> dict[str, float]:
    (row,) = (r for r in found.rows if (r.base, r.model) == (base, model))
    return row.values


def test_measures_by_hand():
    found = values(read(cell("X", "Y", 0.425)), "X", "Y")
    assert found == pytest.approx({"drop": 0.075, "closeness": -0.025, "lift": 0.75})
    assert values(read(), "Y", "Y") == pytest.approx({"drop": 0.1, "closeness": 0, "lift": 1})


def test_judges_count_as_rises_and_retention_as_it_stands():
    before = cell(None, "Y", 0.5, weight=0.0, step=0, strength_judges={"a": 0.1, "b": 0.3}, own_loss=0.2)
    after = cell(
        "X", "Y", 0.45, strength_judges={"a": 0.5, "b": 0.5}, retention_judges={"a": 0.9, "b": 0.7}, own_loss=0.25
    )
    found = values(readings([UNTOUCHED[0], before, *OWN, after], [FACTS], Design()), "X", "Y")
    assert found["judge a"] == pytest.approx(0.4)
    assert found["judge"] == pytest.approx(0.3)
    assert found["retention"] == pytest.approx(0.8)
    assert found["own"] == pytest.approx(-0.05)


def test_seeds_are_averaged():
    found = values(read(cell("X", "Y", 0.42), cell("X", "Y", 0.46, seed=7)), "X", "Y")
    assert found["drop"] == pytest.approx(0.06)


def test_a_column_without_headroom_is_dropped_and_said():
    found = readings([*UNTOUCHED, OWN[0], cell("Y", "Y", 0.494), cell("X", "Y", 0.4, own_loss=0.1)], [FACTS], Design())
    (gone,) = found.dropped
    assert (gone.world, gone.target, gone.model, gone.headroom) == ("w", "ink", "Y", pytest.approx(0.006))
    assert gone.error == pytest.approx(sqrt(2) * 0.001)
    assert values(found, "X", "Y") == {}
    assert not read(headroom_errors=5.0).dropped


def test_paired_batches_show_a_headroom_that_their_spread_would_hide():
    batches = np.random.default_rng(0).normal(0.5, 0.2, 16)
    error = float(batches.std(ddof=1)) / 4
    before = cell(None, "Y", 0.5, weight=0.0, step=0, losses=tuple(batches), loss_error=error)
    own = [cell("Y", "Y", 0.49, losses=tuple(batches - 0.01 + jitter), loss_error=error) for jitter in _small()]
    assert not readings([UNTOUCHED[0], before, *OWN[:1], *own], [FACTS], Design()).dropped
    blind = [replace(c, losses=()) for c in own]
    assert readings([UNTOUCHED[0], before, *OWN[:1], *blind], [FACTS], Design()).dropped


def _small() -> list[np.ndarray]:
    return [np.random.default_rng(1).normal(0, 1e-4, 16)]


def test_a_model_without_its_own_adapter_is_dropped():
    found = readings([*UNTOUCHED, OWN[0], cell("X", "Y", 0.4)], [FACTS], Design())
    assert [d.reason for d in found.dropped] == ["the model's own adapter was not measured"]


def test_checkpoints_are_told_from_the_last():
    rows = read(cell("Y", "Y", 0.45, step=100)).rows
    assert [(r.early, r.final) for r in rows if r.base == "Y"] == [(True, False), (False, True)]
    assert [(r.early, r.final) for r in rows if r.base == "X"] == [(False, True)]


def test_a_model_on_itself_is_not_in_the_matrix():
    found = read(cell("X", "X", 0.25, weight=0.65), cell("X", "Y", 0.45))
    assert [(r.base, r.model) for r in found.main()] == [("X", "Y")]


def test_cells_of_another_experiment_are_refused():
    with pytest.raises(LineageError, match="no model 'Z'"):
        read(cell("Z", "Y", 0.4))


def test_facts_of_a_world_are_read_from_its_truth():
    def model(name: str, parents: dict[str, float], relation: str = "finetune", root: str = "v") -> dict:
        ps = [{"name": p, "weight": w} for p, w in parents.items()]
        return {
            "name": name,
            "role": name,
            "root": root,
            "parents": ps,
            "relation": relation,
            "use": "base",
            "styles": [],
        }

    models = [model("v", {}, "root"), model("a", {"v": 1}), model("b", {"v": 1}), model("aa", {"a": 1})]
    models += [model("m", {"b": 0.3, "aa": 0.7}, "merge"), model("mm", {"m": 1}), model("s", {}, "root", "s")]
    facts = world_facts("w", {"models": models, "targets": ["ink"], "characters": {"mahiro": ["x"]}})
    assert {m.name: m.family for m in facts.models} == {
        "v": "v", "a": "a", "b": "b", "aa": "a", "m": "a", "mm": "a", "s": "s",
    }  # fmt: skip
    assert facts.models[4].parents == ("b", "aa")
    assert facts.targets == {"ink": "style", "mahiro": "character"}


@pytest.fixture(scope="module")
def drawn() -> Drawn:
    return draw(Plan(worlds=5), seed=1)


@pytest.fixture(scope="module")
def result(drawn) -> TransferResult:
    return transfer_result(drawn, shuffles=3)


def score(result: TransferResult, figure: str, predictor: str = PREDICTED, of: str = "strength") -> Score:
    (found,) = (s for s in result.statistics.scores if (s.predictor, s.of, s.figure) == (predictor, of, figure))
    return found


def test_the_record_survives_its_json(result):
    assert to_json(restore(TransferResult, json.loads(dumps(result)))) == to_json(result)


def test_the_sheet_holds_every_cell(result):
    rows = list(csv.DictReader(io.StringIO(cells_csv(result.cells))))
    assert len(rows) == len(result.cells)
    assert [float(r["loss"]) for r in rows] == [c.loss for c in result.cells]
    assert [r["base"] for r in rows] == [c.base or "" for c in result.cells]
    assert exports(result) == {"cells.csv": cells_csv(result.cells)}
    assert "'=1+1" in cells_csv([replace(result.cells[0], world="=1+1")])
    assert float(rows[3]["strength clip"]) == result.cells[3].strength_judges["clip"]


def test_the_hash_of_predictions_knows_values_but_no_order(drawn):
    ps = list(drawn.predictions)
    assert predictions_hash(ps) == predictions_hash(ps[::-1])
    assert predictions_hash(ps) != predictions_hash([replace(ps[0], strength=ps[0].strength + 1e-9), *ps[1:]])


def test_figures_count_pairs_of_one_root_without_controls(drawn):
    found = readings(drawn.cells, drawn.worlds, drawn.design)
    m, members = matrices(found, "lift")[0], found.members()
    mask = within(m, members)
    for i, x in enumerate(m.bases):
        for j, y in enumerate(m.models):
            a, b = members[m.world, x], members[m.world, y]
            assert mask[i, j] == (x != y and a.root == b.root and a.use != "control" != b.use)
    assert "permuted" in m.bases
    assert mask.sum() == 10 * 12 - 10


def test_tau_by_hand(result, drawn):
    """Oracle: scipy over the cells themselves."""
    world, model = drawn.worlds[0], "BP"
    foretold = {(p.world, p.base, p.model): p.strength for p in drawn.predictions}
    means: dict[str, list[float]] = {}
    for c in drawn.cells:
        if (c.world, c.target, c.model, c.network, c.weight) == (world.name, "ink", model, "loha", 0.65):
            means.setdefault(c.base or "", []).append(c.loss)
    kin = [m.name for m in world.models if m.use == "base" and m.name in means]
    taus = stats.kendalltau([-np.mean(means[x]) for x in kin], [foretold[world.name, x, model] for x in kin])
    (m,) = (
        m
        for m in matrices(readings(drawn.cells, drawn.worlds, drawn.design), "lift")
        if (m.world, m.target) == (world.name, "ink")
    )
    y, rows = m.models.index(model), [m.bases.index(x) for x in kin]
    ours = stats.kendalltau(m.values[rows, y], [foretold[world.name, x, model] for x in kin])
    assert ours[0] == pytest.approx(taus[0])
    assert score(result, "tau").worlds[world.name] > 0.5


def test_what_knows_nothing_scores_nothing(result):
    for name in (CONSTANT, LOSS_OF_MODEL):
        assert score(result, "tau", name).mean == score(result, "centred", name).mean == 0
    assert score(result, "centred", ADDITIVE).mean == 0
    assert score(result, "tau", ADDITIVE).mean > 0.1


def test_the_additive_oracle_has_not_seen_the_target_itself(drawn):
    found = readings(drawn.cells, drawn.worlds, drawn.design)
    measured = matrices(found, "lift")
    own = measured[0]
    other = [replace(own, values=own.values[::-1]), *measured[1:]]
    plain, changed = (predictors(found, drawn.predictions, "strength", ms)[ADDITIVE](own) for ms in (measured, other))
    assert np.isfinite(plain).any()
    np.testing.assert_array_equal(plain, changed)


def test_who_knows_the_bases_of_a_target_needs_only_the_prediction_besides(drawn):
    found = readings(drawn.cells, drawn.worlds, drawn.design)
    (own, *_) = matrices(found, "lift")
    mask = within(own, found.members())
    said = predictors(found, drawn.predictions, "strength", [])[PREDICTED](own)
    good = np.random.default_rng(0).normal(0, 1, len(own.bases))
    easy = np.random.default_rng(1).normal(0, 9, len(own.models))
    whole = replace(own, values=np.where(mask, 0.7 * said + good[:, None] + easy, np.nan))
    blind = replace(whole, values=np.where(np.arange(len(own.models)) == 3, np.nan, whole.values))
    for seen in (whole, blind):
        told = predictors(found, drawn.predictions, "strength", [])[TAUGHT](seen)
        off = np.where(mask, told - 0.7 * said - good[:, None], np.nan)[:, 3]
        assert np.nanstd(off) < 1e-9
    assert np.nanstd(np.where(mask, 0.7 * said - good[:, None], np.nan)[:, 3]) > 0.5


def test_a_good_prediction_is_found_good(result):
    assert score(result, "tau").mean > score(result, "tau", "cosine").mean
    assert score(result, "centred").mean > 0.8
    assert score(result, "regret").mean < score(result, "regret", CONSTANT).mean / 5
    assert 0.85 < (score(result, "tau").strict_share or 0) < 1.1
    assert result.statistics.permutation["tau"] == 1 / 500
    gains = {
        c.figure: c.difference for c in result.statistics.comparisons if (c.of, c.baseline) == ("strength", CONSTANT)
    }
    assert gains["tau"] == pytest.approx(score(result, "tau").mean)
    assert gains["regret"] == pytest.approx(score(result, "regret", CONSTANT).mean - score(result, "regret").mean)
    assert score(result, "tau", of="retention").mean > 0.4
    assert result.statistics.partial is not None
    assert result.statistics.partial.mean > 0.2


def test_kinds_and_measures_stand_apart(result):
    apart = {(s.of, s.measure, s.kind): s for s in result.statistics.apart}
    assert len(apart) == 12
    assert apart["strength", "lift", ""].worlds == score(result, "tau").worlds
    assert apart["strength", "lift", ""].ceiling == score(result, "tau").ceiling
    for w, value in apart["strength", "lift", ""].worlds.items():
        parts = [apart["strength", "lift", kind].worlds[w] for kind in ("style", "style", "character")]
        assert value == pytest.approx(np.mean(parts))  # two styles, one character
    assert apart["strength", "judge", ""].mean > 0.5


def test_controls_fail_and_true_pairs_do_not(result):
    found = {c.name: c for c in result.statistics.controls}
    assert len(found) == 3
    assert all(c.fails and abs(c.lift) < 0.1 and c.true_lift > 0.3 for c in found.values())


def test_judges_that_see_the_same_agree(result):
    found = {(a.a, a.b): a.value for a in result.statistics.agreements}
    assert found["judge clip", "judge net"] > 0.6
    assert found["retention clip", "retention net"] > 0.9


def test_more_seeds_raise_the_ceiling_and_none_leave_it_open():
    few, many, one = (
        statistics(d.cells, d.worlds, d.predictions, d.design, shuffles=0, permutations=0)
        for d in (draw(Plan(worlds=3, noise=0.15, seeds=n)) for n in (2, 6, 1))
    )
    ceilings = [next(s for s in found.scores if s.figure == "tau").ceiling for found in (few, many, one)]
    assert ceilings[2] is None
    assert one.ceiling_from.startswith("nothing")
    assert ceilings[1] is not None
    assert ceilings[0] is not None
    assert ceilings[0] + 0.05 < ceilings[1] < 1


def test_without_noise_the_ceiling_is_one():
    d = draw(Plan(worlds=3, noise=0.0))
    found = statistics(d.cells, d.worlds, d.predictions, d.design, shuffles=0, permutations=0)
    top = next(s for s in found.scores if (s.predictor, s.of, s.figure) == (PREDICTED, "strength", "tau"))
    assert top.ceiling == pytest.approx(1)
    assert top.share == pytest.approx(top.mean)
    assert top.strict_share == pytest.approx(top.mean)


def test_one_seed_is_halved_by_batches():
    d = draw(Plan(worlds=3, seeds=1))
    rng = np.random.default_rng(0)
    cells = [replace(c, losses=tuple((c.loss + rng.normal(0, 0.002, 8)).tolist())) for c in d.cells]
    found = statistics(cells, d.worlds, d.predictions, d.design, shuffles=0, permutations=0)
    assert found.ceiling_from == "halves of the held-out batches"
    top = next(s for s in found.scores if s.figure == "tau")
    assert top.ceiling is not None
    assert 0.3 < top.ceiling < 1


def test_seeds_need_not_be_the_same_for_every_base(drawn):
    """Crossed seeds: each adapter has numbers of its own."""
    crossed = [replace(c, seed=c.seed * 1000 + hash_of(c.base)) if c.base else c for c in drawn.cells]
    ours, theirs = (
        statistics(cells, drawn.worlds, drawn.predictions, drawn.design, shuffles=0, permutations=0)
        for cells in (crossed, drawn.cells)
    )
    assert to_json(ours) == to_json(theirs)


def hash_of(name: str) -> int:
    return sum(name.encode())


def test_neither_order_nor_names_matter(drawn, result):
    cells, predictions = list(drawn.cells), list(drawn.predictions)
    random.Random(0).shuffle(cells)
    random.Random(1).shuffle(predictions)
    found = statistics(cells, drawn.worlds, predictions, drawn.design, 0, 0)
    assert figures(found.scores) == pytest.approx(figures(result.statistics.scores))
    roles = [m.role for m in drawn.worlds[0].models]
    names = {role: f"{i:02d} {role[::-1]}" for i, role in enumerate(sorted(roles, key=lambda r: r[::-1]))}
    other = draw(Plan(worlds=5), seed=1, names=names)
    renamed = statistics(other.cells, other.worlds, other.predictions, other.design, shuffles=0, permutations=0)
    assert figures(renamed.scores) == pytest.approx(figures(result.statistics.scores))


def figures(scores: tuple[Score, ...]) -> list[float]:
    return [x for s in scores for x in (s.mean, s.median, s.ceiling or 0, *s.worlds.values())]
