"""Records of the functional test of the rank claim: what a fine-tune still does when only k ranks of it are kept."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from lineage.results import Provenance

MOST = 0.9
"""Share of a fine-tune's gain that counts as nearly all of it."""


@dataclass(frozen=True)
class Outcome:
    """A model on pictures it never saw. loss: mean squared error of the predicted noise; score: mean probability that
    a judge gives to the style asked for, in what the model draws."""

    loss: float
    score: float


@dataclass(frozen=True)
class RankPoint:
    """Base + an adapter of rank k. rank: as asked; narrower matrices hold what they can, null: all ranks.
    parameters: entries of its factors. energy: share of the squared change it was cut from; null where it was trained
    directly. lr: the rate that was best on other pictures; null where it was cut."""

    rank: int | None
    parameters: int
    outcome: Outcome
    energy: float | None = None
    gaussian: float | None = None
    lr: float | None = None


@dataclass(frozen=True)
class RankPair:
    """One fine-tune. base, tuned: without and with all of it. extracted: its change cut to k ranks; trained: adapters
    of rank k trained directly, for as many steps on the same pictures; compressed: the widest of those cut to the ranks
    of the others. median_side: of its layers' short sides."""

    world: str
    parent: str
    child: str
    styles: tuple[str, ...]
    steps: int
    lr: float
    relative: float
    median_side: int
    effective_rank: float
    base: Outcome
    tuned: Outcome
    extracted: tuple[RankPoint, ...]
    trained: tuple[RankPoint, ...]
    compressed: tuple[RankPoint, ...]

    @property
    def name(self) -> str:
        return f"{self.world}: {self.child} from {self.parent}"

    def gain(self, outcome: Outcome, measure: str = "loss") -> float:
        """Share of what the fine-tune gains over its base; 1: all of it, above 1: more."""
        start, end, here = (getattr(o, measure) for o in (self.base, self.tuned, outcome))
        return (start - here) / (start - end)

    def enough(self, share: float = MOST, measure: str = "loss") -> int | None:
        """The smallest rank asked for from which on extraction keeps that share of the gain; null: none does."""
        found = None
        for point in sorted(self.extracted, key=_order, reverse=True):
            if self.gain(point.outcome, measure) < share:
                break
            found = point.rank if point.rank is not None else found
        return found

    def pairs_of(self, cut: str) -> Iterable[tuple[RankPoint, RankPoint]]:
        """(cut, trained) of equal rank; cut: extracted or compressed."""
        by_rank = {point.rank: point for point in getattr(self, cut)}
        return [(by_rank[t.rank], t) for t in self.trained if t.rank in by_rank]


def _order(point: RankPoint) -> float:
    return float("inf") if point.rank is None else point.rank


@dataclass(frozen=True)
class RankClaimResult:
    """The functional test over several fine-tunes. ranks: those asked for, ascending."""

    provenance: Provenance
    pairs: tuple[RankPair, ...]
    ranks: tuple[int, ...]
    draws: int
    pictures: int
    answer: str
    kind: str = "rank_claim"


def answer(pairs: Sequence[RankPair]) -> str:
    """What was found, in words."""
    return " ".join(filter(None, (_enough(pairs), _energy(pairs), _directly(pairs))))


def _enough(pairs: Sequence[RankPair]) -> str:
    needed = [pair.enough() for pair in pairs]
    known = [k for k in needed if k is not None]
    if not known:
        return f"No rank asked for keeps {MOST:.0%} of the gain in held-out loss."
    side = round(fmean(pair.median_side for pair in pairs))
    lacking = f"; in {len(needed) - len(known)} of {len(needed)} no rank is enough" if len(known) < len(needed) else ""
    between = f"{min(known)} to {max(known)}" if min(known) < max(known) else f"{max(known)}"
    return f"{MOST:.0%} of the gain in held-out loss is kept from rank {between} of {side} on{lacking}."


def _energy(pairs: Sequence[RankPair]) -> str:
    points = [(p, k) for p in pairs for k in p.extracted if k.rank is not None and k.rank == p.enough()]
    energies = [point.energy for _, point in points if point.energy is not None]
    if not energies:
        return ""
    return f"There the adapter holds {min(energies):.0%} to {max(energies):.0%} of the squared change."


def _directly(pairs: Sequence[RankPair]) -> str:
    if not any(pair.trained for pair in pairs):
        return "No adapter was trained directly."
    found = (
        f"the {what} cut to that rank in {better} of {total} cases"
        for kind, what in (("extracted", "fine-tune's change"), ("compressed", "widest adapter"))
        for better, total in [_better(pairs, kind)]
        if total
    )
    return (
        "Trained directly for as many steps, an adapter has a lower held-out loss than " + ", than ".join(found) + "."
    )


def _better(pairs: Sequence[RankPair], kind: str) -> tuple[int, int]:
    both = [(cut, trained) for pair in pairs for cut, trained in pair.pairs_of(kind)]
    return sum(trained.outcome.loss < cut.outcome.loss for cut, trained in both), len(both)
