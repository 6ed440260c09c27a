"""docs/cluster_benchmark.md: every table of the zoo's measurement, in Markdown."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import mean
from typing import Any

from zoo_plan import HELD_OUT, LINEAR
from zoo_score import (
    Answer,
    Judged,
    bootstrap,
    by_relation,
    calibration_error,
    directions,
    judge,
    merges,
    rand_index,
    rates,
    reliability,
    root_accuracy,
    unrelated,
    upper_bound,
    wilson,
)
from zoo_truth import Truth

Key = Callable[[Judged], object]


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = ["| " + " | ".join(map(_cell, row)) + " |" for row in rows]
    return "\n".join(["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|", *lines]) + "\n"


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:.3f}" if abs(value) >= 0.001 or value == 0 else f"{value:.1e}"
    return str(value)


def span(low: float, high: float) -> str:
    return f"{low:.3f} to {high:.3f}" if not math.isnan(low) else "-"


def share(k: int, n: int) -> str:
    """k of n with Wilson's interval."""
    return f"{k} of {n} ({span(*wilson(k, n))})" if n else "none"


def methods(truth: Truth, answers: Sequence[Answer]) -> str:
    """Everyone on the same folder."""
    rows = []
    for a in answers:
        judged = judge(truth, a)
        r, tuned, d = rates(judged), rates(j for j in judged if _tuned(j)), directions(judged)
        low, high = bootstrap(judged, lambda js: rates(js).f1)
        right, there = root_accuracy(truth, a)
        rows.append(
            (a.method, r.precision, r.recall, f"{r.f1:.3f} ({span(low, high)})", tuned.f1, d.accuracy,
             rand_index(truth, a), f"{right} of {there}", f"{a.seconds:.0f}")
        )  # fmt: skip
    heads = (
        "method",
        "precision",
        "recall",
        "F1 (95 % over trees)",
        "F1, fine-tunes",
        "direction",
        "ARI",
        "roots",
        "s",
    )
    return table(heads, rows)


def _tuned(j: Judged) -> bool:
    relation = j.relation or (j.claim.relation if j.claim else "")
    return relation == "finetune"


def relations(truth: Truth, judged: Sequence[Judged]) -> str:
    """Per relation: the pair found (whatever it was called), and the relation's own precision, recall, F1."""
    rows = []
    for relation in sorted(set(truth.edges.values())):
        own, true = by_relation(judged, relation), [j for j in judged if j.relation == relation]
        found = sum(j.hit for j in true)
        precise = f"{own.precision:.3f} ({span(*wilson(own.hits, own.claimed))})" if own.claimed else "-"
        named = f"{own.recall:.3f} ({span(*wilson(own.hits, own.true))})"
        rows.append((relation, len(true), share(found, len(true)), precise, named, own.f1, directions(true).accuracy))
    return table(("relation", "true", "pairs found", "precision", "recall", "F1", "direction"), rows)


def parts(judged: Sequence[Judged], title: str, key: Key) -> str:
    """F1 by any property of the child."""
    groups: dict[Any, list[Judged]] = {}
    for j in judged:
        groups.setdefault(key(j), []).append(j)
    rows = []
    for k in sorted(groups, key=str):
        r = rates(groups[k])
        rows.append((k, r.true, r.claimed, r.precision, r.recall, r.f1, directions(groups[k]).accuracy))
    return table((title, "true", "claimed", "precision", "recall", "F1", "direction"), rows)


def band(value: float | None, edges: Sequence[float]) -> str:
    """Which of the bands between `edges` a number lies in; sorts as text."""
    if value is None:
        return "root"
    at = sum(value >= e for e in edges)
    low, high = (0, *edges)[at], (*edges, math.inf)[at]
    return f"{at}: {low:g} to {high:g}"


def held_out(judged: Sequence[Judged]) -> str:
    """What occurs in no tuning tree; a claim counts by its true child."""
    chosen: dict[str, Callable[[Judged], bool]] = {
        f"architecture: {HELD_OUT['arch']}": lambda j: j.row["arch"] == HELD_OUT["arch"],
        f"optimiser: {HELD_OUT['optimizer']}": lambda j: j.row["settings"].get("optimizer") == HELD_OUT["optimizer"],
        f"relation: {HELD_OUT['kind']}": lambda j: j.row["kind"] == HELD_OUT["kind"],
        f"merge method: {HELD_OUT['method']}": lambda j: j.row["settings"].get("method") == HELD_OUT["method"],
    }
    rows = [(name, r.true, r.claimed, r.precision, r.recall, r.f1)
            for name, test in chosen.items() for r in [rates(j for j in judged if test(j))]]  # fmt: skip
    every = rates(j for j in judged if any(test(j) for test in chosen.values()))
    rows.append(("all of these", every.true, every.claimed, every.precision, every.recall, every.f1))
    return table(("held out", "true", "claimed", "precision", "recall", "F1"), rows)


def merging(truth: Truth, answer: Answer) -> str:
    """Merges: sets, coefficients, false ones, missing parents."""
    m = merges(truth, answer)
    crossing, pairs = unrelated(truth, answer)
    rows = [
        (f"linear merges ({', '.join(sorted(LINEAR))}), parents there: exact parent set", share(m.exact, m.linear)),
        ("of those, coefficients inside their printed intervals", share(m.inside, len(m.errors))),
        ("mean absolute error of coefficients", mean(m.errors) if m.errors else math.nan),
        ("fine-tunes and adapters called merges", f"{share(m.false, m.finetunes)}; "
         f"one-sided 95 % bound {_cell(upper_bound(m.false, m.finetunes))}"),
        ("merges with a parent taken away: said to have an unseen parent", share(m.reported, m.missing)),
        ("the same: given a complete set all the same", share(m.misled, m.missing)),
        ("pairs of different trees that are joined", f"{crossing} of {pairs}; "
         f"one-sided 95 % bound {_cell(upper_bound(crossing, pairs))}"),
    ]  # fmt: skip
    return table(("", "found"), rows)


def trust(judged: Sequence[Judged]) -> str:
    """Reliability of edge confidence."""
    rows = [(c, p, share(round(p * n), n)) for c, p, n in reliability(judged)]
    return (
        table(("mean confidence", "share right", "edges right"), rows)
        + f"\nExpected calibration error {calibration_error(judged):.3f}, "
        + f"{len({round(j.claim.confidence, 4) for j in judged if j.claim})} different values.\n"
    )


def ablations(truth: Truth, answers: Mapping[str, Answer]) -> str:
    rows = []
    for name, a in answers.items():
        judged = judge(truth, a)
        right, there = root_accuracy(truth, a)
        tuned = rates(j for j in judged if _tuned(j))
        rows.append((name, rates(judged).f1, tuned.f1, directions(judged).accuracy, f"{right} of {there}"))
    return table(("without", "F1", "F1, fine-tunes", "direction", "roots"), rows)


def signals(truth: Truth) -> str:
    """Whether what is no weight says which end of an edge is the parent: two-sided sign tests."""
    from scipy.stats import binomtest

    width = {"float32": 4, "float16": 2, "bfloat16": 2}
    free = [e for e, r in truth.edges.items() if r in ("finetune", "adapter", "merge", "quantized", "pruned")]
    signs = {
        "name of the parent sorts first": [(a < b) - (a > b) for a, b in free],
        "file of the parent is larger": [
            (x > y) - (x < y) for a, b in free for x, y in [(width[truth.of(a)["dtype"]], width[truth.of(b)["dtype"]])]
        ],
    }
    rows = []
    for name, values in signs.items():
        first, told = sum(v > 0 for v in values), sum(v != 0 for v in values)
        p = float(binomtest(first, told).pvalue) if told else math.nan
        rows.append((name, share(first, told), len(values) - told, p))
    return table(("sign", "holds", "equal", "p of chance"), rows)


def failures(judged: Sequence[Judged], distance: Callable[[str, str], float]) -> str:
    """Every pair that is missed, false or turned, with relative distances."""
    lines = []
    for j in sorted(judged, key=lambda j: (j.row["tree"], j.row["name"])):
        if not j.right:
            what = "missed" if j.claim is None else "false" if j.true is None else "turned"
            row = j.row
            made = row["settings"].get("method") or row["settings"].get("only") or ""
            true = f"{j.true[0]} -> {j.true[1]} d={distance(*j.true):.5f}" if j.true else "nothing"
            said = (f"{j.claim.parent} -> {j.claim.child} {j.claim.relation} "
                    f"d={distance(j.claim.parent, j.claim.child):.5f} "
                    f"confidence {j.claim.confidence:.2f}") if j.claim else "nothing"  # fmt: skip
            lines.append(f"tree {row['tree']} {row['arch']} {what}: {row['name']} is {row['kind']} {made} of "
                         f"{row['parents']} depth {row['depth']} dtype {row['dtype']} delta {row['delta']} ratio "
                         f"{row['ratio']}; true: {true}; claimed: {said}")  # fmt: skip
    return "\n".join(lines) + "\n"


def page(
    command: str,
    truth: Truth,
    answer: Answer,
    rivals: Sequence[Answer],
    without: Mapping[str, Answer],
    others: Mapping[str, Answer],
) -> str:
    """The whole document."""
    judged = judge(truth, answer)
    count = {k: len({truth.of(n)[k] for n in truth.visible}) for k in ("tree", "arch")}
    plain = rates(judge(truth, rivals[0])).f1
    return "\n".join(
        [
            "# `lineage cluster` on a zoo of small networks",
            "",
            INTRODUCTION.format(command=command, nodes=len(truth.visible), edges=len(truth.edges), **count),
            "## All methods",
            "",
            methods(truth, [answer, *rivals]),
            f"The plain spanning tree reaches F1 {plain:.3f}"
            + (": above 0.90, so this zoo is too easy.\n" if plain > 0.9 else ".\n"),
            "## Relations",
            "",
            relations(truth, judged),
            parts(judged, "kind", lambda j: j.row["kind"]),
            "## Merges and false claims",
            "",
            merging(truth, answer),
            parts(
                [j for j in judged if j.row["kind"] == "merge"], "merge method", lambda j: j.row["settings"]["method"]
            ),
            "## Held out whole",
            "",
            held_out(judged),
            "## Size of the change, depth, architecture",
            "",
            "Change over rounding: norm of the change (from the nearest parent) over that of both files' rounding.",
            "",
            parts(judged, "change over rounding", lambda j: band(j.row["ratio"], (1, 2, 4, 8, 16, 64, 1000))),
            parts(judged, "relative change", lambda j: band(j.row["delta"], (0.001, 0.003, 0.01, 0.03, 0.1))),
            parts(judged, "depth", lambda j: j.row["depth"]),
            parts(judged, "architecture", lambda j: j.row["arch"]),
            "## Confidence",
            "",
            trust(judged),
            "## Without one source of evidence",
            "",
            ablations(truth, without),
            "## The same files otherwise",
            "",
            same(truth, answer, others),
            "## What says nothing",
            "",
            signals(truth),
            f"Not reached: {'; '.join(missed(truth, answer, judged)) or 'nothing'}.",
            "",
        ]
    )


def same(truth: Truth, answer: Answer, others: Mapping[str, Answer]) -> str:
    """How many edges stay; an edge without a direction has none here, and identical copies are one node."""

    def edges(a: Answer) -> set[object]:
        claims = (j.claim for j in judge(truth, a) if j.claim)
        return {(c.relation, (c.parent, c.child) if c.directed else frozenset((c.parent, c.child))) for c in claims}

    usual = edges(answer)
    found = {name: edges(a) for name, a in others.items()}
    rows = [(name, share(len(usual & there), len(usual)), len(there - usual)) for name, there in found.items()]
    return table(("", "edges that stay", "new edges"), rows)


def missed(truth: Truth, answer: Answer, judged: Sequence[Judged]) -> list[str]:
    """What of the aims is not reached, in words."""
    m, r, d = merges(truth, answer), rates(judged), directions(judged)
    outside = [j for j in judged if j.row["arch"] == HELD_OUT["arch"]]
    pairs = unrelated(truth, answer)[1]
    aims = {
        "edge F1": (r.f1, 0.92), "edge F1 on fine-tunes": (rates(j for j in judged if _tuned(j)).f1, 0.88),
        f"edge F1 on {HELD_OUT['arch']}": (rates(outside).f1, 0.80), "direction": (d.accuracy, 0.88),
        "ARI of trees": (rand_index(truth, answer), 0.99), "exact parent sets": (m.exact / max(1, m.linear), 0.95),
        "coefficients inside intervals": (m.inside / max(1, len(m.errors)), 0.95),
        "missing parents reported": (m.reported / max(1, m.missing), 0.9),
        "fine-tunes not called merges (bound)": (1 - upper_bound(m.false, m.finetunes), 0.995),
        "calibration (1 - error)": (1 - calibration_error(judged), 0.95),
        "fine-tunes judged": (m.finetunes, 1000), "unrelated pairs judged": (pairs, 100_000),
    }  # fmt: skip
    return [f"{name} {round(value, 3):g} of {aim}" for name, (value, aim) in aims.items() if not value >= aim]


INTRODUCTION = """`{command}` wrote this page from networks that
`python benchmarks/zoo.py make` had trained; truth, scores and baselines are in `benchmarks/zoo_*.py`.

The files judged here: {nodes} networks (identical copies counted once) of {tree} roots and {arch} architectures with
{edges} edges, in one folder, metadata off. They are the odd trees; the even ones are for choosing thresholds.
Every root is trained from its own initialisation on real data (Python's sources and licences, scikit-learn's
digits, drawn avatars), every fine-tune by a real optimiser from its parent's file. An edge counts as found when the
pair is found; its direction is judged apart. Children of a file that was taken out hang from its nearest ancestor that
is there. A claim that is no true edge counts under the properties of the child it claims. Intervals of shares are
Wilson's, 95 %.
"""
