"""HTML by construction: every string that is not already `Safe` is escaped, so a hostile name cannot become markup."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from lineage.results import Provenance
from reports.wording import size

_VOID = {"meta", "link", "input", "br", "hr", "img"}
_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


class Safe(str):
    """Markup that `h` made; it is not escaped again."""


@dataclass(frozen=True)
class Page:
    """One page before it is assembled: `data` reaches the scripts as JSON, `scripts` are asset names run in order.
    `pictures`: files beside the result that `build` embeds as data["pictures"]."""

    title: str
    body: tuple[Safe, ...]
    data: dict[str, Any] = field(default_factory=dict)
    scripts: tuple[str, ...] = ()
    pictures: tuple[str, ...] = ()


def h(tag: str, *children: Any, **attributes: Any) -> Safe:
    """The element `tag`. `class_` gives class, `aria_label` aria-label; None is left out, True is a bare attribute."""
    inner = "".join(_child(c) for c in children)
    opening = f"<{tag}{''.join(_attribute(k, v) for k, v in attributes.items() if v is not None and v is not False)}>"
    return Safe(opening if tag in _VOID else f"{opening}{inner}</{tag}>")


def _child(child: Any) -> str:
    if child is None:
        return ""
    if isinstance(child, list | tuple):
        return "".join(_child(c) for c in child)
    return child if isinstance(child, Safe) else html.escape(visible(str(child)))


def _attribute(name: str, value: Any) -> str:
    name = name.rstrip("_").replace("_", "-")
    return f" {name}" if value is True else f' {name}="{html.escape(visible(str(value)))}"'


def visible(text: str) -> str:
    """`text` with control, bidirectional, zero-width and unpaired characters spelled out as escapes.

    They would hide or reorder what the reader sees, and lone surrogates cannot be written as UTF-8.
    """
    return "".join(_spelled(c) if unicodedata.category(c) in _HIDDEN else c for c in text)


def _spelled(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"


def shortened(text: str, limit: int = 70) -> str:
    """`text` in at most `limit` characters, the middle left out: names differ at their ends."""
    if len(text) <= limit:
        return text
    head = limit // 3
    return f"{text[:head]}…{text[head + 1 - limit :]}"


def plot_text(text: str, limit: int = 70) -> str:
    """`text` for a plotly label, where tags such as <b> and <a href> would be interpreted."""
    return html.escape(shortened(visible(text), limit), quote=False)  # plotly shows &quot; as it is


def script_json(data: Any) -> Safe:
    """JSON that may stand inside <script>: only ASCII, and no character that could end or comment out the element."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return Safe(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def asset(name: str) -> str:
    """Text of a style sheet or script that ships with this package."""
    return files("reports").joinpath(name).read_text(encoding="utf-8")


def assemble(page: Page) -> str:
    """The whole document. Only the scripts whose hashes stand in its policy can run, and none can reach a network."""
    drawn = bool(page.data)
    scripts = [_plotly(), asset("page.js"), *(asset(name) for name in page.scripts)] if drawn else []
    head = h(
        "head",
        h("meta", charset="utf-8"),
        h("meta", http_equiv="Content-Security-Policy", content=_policy(scripts)),
        h("meta", name="viewport", content="width=device-width, initial-scale=1"),
        h("meta", name="color-scheme", content="light dark"),
        h("meta", name="referrer", content="no-referrer"),
        h("link", rel="icon", href="data:,"),
        h("title", page.title),
        h("style", Safe(asset("page.css"))),
    )
    payload = h("script", script_json(page.data), type="application/json", id="data")
    body = h("body", page.body, payload, [h("script", Safe(text)) for text in scripts])
    return "<!doctype html>\n" + h("html", head, body, lang="en") + "\n"


def plot(name: str, label: str) -> Safe:
    """The place of one figure; the script draws figure `name` into it."""
    return h("div", id=f"plot-{name}", class_="plot", role="img", aria_label=label)


def panel(*content: Any) -> Safe:
    """A framed box."""
    return h("div", *content, class_="panel")


def section(title: str, words: Sequence[str], *content: Any) -> Safe:
    """A titled section; `words` say how to read it."""
    return h("section", h("h2", title), h("p", *words, class_="words"), *content)


def listing(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> Safe | None:
    """A plain table in its own scroll box; None without rows."""
    if not rows:
        return None
    top = h("thead", h("tr", [h("th", x, scope="col") for x in heads]))
    body = h("tbody", [h("tr", [h("td", x) for x in row]) for row in rows])
    return h("div", h("table", top, body), class_="scroll", tabindex="0", role="region", aria_label=heads[0])


def footer(p: Provenance) -> Safe:
    """Where the numbers come from: command, versions, inputs and their hashes."""
    seconds = None if p.seconds is None else f"{p.seconds:.3g} s"
    facts = [
        ("Command", p.command),
        ("Version", p.version),
        ("torch", p.torch),
        ("Device", p.device),
        ("Seed", p.seed),
        ("Date", p.date),
    ]
    terms = [(h("dt", k), h("dd", v)) for k, v in [*facts, ("Took", seconds)] if v not in (None, "")]
    rows = [
        (role, i.get("path", ""), _bytes(i.get("bytes")), h("code", i.get("sha256") or "unknown"))
        for role, i in p.inputs.items()
    ]
    return h(
        "footer",
        h("h2", "Where these numbers come from"),
        h("dl", terms, class_="facts"),
        listing(("Input", "File", "Size", "sha256"), rows),
    )


def _bytes(n: Any) -> str:
    return size(n) if isinstance(n, int | float) else "unknown"


def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()


def _policy(scripts: list[str]) -> str:
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts)
    return (
        f"default-src 'none'; script-src {hashes or chr(39) + 'none' + chr(39)}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
