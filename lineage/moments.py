"""What a tensor's values are like, whatever their order: moments, extremes, rounding energy, a hash of the values.

16-bit (and 8-bit) values are counted pattern by pattern, so all of it is exact; wider ones are summed in float64.
An entry that is not finite, or above 2^60 (no weight is), counts as `wild` and as zero in everything else.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lineage.rounding import ulp

WILD = 2.0**60
_SUMS = 7  # sum x, x^2, x^3, x^4, ulp^2 / 12; zeros; wild entries


@dataclass(frozen=True)
class Moments:
    """Of n entries. norm: Frobenius. skewness, kurtosis (3 for a Gaussian): 0 where all entries are equal.

    rounding_energy: sum of ulp^2 / 12 in the stored dtype, the variance of what storing took away. largest: of the
    magnitudes. values_hash: of dtype and values, 128 bits hexadecimal; the same for any order of them."""

    norm: float
    mean: float
    std: float
    skewness: float
    kurtosis: float
    largest: float
    zeros: int
    wild: int
    rounding_energy: float
    values_hash: str


class Tally:
    """Counts the entries of one tensor, part by part, in any order."""

    def __init__(self, dtype: torch.dtype):
        self._dtype, self._entries = dtype, 0
        self._counts = np.zeros(1 << (8 * dtype.itemsize), np.int64) if dtype.itemsize <= 2 else None
        self._sums, self._largest = np.zeros(_SUMS), 0.0
        self._mixed = np.zeros(2, np.uint64)

    def add(self, part: Tensor) -> None:
        """Some more entries (n,), contiguous, in the tensor's dtype."""
        self._entries += len(part)
        if self._counts is not None:
            bits = _bits(part)
            self._counts += np.bincount(bits, minlength=len(self._counts))
            return
        sums, largest = _sums(part)
        self._sums += sums
        self._largest = max(self._largest, largest)
        self._mixed += _mixed(part)

    def moments(self) -> Moments:
        """Of all entries so far."""
        identity = self._mixed.tobytes()
        if self._counts is not None:
            there = np.flatnonzero(self._counts)
            counts = self._counts[there]
            table, magnitudes = _table(self._dtype)
            self._sums, self._largest = counts @ table[there], float(magnitudes[there].max(initial=0.0))
            identity = there.astype("<u4").tobytes() + counts.astype("<i8").tobytes()
        digest = hashlib.sha256(f"{self._dtype} {self._entries} ".encode() + identity).hexdigest()[:32]
        return _moments(self._entries, self._sums, self._largest, digest)


def _moments(n: int, sums: NDArray, largest: float, digest: str) -> Moments:
    """Central moments from raw ones: weights lie around 0, so little cancels."""
    m1, m2, m3, m4 = sums[:4] / max(1, n - sums[6])
    variance = max(0.0, m2 - m1 * m1)
    spread = variance > 1e-12 * m2
    third = m3 - 3 * m1 * m2 + 2 * m1**3
    fourth = m4 - 4 * m1 * m3 + 6 * m1 * m1 * m2 - 3 * m1**4
    return Moments(
        norm=float(sums[1] ** 0.5),
        mean=float(m1),
        std=float(variance**0.5),
        skewness=float(third / variance**1.5) if spread else 0.0,
        kurtosis=float(fourth / variance**2) if spread else 0.0,
        largest=largest,
        zeros=int(sums[5]),
        wild=int(sums[6]),
        rounding_energy=float(sums[4]),
        values_hash=digest,
    )


def tame(row: Tensor) -> Tensor:
    """(n,) as float32 or float64, wild entries set to zero."""
    wide = row.to(torch.float64 if row.dtype == torch.float64 else torch.float32)
    return torch.where(wide.abs() <= WILD, wide, 0)  # a comparison with NaN is false


def _bits(part: Tensor) -> NDArray:
    return part.view(torch.uint8).numpy().view(f"<u{part.dtype.itemsize}")


@cache
def _table(dtype: torch.dtype) -> tuple[NDArray, NDArray]:
    """Per bit pattern: (what it adds to the sums, its magnitude)."""
    size = dtype.itemsize
    patterns = torch.from_numpy(np.arange(1 << (8 * size)).astype(f"<u{size}").view(np.uint8).copy())
    values = patterns.view(dtype)
    rows = [_sums(values[i : i + 1]) for i in range(len(values))] if dtype.is_complex else _each(values)
    return rows


def _each(values: Tensor) -> tuple[NDArray, NDArray]:
    x = tame(values).double()
    wide = values.double()
    wild = ~(wide.abs() <= WILD)
    columns = [x, x**2, x**3, x**4, _rounding(values), (wide == 0).double(), wild.double()]
    return torch.stack(columns, 1).numpy(), x.abs().numpy()


def _rounding(values: Tensor) -> Tensor:
    """ulp^2 / 12 of each entry, float64; 0 for integers and for wild entries."""
    if not values.dtype.is_floating_point:
        return torch.zeros(len(values), dtype=torch.float64)
    step = ulp(values).double()
    return torch.where(tame(values) == values.to(step.dtype), step.square() / 12, 0.0)


def _sums(part: Tensor) -> tuple[NDArray, float]:
    """(what these entries add to the sums, largest magnitude)."""
    each, magnitudes = _each(part)
    return each.sum(0), float(magnitudes.max(initial=0.0))


def _mixed(part: Tensor) -> NDArray:
    """Two sums mod 2^64 of well mixed entries: a hash of a multiset (Clarke et al. 2003, with a fixed mixer)."""
    bits = _bits(part).astype(np.uint64)
    out = np.empty(2, np.uint64)
    for i, odd in enumerate((0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F)):
        x = (bits + np.uint64(i + 1)) * np.uint64(odd)
        x ^= x >> np.uint64(29)
        x *= np.uint64(0xBF58476D1CE4E5B9)
        x ^= x >> np.uint64(32)
        out[i] = x.sum(dtype=np.uint64)
    return out
