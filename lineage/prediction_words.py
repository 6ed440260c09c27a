"""Why an adapter is expected to do what it does, as a sentence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

SAME, ANCESTOR, DESCENDANT, SIBLING, COUSIN = "same", "ancestor", "descendant", "sibling", "cousin"
MERGE, KIN, PERMUTED, OTHER_ROOT = "merge", "kin", "permuted", "other root"
WORKS, WEAK, LOSES = "works", "weak", "loses this model's style"
STRANGERS = (PERMUTED, OTHER_ROOT)
MOST_NAMED = 3
MOSTLY = 0.5  # of a style that comes through as a whole, in words


@dataclass(frozen=True)
class Way:
    """How two models hang together. line: of descent, the elder first, both ends included; empty without one. merged:
    the younger is a merge of the elder, weight: at that coefficient. common: the nearest model both descend from."""

    line: tuple[str, ...] = ()
    merged: bool = False
    weight: float | None = None
    common: str | None = None


def reason(base: str, model: str, relation: str, verdict: str, way: Way, distance: float | None, lacks: float) -> str:
    """ "NMFSAN descends from AC through BP: its style comes through"."""
    return f"{_kin(base, model, relation, way)}: {_effect(base, model, relation, verdict, distance, lacks)}"


def _kin(base: str, model: str, relation: str, way: Way) -> str:
    if relation == SAME:
        return f"trained on {model} itself" if base == model else f"{model} holds the same weights as {base}"
    if relation == OTHER_ROOT:
        return f"{base} and {model} share no training"
    if relation == PERMUTED:
        return f"{base} and {model} share training, but their units are in another order"
    if way.line:
        return _descent(way)
    if way.common:
        return f"{base} and {model} both descend from {way.common}"
    return f"{base} and {model} are kin, in an order that is not known"


def _descent(way: Way) -> str:
    elder, *between, younger = way.line
    if way.merged:
        return f"{younger} is a merge {'of' if way.weight is None else f'that holds {way.weight:.2f} of'} {elder}"
    return f"{younger} descends from {elder}" + (f" through {', '.join(_few(between))}" if between else "")


def _few(names: Sequence[str]) -> Iterator[str]:
    yield from names[:MOST_NAMED]
    if len(names) > MOST_NAMED:
        yield f"{len(names) - MOST_NAMED} more"


def _effect(base: str, model: str, relation: str, verdict: str, distance: float | None, lacks: float) -> str:
    if relation in STRANGERS:
        return "the adapter's weights mean nothing there"
    if relation == SAME:
        return "as strong as it gets, and it replaces what the model draws"
    apart = "" if distance is None else f" (distance {distance:.2g})"
    if verdict == WEAK:
        return f"too far apart for the trained style{apart}"
    if verdict == LOSES:
        return (
            f"training on {base} makes up for {_percent(1 - lacks)} of {model}'s style, and the trained one replaces it"
        )
    if relation == ANCESTOR:
        return "its style comes through" if lacks >= MOSTLY else f"{_percent(lacks)} of its style comes through"
    return f"near enough{apart}, and {_percent(lacks)} of {model}'s style comes through"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
