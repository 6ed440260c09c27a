"""What the inference inside one tree works on, and what it says: models are indices in an order that content fixes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lineage.cluster_result import Evidence
from lineage.fingerprint import Fingerprint
from lineage.unmerge import Reading

Array = NDArray[np.float64]
Models = Sequence[Mapping[str, Tensor] | None]


@dataclass(frozen=True)
class Kin:
    """One tree's n models. table: (blocks, n, n) inner products of differences to one of them, of the part that is
    compared; rounding: (n,) energies; models: their tensors, None where files are not to be read again; matrices,
    vectors: names -> block of the common parameters of two or more, and of one dimension. known: (earlier, later,
    log-odds) from metadata and dates."""

    prints: tuple[Fingerprint, ...]
    models: Models
    blocks: tuple[str, ...]
    table: Array
    rounding: Array
    matrices: Mapping[str, str]
    vectors: tuple[str, ...]
    known: tuple[tuple[int, int, float], ...] = ()

    @property
    def entries(self) -> int:
        """Compared entries of a model."""
        names = {*self.matrices, *self.vectors}
        return max(1, sum(t.entries for t in self.prints[0].tensors if t.name in names))

    @property
    def squares(self) -> Array:
        """(n,) ||W||^2 of what is compared."""
        names = {*self.matrices, *self.vectors}
        return np.array([sum(t.norm**2 for t in p.tensors if t.name in names) for p in self.prints])

    @cached_property
    def g(self) -> Array:
        return self.table.sum(0)

    def held(self, members: Sequence[int]) -> list[Mapping[str, Tensor]] | None:
        """The members' tensors, None where some cannot be read again."""
        models = [m for m in (self.models[i] for i in members) if m is not None]
        return models if len(models) == len(members) else None

    def __len__(self) -> int:
        return len(self.prints)


@dataclass(frozen=True)
class Link:
    """An edge between two models (indices), or from a hidden ancestor (parent -1, -2, ...)."""

    parent: int
    child: int
    relation: str
    confidence: float
    evidence: tuple[Evidence, ...]
    directed: bool = True
    weight: float | None = None
    low: float | None = None
    high: float | None = None
    rank: int | None = None


@dataclass
class Ancestry:
    """What was found in one tree."""

    links: list[Link] = field(default_factory=list)
    merges: list[Merged] = field(default_factory=list)
    root: int | None = None
    root_confidence: float | None = None
    root_evidence: tuple[Evidence, ...] = ()
    parent: Mapping[int, int] = field(default_factory=dict)  # child -> parent, of the fine-tune tree
    derived: dict[int, int] = field(default_factory=dict)  # leaf -> what it derives from, by copying


@dataclass(frozen=True)
class Merged:
    """A merge as found: its reading, intervals per parent, p-value, and coefficients by block where those differ."""

    reading: Reading
    intervals: tuple[tuple[float, float], ...]
    p_value: float | None
    method: str = "weighted_sum"
    unseen: bool = False
    blocks: dict[str, tuple[float, ...]] | None = None
    confidence: float = 0.9
