"""The styles that play artists: which options of dicebear each tag stands for.

The same traits (hair, mouth, ...) can be drawn by every style that has them: "by micah, long hair, red hair, smile" and
the same "by pixel-art". Styles of people know hair and skin; those of creatures have a body colour instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

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
BODY = {"red body": "#d8433f", "blue body": "#3f6fd8", "green body": "#3fa35a", "purple body": "#8a4fc0"}


@dataclass(frozen=True)
class Style:
    """A dicebear style as an artist. `traits`: kind -> tag -> options; the tag "" stands for "not there", untagged."""

    name: str
    traits: Mapping[str, Mapping[str, Options]]
    fixed: Options = field(default_factory=dict)

    @property
    def artist(self) -> str:
        return f"by {self.name}"


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
    hair_colour: str = "hairColor",
    skin: str | None = "skinColor",
) -> Style:
    traits: dict[str, Mapping[str, Options]] = {"hair": hair, "hair colour": _palette(hair_colour, HAIR_COLOUR)}
    traits |= {"mouth": mouth} if mouth else {}
    traits |= {"glasses": glasses} if glasses else {}
    traits |= {"skin": _palette(skin, SKIN)} if skin else {}
    traits |= {"shirt": _palette(shirt, SHIRT)} if shirt else {}
    traits |= {"background": _palette("backgroundColor", BACKGROUND)}
    return Style(name, traits, fixed or {})


def _creature(name: str, colour: str, mouth: Mapping[str, Options], fixed: Options) -> Style:
    traits = {"body": _palette(colour, BODY), "mouth": mouth, "background": _palette("backgroundColor", BACKGROUND)}
    return Style(name, traits, {"animationVariant": ["none"], **fixed})


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
            skin="baseColor",
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
        _person(
            "big-ears",
            _variants("hairVariant", long_hair="long01 long07", short_hair="short01 short04"),
            fixed={"detailsProbability": [0], "eyesVariant": ["variant01"], "mouthVariant": ["variant0101"]},
        ),
        _person(
            "croodles",
            _variants("topVariant", long_hair="variant14 variant17", short_hair="variant06 variant09",
                      curly_hair="variant05 variant18", spiky_hair="variant02", bald="variant28"),
            fixed={"beardProbability": [0], "mustacheProbability": [0]},
            hair_colour="topColor", skin="baseColor",
        ),
        _person(
            "cutouts",
            _variants("hairVariant", long_hair="long", short_hair="fringe sidePart", curly_hair="curls",
                      spiky_hair="crest") | {"bald": {"hairProbability": [0]}},
            _variants("mouthVariant", smile="smile tornSmile", open_mouth="gasp", frown="wavy"),
            fixed={"hairProbability": [100], "browsProbability": [0], "cheeksProbability": [0]},
            hair_colour="paperHairColor", skin="paperFaceColor",
        ),
        _person(
            "lorelei",
            _variants("hairVariant", long_hair="variant15 variant16 variant40", short_hair="variant02 variant08",
                      curly_hair="variant05 variant24", spiky_hair="variant27", bald="variant34"),
            _variants("mouthVariant", smile="happy01 happy02", frown="sad01 sad02"),
            _present("glasses", "glasses", "variant02"),
            fixed={"beardProbability": [0], "earringsProbability": [0], "frecklesProbability": [0],
                   "hairAccessoriesProbability": [0]},
        ),
        _person(
            "notionists",
            _variants("hairVariant", long_hair="variant23 variant41", short_hair="variant05 variant07",
                      curly_hair="variant20", spiky_hair="variant50 variant51", bald="variant42"),
            None,
            _present("glasses", "glasses", "variant02"),
            fixed={"beardProbability": [0], "gestureProbability": [0], "clothesVariant": ["variant01"],
                   "clothesGraphicProbability": [0]},
            hair_colour="inkColor", skin=None,
        ),
        _person(
            "open-peeps",
            _variants("headVariant", long_hair="grayMedium mediumBangs2", short_hair="short4 bangs",
                      spiky_hair="mohawk", bald="noHair1"),
            _variants("expressionVariant", smile="smile cute", open_mouth="smileLOL lovingGrin1",
                      frown="concerned solemn"),
            _present("accessories", "glasses", "glasses2"),
            "clothingColor",
            {"facialHairProbability": [0], "maskProbability": [0]},
            hair_colour="headContrastColor",
        ),
        _person(
            "voxel-art",
            _variants("topVariant", long_hair="longStraight", short_hair="short bowl", curly_hair="curly",
                      spiky_hair="spiky") | {"bald": {"topProbability": [0]}},
            _variants("mouthVariant", smile="smile bigSmile", open_mouth="laugh ooh", frown="frown"),
            _present("glasses", "glasses", "round"),
            "shirtColor",
            {"topProbability": [100], "beardProbability": [0], "cheeksProbability": [0], "outfitVariant": ["plain"],
             "animationVariant": ["none"]},
        ),
        _creature(
            "clay", "bodyColor",
            _variants("mouthVariant", smile="smile smileBig", open_mouth="open laugh", frown="frown"),
            {"bodyVariant": ["boulder", "loaf", "egg"], "eyesVariant": ["googly", "even", "big"]},
        ),
        _creature(
            "critters", "bodyColor",
            _variants("mouthVariant", smile="smile grin", open_mouth="open laugh", frown="frown sad"),
            {"bodyVariant": ["dome", "block", "round"], "eyesVariant": ["round", "bigPupils", "wide"]},
        ),
        _creature(
            "moods", "faceColor",
            _variants("mouthVariant", smile="smile bigSmile", open_mouth="open gasp", frown="frown"),
            {"faceVariant": ["circle", "squircle", "hexagon"], "eyesVariant": ["pupils", "bigPupils"]},
        ),
        _creature(
            "thumbs", "shapeColor",
            _variants("mouthVariant", smile="variant01", open_mouth="variant02", frown="variant03"),
            {"eyesVariant": ["variant02"]},
        ),
    )
}  # fmt: skip
