"""One parameter's delta: the plain facts, what its rounding noise hides, and the record of both."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lineage.keys import Param
from lineage.results import LayerSpectrum, VectorDelta
from lineage.rounding import clean
from lineage.spectrum import RESOLVED, Spectrum, gaussian_energy

LEADING = 256  # singular values kept per layer


def matrix_shape(p: Param) -> tuple[int, int]:
    """(out, in * kh * kw), as adapters see a weight; vectors are columns, a lone number is (1, 1)."""
    rows = p.shape[0] if p.shape else 1
    return rows, p.numel // rows


@dataclass(frozen=True)
class Seen:
    """What of a spectrum stands out of the rounding noise: its count, or at least how many, and their clean values."""

    noise_energy: float
    noise_edge: float
    rank: int | None
    at_least: int
    values: Tensor

    @classmethod
    def through(cls, s: Spectrum, noise_energy: float, noise_edge: float) -> Seen:
        """The signal rank is the count above the edge, unknown where values crowd it or where the count may go on."""
        edge = max(noise_edge, s.floor())
        count = int((s.singular_values > edge).sum())
        resolved = int((s.singular_values[:count] >= RESOLVED * edge).sum())
        ends = count < len(s.singular_values) or s.complete
        values = clean(s.singular_values, noise_energy, s.shape, count)
        rank = count if count == resolved > 0 and ends else None
        return cls(noise_energy, noise_edge, rank, resolved, values)

    @property
    def below_storage_precision(self) -> bool:
        return self.at_least == 0

    def energy(self, ks: list[int]) -> dict[str, float] | None:
        """Share of the clean energy in the first k values; None where nothing stands out."""
        if self.at_least == 0:
            return None
        squares = self.values.square()
        return {str(k): float(squares[:k].sum() / squares.sum()) for k in ks}

    def k_at(self, share: float) -> int | None:
        if self.at_least == 0:
            return None
        squares = self.values.square().cumsum(0)
        return min(1 + int((squares < share * squares[-1]).sum()), len(squares))


@dataclass(frozen=True)
class Sums:
    """||W_base||_F^2, ||D||_F^2, and how many entries are exactly equal (None: not known)."""

    base: float
    delta: float
    identical: int | None

    @property
    def finite(self) -> bool:
        return math.isfinite(self.base) and math.isfinite(self.delta)


@dataclass(frozen=True)
class Facts:
    """One parameter and its sums, to be made a record."""

    param: Param
    sums: Sums

    def _common(self) -> dict:
        p = self.param
        return {
            "name": p.name,
            "component": p.component,
            "block": p.block,
            "role": p.role,
            "shape": tuple(p.shape),
            "frobenius": self.sums.delta**0.5,
            "relative": (self.sums.delta / self.sums.base) ** 0.5 if self.sums.base > 0 else None,
            "identical_entries": self.sums.identical,
        }

    def vector(self) -> VectorDelta:
        return VectorDelta(**self._common())

    def identical_layer(self, ks: list[int]) -> LayerSpectrum:
        """A bit-identical layer has rank 0, whatever the storage."""
        zero = Spectrum(torch.zeros(0, dtype=torch.float64), 0.0, matrix_shape(self.param), "identical")
        return self.layer(zero, Seen(0.0, 0.0, 0, 0, zero.singular_values), ks)

    def layer(self, s: Spectrum, seen: Seen, ks: list[int]) -> LayerSpectrum:
        """The record of one matrix: its spectrum, what of it stands out of rounding, energies at ranks `ks`."""
        k_90, k_90_at_least = s.k_at(0.9)
        k_99, k_99_at_least = s.k_at(0.99)
        return LayerSpectrum(
            **self._common(),
            entries=self.param.numel,
            noise_energy=seen.noise_energy,
            noise_edge=seen.noise_edge,
            signal_rank=seen.rank,
            signal_rank_at_least=seen.at_least,
            below_storage_precision=seen.below_storage_precision and s.total > 0,
            numerical_rank=s.numerical_rank(),
            stable_rank=s.stable_rank(),
            effective_rank=s.effective_rank(),
            participation_ratio=s.participation_ratio(),
            k_90=k_90,
            k_99=k_99,
            k_90_at_least=k_90_at_least,
            k_99_at_least=k_99_at_least,
            signal_k_90=seen.k_at(0.9),
            signal_k_99=seen.k_at(0.99),
            energy={str(k): s.energy(k) for k in ks},
            signal_energy=seen.energy(ks),
            gaussian_energy={str(k): gaussian_energy(s.shape, k) for k in ks},
            singular_values=tuple(s.singular_values[:LEADING].tolist()),
            solver=s.solver,
        )
