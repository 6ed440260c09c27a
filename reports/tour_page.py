"""The first page of a tour: every station with its words, its picture, and the way to its report."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass

from reports.page import Page, Safe, assemble, h, section


@dataclass(frozen=True)
class Stop:
    """`answer`: one sentence of its report; `picture`: a PNG; `report`: path of a page, relative to this one."""

    title: str
    words: str
    answer: str | None = None
    picture: bytes | None = None
    report: str | None = None


def tour(title: str, stops: Sequence[Stop]) -> str:
    """One self-contained page."""
    header = h("header", h("p", h("span", "lineage", class_="badge"), class_="eyebrow"), h("h1", title), class_="top")
    return assemble(Page(title, (header, h("main", [_stop(stop) for stop in stops]))))


def _stop(stop: Stop) -> Safe:
    source = stop.picture and f"data:image/png;base64,{base64.b64encode(stop.picture).decode()}"
    shown = source and h("div", h("img", src=source, alt=stop.words), class_="pictures")
    link = stop.report and h("p", h("a", "The full report", href=stop.report))
    found = stop.answer and h("p", stop.answer)
    return section(stop.title, (stop.words,), h("div", found, shown, link, class_="panel stop"))
