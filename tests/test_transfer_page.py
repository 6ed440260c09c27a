"""The page of a transfer experiment: its words follow the figures, its axes the tree, its pictures the rules."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from synthetic_transfer import PIXEL, ROLES, Plan, draw, transfer_result
from test_reports import Elements

from lineage.results import dumps, to_json
from lineage.transfer_records import (
    CONTRADICTED,
    NOT_TESTABLE,
    SUPPORTED,
    UNDECIDED,
    Comparison,
    Control,
    Failed,
    Hypothesis,
    Member,
    TransferResult,
    WorldFacts,
)  # fmt: skip
from reports.build import build
from reports.embedding import embedded
from reports.kin_matrix import branches
from reports.page import visible
from reports.tables import show
from reports.transfer_figures import effect_dots, pair_means, predictor_dots, shown_world, speed_curves
from reports.transfer_page import View
from reports.transfer_words import answer, claims_words, findings

HOSTILE = {
    "NAI": "</script><script>window.__pwned=1</script>",
    "AC": "<img src=x onerror=window.__pwned=2>",
    "BP": "x\u202egnp.\x1b[31m",
    "AOM": "@ink",
    "nep": "__proto__",
    "RacyMix": "very_long_name_" * 20,
}


@pytest.fixture(scope="module")
def result() -> TransferResult:
    return transfer_result(draw(Plan(worlds=5)), 3, samples="pictures/a.png")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    found = tmp_path_factory.mktemp("result")
    (found / "pictures").mkdir()
    (found / "pictures" / "a.png").write_bytes(PIXEL)
    return found


@pytest.fixture(scope="module")
def text(result, folder) -> str:
    return build(json.loads(dumps(result)), folder)


def payload(text: str) -> dict:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert found
    return json.loads(found[1])


def test_the_page_holds_every_section_and_loads_nothing(text):
    heads = re.findall(r"<h2>(.*?)</h2>", text)
    assert heads == [
        "Where an adapter works", "Predicted against measured", "The prediction and simpler ones",
        "The article&#x27;s claims", "Pictures", "How fast training goes", "Requirements, controls, judges",
        "What lies behind",
        "Where these numbers come from",
    ]  # fmt: skip
    assert not re.findall(r'(?:src|href)="(?!data:)', text.split('<script type="application/json"')[0])


def test_every_pair_has_a_square_that_says_its_number(result, text):
    view = View(result)
    pairs = pair_means(view.found, shown_world(result), "lift")
    assert len(pairs) > 100
    for (x, y), values in list(pairs.items())[::7]:
        assert f"{x} on {y}: lift {sum(values) / len(values):.3f}." in text


def test_every_claim_is_on_the_page(result, text):
    for h in result.hypotheses:
        assert visible(h.claim).replace("'", "&#x27;") in text


def test_dropped_columns_are_listed(result, folder):
    cells = tuple(
        replace(c, loss=0.5) if (c.world, c.target, c.model, c.base) == ("world-1", "ink", "BP", "BP") else c
        for c in result.cells
    )
    dropped = View(replace(result, cells=cells)).found.dropped
    assert [(d.world, d.target, d.model) for d in dropped] == [("world-1", "ink", "BP")]
    text = build(json.loads(dumps(replace(result, cells=cells, dropped=dropped))), folder)
    assert "Dropped (1)" in text
    assert dropped[0].reason in text


def test_diverged_trainings_are_listed(result, folder, capsys):
    lost = Failed("world-1", "ink<b>", "BP", "loha, dadaptation", 0, "The loss of step 22 is nan.")
    failed = replace(result, failed=(lost,))
    text = build(json.loads(dumps(failed)), folder)
    assert "Trainings that diverged (1)" in text
    assert "ink&lt;b&gt;" in text
    show(to_json(failed), 0)
    shown = " ".join(capsys.readouterr().out.split())
    assert "ink<b> on BP, loha, dadaptation, seed 0: The loss of step 22 is nan." in shown


def test_a_model_whose_strength_is_dropped_still_shows_its_retention(result, folder):
    world = shown_world(result)
    cells = tuple(
        replace(c, loss=0.5) if (c.world, c.model, c.base) == (world, "BP", "BP") else c for c in result.cells
    )
    shown = replace(result, cells=cells)
    assert ("NAI", "BP") not in pair_means(View(shown).found, world, "lift")
    text = build(json.loads(dumps(shown)), folder)
    assert "NAI on BP: not measured, or dropped." in text
    assert "NAI on BP: kept 0." in text


def test_axes_follow_the_tree(result):
    facts = result.worlds[0]
    rows = branches(facts, [m.name for m in facts.models])
    assert sorted(b.member.name for b in rows) == sorted(ROLES)
    for b in rows:
        if b.parent >= 0:
            assert rows[b.parent].member.name in b.member.parents
            assert rows[b.parent].depth == b.depth - 1
        else:
            assert b.depth == 0
    names = [b.member.name for b in rows]
    within = [names.index(n) for n in ("AC", "BP", "NMFSAN")]
    assert within == list(range(within[0], within[0] + 3))


def test_a_parent_that_is_not_drawn_is_passed_over():
    chain = [Member("a", "", "a", "a"), Member("b", "", "a", "a", ("a",)), Member("c", "", "a", "a", ("b",))]
    rows = branches(WorldFacts("w", tuple(chain), {}), ["c", "a"])
    assert [(b.member.name, b.depth, b.parent) for b in rows] == [("a", 0, -1), ("c", 1, 0)]


def test_a_circle_in_an_edited_file_ends():
    circle = [Member("a", "", "a", "a", ("b",)), Member("b", "", "a", "a", ("a",))]
    assert branches(WorldFacts("w", tuple(circle), {}), ["a"])[0].parent == -1


def test_figures_hold_what_the_result_holds(result):
    scores = [s for s in result.statistics.scores if (s.of, s.figure) == ("strength", "tau")]
    drawn = predictor_dots(scores)["data"][1]
    assert sorted(drawn["x"]) == sorted(s.mean for s in scores)
    assert drawn["x"][0] == max(drawn["x"])
    regret = predictor_dots([s for s in result.statistics.scores if s.figure == "regret" and s.of == "strength"])
    assert regret["data"][1]["x"][0] == min(regret["data"][1]["x"])
    measured = [h for h in result.hypotheses if h.effect is not None]
    assert effect_dots(result.hypotheses)["data"][0]["x"] == sorted((h.effect for h in measured), reverse=True)


def test_an_effect_beyond_a_whole_lift_lies_at_the_edge_and_says_its_size(result):
    small, far = [
        replace(h, effect=x, low=x - 1, high=x + 1) for h, x in zip(result.hypotheses, (0.5, -5), strict=False)
    ]
    drawn = effect_dots([far, small])["data"][0]
    assert drawn["x"] == [0.5, -1]
    assert drawn["marker"]["symbol"] == ["circle", "triangle-left"]
    assert (drawn["error_x"]["arrayminus"], drawn["error_x"]["array"]) == ([1, 0], [0.5, 0])
    assert drawn["customdata"][1][1] == "-5.000 (-6.000 to -4.000)"


def test_speed_is_the_share_of_the_final_gain(result):
    curves = speed_curves(result, View(result).found, {})
    assert curves is not None
    for curve in curves["data"]:
        assert curve["x"] == [0, 100, 200]
        assert curve["y"][0] == 0
        assert curve["y"][1] == pytest.approx(0.6, abs=0.05)
        assert curve["y"][2] == pytest.approx(1)
    last = [c for c in result.cells if c.step != 100]
    assert speed_curves(replace(result, cells=tuple(last)), View(result).found, {}) is None


def scored(result: TransferResult, p: float | None, mean: float) -> TransferResult:
    scores = tuple(
        replace(s, p=p, mean=mean) if (s.of, s.figure, s.predictor) == ("strength", "tau", "predicted") else s
        for s in result.statistics.scores
    )
    return replace(result, statistics=replace(result.statistics, scores=scores))


@pytest.mark.parametrize(
    ("p", "mean", "words"),
    [
        (0.01, 0.5, "ranks the bases"),
        (0.2, 0.5, "does not rank"),
        (0.01, -0.5, "does not rank"),
        (None, 0.5, "too few"),
    ],
)
def test_the_headline_follows_the_figure(result, p, mean, words):
    assert words in answer(scored(result, p, mean))


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (0.01, 0.3, "the prediction is better"),
        (-0.3, -0.1, "it is better than"),
        (-0.1, 0.2, "tied"),
        (None, None, "few"),
    ],
)
def test_a_tie_is_called_a_tie(result, low, high, words):
    c = Comparison("predicted", "minus distance", "strength", "tau", 0.1, low, high, 0.5)
    found = replace(result, statistics=replace(result.statistics, comparisons=(c,)))
    assert words in findings(found)[0]


def test_a_control_that_works_is_not_kept_quiet(result):
    bad = Control("a permuted copy", 0.9, 0.8, 1.0, 0.9, False, "does not clearly fail")
    found = replace(result, statistics=replace(result.statistics, controls=(bad,)))
    assert "Against expectation, something comes of a permuted copy." in findings(found)[0]


def claim(key: str, verdict: str, reason: str = "") -> Hypothesis:
    return Hypothesis(key, f"Claim {key}", "transfer", "", "", 0.1, None, None, 0.5, 0.5, verdict, reason)


def test_verdicts_choose_the_words():
    found = [
        claim("a", SUPPORTED),
        claim("b", CONTRADICTED),
        claim("c", UNDECIDED, "It depends on the measure: x."),
        claim("d", NOT_TESTABLE),
    ]
    said = " ".join(claims_words(found))
    assert "1 supported, 1 contradicted, 1 undecided, 1 not testable" in said
    assert "Held: claim a." in said
    assert "Did not hold: claim b." in said
    assert "1 claim would turn with the measure" in said
    assert "Held" not in " ".join(claims_words([claim("d", NOT_TESTABLE)]))


def test_an_empty_experiment_has_a_page_that_says_so():
    d = draw(Plan(worlds=1, seeds=1))
    bare = transfer_result(replace(d, cells=(), predictions=()), 0)
    assert "Nothing was measured" in build(json.loads(dumps(bare)))
    assert bare.statistics.false_positives is None


def test_names_are_escaped_everywhere(folder):
    hostile = transfer_result(draw(Plan(worlds=3), names=HOSTILE), 0, samples="pictures/a.png")
    hostile = replace(hostile, notes=tuple(HOSTILE.values()), runs=("<b>run</b>",))
    text = build(json.loads(dumps(hostile)), folder)
    body = Elements(text.split('<script type="application/json"')[0])
    assert not {"script", "iframe"} & {tag for tag, _ in body.found}
    assert not [name for _, attributes in body.found for name in attributes if name.startswith("on")]
    assert "\u202e" not in text
    assert "\x1b" not in text


def test_pictures_are_embedded_once_and_only_from_the_folder(folder, tmp_path):
    (tmp_path / "outside.png").write_bytes(PIXEL)
    (folder / "page.html").write_text("<script>", encoding="utf-8")
    names = [
        "pictures/a.png",
        "pictures/a.png",
        "../outside.png",
        str(tmp_path / "outside.png"),
        "page.html",
        "no.png",
        "\0",
    ]
    found = embedded(folder, names)
    assert [*found] == ["pictures/a.png"]
    assert found["pictures/a.png"].startswith("data:image/png;base64,")
    assert embedded(None, names) == {}


def test_a_picture_stands_in_the_page_once(text):
    assert [*payload(text)["pictures"]] == ["pictures/a.png"]
    assert text.count(base64.b64encode(PIXEL).decode()) == 1


def test_the_terminal_says_the_same(result, capsys):
    show(to_json(result), 0)
    shown = " ".join(capsys.readouterr().out.split())
    assert answer(result) in shown
    assert result.statistics.bars[0].name in shown
