"""What the documentation shows works: its Python runs, its commands exist, and every page can be found."""

from __future__ import annotations

import dataclasses
import doctest
import re
import shlex
from pathlib import Path

import click
import pytest

import cli
from lineage.results import InspectResult
from reports.build import PAGES as RESULT_PAGES

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
KINDS = {"inspect": InspectResult, **{kind: record for kind, (record, _) in RESULT_PAGES.items()}}
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)


def examples(page: Path) -> str:
    """The page's Python blocks; every other line is emptied, so that a failure names the page's own line."""
    text = page.read_text("utf-8")
    kept = set()
    for block in PYTHON.finditer(text):
        first = text.count("\n", 0, block.start(1))
        kept |= set(range(first, first + block[1].count("\n")))
    return "\n".join(line if at in kept else "" for at, line in enumerate(text.splitlines()))


def test_the_python_page_does_what_it_says(tmp_path, monkeypatch, no_sync, capsys):
    monkeypatch.chdir(tmp_path)
    page = DOCS / "api.md"
    test = doctest.DocTestParser().get_doctest(examples(page), {}, page.name, str(page), 0)
    assert len(test.examples) > 40
    with capsys.disabled():
        ran = doctest.DocTestRunner(optionflags=doctest.REPORT_NDIFF).run(test)
    assert not ran.failed


def test_examples_keep_their_lines(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n```python\n>>> 1\n1\n```\nb\n", "utf-8")
    assert examples(page) == "\n\n>>> 1\n1\n\n"


def commands(text: str) -> list[str]:
    """Lines of code that call lineage, without their comments and what they are piped to."""
    lines = [re.split(r"\s+#\s|\s[|>]\s", line)[0].strip() for line in text.splitlines()]
    return [line for line in lines if line.startswith("lineage ")]


def shown(page: Path) -> list[str]:
    return commands("\n".join(re.findall(r"^(?: {4}|\t)(.*)$", page.read_text("utf-8"), re.M)))


def unknown(line: str) -> list[str]:
    """What of a command line lineage does not know: the command, or options of it."""
    _, name, *words = shlex.split(line)
    command = cli.cli.commands.get(name)
    if command is None:
        return [] if name in ("--help", "COMMAND") else [name]
    options = {o for p in command.params if isinstance(p, click.Option) for o in (*p.opts, *p.secondary_opts)}
    return [word for word in words if word.startswith("-") and word not in {*options, "--help"}]


@pytest.mark.parametrize("page", [p for p in PAGES if shown(p)], ids=lambda p: p.name)
def test_commands_that_are_shown_exist(page):
    assert {line: unknown(line) for line in shown(page) if unknown(line)} == {}


def test_a_wrong_command_is_noticed():
    assert unknown("lineage svd a b --wrong") == ["--wrong"]
    assert unknown("lineage dance") == ["dance"]
    assert commands("lineage svd a b > out  # why\ncp a b") == ["lineage svd a b"]


def test_every_page_is_in_the_index():
    index = (DOCS / "index.md").read_text("utf-8")
    assert [p.name for p in sorted(DOCS.glob("*.md")) if p.name != "index.md" and f"]({p.name})" not in index] == []


@pytest.mark.parametrize("name", sorted(cli.cli.commands))
def test_every_command_leads_to_its_page(name):
    """commands.md lists options; more than that stands on a page that its section links to."""
    section = (DOCS / "commands.md").read_text("utf-8").split(f"\n## `lineage {name}", 1)[1].split("\n## ", 1)[0]
    assert name in ("completion", "report") or re.search(r"\]\(\w+\.md", section)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_to_headings(page):
    for target, heading in re.findall(r"\]\(([^)#\s:]*)#([^)\s]+)\)", page.read_text("utf-8")):
        text = ((page.parent / target) if target else page).read_text("utf-8")
        headings = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.*)$", text, re.M)}
        assert heading in headings, f"{page.name}: {target}#{heading}"


@pytest.mark.parametrize(("kind", "record"), [*KINDS.items()])
def test_the_schema_page_names_every_field(kind, record):
    section = (DOCS / "schema.md").read_text("utf-8").split(f"\n## kind `{kind}`\n", 1)[1].split("\n## ", 1)[0]
    fields = {field.name for field in dataclasses.fields(record)} - {"kind", "provenance"}
    assert sorted(name for name in fields if not re.search(rf"`[^`]*\b{name}\b[^`]*`", section)) == []


def test_pictures_are_small_enough_to_load():
    assert [p.name for p in (DOCS / "pictures").glob("*.png") if p.stat().st_size > 200_000] == []
