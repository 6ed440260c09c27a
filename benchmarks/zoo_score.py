"""How right an answer is: every true and every claimed edge judged once, and numbers with intervals over them."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from zoo_truth import Pair, Truth


@dataclass(frozen=True)
class Claim:
    """One edge of an answer."""

    parent: str
    child: str
    relation: str = "finetune"
    directed: bool = True
    confidence: float = 1.0


@dataclass(frozen=True)
class MergeClaim:
    """parents: name -> (weight, low, high), null where it has none."""

    parents: Mapping[str, tuple[float | None, float | None, float | None]]
    unseen: bool


@dataclass(frozen=True)
class Answer:
    """What a method says of a folder. tree: name -> label of the tree it belongs to."""

    method: str
    claims: Sequence[Claim]
    tree: Mapping[str, str]
    merges: Mapping[str, MergeClaim] = field(default_factory=dict)
    roots: frozenset[str] = frozenset()
    seconds: float = 0.0


@dataclass(frozen=True)
class Judged:
    """A pair of nodes that is true, claimed, or both. row: truth of its (true, else claimed) child."""

    true: tuple[str, str] | None
    relation: str | None
    claim: Claim | None
    row: Mapping[str, Any]

    @property
    def hit(self) -> bool:
        return self.true is not None and self.claim is not None

    @property
    def right_way(self) -> bool:
        return self.hit and self.claim is not None and self.claim.directed and (
            self.true == (self.claim.parent, self.claim.child)
        )  # fmt: skip

    @property
    def right(self) -> bool:
        """Whether the claim holds: the pair, and the direction where it claims one."""
        return self.right_way or (self.hit and self.claim is not None and not self.claim.directed)


def judge(truth: Truth, answer: Answer) -> list[Judged]:
    """Every pair once; of several claims about a pair the most confident counts."""
    claims: dict[Pair, Claim] = {}
    for c in sorted(answer.claims, key=lambda c: (c.confidence, c.parent, c.child)):
        a, b = truth.node[c.parent], truth.node[c.child]
        if a != b and frozenset((a, b)) not in truth.neutral:
            claims[frozenset((a, b))] = Claim(a, b, c.relation, c.directed, c.confidence)
    out = []
    for edge, relation in truth.edges.items():
        out.append(Judged(edge, relation, claims.pop(frozenset(edge), None), truth.of(edge[1])))
    return [*out, *(Judged(None, None, c, truth.of(c.child)) for c in claims.values())]


@dataclass(frozen=True)
class Rates:
    """Counts of pairs, and what follows."""

    true: int
    claimed: int
    hits: int

    @property
    def precision(self) -> float:
        return self.hits / self.claimed if self.claimed else math.nan

    @property
    def recall(self) -> float:
        return self.hits / self.true if self.true else math.nan

    @property
    def f1(self) -> float:
        total = self.true + self.claimed
        return 2 * self.hits / total if total else math.nan


def rates(judged: Iterable[Judged]) -> Rates:
    rows = list(judged)
    return Rates(
        sum(j.true is not None for j in rows), sum(j.claim is not None for j in rows), sum(j.hit for j in rows)
    )


def by_relation(judged: Sequence[Judged], relation: str) -> Rates:
    """Recall over true edges of a relation, precision over claims of it; a pair found under another name is no hit of
    either here, but see `rates`."""
    true = [j for j in judged if j.relation == relation]
    claimed = [j for j in judged if j.claim is not None and j.claim.relation == relation]
    return Rates(len(true), len(claimed), sum(j.relation == relation for j in claimed))


def wilson(k: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of a share k / n (Wilson 1927); (0, 1) of nothing."""
    if n == 0:
        return 0.0, 1.0
    p, q = k / n, z * z / n
    middle, spread = p + q / 2, z * math.sqrt(p * (1 - p) / n + q / n / 4)
    return max(0.0, (middle - spread) / (1 + q)), min(1.0, (middle + spread) / (1 + q))


def upper_bound(k: int, n: int) -> float:
    """One-sided 95 % upper bound of a share k / n (Clopper & Pearson 1934)."""
    from scipy.stats import beta

    return float(beta.ppf(0.95, k + 1, n - k)) if k < n else 1.0


def bootstrap(
    judged: Sequence[Judged], value: Callable[[list[Judged]], float], count: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of `value` when whole trees are drawn again."""
    trees: dict[int, list[Judged]] = {}
    for j in judged:
        trees.setdefault(j.row["tree"], []).append(j)
    rng, keys = random.Random(seed), sorted(trees)
    drawn = (value([j for t in rng.choices(keys, k=len(keys)) for j in trees[t]]) for _ in range(count))
    values = sorted(v for v in drawn if not math.isnan(v))
    return (values[int(0.025 * len(values))], values[int(0.975 * len(values))]) if values else (math.nan, math.nan)


@dataclass(frozen=True)
class Directions:
    """Of the pairs that were found: directed as they are, the other way, or left open."""

    right: int
    wrong: int
    open: int

    @property
    def accuracy(self) -> float:
        """Over all pairs found; open counts as not right."""
        total = self.right + self.wrong + self.open
        return self.right / total if total else math.nan


def directions(judged: Iterable[Judged]) -> Directions:
    hits = [j for j in judged if j.hit and j.claim]
    right, left_open = sum(j.right_way for j in hits), sum(not j.claim.directed for j in hits if j.claim)
    return Directions(right, len(hits) - right - left_open, left_open)


@dataclass(frozen=True)
class Merges:
    """exact: of `linear` merges with all parents there, those whose parent set is exactly found. errors: |coefficient -
    truth| of those; inside: coefficients within their intervals. false: fine-tunes (of `finetunes`) called merges.
    reported: of `missing` merges with a parent taken away, those said to have an unseen one; misled: those given a
    complete but false set."""

    linear: int
    exact: int
    errors: list[float]
    inside: int
    finetunes: int
    false: int
    missing: int
    reported: int
    misled: int


def merges(truth: Truth, answer: Answer) -> Merges:
    claimed = {truth.node[child]: m for child, m in answer.merges.items()}
    whole = {c: m for c, m in claimed.items() if not m.unseen}
    errors, inside, exact, linear = [], 0, 0, list(truth.linear())
    for child, weights in linear:
        found = {truth.node[p]: w for p, w in whole[child].parents.items()} if child in whole else {}
        if set(found) == set(weights):
            exact += 1
            for p, w in weights.items():
                value, low, high = found[p]
                errors += [abs(value - w)] if value is not None else []
                inside += low is not None and high is not None and low <= w <= high
    tuned = [n for n in truth.visible if truth.of(n)["relation"] in ("finetune", "adapter")]
    missing = [n for n, _, gone in truth.merges() if gone]
    return Merges(
        len(linear), exact, errors, inside, len(tuned), sum(n in claimed for n in tuned),
        len(missing), sum(n in claimed and claimed[n].unseen for n in missing), sum(n in whole for n in missing),
    )  # fmt: skip


def unrelated(truth: Truth, answer: Answer) -> tuple[int, int]:
    """(pairs of different trees that are claimed, all such pairs)."""
    sizes: dict[int, int] = {}
    for n in truth.visible:
        sizes[truth.of(n)["tree"]] = sizes.get(truth.of(n)["tree"], 0) + 1
    total = sum(sizes.values())
    pairs = (total * total - sum(s * s for s in sizes.values())) // 2
    crossing = {
        frozenset((truth.node[c.parent], truth.node[c.child]))
        for c in answer.claims
        if truth.rows[c.parent]["tree"] != truth.rows[c.child]["tree"]
    }
    return len(crossing), pairs


def rand_index(truth: Truth, answer: Answer) -> float:
    """Adjusted Rand index of the trees found (Hubert & Arabie 1985)."""
    from sklearn.metrics import adjusted_rand_score

    return float(
        adjusted_rand_score([truth.of(n)["tree"] for n in truth.visible], [answer.tree[n] for n in truth.visible])
    )


def root_accuracy(truth: Truth, answer: Answer) -> tuple[int, int]:
    """(roots named as such, roots that are there)."""
    there, named = truth.roots(), {truth.node[r] for r in answer.roots if r in truth.node}
    return sum(r in named for r in there.values()), len(there)


def reliability(judged: Iterable[Judged], bins: int = 10) -> list[tuple[float, float, int]]:
    """(mean confidence, share that is right, claims) of each bin that has any."""
    rows = [(j.claim.confidence, j.right) for j in judged if j.claim]
    parts: dict[int, list[tuple[float, bool]]] = {}
    for c, ok in rows:
        parts.setdefault(min(bins - 1, int(c * bins)), []).append((c, ok))
    return [
        (sum(c for c, _ in part) / len(part), sum(ok for _, ok in part) / len(part), len(part))
        for _, part in sorted(parts.items())
    ]


def calibration_error(judged: Iterable[Judged], bins: int = 10) -> float:
    """Expected calibration error (Naeini et al. 2015)."""
    table = reliability(judged, bins)
    total = sum(n for _, _, n in table)
    return sum(n * abs(c - p) for c, p, n in table) / total if total else math.nan
