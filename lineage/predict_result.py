"""Frozen records of what `lineage predict` says; saved as every other result (see lineage.results)."""

from __future__ import annotations

from dataclasses import dataclass

from lineage.results import Provenance

OTHER_ARCHITECTURE, BASE_UNKNOWN = "other architecture", "base unknown"
CERTAIN, LIKELY, GUESS, UNKNOWN = "certain", "likely", "a guess", "unknown"


@dataclass(frozen=True)
class Constants:
    """scale: relative distance at which strength has fallen to 1/e. weak: strength below it; loses: retention below it.
    source: where they come from."""

    scale: float
    weak: float
    loses: float
    source: str


@dataclass(frozen=True)
class Features:
    """What a prediction for (X, Y) is made of. distance: ||X - Y|| / sqrt(||X|| ||Y||), null where they cannot be
    compared. steps: edges between them in the tree, null without a way. beyond: squared relative length of what X
    learned and Y did not; missing: of what Y learned and X did not; together distance^2. lacks: share of Y's style
    vector that X lacks. cosine: of their style vectors. Strangers: 0, 0, 1, 0."""

    distance: float | None
    steps: int | None
    beyond: float = 0.0
    missing: float = 0.0
    lacks: float = 1.0
    cosine: float = 0.0


@dataclass(frozen=True)
class Prediction:
    """Of an adapter trained on `base` and applied to `model`: how strong its style is there, and how much of the
    model's own style is left, both 0 to 1. relation: what the base is to the model. verdict: WORKS, WEAK, LOSES or one
    of STRANGERS. confidence: that of the least sure edge between them, null where the tree shows no way."""

    base: str
    model: str
    strength: float
    retention: float
    relation: str
    verdict: str
    reason: str
    confidence: float | None
    features: Features


@dataclass(frozen=True)
class ListedModel:
    """A model of the folder. depth: steps below the first of its tree, along the line that the page indents by."""

    name: str
    file: str
    architecture: str
    root: str
    family: str
    depth: int


@dataclass(frozen=True)
class AdapterFacts:
    """What was asked about. modules: how many layers it changes; prediction_type: "epsilon" or "v", null where neither
    it nor its base says."""

    name: str
    file: str
    kind: str
    modules: int
    prediction_type: str | None


@dataclass(frozen=True)
class TrainingBase:
    """The model that the adapter was trained on. model: its name in the folder, or that of the one which stands in for
    it where it is missing (`stands_in`); null where nothing is known. sure: CERTAIN (content hash), LIKELY (short hash
    or name), GUESS or UNKNOWN. hash, said: as the adapter's metadata or card calls it; words: how it was found."""

    model: str | None
    stands_in: bool
    sure: str
    hash: str | None
    said: str | None
    words: str


@dataclass(frozen=True)
class Forecast:
    """What the adapter will do on `model`. verdict: as of a Prediction, or OTHER_ARCHITECTURE, or BASE_UNKNOWN; the
    numbers are null where nothing can be said. fits: share of the adapter's layers that the model has;
    warnings: of the model, as sentences without their subject."""

    model: str
    verdict: str
    reason: str
    fits: float
    warnings: tuple[str, ...] = ()
    strength: float | None = None
    retention: float | None = None
    relation: str | None = None
    distance: float | None = None
    confidence: float | None = None


@dataclass(frozen=True)
class Advice:
    """`base` to train on for the targets. stays: mean strength over them, for who wants the trained style; through:
    mean of strength times retention, for who wants the targets' own; words: what it is to the targets."""

    base: str
    stays: float
    through: float
    words: str
    pairs: tuple[Prediction, ...]


@dataclass(frozen=True)
class PredictResult:
    """Either `adapter`, `base` and a forecast per model, or `targets` and advice per base. models: in the order of the
    drawn family tree; forecasts in theirs, advice best for `stays` first. code: sha256 of the predictor."""

    provenance: Provenance
    folder: str
    models: tuple[ListedModel, ...]
    adapter: AdapterFacts | None
    base: TrainingBase | None
    forecasts: tuple[Forecast, ...]
    targets: tuple[str, ...]
    advice: tuple[Advice, ...]
    constants: Constants
    code: str
    kind: str = "predict"
