"""A found merge as a recipe that `lineage merge` runs (the TOML form, rounded once)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from lineage.results import Interval


def shortest(value: Interval) -> float:
    """The decimal of fewest digits inside an interval, nearest its value: what a person will have typed."""
    for digits in range(1, 12):
        rounded = round(value.value, digits)
        if value.low <= rounded <= value.high:
            return rounded
    return value.value


def toml(
    name: str,
    parents: Sequence[str],
    weights: Sequence[Interval],
    *,
    half: bool,
    blocks: Mapping[str, Sequence[float]] | None = None,
) -> str | None:
    """The recipe of an affine combination of models (weights sum to 1), or None where no chain of lines makes it.

    Convex ones chain weighted sums; with one negative coefficient, add-differences upon the parent of weight near 1.
    blocks: block -> weights, of two parents: that of the second is written per block."""
    order = sorted(range(len(parents)), key=lambda i: (-weights[i].value, parents[i]))
    negative = [i for i in order if weights[i].value < 0]
    if len(negative) > 1 or (negative and len(parents) < 3) or (blocks and len(parents) != 2):
        return None
    steps = _differences(order, negative[0], weights) if negative else _sums(order, weights)
    lines = ['arithmetic = "float32"']
    for number, (method, operands, weight) in enumerate(steps, 1):
        models = ([f"__O{number - 1}__"] if number > 1 else []) + [parents[i] for i in operands]
        lines += [
            "",
            "[[merge]]",
            f"name = {_text(name if number == len(steps) else f'{name}-{number}')}",
            f'method = "{method}"',
            f"models = [{', '.join(map(_text, models))}]",
            f"weight = {weight!r}",
        ]
        if blocks:
            inside = ", ".join(f"{_text(b)} = {float(w[order[1]])!r}" for b, w in sorted(blocks.items()))
            lines.append(f"blocks = {{ {inside} }}")
        if half and number == len(steps):
            lines.append("half = true")
    return "\n".join(lines) + "\n"


Steps = list[tuple[str, list[int], float]]


def _sums(order: list[int], weights: Sequence[Interval]) -> Steps:
    """Weighted sums: each line takes the next parent's share of what has been mixed so far."""
    steps: Steps = []
    total = shortest(weights[order[0]])
    for place, i in enumerate(order[1:], 1):
        if len(order) == 2:
            share = shortest(weights[i])
        else:
            total, own = total + shortest(weights[i]), shortest(weights[i])
            share = own / total
        steps.append(("weighted_sum", [order[0], i] if place == 1 else [i], share))
    return steps


def _differences(order: list[int], negative: int, weights: Sequence[Interval]) -> Steps:
    """Add-differences: the parent whose weight is nearest 1, plus each other's distance from the negative one."""
    whole = min((i for i in order if i != negative), key=lambda i: (abs(weights[i].value - 1), i))
    added = [i for i in order if i not in (whole, negative)]
    return [
        ("add_difference", [whole, i, negative] if place == 0 else [i, negative], shortest(weights[i]))
        for place, i in enumerate(added)
    ]


def _text(value: str) -> str:
    """A TOML basic string: JSON's, but for the one control character that JSON leaves as it is."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
