"""The claims: what a verdict takes, power where there is an effect, silence where there is none."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from synthetic_transfer import Plan, draw

from lineage.contrasts import Frame, Pick, contrast, frame
from lineage.hypotheses import CLAIMS, SETUPS, Claim
from lineage.transfer_measures import STRENGTH, Reading, readings
from lineage.transfer_records import (
    CONTRADICTED,
    DEFAULT,
    NOT_TESTABLE,
    SUPPORTED,
    UNDECIDED,
    VERDICTS,
    Design,
    Hypothesis,
    Member,
    WorldFacts,
)
from lineage.verdicts import FEWEST_WORLDS, hypotheses, table_false_positives


def framed(plan: Plan, seed: int = 0) -> Frame:
    d = draw(plan, seed)
    return frame(readings(d.cells, d.worlds, d.design))


@pytest.fixture(scope="module")
def found() -> dict[str, Hypothesis]:
    return {h.key: h for h in hypotheses(framed(Plan()))}


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda c: c.key)
def test_every_claim_is_whole(claim):
    assert claim.says
    assert claim.article
    assert claim.test
    assert {p.setup for p in picks(claim)} <= set(SETUPS)
    assert claim.needs or claim.a != claim.b


def picks(claim: Claim) -> tuple[Pick, ...]:
    return (claim.a, claim.b, *(claim.beyond or ()))


def test_keys_are_their_own_and_all_setups_are_used():
    assert len({c.key for c in CLAIMS}) == len(CLAIMS)
    assert {p.setup for c in CLAIMS for p in picks(c)} == set(SETUPS)


def test_every_claim_gets_a_row_with_a_known_verdict(found):
    assert [*found] == [c.key for c in CLAIMS]
    assert {h.verdict for h in found.values()} <= set(VERDICTS)
    assert all(h.reason for h in found.values())


def test_what_was_not_measured_is_not_judged(found):
    for key in ("photo", "larger", "cosine", "outfits"):
        assert found[key].verdict == NOT_TESTABLE
        assert found[key].effect is found[key].p is found[key].adjusted_p is None
    assert "NED, ChilloutMix" in found["photo"].reason
    assert "cosine" in found["cosine"].reason


def test_what_holds_is_found(found):
    for key in ("family", "root", "pastel", "merge-parents", "speed"):
        assert found[key].verdict == SUPPORTED
        assert found[key].adjusted_p <= 0.05
        assert found[key].worlds == 8
    assert found["family"].effect == pytest.approx(0.276, abs=0.1)
    assert found["family"].low < found["family"].effect < found["family"].high


def test_the_reverse_is_contradicted():
    """The table's own claims about families, turned round."""
    turned = [replace(c, a=c.b, b=c.a) for c in CLAIMS if c.key in ("family", "pastel")]
    assert [h.verdict for h in hypotheses(framed(Plan()), turned)] == [CONTRADICTED] * 2


def test_a_few_worlds_give_no_verdict():
    for h in hypotheses(framed(Plan(worlds=FEWEST_WORLDS - 1))):
        assert h.verdict in (UNDECIDED, NOT_TESTABLE)
        assert h.p is None


def with_values(measures: dict[str, float], worlds: int = 8) -> Frame:
    """X on Y and Y on X in every world, X above Y by the given amount in each measure, a little noise on it."""
    rng = np.random.default_rng(0)
    d = draw(Plan(worlds=worlds))
    rows = []
    for w in d.worlds:
        up = {m: v + rng.normal(0, 0.001) for m, v in measures.items()}
        plain = dict.fromkeys(measures, 0.0)
        for x, y, found in (("AC", "BP", up), ("BP", "AC", plain)):
            rows.append(Reading(w.name, "ink", "style", "loha", DEFAULT, x, y, 0.65, True, False, found))
    base = readings(d.cells, d.worlds, d.design)
    return frame(replace(base, rows=tuple(rows)))


CHAIN = [c for c in CLAIMS if c.key == "up-strength"]


@pytest.mark.parametrize("signs", list(product((1, -1), repeat=3)))
def test_a_direction_needs_every_measure(signs):
    measures: dict[str, float] = dict(zip(STRENGTH, (0.1 * s for s in signs), strict=True))
    (h,) = hypotheses(with_values(measures), CHAIN)
    if len(set(signs)) == 1:
        assert h.verdict == (SUPPORTED if signs[0] > 0 else CONTRADICTED)
    else:
        assert h.verdict == UNDECIDED
        assert h.reason.startswith("It depends on the measure")


def test_the_weakest_measure_decides():
    sure = {"lift": 0.1, "drop": 0.1}
    (h,) = hypotheses(with_values({**sure, "closeness": 0.0}), CHAIN)
    assert h.verdict == UNDECIDED
    assert h.p == max(e.p for e in h.effects if e.p is not None)


def test_a_measure_that_was_not_taken_leaves_strength_open():
    (h,) = hypotheses(with_values({"lift": 0.1, "drop": 0.1}), CHAIN)
    assert h.verdict == NOT_TESTABLE


@pytest.mark.parametrize(("difference", "verdict"), [(0.02, SUPPORTED), (0.1, UNDECIDED), (0.2, CONTRADICTED)])
def test_no_difference_is_a_claim_too(difference, verdict):
    claim = replace(CHAIN[0], measures=("lift",), margin=0.1)
    (h,) = hypotheses(with_values({"lift": difference}), [claim])
    assert h.verdict == verdict


@pytest.mark.parametrize(("difference", "verdict"), [(0.1005, UNDECIDED), (0.102, CONTRADICTED)])
def test_that_two_things_differ_is_corrected_for_the_table_as_all_else_is(difference, verdict):
    claim = replace(CHAIN[0], measures=("lift",), margin=0.1)
    rest = 39 * [replace(claim, margin=difference)]
    h = hypotheses(with_values({"lift": difference}), [claim, *rest])[0]
    assert h.p is not None
    assert h.p < 0.01
    assert h.verdict == verdict


def test_beyond_is_a_difference_of_differences():
    """Up over down, less down over up: twice the effect."""
    up = replace(CHAIN[0], measures=("lift",))
    twice = replace(up, beyond=(up.b, up.a))
    found = hypotheses(with_values({"lift": 0.1}), [up, twice])
    assert found[1].effect == pytest.approx(2 * (found[0].effect or 0))
    none = replace(up, beyond=(up.a, up.b))
    assert hypotheses(with_values({"lift": 0.1}), [none])[0].effect == pytest.approx(0)


@pytest.mark.parametrize("claim", [c for c in CLAIMS if not c.needs], ids=lambda c: c.key)
def test_a_contrast_is_the_loop_it_stands_for(claim):
    """Oracle: plain loops over the readings."""
    d = draw(Plan(worlds=2, targets=(("ink", "style"), ("mahiro", "character"))), 3)
    found = readings(d.cells, d.worlds, d.design)
    ours = contrast(frame(found), claim.a, claim.b, claim.by, claim.measures[0])
    assert ours == pytest.approx(slow_contrast(found.rows, d.worlds, d.design, claim, claim.measures[0]))


def slow_contrast(rows, worlds, design: Design, claim: Claim, measure: str) -> dict[str, float]:
    members = {(w.name, m.name): m for w in worlds for m in w.models}
    groups: dict[tuple, tuple[list, list]] = {}
    for r in rows:
        x, y = members[r.world, r.base], members[r.world, r.model]
        key = [r.world]
        for by in claim.by:
            key.append(
                {"target": r.target, "base": r.base, "model": r.model, "family": x.family}.get(by)
                or "/".join(sorted((r.base, r.model)))
            )
        for side, pick in enumerate((claim.a, claim.b)):
            if measure in r.values and meant(r, x, y, pick, design, {w.name: w for w in worlds}[r.world]):
                groups.setdefault(tuple(key), ([], []))[side].append(r.values[measure])
    differences: dict[str, list[float]] = {}
    for key, (a, b) in groups.items():
        if a and b:
            differences.setdefault(key[0], []).append(float(np.mean(a) - np.mean(b)))
    return {w: float(np.mean(ds)) for w, ds in differences.items()}


def meant(r: Reading, x: Member, y: Member, pick: Pick, design: Design, world: WorldFacts) -> bool:
    parents = {m.name: m.parents for m in world.models}

    def above(name: str) -> set[str]:
        return set(parents[name]).union(*(above(p) for p in parents[name]))

    plain, kin = "control" not in (x.use, y.use), x.root == y.root and x.name != y.name
    relation = {
        "the same model": x.name == y.name,
        "another model": plain and x.name != y.name,
        "other root": x.root != y.root and "permuted" not in (x.relation, y.relation),
        "same root": plain and kin,
        "same family": plain and kin and x.family == y.family,
        "other family": plain and kin and x.family != y.family,
        "ancestor": plain and kin and x.name in above(y.name),
        "descendant": plain and kin and y.name in above(x.name),
        "merge of it": plain and kin and x.relation == "merge" and y.name in x.parents,
        "no merge of it": plain and kin and not (x.relation == "merge" and y.name in x.parents),
    }[pick.relation]
    roles = all(
        (not wanted or m.role in wanted) and m.role not in but
        for m, wanted, but in ((x, pick.bases, pick.but_bases), (y, pick.models, pick.but_models))
    )
    weight = design.weight if pick.weight == "main" else design.reference_weight
    return (
        relation and roles and pick.kind in ("", r.kind) and r.setup == pick.setup and r.weight == weight
        and r.network == (pick.network or design.network) and (r.final if pick.moment == "final" else r.early)
    )  # fmt: skip


def test_a_shuffle_moves_labels_and_no_measurement():
    f = framed(Plan(worlds=2))
    shuffled = f.shuffled(np.random.default_rng(0))
    assert sorted(shuffled.kin.roles) == sorted(f.kin.roles)
    assert shuffled.kin.roles != f.kin.roles
    for name, table in f.kin.relations.items():
        assert shuffled.kin.relations[name].sum() == table.sum()
    for at in np.unique(f.shelves):
        on = np.flatnonzero(f.shelves == at)
        assert sorted(shuffled.kin.roles[i] for i in on) == sorted(f.kin.roles[i] for i in on)
    assert shuffled.values is f.values


def test_shuffled_trees_are_seldom_spoken_of():
    """150 deals of labels on data where the tree matters: 5 % may give a verdict, three standard errors are allowed."""
    hits = table_false_positives(framed(Plan(worlds=10), 5), 150, np.random.default_rng(0))
    assert hits / 150 <= 0.05 + 3 * (0.05 * 0.95 / 150) ** 0.5


@pytest.mark.slow
def test_worlds_without_an_effect_are_seldom_spoken_of():
    """60 experiments in which the tree does nothing; the claims about the tree, adjusted together."""
    claims = [c for c in CLAIMS if c.of_the_tree]
    spoken = sum(
        any(
            h.verdict in (SUPPORTED, CONTRADICTED)
            for h in hypotheses(framed(Plan(worlds=6, effect=0.0, seeds=1), seed), claims)
        )
        for seed in range(60)
    )
    assert spoken <= 8
