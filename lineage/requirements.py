"""What a prediction of transfer must reach, what it aims at, and whether it does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lineage.transfer_records import PREDICTED, Bar, Comparison, Control, FalsePositives, Score, rivals

SHARE = "tau as a share of what a perfect predictor would reach"
MOST_REGRET, MOST_FALSE = 0.02, 0.07


def requirements(
    scores: Sequence[Score], comparisons: Sequence[Comparison], controls: Sequence[Control], rate: FalsePositives | None
) -> Iterator[Bar]:
    """Every bar; its figure is null where nothing was measured, and then nobody knows whether it is met."""
    table = {(s.of, s.figure): s for s in scores if s.predictor == PREDICTED}
    strength, kept, lost = (table.get(k) for k in (("strength", "tau"), ("retention", "tau"), ("strength", "regret")))
    yield _at_least(f"must: strength, {SHARE}", strength and strength.strict_share, 0.7)
    yield _at_least(f"aim: strength, {SHARE}", strength and strength.strict_share, 0.85)
    yield _at_most("must: median regret over worlds, in lift", lost and lost.median, MOST_REGRET)
    yield from _rivals(rivals(comparisons))
    yield _at_least(f"must: retention, {SHARE}", kept and kept.strict_share, 0.6)
    for c in controls:
        yield Bar(f"must: {c.name}, lift", c.lift, f"below half of {c.true_lift:.3g}", c.fails)
    shuffles = "must: false positives on shuffled trees"
    yield _at_most(f"{shuffles}, the table", rate and rate.table / rate.shuffles, MOST_FALSE)
    yield _at_most(f"{shuffles}, the prediction", rate and rate.predictor / rate.shuffles, MOST_FALSE)


def _rivals(found: Sequence[Comparison]) -> Iterator[Bar]:
    """The prediction against the baseline that comes nearest to it, and against all of them."""
    nearest = min(found, key=lambda c: c.difference, default=None)
    high = nearest and nearest.high
    met = None if high is None else high >= 0
    yield Bar("must: tau less the best baseline's", nearest and nearest.difference, "not clearly below 0", met)
    lowest = min((c.low for c in found if c.low is not None), default=None)
    met = None if lowest is None else lowest > 0
    yield Bar("aim: lowest bound of tau less any baseline's", lowest, "above 0", met)


def _at_least(name: str, value: float | None, wanted: float) -> Bar:
    return Bar(name, value, f"at least {wanted:g}", None if value is None else value >= wanted)


def _at_most(name: str, value: float | None, wanted: float) -> Bar:
    return Bar(name, value, f"at most {wanted:g}", None if value is None else value <= wanted)
