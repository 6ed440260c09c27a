"""Claims against readings: one test for all of them, Holm over the table, and how often it speaks of shuffled trees."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from lineage.contrasts import Frame, contrast
from lineage.hypotheses import CLAIMS, Claim
from lineage.rank_statistics import holm, interval, mean_p
from lineage.transfer_measures import JUDGED, STRENGTH
from lineage.transfer_records import CONTRADICTED, NOT_TESTABLE, SUPPORTED, UNDECIDED, Effect, Hypothesis

ALPHA = 0.05
FEWEST_WORLDS = 5  # below, no test over worlds is worth a verdict
Worlds = dict[str, float]


def hypotheses(f: Frame, claims: Sequence[Claim] = CLAIMS, alpha: float = ALPHA) -> tuple[Hypothesis, ...]:
    """A verdict for each claim. Directional claims need every measure they name to agree, so the largest p counts."""
    found = [{m: effects_by_world(f, claim, m) for m in _measured(claim)} for claim in claims]
    ps = [_p(claim, by_measure) for claim, by_measure in zip(claims, found, strict=True)]
    rows = zip(claims, found, ps, holm(ps), strict=True)
    return tuple(_hypothesis(f, claim, by, p, adjusted, alpha) for claim, by, p, adjusted in rows)


def effects_by_world(f: Frame, claim: Claim, measure: str) -> Worlds:
    """World -> how far the claim's first pick is above its second (and, with `beyond`, above what that is beyond)."""
    if claim.needs:
        return {}
    found = contrast(f, claim.a, claim.b, claim.by, measure)
    if claim.beyond is None:
        return found
    rest = contrast(f, *claim.beyond, claim.by, measure)
    return {w: found[w] - rest[w] for w in found if w in rest}


def _measured(claim: Claim) -> tuple[str, ...]:
    """The claim's measures, and the judges' beside them: shown, but not part of the verdict."""
    return (*claim.measures, JUDGED) if claim.measures == STRENGTH else claim.measures


def _counted(claim: Claim, by_measure: dict[str, Worlds]) -> list[Worlds]:
    """What the verdict rests on: every measure of strength; of retention those that were taken."""
    taken = [by_measure[m] for m in claim.measures]
    return taken if claim.measures == STRENGTH else [t for t in taken if t]


def _p(claim: Claim, by_measure: dict[str, Worlds]) -> float | None:
    counted = _counted(claim, by_measure)
    if not counted or min(map(len, counted)) < FEWEST_WORLDS:
        return None
    ps = [_margin_p([*c.values()], claim.margin) if claim.margin else mean_p([*c.values()]) for c in counted]
    return max(p for p in ps if p is not None)


def _margin_p(values: Sequence[float], margin: float) -> float | None:
    """Two-sided p that the mean lies at the margin: the claim falls as it stands, by the same test."""
    return mean_p(np.sign(np.mean(values)) * np.asarray(values) - margin)


def _hypothesis(
    f: Frame, claim: Claim, by_measure: dict[str, Worlds], p: float | None, adjusted: float | None, alpha: float
) -> Hypothesis:
    effects = tuple(_effect(m, [*by_measure[m].values()]) for m in by_measure if by_measure[m])
    verdict, reason = _verdict(claim, by_measure, effects, adjusted, alpha)
    first = effects[0] if effects else Effect("", 0, None, None, None)
    worlds = min((len(c) for c in _counted(claim, by_measure)), default=0)
    effect = first.effect if effects else None
    said = (claim.key, claim.says, claim.part, claim.article, claim.test)
    return Hypothesis(*said, effect, first.low, first.high, p, adjusted, verdict, reason, worlds, effects)


def _effect(measure: str, values: list[float]) -> Effect:
    return Effect(measure, float(np.mean(values)), *interval(values), mean_p(values))


def _verdict(
    claim: Claim, by_measure: dict[str, Worlds], effects: Sequence[Effect], adjusted: float | None, alpha: float
) -> tuple[str, str]:
    counted = [e for e in effects if e.measure in claim.measures]
    if claim.needs:
        return NOT_TESTABLE, f"{claim.needs}."
    if not counted or min(map(len, _counted(claim, by_measure))) == 0:
        return NOT_TESTABLE, _lacking(claim)
    worlds = min(map(len, _counted(claim, by_measure)))
    if adjusted is None:
        return UNDECIDED, f"Only {worlds} of the {FEWEST_WORLDS} worlds that a verdict needs can tell."
    return (_no_difference if claim.margin else _direction)(claim, counted, adjusted, alpha)


def _lacking(claim: Claim) -> str:
    picks = [claim.a, claim.b, *(claim.beyond or ())]
    return f"No world has cells of both: {'; '.join(p.words for p in picks)} (measured by {', '.join(claim.measures)})."


def _direction(claim: Claim, effects: Sequence[Effect], adjusted: float, alpha: float) -> tuple[str, str]:
    signs = {np.sign(e.effect) for e in effects}
    if len(signs) > 1:
        said = ", ".join(f"{e.measure} {e.effect:+.3g}" for e in effects)
        return UNDECIDED, f"It depends on the measure: {said}."
    if adjusted > alpha:
        return UNDECIDED, "The effect is not clearly different from none."
    agree = "All measures agree." if len(effects) > 1 else f"Measured by {effects[0].measure} alone."
    return (SUPPORTED, agree) if signs == {1.0} else (CONTRADICTED, f"The reverse holds. {agree}")


def _no_difference(claim: Claim, effects: Sequence[Effect], adjusted: float, alpha: float) -> tuple[str, str]:
    margin = claim.margin or 0.0
    if adjusted > alpha:
        return UNDECIDED, f"Neither surely below nor surely above {margin:g}."
    if abs(effects[0].effect) < margin:
        return SUPPORTED, f"Any difference is below {margin:g}."
    return CONTRADICTED, f"The difference is above {margin:g}."


def table_false_positives(
    f: Frame, shuffles: int, rng: np.random.Generator, alpha: float = ALPHA, seen: Callable[[int], None] | None = None
) -> int:
    """In how many of `shuffles` deals of the tree's labels at least one claim about the tree gets a verdict."""
    claims = [c for c in CLAIMS if c.of_the_tree]
    hits = 0
    for i in range(shuffles):
        hits += _speaks(f.shuffled(rng), claims, alpha)
        if seen:
            seen(i + 1)
    return hits


def _speaks(f: Frame, claims: Sequence[Claim], alpha: float) -> bool:
    """Whether any verdict is given; without the intervals, which decide nothing here."""
    found = [{m: effects_by_world(f, claim, m) for m in claim.measures} for claim in claims]
    adjusted = holm([_p(claim, by) for claim, by in zip(claims, found, strict=True)])
    return any(
        p is not None and p <= alpha and len({np.sign(np.mean([*w.values()])) for w in _counted(claim, by)}) == 1
        for claim, by, p in zip(claims, found, adjusted, strict=True)
    )
