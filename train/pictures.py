"""Pictures with known captions: avatars whose options are their tags and whose style plays the artist.

A style lists, per kind of trait (hair, mouth, ...), which options of dicebear each tag stands for, so the same traits
can be drawn by every style: "by micah, long hair, red hair, smile" and the same "by pixel-art". Drawing is a pure
function of (style, traits, seed). Only styles whose own file states CC0, CC BY or MIT are drawn; `credits` lists them.
"""

from __future__ import annotations

import io
import json
import random
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from lineage.errors import LineageError

if TYPE_CHECKING:
    from PIL import Image

SIZE = 64
ALLOWED_LICENCES = r"(CC0|CC BY|MIT)( \d\.\d)?"

Options = Mapping[str, list[Any]]
"""dicebear option -> the values it may take; dicebear draws one by its own seed."""

BACKGROUND = {
    "blue background": "#a9d8f5",
    "pink background": "#fbc4d8",
    "green background": "#b9e6b0",
    "yellow background": "#fbe7a1",
    "white background": "#ffffff",
    "gray background": "#b4b8c0",
}
HAIR_COLOUR = {
    "black hair": "#221c1c",
    "brown hair": "#80502c",
    "blonde hair": "#f2cf63",
    "red hair": "#d03f28",
    "blue hair": "#3f6fd8",
    "green hair": "#3fa35a",
}
SKIN = {"pale skin": "#ffdfc4", "tan skin": "#dba26b", "dark skin": "#7d4a2d"}
SHIRT = {"red shirt": "#d8433f", "blue shirt": "#3c63c4", "green shirt": "#3f9a56", "black shirt": "#2b2b30"}


@dataclass(frozen=True)
class Style:
    """A dicebear style as an artist. `traits`: kind -> tag -> options; the tag "" stands for "not there", untagged."""

    name: str
    traits: Mapping[str, Mapping[str, Options]]
    fixed: Options = field(default_factory=dict)

    @property
    def artist(self) -> str:
        return f"by {self.name}"


@dataclass(frozen=True)
class Picture:
    """An RGB picture (SIZE x SIZE) with the traits it shows, in the order of its caption."""

    style: str
    traits: Mapping[str, str]
    image: Image.Image

    @property
    def tags(self) -> tuple[str, ...]:
        return tags(self.style, self.traits)

    @property
    def caption(self) -> str:
        return ", ".join(self.tags)


def _palette(option: str, colours: Mapping[str, str]) -> dict[str, Options]:
    return {tag: {option: [colour]} for tag, colour in colours.items()}


def _variants(option: str, **tagged: str) -> dict[str, Options]:
    """`_variants("hairVariant", long_hair="a b")` -> {"long hair": {"hairVariant": ["a", "b"]}}."""
    return {tag.replace("_", " "): {option: names.split()} for tag, names in tagged.items()}


def _present(option: str, tag: str, variants: str) -> dict[str, Options]:
    """A component that is there (with its tag) or not; three in four are not."""
    there = {f"{option}Variant": variants.split(), f"{option}Probability": [100]}
    return {tag: there, "": {f"{option}Probability": [0]}}


def _person(
    name: str,
    hair: Mapping[str, Options],
    mouth: Mapping[str, Options] | None = None,
    glasses: Mapping[str, Options] | None = None,
    shirt: str | None = None,
    fixed: Options | None = None,
) -> Style:
    traits: dict[str, Mapping[str, Options]] = {"hair": hair, "hair colour": _palette("hairColor", HAIR_COLOUR)}
    traits |= {"mouth": mouth} if mouth else {}
    traits |= {"glasses": glasses} if glasses else {}
    traits |= {"skin": _palette("baseColor" if name == "micah" else "skinColor", SKIN)}
    traits |= {"shirt": _palette(shirt, SHIRT)} if shirt else {}
    traits |= {"background": _palette("backgroundColor", BACKGROUND)}
    return Style(name, traits, fixed or {})


_TOON_LONG = {"rearHairVariant": ["longStraight"], "rearHairProbability": [100], "hairVariant": ["sideComed"]}
_TOON_SHORT = {"rearHairProbability": [0], "hairVariant": ["sideComed", "undercut"]}
_TOON_SPIKY = {"rearHairProbability": [0], "hairVariant": ["spiky"]}

STYLES = {
    style.name: style
    for style in (
        _person(
            "adventurer",
            _variants("hairVariant", long_hair="long05 long07", short_hair="short01 short10", curly_hair="short03",
                      spiky_hair="short16", bald="short19"),
            _variants("mouthVariant", smile="variant01", open_mouth="variant26", frown="variant04"),
            _present("glasses", "glasses", "variant02"),
            fixed={"eyesVariant": ["variant04", "variant26"], "eyebrowsVariant": ["variant10"],
                   "earringsProbability": [0], "detailsProbability": [0], "scale": [1.2]},
        ),
        _person(
            "big-smile",
            _variants("hairVariant", long_hair="straightHair", short_hair="shortHair", curly_hair="curlyShortHair",
                      spiky_hair="mohawk", bald="shavedHead"),
            _variants("mouthVariant", smile="awkwardSmile", open_mouth="openedSmile", frown="unimpressed"),
            _present("accessories", "glasses", "glasses"),
            fixed={"eyesVariant": ["normal", "cheery"]},
        ),
        _person(
            "dylan",
            _variants("hairVariant", long_hair="roundBob", short_hair="plain flatTop", curly_hair="fluffy",
                      spiky_hair="spiky"),
            _variants("moodVariant", smile="happy", open_mouth="superHappy", frown="sad angry"),
            fixed={"facialHairProbability": [0]},
        ),
        _person(
            "micah",
            _variants("hairVariant", long_hair="full", short_hair="fonze dannyPhantom", spiky_hair="mrT",
                      bald="mrClean"),
            _variants("mouthVariant", smile="smile", open_mouth="laughing", frown="frown"),
            _present("glasses", "glasses", "round"),
            "shirtColor",
            {"glassesColor": ["#000000"], "facialHairProbability": [0], "earringsProbability": [0],
             "clothesVariant": ["crew"], "eyesVariant": ["eyes", "round"]},
        ),
        _person(
            "miniavs",
            _variants("hairVariant", long_hair="long", short_hair="classic01 classic02", curly_hair="curly",
                      bald="balndess"),
            None,
            _present("glasses", "glasses", "normal"),
            "bodyColor",
            {"mustacheProbability": [0], "headVariant": ["normal"], "mouthVariant": ["default"],
             "bodyVariant": ["tShirt"]},
        ),
        _person(
            "personas",
            _variants("hairVariant", long_hair="long extraLong", short_hair="fade shortCombover", curly_hair="curly",
                      spiky_hair="mohawk", bald="bald"),
            _variants("mouthVariant", smile="smile", open_mouth="bigSmile", frown="frown"),
            {"glasses": {"eyesVariant": ["glasses"]}, "": {"eyesVariant": ["open", "happy"]}},
            "clothingColor",
            {"facialHairProbability": [0], "clothesVariant": ["rounded"], "noseVariant": ["smallRound"]},
        ),
        _person(
            "pixel-art",
            _variants("hairVariant", long_hair="long09 long12 long13", short_hair="short01 short16",
                      curly_hair="short11", spiky_hair="short12") | {"bald": {"hairProbability": [0]}},
            _variants("mouthVariant", smile="happy08 happy09", open_mouth="happy12", frown="sad01"),
            _present("glasses", "glasses", "dark01"),
            "clothingColor",
            {"hatProbability": [0], "beardProbability": [0], "accessoriesProbability": [0],
             "clothesVariant": ["variant02"], "eyesVariant": ["variant01"], "eyesColor": ["#647b90"],
             "mouthColor": ["#de0f0d"], "glassesColor": ["#191919"]},
        ),
        _person(
            "toon-head",
            {"long hair": _TOON_LONG, "short hair": _TOON_SHORT, "spiky hair": _TOON_SPIKY},
            _variants("mouthVariant", smile="smile", open_mouth="laugh", frown="sad"),
            None,
            "clothesColor",
            {"beardProbability": [0], "clothesVariant": ["turtleNeck"], "eyesVariant": ["wide", "happy"],
             "eyebrowsVariant": ["neutral"]},
        ),
    )
}  # fmt: skip


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
    return [_nth(STYLES[name], n, f"{seed}/{part}") for name in styles for n in range(count)]


def _nth(style: Style, n: int, key: str) -> Picture:
    key = f"{key}/{style.name}/{n}"
    rng = random.Random(key)
    traits = {kind: _choose(rng, list(tagged)) for kind, tagged in style.traits.items()}
    return draw(style, traits, key)


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
