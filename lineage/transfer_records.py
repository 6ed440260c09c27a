"""Frozen records of a transfer experiment: what was planned, predicted, measured and concluded.

`lineage.results.to_json` writes each of them; `lineage.records.restore(Cell, found)` reads it back.
A cell is one adapter, trained on one base, applied to one model. Larger is better in every derived number.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lineage.results import Provenance, to_json

STYLE, CHARACTER = "style", "character"
KINDS = (STYLE, CHARACTER)
RANDOM = "random"  # network of a control: random factors of the norm that X's trained adapter has
NONE = "none"  # network of the untouched model's cell
DEFAULT = "default"
PREDICTED = "predicted"
ADDITIVE, TAUGHT = "rows + columns (oracle, other targets)", "predicted + rows (oracle, other models)"
ORACLES = (ADDITIVE, TAUGHT)  # predictors that have seen answers
SUPPORTED, CONTRADICTED, UNDECIDED = "supported", "contradicted", "undecided"
NOT_TESTABLE = "not testable in miniature"
VERDICTS = (SUPPORTED, CONTRADICTED, UNDECIDED, NOT_TESTABLE)


@dataclass(frozen=True)
class Cell:
    """One adapter on one model. Together (world, seed, target, network, setup, base, model, weight, step) name it.

    seed: of the adapter (initialisation and order of data). kind: "style" or "character". network: "loha", "locon",
    "lora", "random", or "none" for the untouched model, whose `base` is null, weight 0, step 0, seed 0. setup: how the
    training differs from the default, by a name of `lineage.hypotheses.SETUPS`. step: training steps of the checkpoint.
    loss: mean denoising loss on held-out pictures of the target under fixed noise and timesteps (the same for every
    cell of a world and target); loss_error: standard error of that mean; losses: the same per batch, always in the
    same order, or empty. strength_judges: judge -> score of the target in generated pictures. retention_judges: judge
    -> likeness to the untouched model's pictures, target left out; empty for the untouched model itself. own_loss:
    loss on the model's own held-out pictures, without the trigger. samples: one picture file, relative to the
    result's folder."""

    world: str
    seed: int
    target: str
    kind: str
    network: str
    base: str | None
    model: str
    weight: float
    step: int
    loss: float
    loss_error: float
    losses: tuple[float, ...] = ()
    strength_judges: dict[str, float] = field(default_factory=dict)
    retention_judges: dict[str, float] = field(default_factory=dict)
    own_loss: float | None = None
    samples: str | None = None
    setup: str = DEFAULT


@dataclass(frozen=True)
class Member:
    """A model of a world as its truth says. relation: "root", "finetune", "merge" or "permuted". use: "base" (trained
    on and applied to), "apply" (applied to; its own adapter is only the reference) or "control". parents: names;
    styles: those it was trained on, its parents' not among them."""

    name: str
    role: str
    root: str
    family: str
    parents: tuple[str, ...] = ()
    relation: str = "finetune"
    use: str = "base"
    styles: tuple[str, ...] = ()


@dataclass(frozen=True)
class WorldFacts:
    """A world as its truth says; parents come before their children. targets: name -> "style" or "character"."""

    name: str
    models: tuple[Member, ...]
    targets: dict[str, str]


def world_facts(name: str, truth: Mapping[str, Any]) -> WorldFacts:
    """The facts of a world from its truth.json. Family: the branch below the root that a model hangs from, a merge from
    its heaviest part; a root is its own family."""
    branch: dict[str, str] = {}
    for m in truth["models"]:
        main = max(m["parents"], key=lambda p: p["weight"], default={"name": None})["name"]
        branch[m["name"]] = m["name"] if main is None or main == m["root"] else branch[main]
    members = (
        Member(
            m["name"], m["role"], m["root"], branch[m["name"]], tuple(p["name"] for p in m["parents"]),
            m["relation"], m["use"], tuple(m["styles"]),
        )
        for m in truth["models"]
    )  # fmt: skip
    kinds = dict.fromkeys(truth["targets"], STYLE) | dict.fromkeys(truth.get("characters", {}), CHARACTER)
    return WorldFacts(name, tuple(members), kinds)


@dataclass(frozen=True)
class PairPrediction:
    """What is foretold of an adapter trained on `base` and applied to `model`, larger is more; any scale will do.
    baselines: name -> value of the simple predictors ("cosine", "minus distance", "tree distance"), likewise larger
    for more. words: "works", "weak", "loses this model's style", "other root"; reason: why, a plain sentence."""

    world: str
    base: str
    model: str
    strength: float
    retention: float
    baselines: dict[str, float] = field(default_factory=dict)
    words: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Design:
    """Which cells are the main matrix: `network` at `weight` for X on Y; `reference_weight` for a model's own adapter,
    the 1 of lift. Losses closer to the untouched one than `headroom_errors` standard errors are dropped."""

    network: str = "loha"
    weight: float = 0.65
    reference_weight: float = 1.0
    headroom_errors: float = 5.0


@dataclass(frozen=True)
class Failed:
    """An adapter that could not be trained: its loss stopped being a number."""

    world: str
    target: str
    base: str
    way: str
    seed: int
    reason: str


@dataclass(frozen=True)
class Dropped:
    """A column that no strength can be read from: the model's own adapter gained too little there, or is missing.
    headroom: L_Y - L_Y(adapter_Y); error: its standard error."""

    world: str
    target: str
    model: str
    headroom: float | None
    error: float | None
    reason: str


@dataclass(frozen=True)
class Score:
    """One predictor's score in one figure against one measure of one kind of target (both where empty: the design's
    measure, every target). Of worlds: mean, median, bootstrap interval of the mean, p of a mean of 0
    (sign flips), `worlds` their values. figure: "tau", "centred", "regret" or "all pairs". of: "strength" or
    "retention". ceiling: what one half of the seeds says of the other; share: the predictor's mean score against such
    halves over that; strict_share: its score over what a perfect predictor would reach. Null: it cannot be known."""

    predictor: str
    of: str
    figure: str
    mean: float
    median: float
    low: float | None
    high: float | None
    p: float | None
    ceiling: float | None
    share: float | None
    strict_ceiling: float | None
    strict_share: float | None
    worlds: dict[str, float]
    measure: str = ""
    kind: str = ""


@dataclass(frozen=True)
class Comparison:
    """Predictor minus baseline in one figure, paired over worlds (for regret: baseline minus predictor)."""

    predictor: str
    baseline: str
    of: str
    figure: str
    difference: float
    low: float | None
    high: float | None
    p: float | None


def rivals(found: Iterable[Comparison]) -> list[Comparison]:
    """The prediction of strength against what has seen no answers, in the order of bases."""
    return [c for c in found if (c.of, c.figure) == ("strength", "tau") and c.baseline not in ORACLES]


@dataclass(frozen=True)
class Control:
    """What must fail, over worlds: mean lift with interval beside that of true pairs within the same columns."""

    name: str
    lift: float
    low: float | None
    high: float | None
    true_lift: float
    fails: bool | None
    words: str


@dataclass(frozen=True)
class FalsePositives:
    """Shuffles of the tree's labels within every world: how many gave the table at least one verdict (`table`), and
    the predictor a significant score (`predictor`), at level alpha; the upper 95 % bounds (Clopper and Pearson)."""

    shuffles: int
    alpha: float
    table: int
    table_upper: float
    predictor: int
    predictor_upper: float


@dataclass(frozen=True)
class Agreement:
    """Mean over worlds of the rank agreement (Spearman, cells within one root) of two ways to measure one thing."""

    of: str
    a: str
    b: str
    value: float
    worlds: int


@dataclass(frozen=True)
class Bar:
    """One requirement, the figure it is held against, and whether it is met; null where it could not be measured."""

    name: str
    value: float | None
    wanted: str
    met: bool | None


@dataclass(frozen=True)
class Statistics:
    """All figures of the prediction. permutation: figure -> p of the strength predictor when models are exchanged
    within their families, every world at once. partial: what the retention predictor explains beyond strength.
    apart: the prediction's tau for styles and characters apart, and against each other measure."""

    worlds: int
    cells: int
    ceiling_from: str
    scores: tuple[Score, ...]
    comparisons: tuple[Comparison, ...]
    controls: tuple[Control, ...]
    agreements: tuple[Agreement, ...]
    partial: Score | None
    permutation: dict[str, float | None]
    false_positives: FalsePositives | None
    bars: tuple[Bar, ...]
    apart: tuple[Score, ...] = ()


@dataclass(frozen=True)
class Effect:
    """A claim's effect under one measure: mean over worlds, interval, p; positive as the claim says."""

    measure: str
    effect: float
    low: float | None
    high: float | None
    p: float | None


@dataclass(frozen=True)
class Hypothesis:
    """One claim and what became of it. part: "transfer" or "training"; article: where it is said, in our words; test:
    what is compared. effect, low, high: under the measure shown first; p: the largest over measures (all must agree);
    adjusted_p: Holm over the table. verdict: one of VERDICTS; reason: why, in words. worlds: how many could tell."""

    key: str
    claim: str
    part: str
    article: str
    test: str
    effect: float | None
    low: float | None
    high: float | None
    p: float | None
    adjusted_p: float | None
    verdict: str
    reason: str
    worlds: int = 0
    effects: tuple[Effect, ...] = ()


@dataclass(frozen=True)
class TransferResult:
    """What `lineage transfer-test` found. config: the resolved experiment; config_hash, predictions_hash: sha256 of
    it and of the predictions as they stood before the first training. shown: the world whose matrices and pictures the
    page draws; null: the one with most models. runs: rows of the ledger in words, newest last."""

    provenance: Provenance
    config: dict[str, Any]
    config_hash: str
    predictions_hash: str
    design: Design
    worlds: tuple[WorldFacts, ...]
    predictions: tuple[PairPrediction, ...]
    cells: tuple[Cell, ...]
    dropped: tuple[Dropped, ...]
    statistics: Statistics
    hypotheses: tuple[Hypothesis, ...]
    failed: tuple[Failed, ...] = ()
    shown: str | None = None
    runs: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    kind: str = "transfer"


def predictions_hash(predictions: Iterable[PairPrediction]) -> str:
    """sha256 of predictions, whatever their order."""
    rows = [to_json(p) for p in sorted(predictions, key=lambda p: (p.world, p.base, p.model))]
    return hashlib.sha256(json.dumps(rows, sort_keys=True, allow_nan=False).encode()).hexdigest()
