"""What a tensor's values are like, whatever their order: moments, extremes, rounding energy, a hash of the values.

Values of one or two bytes are counted pattern by pattern, so all of it is exact; wider ones are summed in float64. An
entry that is not finite, or above 2^60 (no weight is), counts as wild, and as zero in everything else.
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
PART = 1 << 19  # entries counted at once: fewer, and clearing the counts costs more than counting
FEW = 1 << 12  # entries below which they are looked up, not counted
_LANES = ((0x9E3779B1, 0x85EBCA77), (0xC2B2AE3D, 0x27D4EB2F))  # odd numbers; two lanes make 64 bits against accidents
_WIDE = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Moments:
    """norm: Frobenius. skewness, kurtosis (3 for a Gaussian): 0 where all entries are equal. largest: in magnitude.

    rounding_energy: sum of ulp^2 / 12 in the stored dtype, the variance of what storing took away. values_hash: of
    dtype and values, 128 bits hexadecimal, the same for any order of them; against accidents, not forgery."""

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


@dataclass
class _Sums:
    """Of x, x^2, x^3, x^4, ulp^2 / 12, zeros and wild entries; the largest magnitude; the lanes of the hash."""

    powers: NDArray[np.float64]
    largest: float
    lanes: NDArray[np.uint64]

    def __iadd__(self, other: _Sums) -> _Sums:
        self.powers += other.powers
        self.largest = max(self.largest, other.largest)
        self.lanes += other.lanes
        return self


def moments(entries: Tensor) -> Moments:
    """Of a tensor (n,) of any real dtype, contiguous."""
    tally = Tally(entries.dtype)
    for part in entries.split(PART):
        tally.add(part)
    return tally.moments()


class Tally:
    """The moments of a tensor of `dtype` that comes in parts, in any order."""

    def __init__(self, dtype: torch.dtype):
        self._dtype, self._entries = dtype, 0
        self._sums = _Sums(np.zeros(7), 0.0, np.zeros(len(_LANES), np.uint64))
        self._counts: Tensor | None = None

    def add(self, part: Tensor) -> None:
        """Up to PART more entries (n,), contiguous."""
        self._entries += len(part)
        if self._dtype.itemsize > 2:
            self._sums += _summed(part)
        elif len(part) <= FEW:
            self._sums += _table(self._dtype).at(_patterns(part))
        else:
            counts = torch.bincount(_patterns(part), minlength=1 << (8 * self._dtype.itemsize))
            self._counts = counts if self._counts is None else self._counts.add_(counts)

    def moments(self) -> Moments:
        """Of all entries so far."""
        if self._counts is not None:
            self._sums += _table(self._dtype).counted(self._counts.numpy())
            self._counts = None
        return _central(self._entries, self._sums, f"{self._dtype} {self._entries} ".encode())


def tame(row: Tensor) -> Tensor:
    """(n,) in float32 (float64 stays), wild entries set to zero."""
    wide = row if row.dtype == torch.float64 else row.float()
    return torch.where(wide.abs() <= WILD, wide, 0)  # no comparison with NaN is true


def _central(n: int, sums: _Sums, label: bytes) -> Moments:
    """From raw moments: weights lie around 0, so little cancels."""
    m1, m2, m3, m4 = sums.powers[:4] / max(1, n - sums.powers[6])
    variance = max(0.0, m2 - m1 * m1)
    spread = variance > 1e-12 * m2
    third = m3 - 3 * m1 * m2 + 2 * m1**3
    fourth = m4 - 4 * m1 * m3 + 6 * m1 * m1 * m2 - 3 * m1**4
    return Moments(
        norm=float(sums.powers[1] ** 0.5),
        mean=float(m1),
        std=float(variance**0.5),
        skewness=float(third / variance**1.5) if spread else 0.0,
        kurtosis=float(fourth / variance**2) if spread else 0.0,
        largest=sums.largest,
        zeros=int(sums.powers[5]),
        wild=int(sums.powers[6]),
        rounding_energy=float(sums.powers[4]),
        values_hash=hashlib.sha256(label + sums.lanes.astype("<u8").tobytes()).hexdigest()[:32],
    )


def _summed(part: Tensor) -> _Sums:
    """Of entries of four or eight bytes."""
    x = part.double()
    low, high = (float(v) for v in torch.aminmax(x)) if len(x) else (0.0, 0.0)
    wild = 0
    if not (low >= -WILD and high <= WILD):  # NaN too
        wild = int((~(x.abs() <= WILD)).sum())
        x = tame(x)
        low, high = (float(v) for v in torch.aminmax(x))
    square = x * x
    rounding = float(_spacing(part, x).square().sum()) / 12 if part.is_floating_point() else 0.0
    zeros = len(x) - int(torch.count_nonzero(x)) - wild
    powers = [x.sum(), x @ x, x @ square, square @ square, rounding, zeros, wild]
    bits = part.numpy().view(f"u{part.dtype.itemsize}")
    return _Sums(np.array([float(p) for p in powers]), max(-low, high), _lanes(bits))


def _spacing(part: Tensor, x: Tensor) -> Tensor:
    """ulp of each entry, 0 for wild ones; `x`: the tame entries. Of float64 that of float32: next to nothing."""
    wide = part if part.dtype != torch.float64 else part.float()
    steps = ulp(wide).to(x.dtype)
    return steps if bool((wide.abs() <= WILD).all()) else torch.where(wide.abs() <= WILD, steps, 0)


def _patterns(part: Tensor) -> Tensor:
    """Bit patterns of one- or two-byte entries as integers from 0."""
    if part.dtype.itemsize == 1:
        return part.view(torch.uint8).int()
    return part.view(torch.int16).int().bitwise_and_(0xFFFF)


@dataclass(frozen=True)
class _Table:
    """What each bit pattern adds: to the powers (patterns, 7), as a magnitude, to the lanes (lanes, patterns)."""

    powers: NDArray[np.float64]
    magnitudes: NDArray[np.float64]
    lanes: NDArray[np.uint64]

    def at(self, patterns: Tensor) -> _Sums:
        """Of a few entries."""
        i = patterns.numpy()
        return _Sums(self.powers[i].sum(0), float(self.magnitudes[i].max(initial=0.0)), self.lanes[:, i].sum(1))

    def counted(self, counts: NDArray[np.int64]) -> _Sums:
        """Of as many entries of each pattern as `counts` says."""
        lanes = (counts.astype(np.uint64) * self.lanes).sum(1)
        largest = float(self.magnitudes[counts > 0].max(initial=0.0))
        return _Sums(counts.astype(np.float64) @ self.powers, largest, lanes)


@cache
def _table(dtype: torch.dtype) -> _Table:
    bits = np.arange(1 << (8 * dtype.itemsize)).astype(f"u{dtype.itemsize}")
    values = torch.from_numpy(bits.view(np.uint8).copy()).view(dtype)
    wide = values.double()
    x = tame(wide)
    wild = ~(wide.abs() <= WILD)
    rounding = torch.zeros_like(x)
    if dtype.is_floating_point:
        rounding = torch.where(wild, 0, ulp(values).double().square() / 12)
    columns = [x, x**2, x**3, x**4, rounding, (wide == 0).double(), wild.double()]
    lanes = np.stack([_mixed(bits, *odd) for odd in _LANES]).astype(np.uint64)
    return _Table(torch.stack(columns, 1).numpy(), x.abs().numpy(), lanes)


def _lanes(bits: NDArray) -> NDArray[np.uint64]:
    """Sums of well mixed bit patterns mod 2^64: hashes of a multiset (Clarke et al. 2003, with a fixed mixer)."""
    if bits.itemsize == 8:
        bits = ((bits * _WIDE) >> np.uint64(32)).astype(np.uint32)
    return np.array([_mixed(bits, *odd).sum(dtype=np.uint64) for odd in _LANES], np.uint64)


def _mixed(bits: NDArray, first: int, second: int) -> NDArray[np.uint32]:
    x = bits.astype(np.uint32)
    x += np.uint32(1)
    x *= np.uint32(first)
    x ^= x >> np.uint32(15)
    x *= np.uint32(second)
    x ^= x >> np.uint32(13)
    return x
