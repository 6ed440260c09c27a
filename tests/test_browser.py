"""The page in a real browser: nothing fails, nothing leaves, a click shows the right layer, nothing overflows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from synthetic import HOSTILE, merge_result, svd_result
from synthetic_cluster import HOSTILE_NAMES, cluster_result
from synthetic_prediction import predict_result
from synthetic_transfer import PIXEL, Plan, draw, transfer_result
from test_transfer_page import HOSTILE as HOSTILE_MODELS

from lineage.results import dumps
from reports.build import build
from reports.page import visible

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(
    filter(
        None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome"])
    ),
    None,
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome on the PATH")
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with sync_api.sync_playwright() as p:
        found = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield found
        found.close()


@pytest.fixture(scope="module")
def svd_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("page") / "svd.html"
    path.write_text(build(json.loads(dumps(svd_result()))), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def merge_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("page") / "merge.html"
    path.write_text(build(json.loads(dumps(merge_result()))), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def cluster_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("page") / "cluster.html"
    path.write_text(build(json.loads(dumps(cluster_result(60, hostile=True)))), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def transfer_file(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    (folder / "a.png").write_bytes(PIXEL)
    result = transfer_result(draw(Plan(worlds=3), names=HOSTILE_MODELS), 0, samples="a.png")
    (folder / "transfer.html").write_text(build(json.loads(dumps(result)), folder), encoding="utf-8")
    return folder / "transfer.html"


@pytest.fixture(scope="module")
def predict_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("page") / "predict.html"
    path.write_text(build(json.loads(dumps(predict_result((*HOSTILE_NAMES, "a", "b", "c"))))), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def open_page(browser) -> Iterator:
    """open_page(file, width, scheme) -> (page, faults); each opened once, that costs seconds."""
    pages = {}

    def opened(file: Path, width: int, scheme: str):
        if (file, width, scheme) not in pages:
            page, faults = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme), []
            page.on("console", lambda m: faults.append(m.text) if m.type in ("error", "warning") else None)
            page.on("pageerror", lambda e: faults.append(str(e)))
            page.on("requestfailed", lambda r: faults.append(r.url))
            page.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else faults.append(r.url))
            page.on("dialog", lambda d: faults.append(d.message))
            page.goto(file.as_uri())
            pages[file, width, scheme] = page, faults
        return pages[file, width, scheme]

    yield opened
    for page, _ in pages.values():
        page.close()


@pytest.fixture
def visit(open_page) -> Iterator:
    """visit(file, width, scheme) -> page; at the end nothing may have failed, gone out or run that should not."""
    seen = []

    def visited(file: Path, width: int = 1400, scheme: str = "light"):
        seen.append(open_page(file, width, scheme))
        page = seen[-1][0]
        page.evaluate("scrollTo(0, 0)")
        return page

    yield visited
    assert [faults for _, faults in seen] == [[]] * len(seen)
    assert [page.evaluate("window.__pwned") for page, _ in seen] == [None] * len(seen)


def wait(page, condition: str) -> None:
    """Polls from outside: the page's own policy forbids the evaluation that playwright's wait_for_function needs."""
    for _ in range(100):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"never true: {condition}")


def name(page) -> str:
    return page.inner_text("#detail-name")


def drawn(page) -> list[float]:
    """The singular values that the spectrum's curve shows."""
    return page.evaluate("document.getElementById('plot-spectrum').data[0].y")


def column(page, at: int) -> list[str]:
    return page.eval_on_selector_all(f"#rows tr:not([hidden]) td:nth-child({at})", "c => c.map(x => x.textContent)")


@pytest.mark.parametrize("width", [390, 700, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_opens_and_does_not_overflow(visit, svd_file, width, scheme):
    page = visit(svd_file, width, scheme)
    page.wait_for_selector("#plot-heat .heatmaplayer image", state="attached")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("document.querySelectorAll('.plot .main-svg').length") >= 6
    assert page.locator("h1").inner_text()


def test_a_row_shows_its_layer(visit, svd_file):
    page = visit(svd_file)
    layers = {visible(x.name): x for x in svd_result().layers}
    for at in (3, 60, 120):
        wanted = column(page, 1)[at]
        page.locator("#rows tr").nth(at).locator("button").click()
        assert name(page) == wanted
        assert drawn(page) == pytest.approx(layers[wanted].singular_values, rel=1e-3)
        assert page.locator("#rows tr[aria-current]").count() == 1


def test_a_heat_map_cell_shows_its_layer(visit, svd_file):
    page = visit(svd_file)
    plot = page.locator("#plot-heat")
    plot.scroll_into_view_if_needed()
    for at in (20, 150):
        where = page.evaluate(
            """at => { const p = document.getElementById('plot-heat'), l = p._fullLayout, b = p.getBoundingClientRect();
            return [b.left + l.xaxis._offset + l.xaxis.d2p(2), l.yaxis._offset + l.yaxis.d2p(at)]; }""",
            at,
        )
        page.evaluate("([p, y]) => scrollTo(0, p + y - 400)", [page.evaluate(TOP), where[1]])
        page.wait_for_timeout(150)
        page.mouse.click(where[0], page.evaluate(TOP_NOW) + where[1])
        wanted = page.evaluate("at => document.getElementById('plot-heat').data[0].customdata[at][0][1]", at)
        wait(page, f"document.querySelector('#rows tr[aria-current]').dataset.index == {wanted}")
        assert name(page) == page.locator(f"#rows tr[data-index='{wanted}'] td").first.text_content()


TOP = "document.getElementById('plot-heat').getBoundingClientRect().top + scrollY"
TOP_NOW = "document.getElementById('plot-heat').getBoundingClientRect().top"


def test_signal_and_raw_are_switched(visit, svd_file):
    page = visit(svd_file)
    heat = "JSON.stringify(document.getElementById('plot-heat').data[0].z)"
    signal = page.evaluate(heat)
    page.get_by_text("Raw", exact=True).click()
    raw = page.evaluate(heat)
    assert json.loads(raw) != json.loads(signal)
    assert sum(row[0] is None for row in json.loads(raw)) < sum(row[0] is None for row in json.loads(signal))


def test_sorting_puts_the_unknown_last(visit, svd_file):
    page = visit(svd_file)
    page.locator("th button[data-key=signal_at_k]").click()
    assert page.locator("th[aria-sort=descending]").count() == 1
    shown = column(page, 5)
    known = [float(x.split("\u202f")[0]) for x in shown if "%" in x]
    assert known == sorted(known, reverse=True)
    assert len(known) > 100
    assert not any("%" in x for x in shown[len(known) :])
    page.locator("th button[data-key=signal_at_k]").click()
    assert [x for x in column(page, 5) if "%" in x] == sorted(
        (x for x in shown if "%" in x), key=lambda x: float(x.split("\u202f")[0])
    )


def test_filtering_says_how_many(visit, svd_file):
    page = visit(svd_file)
    page.fill("#filter", "text_encoder fc1")
    assert len(column(page, 1)) == 12
    assert all("fc1" in x for x in column(page, 1))
    assert page.inner_text("#shown").startswith("12 of")
    page.fill("#filter", "")
    page.select_option("#state", "identical")
    assert all(x.startswith("vae.") for x in column(page, 1))
    page.select_option("#state", "")


def test_the_keyboard_reaches_a_layer(visit, svd_file):
    page = visit(svd_file)
    page.locator("#rows button").nth(5).focus()
    page.keyboard.press("Enter")
    before = name(page)
    assert before == column(page, 1)[5]
    page.locator("#next").focus()
    page.keyboard.press("Enter")
    assert name(page) == column(page, 1)[6]


def test_on_a_phone_the_layer_opens_and_closes(visit, svd_file):
    page = visit(svd_file, 390)
    assert not page.locator("#detail").is_visible()
    page.locator("#rows button").nth(2).click()
    wait(page, "getComputedStyle(document.getElementById('detail')).visibility === 'visible'")
    page.keyboard.press("Escape")
    wait(page, "getComputedStyle(document.getElementById('detail')).visibility === 'hidden'")


def test_hostile_layers_are_shown_as_text(visit, svd_file):
    page = visit(svd_file)
    for hostile in HOSTILE:
        page.locator("#rows button", has_text=visible(hostile)).first.click()
        assert name(page) == visible(hostile)
    plotted = page.eval_on_selector_all(".plot a, .plot img, .plot script", "found => found.length")
    assert plotted == 0


def test_colours_follow_the_scheme(visit, svd_file):
    page = visit(svd_file)
    ink = "document.getElementById('plot-curves')._fullLayout.font.color"
    light = page.evaluate(ink)
    page.emulate_media(color_scheme="dark")
    wait(page, f"({ink}) !== '{light}'")
    page.emulate_media(color_scheme="light")
    wait(page, f"({ink}) === '{light}'")
    assert page.evaluate(ink) == light


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1400, "light")])
def test_a_merge_opens_and_does_not_overflow(visit, merge_file, width, scheme):
    page = visit(merge_file, width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("svg.tree rect").count() == 15
    assert page.locator(".plot .main-svg").first.is_visible()
    assert page.evaluate("document.getElementById('plot-coefficients-1').data[0].x")[0] == -2


@pytest.mark.parametrize("width", [390, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_family_tree_opens_and_does_not_overflow(visit, cluster_file, width, scheme):
    page = visit(cluster_file, width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("svg.forest .node").count() == 61
    assert page.locator(".plot .main-svg").count() >= 3
    boxes = page.eval_on_selector_all(".forest .box", "b => b.map(x => ['x', 'y'].map(a => x.getAttribute(a)).join())")
    assert len(set(boxes)) == len(boxes)


def test_an_edge_shows_its_evidence(visit, cluster_file):
    page = visit(cluster_file)
    edges = cluster_result(60, hostile=True).edges
    for at in (0, 20, len(edges) - 1):
        page.evaluate(
            "at => document.querySelector(`.forest .edge[data-edge='${at}'] .grip`)"
            ".dispatchEvent(new MouseEvent('click', { bubbles: true }))",
            at,
        )
        assert name(page) == visible(edges[at].child)
        shown = page.inner_text("#detail-list")
        assert all(e.words in shown and e.source in shown for e in edges[at].evidence)
        assert page.locator(f".forest .edge.chosen[data-edge='{at}']").count() == 1
        assert page.locator(f"#rows tr[aria-current][data-index='{at}']").count() == 1


def test_a_line_is_clicked_with_the_mouse(visit, cluster_file):
    page = visit(cluster_file)
    page.locator("#forest").scroll_into_view_if_needed()
    where = page.evaluate(
        """() => { const p = document.querySelector(".forest .edge[data-edge] .grip"), l = p.getTotalLength();
        const at = p.getPointAtLength(l * 0.5).matrixTransform(p.getScreenCTM());
        return [at.x, at.y, document.elementFromPoint(at.x, at.y).closest("[data-edge]")?.dataset.edge]; }"""
    )
    page.mouse.click(where[0], where[1])
    assert name(page) == visible(cluster_result(60, hostile=True).edges[int(where[2])].child)


def test_a_row_of_the_relations_shows_its_edge(visit, cluster_file):
    page = visit(cluster_file)
    page.locator("#rows button").nth(7).focus()
    page.keyboard.press("Enter")
    assert name(page) == visible(cluster_result(60, hostile=True).edges[7].child)


def test_on_a_phone_a_model_opens_and_closes(visit, cluster_file):
    page = visit(cluster_file, 390)
    assert not page.locator("#detail").is_visible()
    page.locator("svg.forest .node").last.click()
    wait(page, "getComputedStyle(document.getElementById('detail')).visibility === 'visible'")
    page.locator("#close").click()
    wait(page, "getComputedStyle(document.getElementById('detail')).visibility === 'hidden'")


def test_searching_finds_a_model_that_was_folded_away(visit, cluster_file):
    page = visit(cluster_file)
    page.locator("#fold").click()
    hidden = page.locator("svg.forest .node").count()
    assert hidden < 61
    wanted = next(n for n in page.evaluate("Page.data.nodes.filter(n => n[3] > 2).map(n => n[0])"))
    assert page.locator("svg.forest .node title", has_text=wanted).count() == 0
    page.fill("#find", wanted)
    assert page.locator("svg.forest .node.hit title").first.text_content() == wanted
    assert "1 of" in page.inner_text("#found")
    page.fill("#find", "")
    page.locator("#unfold").click()
    assert page.locator("svg.forest .node").count() == 61


def test_folding_hides_what_is_below(visit, cluster_file):
    page = visit(cluster_file)
    below = page.evaluate("Forest.nodes[0].below")
    page.evaluate(
        "document.querySelector('[data-toggle=\"0\"]').dispatchEvent(new MouseEvent('click', {bubbles: true}))"
    )
    assert page.locator("svg.forest .node").count() == 61 - below
    assert page.locator(".toggle.shut").first.text_content().endswith(f"+{below}")
    page.locator("#unfold").click()


def test_a_cell_of_the_map_chooses_the_pair(visit, cluster_file):
    page = visit(cluster_file)
    page.evaluate("document.getElementById('plot-distances').scrollIntoView()")
    page.wait_for_timeout(150)
    where = page.evaluate(
        """() => { const p = document.getElementById('plot-distances'), l = p._fullLayout;
        const b = p.getBoundingClientRect();
        return [b.left + l.xaxis._offset + l.xaxis.d2p(3), b.top + l.yaxis._offset + l.yaxis.d2p(9)]; }"""
    )
    page.mouse.click(*where)
    order = page.evaluate("Page.data.heat.order")
    wait(page, f"document.getElementById('pair-a').value === '{order[9]}'")
    assert page.input_value("#pair-b") == str(order[3])
    a, b = sorted((order[9], order[3]))
    drawn = page.evaluate("document.getElementById('plot-blocks').data[0].x")
    kept = next(v for i, j, *v in page.evaluate("Page.data.similarity.pairs") if {i, j} == {a, b})
    assert drawn == [v for v in kept if v is not None]


def test_a_recipe_is_copied_or_selected(visit, cluster_file):
    page = visit(cluster_file)
    page.locator(".recipes summary").first.click()
    button = page.locator("button.copy").first
    page.evaluate("document.querySelector('button.copy').closest('details').open = true")
    button.click()
    wait(page, "/Copied|Selected/.test(document.querySelector('button.copy').textContent)")
    assert button.inner_text().startswith(("Copied", "Selected"))


@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (1400, "dark")])
def test_a_transfer_experiment_opens_and_does_not_overflow(visit, transfer_file, width, scheme):
    page = visit(transfer_file, width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator(".plot .main-svg").count() >= 7
    assert page.locator(".two > .panel .kin-matrix").count() == 4
    assert page.evaluate("[...document.querySelectorAll('details[open] .thumb img')].every(i => i.naturalWidth === 1)")


def test_a_square_says_its_numbers(visit, transfer_file):
    page = visit(transfer_file)
    assert not page.locator("#square").is_visible()
    square = page.locator(".kin-matrix .cell.plus").nth(5)
    square.click()
    assert page.inner_text("#square") == square.locator("title").text_content()
    assert page.locator(".kin-matrix .chosen").count() == 1


def test_a_picture_grows_and_closes(visit, transfer_file):
    page = visit(transfer_file, 390)
    thumb = page.locator(".thumb").nth(3)
    thumb.click()
    assert page.locator("#enlarged").is_visible()
    assert page.inner_text("#large-name") == visible(thumb.locator("img").get_attribute("alt"))
    page.keyboard.press("Escape")
    assert not page.locator("#enlarged").is_visible()


def test_pictures_that_are_not_there_are_said_to_be_missing_once(visit, transfer_file):
    bare = transfer_file.with_name("bare") / "transfer.html"
    bare.parent.mkdir()
    result = transfer_result(draw(Plan(worlds=3)), 0, samples="a.png")
    bare.write_text(build(json.loads(dumps(result)), bare.parent), encoding="utf-8")
    page = visit(bare)
    assert page.locator(".pictures").count() == 0
    assert page.get_by_text("do not lie beside its result").count() == 1


def test_a_claim_opens_its_figures(visit, transfer_file):
    page = visit(transfer_file)
    claim = page.locator(".claim", has_text="within a family").first
    assert not claim.locator("table").is_visible()
    claim.locator("summary").click()
    assert claim.locator("table").is_visible()
    assert claim.locator("tbody tr").count() == 4


@pytest.mark.parametrize("width", [390, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_prediction_opens_and_does_not_overflow(visit, predict_file, width, scheme):
    page = visit(predict_file, width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator(".forecast li").count() == len(HOSTILE_NAMES) + 3
    assert page.locator(".forecast .who b").all_inner_texts()[:2] == [visible(n) for n in HOSTILE_NAMES[:2]]


def test_bars_are_as_long_as_they_say(visit, predict_file):
    page = visit(predict_file)
    found = predict_result((*HOSTILE_NAMES, "a", "b", "c")).forecasts
    drawn = page.eval_on_selector_all(
        ".forecast .fill.signal", "bars => bars.map(b => b.offsetWidth / b.parentElement.offsetWidth)"
    )
    assert drawn == pytest.approx([f.strength or 0 for f in found], abs=0.01)
    assert page.locator(".forecast li").nth(1).get_attribute("title") == visible(found[1].reason)


@pytest.mark.slow
def test_a_thousand_models_open_folded_and_are_found(visit, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "large.html"
    path.write_text(build(json.loads(dumps(cluster_result(1000)))), encoding="utf-8")
    page = visit(path)
    assert page.locator("svg.forest .node").count() < 200
    wanted = page.evaluate("Page.data.nodes.reduce((deep, n) => (n[3] > deep[3] ? n : deep))[0]")
    page.fill("#find", wanted)
    assert page.locator("svg.forest .node.hit title").first.text_content() == wanted
