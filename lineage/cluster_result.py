"""Frozen records of what `lineage cluster` found; saved as every other result (see lineage.results).

Every name in edges, merges, families and roots is that of a `ClusterModel` or of an `Unobserved` ancestor.
"""

from __future__ import annotations

from dataclasses import dataclass

from lineage.results import Provenance

RELATIONS = ("finetune", "merge", "adapter", "quantized", "pruned", "copy", "component", "permuted")
ALL_PAIRS = 100  # models up to which the blocks of every pair are kept
NEAREST = 20  # neighbours per model whose blocks are kept beyond that
ALL_DISTANCES = 1000  # comparable models up to which every distance is kept


@dataclass(frozen=True)
class Evidence:
    """One reason for a claim. `source`: "distance", "rounding", "residual", "rank", "zeros", "norms", "metadata",
    "dates", "base" ...; `words`: a plain sentence; `value`: the number behind it, where there is one."""

    source: str
    words: str
    value: float | None = None


@dataclass(frozen=True)
class Affinity:
    """How much of a model's change points along a family; the weights of one model sum to 1."""

    family: str
    weight: float


@dataclass(frozen=True)
class ClusterModel:
    """One file of the folder that takes part. `name`: its stem, with its folder where two collide; `file`: path inside
    the folder; `kind`: "model" or "adapter" (then root and family are null unless its declared base is here);
    `components`: component -> digest of its tensors, equal where two models share it bit for bit; `license`: as its
    card or metadata declares."""

    name: str
    file: str
    sha256: str | None
    bytes: int
    architecture: str
    root: str | None
    family: str | None
    affinities: tuple[Affinity, ...] = ()
    components: dict[str, str] | None = None
    kind: str = "model"
    license: str | None = None


@dataclass(frozen=True)
class Family:
    """`root`: name of the tree's root; `stability`: 0 to 1, how much of it stays when blocks are resampled."""

    name: str
    root: str
    members: tuple[str, ...]
    stability: float | None


@dataclass(frozen=True)
class Edge:
    """`relation`: one of RELATIONS. `weight`, `low`, `high`: coefficient of the parent in a merge, or of an adapter,
    with its interval; null where the relation has none. `directed`: false where parent and child cannot be told apart
    (their order is then only that of names). `distance`: ||child - parent|| / sqrt(||child|| ||parent||). `rank`:
    signal rank of a baked adapter. `component`: which one was swapped. `declared`: drawn because a file says so, not
    because weights show it."""

    parent: str
    child: str
    relation: str
    weight: float | None
    low: float | None
    high: float | None
    directed: bool
    confidence: float
    evidence: tuple[Evidence, ...] = ()
    distance: float | None = None
    rank: int | None = None
    component: str | None = None
    declared: bool = False


@dataclass(frozen=True)
class MergeParent:
    """A parent and its coefficient with an interval; null for a method without coefficients (SLERP, TIES, DARE)."""

    name: str
    weight: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class FoundMerge:
    """`method`: "weighted_sum", "add_difference", "block_weighted", "slerp", "ties", "dare" or "unknown". `residual`:
    ||child - sum w parent||^2 / ||child - nearest parent||^2; `residual_ratio`: the same over its rounding floor;
    `p_value` by resampling blocks. `unseen_parent`: part of it is in no file of the folder. `recipe`: what
    `lineage merge` runs; null where it cannot be written. `blocks`: block -> coefficients in the order of `parents`,
    where they differ by block."""

    child: str
    parents: tuple[MergeParent, ...]
    residual: float | None
    p_value: float | None
    unseen_parent: bool
    recipe: str | None
    residual_ratio: float | None = None
    method: str = "weighted_sum"
    confidence: float | None = None
    blocks: dict[str, tuple[float, ...]] | None = None


@dataclass(frozen=True)
class Unobserved:
    """An ancestor that no file of the folder is, but that its descendants imply."""

    name: str
    root: str
    words: str
    confidence: float | None = None


@dataclass(frozen=True)
class Root:
    """The start of one tree: a model or an unobserved ancestor. `architecture`: of all its models; `members`: how many
    models grew from it, itself included; `confidence` that it, and no other of them, is the first."""

    name: str
    architecture: str
    members: int
    confidence: float | None
    evidence: tuple[Evidence, ...] = ()


@dataclass(frozen=True)
class Skipped:
    """A file that takes no part. `bucket`: "vae", "component", "other", "unreadable" ... as in `counts`."""

    file: str
    bucket: str
    reason: str


@dataclass(frozen=True)
class Distances:
    """Relative distances ||A - B|| / sqrt(||A|| ||B||) of `models`: the condensed upper triangle, row by row (as
    scipy's squareform reads it); null between models that cannot be compared. Empty beyond ALL_DISTANCES models."""

    models: tuple[str, ...]
    values: tuple[float | None, ...]


@dataclass(frozen=True)
class PairBlocks:
    """Relative distance of models `a` and `b` in each block, in the order of `BlockSimilarity.blocks`; null where
    either lacks the block. Similarity is 1 - distance^2 / 2, a cosine where both norms are equal."""

    a: str
    b: str
    values: tuple[float | None, ...]


@dataclass(frozen=True)
class BlockSimilarity:
    """All pairs up to ALL_PAIRS models (`complete`), beyond that each model's NEAREST neighbours."""

    blocks: tuple[str, ...]
    pairs: tuple[PairBlocks, ...]
    complete: bool


@dataclass(frozen=True)
class Contradiction:
    """What a file's metadata, its card or a date says (`source`, `claim`) against what weights show (`finding`)."""

    model: str
    source: str
    claim: str
    finding: str


@dataclass(frozen=True)
class Choice:
    """`producer` of the table of inner products: "exact" or "sketch"; `reason`: why, a whole sentence."""

    producer: str
    reason: str


@dataclass(frozen=True)
class ClusterResult:
    """What `lineage cluster` found. `counts`: bucket -> number of files; they add up to the files of the folder.
    `linkage`: rows (a, b, distance, size) as scipy writes them, leaves in the order of `distances.models`.
    `added`: the model that --add asked about. Models, edges and merges are sorted by name."""

    provenance: Provenance
    folder: str
    models: tuple[ClusterModel, ...]
    families: tuple[Family, ...]
    edges: tuple[Edge, ...]
    merges: tuple[FoundMerge, ...]
    unobserved: tuple[Unobserved, ...]
    roots: tuple[Root, ...]
    skipped: tuple[Skipped, ...]
    counts: dict[str, int]
    choice: Choice
    distances: Distances
    linkage: tuple[tuple[float, float, float, float], ...]
    block_similarity: BlockSimilarity
    contradictions: tuple[Contradiction, ...] = ()
    min_confidence: float = 0.0
    added: str | None = None
    notes: tuple[str, ...] = ()
    kind: str = "cluster"
