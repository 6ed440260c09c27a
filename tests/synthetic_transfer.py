"""Transfer experiments with a known answer: models are points on a tree, an adapter reaches as far as `effect` says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lineage.contrasts import frame
from lineage.results import provenance
from lineage.transfer_measures import readings
from lineage.transfer_records import (
    CHARACTER,
    NONE,
    STYLE,
    Cell,
    Design,
    Member,
    PairPrediction,
    TransferResult,
    WorldFacts,
    predictions_hash,
)
from lineage.transfer_statistics import statistics
from lineage.verdicts import hypotheses

# role: (family, parents, relation, use)
ROLES: dict[str, tuple[str, tuple[str, ...], str, str]] = {
    "vanilla": ("vanilla", (), "root", "base"),
    "NAI": ("source", ("vanilla",), "finetune", "base"),
    "AC": ("ac", ("vanilla",), "finetune", "base"),
    "BP": ("ac", ("AC",), "finetune", "base"),
    "NMFSAN": ("ac", ("BP",), "finetune", "base"),
    "Anything": ("orange", ("NAI",), "finetune", "base"),
    "AOM": ("orange", ("Anything",), "finetune", "base"),
    "AnyLora": ("orange", ("Anything", "AOM"), "merge", "base"),
    "PastelMix": ("pastel", ("NAI",), "finetune", "base"),
    "RacyMix": ("pastel", ("PastelMix",), "finetune", "base"),
    "Mix-Pro": ("orange", ("AOM",), "finetune", "apply"),
    "nep": ("nep", ("NAI",), "finetune", "apply"),
    "other-root": ("other-root", (), "root", "control"),
    "permuted": ("source", ("NAI",), "permuted", "control"),
}
PIXEL = (
    b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00\x00\x01\x00\x00\x00\x01\x08\x02\x00\x00\x00\x90wS\xde"
    b"\x00\x00\x00\x0cIDATx\x9cc`\xf8\xcf\x00\x00\x03\x01\x01\x00\xc9\xfe\x92\xef\x00\x00\x00\x00IEND\xaeB`\x82"
)


@dataclass(frozen=True)
class Plan:
    """effect: 0, an adapter does the same on every model, else how fast it fades with distance. noise: of a seed."""

    worlds: int = 8
    effect: float = 1.0
    noise: float = 0.05
    seeds: int = 2
    targets: Sequence[tuple[str, str]] = (("ink", STYLE), ("clay", STYLE), ("mahiro", CHARACTER))
    design: Design = Design()  # noqa: RUF009


@dataclass(frozen=True)
class Drawn:
    worlds: tuple[WorldFacts, ...]
    cells: tuple[Cell, ...]
    predictions: tuple[PairPrediction, ...]
    design: Design


def draw(plan: Plan = Plan(), seed: int = 0, names: dict[str, str] | None = None) -> Drawn:
    """All cells of every world; `names`: role -> another name for the model that plays it."""
    rng = np.random.default_rng(seed)
    names = names or {}
    worlds, cells, predictions = [], [], []
    for w in range(plan.worlds):
        facts = _facts(f"world-{w}", dict(plan.targets), names)
        points = _points(rng)
        worlds.append(facts)
        cells += _cells(facts, points, plan, rng)
        predictions += _predictions(facts, points)
    return Drawn(tuple(worlds), tuple(cells), tuple(predictions), plan.design)


def _facts(name: str, targets: dict[str, str], names: dict[str, str]) -> WorldFacts:
    def member(role: str) -> Member:
        family, parents, relation, use = ROLES[role]
        root = "other-root" if role == "other-root" else "vanilla"
        ps = tuple(names.get(p, p) for p in parents)
        return Member(
            names.get(role, role), role, names.get(root, root), family, ps, relation, use, (f"style of {role}",)
        )

    return WorldFacts(name, tuple(member(role) for role in ROLES), targets)


def _points(rng: np.random.Generator) -> dict[str, np.ndarray]:
    points: dict[str, np.ndarray] = {}
    for role, (_, parents, relation, _) in ROLES.items():
        if not parents or relation == "permuted":
            points[role] = rng.normal(0, 3, 16)
        else:
            step = rng.normal(0, 0.02 if relation == "merge" else 0.12 * rng.uniform(0.5, 2), 16)
            points[role] = np.mean([points[p] for p in parents], axis=0) + step
    return points


def distance(points: dict[str, np.ndarray], x: str, y: str) -> float:
    return float(np.linalg.norm(points[x] - points[y]))


def _cells(facts: WorldFacts, points: dict, plan: Plan, rng: np.random.Generator) -> list[Cell]:
    found = []
    role = {m.name: m.role for m in facts.models}
    adapters = {m.name: rng.normal(0, 0.03) for m in facts.models}
    for target, kind in plan.targets:
        untouched = {m.name: float(rng.uniform(0.3, 0.4)) for m in facts.models}
        headroom = {m.name: float(rng.uniform(0.08, 0.12)) for m in facts.models}

        def cell(
            seed,
            x,
            y,
            weight,
            step,
            lift,
            far,
            network="loha",
            target=target,
            kind=kind,
            before=untouched,
            room=headroom,
        ):
            judged = {
                "clip": 0.2 + 0.6 * lift + float(rng.normal(0, 0.03)),
                "net": 0.1 + 0.7 * lift + float(rng.normal(0, 0.03)),
            }
            kept = float(np.clip(0.4 + 0.3 * far + rng.normal(0, 0.03), 0, 1))
            return Cell(
                facts.name, seed, target, kind, network, x, y, weight, step, before[y] - room[y] * lift, 0.002,
                strength_judges=judged, retention_judges={"clip": kept, "net": kept**1.5} if x else {},
                own_loss=0.3 - (0.02 * (far - 1) if x else 0), setup="default",
            )  # fmt: skip

        for m in facts.models:
            found.append(cell(0, None, m.name, 0.0, 0, 0.0, 0.0, NONE))
        for x in facts.models:
            for s in range(plan.seeds):
                luck = float(rng.normal(0, plan.noise))
                for step, part in ((100, 0.6), (200, 1.0)):
                    found.append(cell(s, x.name, x.name, 1.0, step, part + luck * 0.2, 0.0))
                if x.use == "apply":
                    continue
                for y in facts.models:
                    if x.name == y.name:
                        continue
                    d = distance(points, role[x.name], role[y.name])
                    reach = float(np.exp(-plan.effect * d)) if plan.effect else 0.5
                    lift = reach + adapters[x.name] + luck * 0.3 + float(rng.normal(0, plan.noise))
                    found.append(cell(s, x.name, y.name, 0.65, 200, lift, 1 - np.exp(-d) if plan.effect else 0.5))
                if x.role == "NAI":
                    y = facts.models[2].name
                    found.append(cell(s, x.name, y, 0.65, 200, float(rng.normal(0, 0.02)), 0.5, "random"))
    return found


def _predictions(facts: WorldFacts, points: dict) -> list[PairPrediction]:
    found = []
    for x in facts.models:
        for y in facts.models:
            if x.name != y.name and x.use != "apply":
                d = distance(points, x.role, y.role)
                plain = {"minus distance": -d, "cosine": -abs(d - 0.5)}
                words = "other root" if x.root != y.root else "works" if d < 0.6 else "weak"
                reason = f"{x.name} and {y.name} are {d:.2f} apart."
                found.append(PairPrediction(facts.name, x.name, y.name, float(np.exp(-d)), d, plain, words, reason))
    return found


def transfer_result(drawn: Drawn, shuffles: int = 20, samples: str | None = None) -> TransferResult:
    """What the experiment would have written."""
    found = readings(drawn.cells, drawn.worlds, drawn.design)
    cells = tuple(
        Cell(**{**c.__dict__, "samples": samples}) if samples and c.world == "world-0" else c for c in drawn.cells
    )
    return TransferResult(
        provenance("transfer-test", {}, seed=0), {"size": "synthetic"}, "0" * 64, predictions_hash(drawn.predictions),
        drawn.design, drawn.worlds, drawn.predictions, cells, found.dropped,
        statistics(drawn.cells, drawn.worlds, drawn.predictions, drawn.design, shuffles), hypotheses(frame(found)),
        notes=("Made for tests: no model was trained.",),
    )  # fmt: skip
