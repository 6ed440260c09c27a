"""Records of what `lineage extract` and `lineage resize` wrote, and of what they could not write."""

from __future__ import annotations

from dataclasses import dataclass

from lineage.results import Provenance


@dataclass(frozen=True)
class AdaptedLayer:
    """One module of the new adapter. rank: its dim. wanted: the rank asked for, where the matrix allows less.

    relative: ||D||_F / ||W_base||_F of the change, null for a resized adapter. error: ||D - D'||_F / ||D||_F of what
    was written, factors rounded as stored. best_error: the least that any matrix of rank dim^2 leaves (LoHa only, else
    null)."""

    name: str
    module: str
    component: str
    block: str
    shape: tuple[int, ...]
    rank: int
    wanted: int | None
    relative: float | None
    frobenius: float
    error: float
    best_error: float | None


@dataclass(frozen=True)
class LeftOut:
    """A change that is not in the adapter. share: of the squared change of all that was looked at; null: not known."""

    name: str
    reason: str
    share: float | None


@dataclass(frozen=True)
class AdapterResult:
    """What was written to `file`. algorithm: lora, locon or loha. criterion: how ranks were chosen, in words. kept:
    share of the squared change of everything looked at that the adapter reproduces; null where nothing changed."""

    provenance: Provenance
    file: str
    sha256: str
    bytes: int
    source: str
    base: str
    algorithm: str
    criterion: str
    dtype: str
    kept: float | None
    layers: tuple[AdaptedLayer, ...]
    left_out: tuple[LeftOut, ...]
    notes: tuple[str, ...] = ()
    kind: str = "adapter"
