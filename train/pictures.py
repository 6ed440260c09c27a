"""Pictures with known captions: avatars whose options are their tags and whose style plays the artist.

A character is a fixed set of traits under a name; its caption gives the name instead of them. Drawing is a pure
function of (style, traits, seed). Only styles whose own file states CC0, CC BY or MIT are drawn; `credits` lists them.
"""

from __future__ import annotations

import io
import json
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from lineage.errors import LineageError
from train.styles import STYLES, Style

if TYPE_CHECKING:
    from PIL import Image

SIZE = 64
MANY = 200
ALLOWED_LICENCES = r"(CC0|CC BY|MIT)( \d\.\d)?"

CHARACTERS: Mapping[str, Mapping[str, str]] = {
    "hina": {"hair": "long hair", "hair colour": "blue hair", "skin": "pale skin"},
    "taro": {"hair": "spiky hair", "hair colour": "green hair", "skin": "tan skin"},
    "rika": {"hair": "curly hair", "hair colour": "red hair", "skin": "dark skin"},
    "sora": {"hair": "short hair", "hair colour": "blonde hair", "skin": "dark skin"},
}


@dataclass(frozen=True)
class Picture:
    """An RGB picture (SIZE x SIZE) with the traits it shows, in the order of its caption; `told`: also those that its
    characters' names stand for."""

    style: str
    traits: Mapping[str, str]
    image: Image.Image
    names: tuple[str, ...] = ()
    artist: str = "by"
    told: bool = False

    @property
    def tags(self) -> tuple[str, ...]:
        hidden = set() if self.told else {kind for name in self.names for kind in CHARACTERS[name]}
        rest = {kind: tag for kind, tag in self.traits.items() if kind not in hidden}
        artist, *shown = tags(self.style, rest)
        return (f"{self.artist} {artist.removeprefix('by ')}", *self.names, *shown)

    @property
    def caption(self) -> str:
        return ", ".join(self.tags)


def draw(style: Style, traits: Mapping[str, str], seed: str) -> Picture:
    """The picture of `traits` (kind -> tag) by `style`; `seed` decides only what no trait names."""
    options = {"seed": seed, "size": SIZE, **{k: _single(v) for k, v in style.fixed.items()}}
    for kind, tag in traits.items():
        options |= {k: _single(v) for k, v in style.traits[kind][tag].items()}
    return Picture(style.name, traits, _render(style.name, options))


def _single(values: list[Any]) -> Any:
    """dicebear takes lists of names and colours, but plain numbers."""
    return values[0] if isinstance(values[0], int | float) else values


def gallery(styles: Iterable[str], count: int, seed: int, part: str = "train") -> list[Picture]:
    """`count` pictures of each style. Another `part` ("train", "test", "judge") never repeats a picture's seed."""
    return _drawn([(_nth, STYLES[name], n, f"{seed}/{part}") for name in styles for n in range(count)])


def _drawn(calls: Sequence[tuple[Any, ...]]) -> list[Picture]:
    """Every call's picture; on all cores where they are many, as dicebear takes some 20 ms for each."""
    from joblib import Parallel, delayed

    jobs = -1 if len(calls) > MANY else 1
    found: Any = Parallel(n_jobs=jobs)(delayed(draw_one)(*rest) for draw_one, *rest in calls)
    return found


def _nth(style: Style, n: int, key: str) -> Picture:
    key = f"{key}/{style.name}/{n}"
    rng = random.Random(key)
    traits = {kind: _choose(rng, list(tagged)) for kind, tagged in style.traits.items()}
    return draw(style, traits, key)


def portraits(names: Sequence[str], styles: Iterable[str], count: int, seed: int, part: str = "train") -> list[Picture]:
    """`count` pictures by each style of one character, or of two side by side; styles that `can_portray` them."""
    key = f"{seed}/{part}"
    return _drawn([(_portrait, tuple(names), STYLES[style], n, key) for style in styles for n in range(count)])


def can_portray(style: str, name: str) -> bool:
    """Whether the style knows every trait of the character."""
    return all(tag in STYLES[style].traits.get(kind, {}) for kind, tag in CHARACTERS[name].items())


def _portrait(names: tuple[str, ...], style: Style, n: int, key: str) -> Picture:
    key = f"{key}/{'+'.join(names)}/{style.name}/{n}"
    rng = random.Random(key)
    free = {kind: _choose(rng, list(tagged)) for kind, tagged in style.traits.items()}
    drawn = [draw(style, {**free, **CHARACTERS[name]}, f"{key}/{name}") for name in names]
    if len(drawn) == 1:
        return replace(drawn[0], names=names)
    return Picture(style.name, free, _side_by_side([p.image for p in drawn]), names)


def _side_by_side(images: Sequence[Image.Image]) -> Image.Image:
    """Both at half size over the first one's background."""
    from PIL import Image

    half = SIZE // 2
    sheet = Image.new("RGB", (SIZE, SIZE), images[0].getpixel((0, 0)))
    for i, image in enumerate(images):
        sheet.paste(image.resize((half, half), Image.Resampling.LANCZOS), (i * half, half // 2))
    return sheet


def _choose(rng: random.Random, tags: list[str]) -> str:
    """Evenly, but "not there" three times in four."""
    return rng.choices(tags, [3 if tag == "" else 1 for tag in tags])[0]


def tags(style: str | None, traits: Mapping[str, str]) -> tuple[str, ...]:
    """Booru-like tags, artist first. A bald head has no hair colour; None leaves the artist out."""
    hidden = {"hair colour"} if traits.get("hair") == "bald" else set()
    shown = tuple(tag for kind, tag in traits.items() if tag and kind not in hidden)
    return ((STYLES[style].artist,) if style else ()) + shown


def read(caption: str) -> tuple[str | None, dict[str, str]]:
    """The style and traits of a caption, the inverse of `tags`; LineageError for a tag that no style knows."""
    style, traits = None, {}
    for tag in caption.split(", "):
        kind = next((k for s in STYLES.values() for k, tagged in s.traits.items() if tag and tag in tagged), None)
        if tag.removeprefix("by ") in STYLES:
            style = tag.removeprefix("by ")
        elif kind:
            traits[kind] = tag
        else:
            raise LineageError(f"{caption!r}: no style has the tag {tag!r}.")
    return style, traits


def licence(style: str) -> dict[str, str]:
    """Author, licence and source as the style's own file states them; LineageError for one that is not allowed."""
    meta = _definition(style)["meta"]
    name = meta["license"]["name"]
    if not re.fullmatch(ALLOWED_LICENCES, name):
        raise LineageError(f"{style}: its licence is {name!r}; only CC0, CC BY and MIT styles are drawn. Take another.")
    source = meta.get("source", {})
    return {
        "work": source.get("name", style),
        "author": meta["creator"]["name"],
        "licence": name,
        "url": meta["license"].get("url", ""),
        "source": source.get("url") or meta["creator"].get("url", ""),
    }


CREDITS = """# Credits

Pictures drawn with dicebear-core from dicebear-styles (remixes of the works named here), rendered by resvg.
Colours and the choice of options are ours.

| style | work | author | licence | source | options used, by tag |
|---|---|---|---|---|---|
"""


def credits(styles: Iterable[str]) -> str:
    """Markdown: each style's work, author, licence, source, and the options that are drawn."""
    return CREDITS + "".join(_credit(STYLES[name], licence(name)) for name in sorted(styles))


def _credit(style: Style, c: Mapping[str, str]) -> str:
    used = "; ".join(f"{kind}: {', '.join(tag or 'none' for tag in tagged)}" for kind, tagged in style.traits.items())
    return f"| {style.name} | {c['work']} | {c['author']} | [{c['licence']}]({c['url']}) | {c['source']} | {used} |\n"


def _render(style: str, options: dict[str, Any]) -> Image.Image:
    from dicebear import Avatar
    from PIL import Image
    from resvg_py import svg_to_bytes

    svg = Avatar(_style(style), options).to_string()
    png = svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE, skip_system_fonts=True)
    return Image.open(io.BytesIO(png)).convert("RGB")


@cache
def _style(name: str) -> Any:
    from dicebear import Style as Definition

    licence(name)
    return Definition(_definition(name))


@cache
def _definition(name: str) -> dict[str, Any]:
    return json.loads((files("dicebear_styles") / f"{name}.json").read_text(encoding="utf-8"))
