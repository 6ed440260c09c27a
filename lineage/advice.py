"""On which base to train for given targets: near to them, or upstream of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from lineage.errors import LineageError
from lineage.folder import stem
from lineage.predict_result import Advice, Constants, Prediction
from lineage.prediction import FamilyTree, predict_pair
from lineage.recipe import did_you_mean

PHRASES = {
    "same": "is {}",
    "ancestor": "is an ancestor of {}",
    "descendant": "descends from {}",
    "merge": "is one merge away from {}",
    "sibling": "is a sibling of {}",
    "cousin": "is a cousin of {}",
    "kin": "is kin to {}",
    "permuted": "has the units of {} in another order",
    "other root": "shares no training with {}",
}


def named(target: str | Path, models: Sequence[str]) -> str:
    """The model of the folder that a name or a file's path means. LineageError where it is none."""
    text = str(target)
    if text in models:
        return text
    found = [name for name in models if stem(name) == stem(text)]
    if len(found) == 1:
        return found[0]
    raise LineageError(f"target {text!r}: {'several models' if found else 'no model'} of the folder. "
                       f"{did_you_mean(text, models)}")  # fmt: skip


def advise(tree: FamilyTree, targets: Sequence[str], constants: Constants) -> tuple[Advice, ...]:
    """Every base that reaches a target at all, the one nearest to all of them first."""
    rows = [[predict_pair(tree, base, t, constants) for t in targets] for base in sorted(tree.names)]
    found = [_advice(pairs) for pairs in rows if any(p.strength > 0 for p in pairs)]
    return tuple(sorted(found, key=lambda a: (-a.stays, a.base)))


def _advice(pairs: Sequence[Prediction]) -> Advice:
    stays = sum(p.strength for p in pairs) / len(pairs)
    through = sum(p.strength * p.retention for p in pairs) / len(pairs)
    return Advice(pairs[0].base, stays, through, ", ".join(_what_it_is(pairs)), tuple(pairs))


def _what_it_is(pairs: Sequence[Prediction]) -> Iterator[str]:
    for relation, phrase in PHRASES.items():
        if found := [p.model for p in pairs if p.relation == relation]:
            yield phrase.format(" and ".join(found))
