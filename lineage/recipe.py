"""Recipe text of the web UI's merge board -> Recipe (data), with exact error positions, and what a recipe amounts to.

    # comment
    __SD15__, put your sd1.5              declares a user variable
    tmp1 = nai + bp, 0.5, fp16, ckpt      weighted sum      A*(1-M) + B*M
    mix = __O1__ + nep + nai, 0.5         add difference    A + (B-C)*M; __O1__ is the first merge line's output

Notation: sdweb-merge-board's recipe text, read strictly: whatever that reader would silently ignore is an error here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from fractions import Fraction

from lineage.errors import LineageError

CONTAINERS = ("ckpt", "safetensors")
FLAGS = ("fp16", *CONTAINERS)
ARITIES = {"weighted_sum": 2, "add_difference": 3, "copy": 1}
_OUTPUT = re.compile(r"__O(\d+)__")
_VARIABLE = re.compile(r"__.+__")
_RESERVED = re.compile(r"(?i)(con|prn|aux|nul|com[0-9]|lpt[0-9])(\.|$)")
_FORM = "A merge line reads: OUT = A + B, M   or   OUT = A + B + C, M   and then flags: fp16, ckpt, safetensors."


class RecipeError(LineageError):
    """A recipe that cannot be followed; the message shows the line and points at the place, where it has one."""

    def __init__(self, source: str, place: Place, problem: str, advice: str = ""):
        self.line, self.column = place.line, place.column
        where, shown = source, ""
        if place.line:
            where = f"{source}:{place.line}:{place.column}"
            pointer = " " * (place.column - 1) + "^" * max(1, len(place.text))
            shown = f"\n    {place.source.expandtabs(1)}\n    {pointer}"
        super().__init__(f"{where}: {problem}{shown}" + (f"\n{advice}" if advice else ""))


@dataclass(frozen=True)
class Place:
    """A piece of recipe text and where it stands. `line`, `column` are 1-based; `source` is the whole line."""

    text: str
    line: int = 0
    column: int = 1
    source: str = field(default="", repr=False, compare=False)

    def split(self, separator: str) -> list[Place]:
        """Pieces between separators, each stripped, at its own column."""
        pieces, at = [], 0
        for piece in self.text.split(separator):
            pieces.append(self._part(at, at + len(piece)))
            at += len(piece) + len(separator)
        return pieces

    def _part(self, start: int, stop: int) -> Place:
        piece = self.text[start:stop]
        start += len(piece) - len(piece.lstrip())
        return Place(piece.strip(), self.line, self.column + start, self.source)


@dataclass(frozen=True)
class Operand:
    """What a merge line takes: a model's name, an earlier output (`step`, 0-based), or a variable bound by --set."""

    place: Place
    step: int | None = None

    @property
    def text(self) -> str:
        return self.place.text

    @property
    def is_variable(self) -> bool:
        return self.step is None and bool(_VARIABLE.fullmatch(self.text))


@dataclass(frozen=True)
class Step:
    """One merge. `blocks`: (pattern of block or parameter name, weight), the last match wins over `weight`.
    `take`: component -> operand whose tensors replace it whole. `adapters`: (adapter file, weight), applied last."""

    name: str
    place: Place
    method: str
    operands: tuple[Operand, ...]
    weight: float = 0.0
    half: bool = False
    container: str = "ckpt"
    blocks: tuple[tuple[str, float], ...] = ()
    take: tuple[tuple[str, Operand], ...] = ()
    adapters: tuple[tuple[Operand, float], ...] = ()

    @property
    def references(self) -> tuple[Operand, ...]:
        """Every model this step reads: its operands, then the donors of `take`."""
        return self.operands + tuple(donor for _, donor in self.take)


@dataclass(frozen=True)
class Recipe:
    """A parsed recipe. `arithmetic`: "webui" | "float32". `variables`: declared ones; `warnings`: plain sentences."""

    source: str
    text: str
    steps: tuple[Step, ...]
    arithmetic: str = "webui"
    variables: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def results(self) -> tuple[int, ...]:
        """Indices of the steps whose output no later step uses."""
        used = {ref.step for step in self.steps for ref in step.references}
        return tuple(i for i in range(len(self.steps)) if i not in used)

    @property
    def originals(self) -> list[str]:
        """The operands that are models of their own, as written; one for each mention."""
        return [ref.text for step in self.steps for ref in step.references if ref.step is None]


def parse(text: str, source: str = "recipe") -> Recipe:
    """Recipe text -> Recipe. RecipeError with line and column where the text is not exactly of the grammar."""
    steps: list[Step] = []
    variables: list[str] = []
    warnings: list[str] = []
    for number, raw in enumerate(text.removeprefix("\ufeff").splitlines(), 1):
        line = Place(raw.split("#")[0], number, 1, raw)
        if not line.text.strip():
            continue
        if line.text.lstrip().startswith("_"):
            variables.append(_declaration(source, line, warnings))
        else:
            steps.append(_merge_line(source, line, steps))
            if not 0 <= steps[-1].weight <= 1:
                warnings.append(f"line {number}: the weight {steps[-1].weight} lies outside 0 to 1.")
    if not steps:
        raise LineageError(f"{source}: no merge line. {_FORM}")
    return Recipe(source, text, tuple(steps), "webui", tuple(variables), tuple(warnings))


def _declaration(source: str, line: Place, warnings: list[str]) -> str:
    name = line.split(",")[0]
    if "=" in line.text:
        warnings.append(f"line {line.line}: starts with '_', so it declares a variable and merges nothing.")
        name = name.split("=")[0]
    if not _VARIABLE.fullmatch(name.text):
        raise RecipeError(source, name, "a line that starts with '_' must declare a variable.", "Write __NAME__, note.")
    return name.text


def _merge_line(source: str, line: Place, earlier: list[Step]) -> Step:
    if "=" not in line.text:
        raise RecipeError(source, line.split("\0")[0], "this is not a merge line: there is no '='.", _FORM)
    cut = line.text.index("=")
    out = line._part(0, cut)
    body, *rest = line._part(cut + 1, len(line.text)).split(",")
    operands = tuple(read_operand(source, place, len(earlier)) for place in _operands(source, body))
    if not rest or not rest[0].text:
        raise RecipeError(source, _end(line), "the weight is missing.", _FORM)
    half, container = _flags(source, rest[1:])
    method = "weighted_sum" if len(operands) == 2 else "add_difference"
    name = output_name(source, out, earlier)
    return Step(name, out, method, operands, _weight(source, rest[0]), half, container)


def _end(line: Place) -> Place:
    return Place("", line.line, len(line.text.rstrip()) + 1, line.source)


def _operands(source: str, body: Place) -> list[Place]:
    pieces = body.split(" + ")
    if len(pieces) not in (2, 3):  # names may hold a bare '+', but only where ' + ' separates
        pieces = body.split("+")
    if len(pieces) > 3:
        raise RecipeError(source, pieces[3], "a fourth operand.", f"Chain lines through __O1__, __O2__, ... {_FORM}")
    for piece in pieces:
        if not piece.text:
            raise RecipeError(source, piece, "a model's name is missing.", _FORM)
    if len(pieces) < 2:
        raise RecipeError(source, pieces[0], "only one operand; a merge needs two or three.", _FORM)
    return pieces


def read_operand(source: str, place: Place, earlier: int) -> Operand:
    """Classify a name; `__Ox__` must be one of the `earlier` outputs."""
    found = _OUTPUT.fullmatch(place.text)
    if not found:
        return Operand(place)
    number = int(found[1])
    if not 1 <= number <= earlier:
        why = "names its own line" if number == earlier + 1 else "names a line that does not come before this one"
        known = f"__O1__ to __O{earlier}__" if earlier else "no output yet"
        raise RecipeError(
            source, place, f"{place.text} {why}.", f"Known here: {known} (only merge lines count, from 1)."
        )
    return Operand(place, number - 1)


def _weight(source: str, place: Place) -> float:
    try:
        weight = float(place.text)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise RecipeError(source, place, f"the weight {place.text!r} is not a number.", _FORM)
    return weight


def _flags(source: str, places: Iterable[Place]) -> tuple[bool, str]:
    half, container = False, ""
    for place in places:
        if place.text not in FLAGS:
            raise RecipeError(source, place, f"unknown flag {place.text!r}.", did_you_mean(place.text, FLAGS))
        if place.text == "fp16":
            half = True
        elif container not in ("", place.text):
            raise RecipeError(
                source, place, "both ckpt and safetensors.", "One line writes one file: keep one of them."
            )
        else:
            container = place.text
    return half, container or "ckpt"


def output_name(source: str, place: Place, earlier: Iterable[Step] = ()) -> str:
    """The output's file stem: \\ | : ? " < > * become '-'. Refuses what would leave the folder, be no file name on some
    system, or collide with an earlier output (also where case does not count)."""
    name = re.sub(r'[\\|:?"<>*]', "-", place.text)
    parts = name.split("/")
    if any(not part.rstrip(". ") for part in parts):
        raise RecipeError(source, place, f"the output name {place.text!r} does not stay inside the output folder.", "")
    if any(ord(c) < 32 or ord(c) == 127 for c in name) or any(_RESERVED.match(part) for part in parts):
        raise RecipeError(source, place, f"{place.text!r} cannot be a file name everywhere.", "Choose another.")
    for step in earlier:
        if step.name.casefold() == name.casefold():
            raise RecipeError(
                source, place, f"line {step.place.line} already makes {step.name!r}.", "Choose another name."
            )
    return name


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """ "Did you mean ...?" with the closest of `known`, or all that are known if they are few."""
    known = sorted(known)
    close = get_close_matches(name.casefold(), [k.casefold() for k in known], n=3, cutoff=0.5)
    near = [k for k in known if k.casefold() in close]
    near += [k for k in known if name.casefold() in k.casefold() and k not in near][:3]
    if near:
        return f"Did you mean {' or '.join(near)}?"
    return f"Known: {', '.join(known[:12])}{', ...' if len(known) > 12 else ''}." if known else ""


Coefficients = Mapping[str, Fraction]


def coefficients(
    recipe: Recipe,
    block: Callable[[Step], float] = lambda step: step.weight,
    key: Callable[[Operand], str] = lambda operand: operand.text,
) -> list[dict[str, Fraction]]:
    """Each step's output as an explicit combination of the original inputs, exact in the weights' decimal digits.

    `block(step)` is the weight to use (of one block, say); `key(operand)` the identity of an original input.
    They sum to 1: every merge here is affine. Adapters and components taken whole are not part of it."""
    found: list[dict[str, Fraction]] = []
    for step in recipe.steps:
        terms: dict[str, Fraction] = {}
        for operand, factor in zip(step.operands, factors(step.method, Fraction(repr(block(step)))), strict=True):
            source = found[operand.step] if operand.step is not None else {key(operand): Fraction(1)}
            for name, value in source.items():
                terms[name] = terms.get(name, Fraction(0)) + factor * value
        found.append(terms)
    return found


def factors(method: str, m: Fraction) -> tuple[Fraction, ...]:
    """Factor of each operand: weighted_sum (1-m, m), add_difference (1, m, -m), copy (1)."""
    return {"weighted_sum": (1 - m, m), "add_difference": (Fraction(1), m, -m), "copy": (Fraction(1),)}[method]
