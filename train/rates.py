"""Which learning rate? A sweep from low to high as a record, and what it suggests (Smith 2017, section 3.3)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lineage.results import Provenance

CLEAR = 0.01  # a fall below this share of the loss is none


@dataclass(frozen=True)
class RatePoint:
    """After a step at `lr`: the loss of the judged pictures, their noise and timesteps the same at every point."""

    lr: float
    loss: float


@dataclass(frozen=True)
class RatesResult:
    """A sweep: one training step per point, at a growing rate. start: the loss before the first.

    suggestion: where the loss falls steepest per decade, before it is lowest; null where it never clearly falls."""

    provenance: Provenance
    optimizer: str
    pictures: int
    start: float
    points: tuple[RatePoint, ...]
    lowest: float | None
    suggestion: float | None
    answer: str
    kind: str = "rates"


def rates_result(
    provenance: Provenance, optimizer: str, pictures: int, start: float, points: Sequence[RatePoint]
) -> RatesResult:
    """The sweep with what it says."""
    lowest = min(points, key=lambda p: p.loss, default=None)
    found = suggestion(start, points)
    return RatesResult(
        provenance,
        optimizer,
        pictures,
        start,
        tuple(points),
        lowest.lr if lowest and found else None,
        found,
        _answer(start, points, found),
    )


def suggestion(start: float, points: Sequence[RatePoint]) -> float | None:
    """The rate of the steepest fall per decade on the way to the lowest loss; None without a clear fall.

    The slope is that over five neighbours: a single step is noisy."""
    losses = [p.loss for p in points]
    if not losses or not min(losses) < (1 - CLEAR) * start:
        return None
    end = losses.index(min(losses))
    slopes = {i: _slope(points[max(0, i - 2) : i + 3]) for i in range(end + 1)}
    return points[min(slopes, key=slopes.__getitem__)].lr


def _slope(points: Sequence[RatePoint]) -> float:
    """Loss per decade, by least squares."""
    if len(points) < 2:
        return 0.0
    x, y = [math.log10(p.lr) for p in points], [p.loss for p in points]
    middle = sum(x) / len(x)
    return sum((a - middle) * b for a, b in zip(x, y, strict=True)) / sum((a - middle) ** 2 for a in x)


def rising(low: float, high: float, steps: int) -> Iterator[float]:
    """`steps` rates from `low` to `high`, each the same multiple of the one before."""
    yield from (low * (high / low) ** (i / max(1, steps - 1)) for i in range(steps))


def _answer(start: float, points: Sequence[RatePoint], found: float | None) -> str:
    if found is None:
        return f"No rate up to {points[-1].lr:.1e} clearly lowered the loss of {start:.4g}." if points else "No step."
    lowest = min(points, key=lambda p: p.loss)
    end = "where the sweep ended" if lowest is points[-1] else "and rises beyond"
    return (
        f"Try a learning rate of {found:.1e}: there the loss falls steepest. It is lowest at {lowest.lr:.1e} "
        f"({lowest.loss:.4g}, from {start:.4g}), {end}."
    )
