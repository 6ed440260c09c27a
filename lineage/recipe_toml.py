"""Recipes as TOML, for what the text cannot say: per-block weights, components taken whole, adapters.

arithmetic = "float32"                 # or "webui"

[[merge]]
name = "mix"
method = "weighted_sum"                # add_difference, or copy (one model)
models = ["a", "__O1__"]
weight = 0.5
blocks = { "IN0*" = 0.2, "TE.*" = 0 }  # or the 26 numbers of SD1 / 20 of SDXL: BASE, IN.., M00, OUT..
take = { vae = "vae-ft-mse" }          # components as they are in another model
adapters = { "style.safetensors" = 0.65 }
half = true
container = "safetensors"
"""

from __future__ import annotations

import math
import tomllib
from typing import Any

from lineage.errors import LineageError
from lineage.recipe import ARITIES, CONTAINERS, Operand, Place, Recipe, Step, did_you_mean, output_name, read_operand

COMPONENTS = ("unet", "text_encoder", "text_encoder_2", "vae")
BLOCK_COUNTS = {26: 12, 20: 9}
_DEFAULTS: dict[str, Any] = {
    "name": "",
    "method": "weighted_sum",
    "models": [],
    "weight": 0.0,
    "blocks": {},
    "take": {},
    "adapters": {},
    "half": False,
    "container": "safetensors",
}
_KINDS = {"name": str, "method": str, "models": list, "take": dict, "adapters": dict, "half": bool, "container": str}


def parse_toml(text: str, source: str = "recipe") -> Recipe:
    """TOML text -> Recipe. LineageError names the table entry at fault."""
    try:
        found = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as e:
        raise LineageError(f"{source}: not valid TOML: {e}.") from e
    _known(source, found, ("arithmetic", "merge"))
    arithmetic = _choice(f"{source}: arithmetic", found.get("arithmetic", "float32"), ("float32", "webui"))
    merges = found.get("merge")
    if not isinstance(merges, list) or not merges or not all(isinstance(m, dict) for m in merges):
        raise LineageError(f"{source}: no [[merge]] table. Each merge is one; see docs/merge.md.")
    steps: list[Step] = []
    for number, table in enumerate(merges, 1):
        steps.append(_step(f"{source}: merge {number}", table, steps))
    warnings = tuple(
        f"merge {i}: a weight lies outside 0 to 1." for i, step in enumerate(steps, 1) if not _within_unit(step)
    )
    return Recipe(source, text, tuple(steps), arithmetic, warnings=warnings)


def _within_unit(step: Step) -> bool:
    return all(0 <= w <= 1 for w in (step.weight, *(w for _, w in step.blocks)))


def _step(where: str, table: dict[str, Any], earlier: list[Step]) -> Step:
    _known(where, table, _DEFAULTS)
    for key, kind in _KINDS.items():
        if not isinstance(table.get(key, _DEFAULTS[key]), kind):
            raise LineageError(f"{where}: {key} must be {_SPOKEN[kind]}, it is {table[key]!r}.")
    row = _DEFAULTS | table
    method = _choice(f"{where}: method", row["method"], ARITIES)
    if len(row["models"]) != ARITIES[method]:
        raise LineageError(f"{where}: {method} takes {ARITIES[method]} models, {len(row['models'])} given.")
    if method != "copy" and "weight" not in table:
        raise LineageError(f"{where}: weight is missing.")
    place = Place(str(row["name"]), 0, 1, str(row["name"]))
    return Step(
        name=output_name(where, place, earlier),
        place=place,
        method=method,
        operands=tuple(_operand(where, name, earlier) for name in row["models"]),
        weight=_number(f"{where}: weight", row["weight"]),
        half=row["half"],
        container=_choice(f"{where}: container", row["container"], CONTAINERS),
        blocks=_blocks(where, row["blocks"]),
        take=tuple(
            (_choice(f"{where}: take", c, COMPONENTS), _operand(where, name, earlier))
            for c, name in row["take"].items()
        ),
        adapters=tuple(
            (_adapter(where, name), _number(f"{where}: adapters.{name}", w)) for name, w in row["adapters"].items()
        ),
    )


_SPOKEN = {str: "a string", list: "a list", dict: "a table", bool: "true or false"}


def _known(where: str, table: dict[str, Any], known: Any) -> None:
    for key in table:
        if key not in known:
            raise LineageError(f"{where}: unknown key {key!r}. {did_you_mean(key, known)}")


def _choice(where: str, value: Any, known: Any) -> str:
    if value not in list(known):
        raise LineageError(f"{where}: {value!r} is not known. {did_you_mean(str(value), known)}")
    return value


def _number(where: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise LineageError(f"{where}: {value!r} is not a number.")
    return float(value)


def _operand(where: str, name: Any, earlier: list[Step]) -> Operand:
    if not isinstance(name, str) or not name:
        raise LineageError(f"{where}: {name!r} is not a model's name.")
    return read_operand(where, Place(name, 0, 1, name), len(earlier))


def _adapter(where: str, name: str) -> Operand:
    if not name:
        raise LineageError(f"{where}: an adapter without a name.")
    return Operand(Place(name, 0, 1, name))


def _blocks(where: str, blocks: Any) -> tuple[tuple[str, float], ...]:
    if isinstance(blocks, dict):
        return tuple((pattern, _number(f"{where}: blocks.{pattern}", w)) for pattern, w in blocks.items())
    if not isinstance(blocks, list) or len(blocks) not in BLOCK_COUNTS:
        raise LineageError(f"{where}: blocks must be a table, or 26 numbers (SD1, SD2) or 20 (SDXL).")
    numbers = [_number(f"{where}: blocks[{i}]", w) for i, w in enumerate(blocks)]
    named = zip(block_names(BLOCK_COUNTS[len(blocks)]), numbers, strict=True)
    # merge-block-weighted counts the time embedding to the first block and the head to the last
    return (*named, ("TIME", numbers[1]), ("OUT", numbers[-1]))


def block_names(levels: int) -> list[str]:
    """BASE (as "*"), IN00.., M00, OUT00..: the order of a block-weight list with `levels` input blocks."""
    sides = [[f"{side}{i:02d}" for i in range(levels)] for side in ("IN", "OUT")]
    return ["*", *sides[0], "M00", *sides[1]]
