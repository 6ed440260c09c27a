"""Pages from results: hostile strings stay text, nothing loads from outside, wrong input is named by its place."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import plotly.graph_objects as go
import pytest
from synthetic import HOSTILE, merge_result, svd_result

from lineage.errors import LineageError
from lineage.records import restore
from lineage.results import SvdResult, dumps, to_json
from reports import wording
from reports.build import build
from reports.figures import energy_curves, natural, short_side
from reports.merge_page import merge_page
from reports.page import Page, Safe, assemble, h, plot_text, script_json, visible
from reports.svd_page import svd_page
from reports.tour_page import Stop, tour
from reports.tree import drawing, factors


@pytest.fixture(scope="module")
def result() -> SvdResult:
    return svd_result(limit=40)


@pytest.fixture(scope="module")
def text(result) -> str:
    return build(json.loads(dumps(result)))


class Elements(HTMLParser):
    """Every element with its attributes, and the text of the page outside scripts and styles."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.words, self._inside = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        self._inside = tag

    def handle_data(self, data):
        if self._inside not in ("script", "style"):
            self.words.append(data)


def test_a_record_survives_its_json(result):
    assert restore(SvdResult, json.loads(dumps(result))).summary == result.summary
    assert to_json(restore(SvdResult, to_json(result))) == to_json(result)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("layers", 3, "frobenius"), "<b>", "result.layers[3].frobenius"),
        (("layers", 0, "shape"), [1, "x"], "result.layers[0].shape[1]"),
        (("layers",), {}, "result.layers"),
        (("summary", "k"), True, "result.summary.k"),
        (("summary", "median_signal_rank"), float("nan"), "result.summary.median_signal_rank"),
        (("provenance",), None, "result.provenance"),
        (("notes",), ["fine", 3], "result.notes[1]"),
    ],
)
def test_a_misfit_is_named_by_its_place(result, path, value, said):
    found = to_json(result)
    place = found
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    with pytest.raises(LineageError, match=re.escape(said)):
        build(found)


def test_a_missing_field_and_an_unknown_kind_are_refused(result):
    found = to_json(result)
    del found["layers"]
    with pytest.raises(LineageError, match="lacks layers"):
        build(found)
    with pytest.raises(LineageError, match="no page for kind 'tea'"):
        build({"kind": "tea"})


def test_fields_of_a_later_schema_are_ignored(result, text):
    assert build({**to_json(result), "invented_later": [1]}) == text


def test_nothing_is_loaded_from_outside(text):
    for tag, attributes in Elements(text).found:
        assert not {"src", "action", "background", "poster"} & set(attributes), (tag, attributes)
        assert attributes.get("href", "data:,") == "data:,"
        assert not [name for name in attributes if name.startswith("on")]


def test_only_our_scripts_may_run(text):
    policy = next(a["content"] for t, a in Elements(text).found if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    ran = [body for attributes, body in re.findall(r"<script([^>]*)>(.*?)</script>", text, re.S) if not attributes]
    digests = [base64.b64encode(hashlib.sha256(body.encode()).digest()).decode() for body in ran]
    assert re.findall(r"'sha256-([^']+)'", policy) == digests
    assert len(digests) == 3
    assert "default-src 'none'" in policy
    assert "unsafe-inline" not in policy.split("script-src")[1].split(";")[0]


def test_hostile_names_make_no_element(text):
    made = [tag for tag, _ in Elements(text).found]
    assert not {"img", "a", "iframe", "object", "u", "svg"} & set(made)
    assert made.count("script") == 4
    assert made.count("b") == 2  # base and tuned


def test_hostile_names_reach_the_scripts_whole(result, text):
    payload = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert payload
    names = json.loads(payload[1])["layers"]["name"]
    assert sorted(names) == sorted(visible(x.name) for x in result.layers)
    assert {visible(n) for n in HOSTILE} <= set(names)


@pytest.mark.parametrize("name", HOSTILE)
def test_every_way_out_is_escaped(name):
    element = h("p", name, title=name)
    parsed = Elements(element)
    assert parsed.found == [("p", {"title": visible(name)})]
    assert "".join(parsed.words) == visible(name)
    assert not re.search(r"[<>&\u2028\u2029\ud800]", script_json([name]))
    assert "<" not in plot_text(name)
    assert html.unescape(plot_text(name, 10**6)) == visible(name)
    element.encode()


def test_markup_is_not_escaped_twice():
    assert h("p", h("b", "a < b"), None, ["c", Safe("&amp;")]) == "<p><b>a &lt; b</b>c&amp;</p>"


def test_a_page_without_scripts_allows_none():
    assert "script-src 'none'" in html.unescape(assemble(Page("t", (h("p", "x"),))))


def test_the_answer_and_its_reasons_are_said(result, text):
    words = " ".join("".join(Elements(text).words).split())
    assert " ".join(result.summary.answer.replace("\u00a0", " ").split()) in words
    for said in (
        "below storage precision",
        "this solver cannot know it",
        "Gaussian",
        "bit for bit",
        "lineage svd v1-5",
    ):
        assert said in words
    for record in result.provenance.inputs.values():
        assert record["sha256"] in words


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_merge_is_told_whole(dry_run):
    made = merge_result(dry_run=dry_run)
    page = build(json.loads(dumps(made)))
    elements = Elements(page)
    words = " ".join("".join(elements.words).split())
    tags = [tag for tag, _ in elements.found]
    assert tags.count("svg") == 1
    adapters = sum(len(s.adapters) for s in made.steps)
    assert tags.count("rect") == len(made.inputs) + len(made.steps) + adapters
    assert tags.count("path") == sum(len(s.inputs) for s in made.steps) + adapters
    assert tags.count("script") == 3
    assert words.index(made.warnings[0]) < words.index("The merge tree")
    assert "add up to 5" in words.split("The merge tree")[0]
    assert made.recipe.splitlines()[1] in words
    for said in ("only in a later operand", "kept, and left in single precision", "style<i>.safetensors", "A dry run"):
        assert (said in words) == (dry_run or said != "A dry run")


def test_a_step_says_what_it_multiplies_with():
    steps = merge_result().steps
    assert factors(steps[0]) == ("0.5", "0.5")
    assert factors(steps[-1]) == ("1", "3", "-3")
    assert factors(replace(steps[0], method="unheard of")) == ("", "")


def test_a_broken_tree_is_refused():
    found = to_json(merge_result())
    for steps in ([99, None], [None], [0, None], [-1, None]):
        found["steps"][0]["from_steps"] = steps
        with pytest.raises(LineageError, match=r"steps\[0\]"):
            build(found)


def test_no_two_boxes_of_a_tree_overlap():
    boxes = [
        {k: float(a[k] or 0) for k in ("x", "y", "width", "height")}
        for tag, a in Elements(drawing(merge_result())).found
        if tag == "rect"
    ]
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            beside = a["x"] >= b["x"] + b["width"] or b["x"] >= a["x"] + a["width"]
            assert beside or a["y"] >= b["y"] + b["height"] or b["y"] >= a["y"] + a["height"]


@pytest.mark.parametrize("limit", [0, 1, 40])
def test_figures_are_what_plotly_knows(limit):
    page = svd_page(svd_result(limit=limit, hostile=limit > 0))
    for name, figure in page.data["figures"].items():
        known = json.loads(re.sub(r'"@[a-z-]+"', '"#123456"', json.dumps(figure)))
        assert go.Figure(known), name


def test_merge_figures_are_what_plotly_knows():
    for name, figure in merge_page(merge_result()).data["figures"].items():
        assert go.Figure(json.loads(re.sub(r'"@[a-z-]+"', '"#123456"', json.dumps(figure)))), name


def test_curves_count_only_changed_layers_of_short_side_above_k(result):
    values = [x.energy["64"].value for x in result.layers if x.frobenius > 0 and short_side(x.shape) > 64]
    raw = next(t for t in energy_curves(result)["data"] if t.get("name") == "raw delta")
    assert sorted(values)[0] <= raw["y"][-1] <= sorted(values)[-1]
    assert raw["x"] == [1, 2, 4, 8, 16, 32, 64]


def test_unknown_numbers_stay_unknown(result):
    rows = svd_page(result).data["layers"]
    for at, name in enumerate(rows["name"]):
        layer = next(x for x in result.layers if visible(x.name) == name)
        assert rows["signal_rank"][at] == layer.signal_rank
        assert rows["k_99"][at] == layer.k_99
        assert rows["values"][at] == pytest.approx(layer.singular_values, rel=1e-3)


def test_without_a_base_the_change_is_unknown():
    found = to_json(svd_result(limit=3, hostile=False))
    found["summary"]["relative"], found["base"] = None, ""
    for group in found["summary"]["blocks"].values():
        group["relative"] = None
    for layer in found["layers"]:
        layer["relative"] = None
    page = build(found)
    assert page.count("no base weights to compare with") == 2
    assert '"relative":[null,null,null]' in page


def test_blocks_are_in_model_order():
    names = ["OUT2", "IN10", "IN2", "TIME", "M00"]
    assert sorted(names, key=natural) == ["IN2", "IN10", "M00", "OUT2", "TIME"]


@pytest.mark.parametrize(
    ("write", "value", "said"),
    [
        (wording.percent, 0.02934, "2.93 %"),
        (wording.percent, 1.0, "100 %"),
        (wording.percent, 0.0, "0 %"),
        (wording.percent, None, "unknown"),
        (wording.percent, 1e-7, "1.0e-05 %"),
        (wording.percent, 9.8e-5, "0.0098 %"),
        (wording.number, 12.0, "12"),
        (wording.number, 1.2345, "1.23"),
        (wording.size, 2132625432, "2.13 GB"),
        (wording.size, 999, "999 bytes"),
    ],
)
def test_numbers_in_words(write, value, said):
    assert write(value) == said


def test_a_page_needs_no_torch():
    code = (
        "import sys, reports.build, lineage.results; sys.exit('torch' in sys.modules or 'safetensors' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_large_result_stays_small():
    """Spectra travel once: 700 layers of 256 values may not double the page beyond plotly's own size."""
    big = svd_result(limit=40)
    many = to_json(big)
    many["layers"] = [{**many["layers"][i % 40], "name": f"unet.{i}"} for i in range(700)]
    assert len(build(many)) < 8_500_000


def test_a_tour_shows_what_each_stop_has_and_escapes_it():
    stops = [Stop("One", HOSTILE[0], HOSTILE[1], b"png", "one/report.html"), Stop("Two", "words")]
    page = tour("Round", stops)
    assert page.count("<section>") == 2
    assert page.count("<img ") == page.count("<a ") == 1
    assert 'href="one/report.html"' in page
    assert not any(hostile in page for hostile in HOSTILE[:2])
    assert all(html.escape(hostile) in page for hostile in HOSTILE[:2])
