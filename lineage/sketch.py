"""CountSketch of a model's weights: few numbers per block whose distances are the weights' distances, nearly.

Linear: the sketch of a A + b B is a sketch(A) + b sketch(B). A parameter's hash depends on its canonical name and on
positions inside it alone, so the same parameter meets the same slots in any file, layout and dtype. Charikar, Chen &
Farach-Colton 2002; here signs and slots are structured, so that whole rows are added at once: a row of entries takes
its signs from random places of two fixed sequences, is shifted cyclically by a random amount, and one fixed permutation
scatters the sum. Two entries share a slot with probability 1 / slots, with independent signs.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Mapping
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SLOTS = 1 << 16  # of one model
LEAST = 16  # slots of one block
ROW = 1 << 15  # entries hashed at once: in float32 they and their signs stay in the processor's cache
_POOL = 1 << 14  # places where signs may begin: with two sequences, equal rows all but never meet with equal signs
_GRID = 2.0**40  # sums of such multiples are exact in float64, whatever their order


def allocate(entries: Mapping[str, int], slots: int = SLOTS) -> dict[str, int]:
    """Slots of each block: powers of two, in proportion to its entries as nearly as they allow, at least LEAST.

    entries: block -> how many. Powers of two fold into one another, so files whose blocks differ a little still
    compare. ValueError where there are too many blocks for that."""
    given = dict.fromkeys(sorted(entries), LEAST)
    left = slots - LEAST * len(given)
    if left < 0:
        raise ValueError(f"{len(given)} blocks for {slots} slots")
    queue = [(-entries[block] / LEAST, block) for block in given]
    heapq.heapify(queue)
    while queue:
        load, block = heapq.heappop(queue)
        if given[block] <= left:
            left -= given[block]
            given[block] *= 2
            heapq.heappush(queue, (load / 2, block))
    return given


def fold(sketch: NDArray, slots: int) -> NDArray:
    """A sketch (..., m) as it would be with fewer slots (..., slots); both powers of two."""
    return sketch.reshape(*sketch.shape[:-1], -1, slots).sum(-2, dtype=np.float64)


class Hash:
    """The hash of one parameter into `slots` (a power of two, at most SLOTS): `take` its entries, then `sketch`.

    name: canonical; entries: of the parameter; seed: of the whole family of hashes."""

    def __init__(self, name: str, entries: int, slots: int, seed: int = 0):
        draws = _philox(f"{seed} {name}").random_raw(max(1, -(-entries // ROW)))
        self._first, draws = (draws % np.uint64(_POOL)).tolist(), draws // np.uint64(_POOL)
        self._second, draws = (draws % np.uint64(_POOL)).tolist(), draws // np.uint64(_POOL)
        self._shift = (draws % np.uint64(SLOTS)).tolist()
        self._signs, self._slots, self._rows = _signs(seed), slots, 0
        self._sum = torch.zeros(SLOTS + ROW) if entries > ROW else None
        self._small = np.zeros(slots)

    def take(self, part: Tensor) -> None:
        """The next entries (n,), row-major; n a multiple of ROW, but for the last ones."""
        for row in part.split(ROW):
            i, n = self._rows, len(row)
            first = self._signs[0, self._first[i] : self._first[i] + n]
            second = self._signs[1, self._second[i] : self._second[i] + n]
            signed, at = (first * row).float(), self._shift[i]
            if self._sum is None:
                slots = _place()[at : at + n] & (self._slots - 1)
                self._small = np.bincount(slots, signed.mul_(second).numpy(), self._slots)
            else:
                self._sum[at : at + n].addcmul_(signed, second)
            self._rows += 1

    def sketch(self) -> NDArray[np.float64]:
        """(slots,) float64, on a grid on which sums of sketches are exact."""
        if self._sum is not None:
            self._sum[:ROW] += self._sum[SLOTS:]
            self._small = self._sum.numpy()[_order()].reshape(-1, self._slots).sum(0, dtype=np.float64)
        return np.rint(self._small * _GRID) / _GRID


def _philox(text: str) -> np.random.Philox:
    """A counter-based generator, the same on every system."""
    return np.random.Philox(
        key=int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).digest())
    )


@cache
def _signs(seed: int) -> Tensor:
    """Two sequences of random signs, (2, _POOL + ROW)."""
    raw = _philox(f"signs {seed}").random_raw(2 * (_POOL + ROW) // 64).astype("<u8").view(np.uint8)
    return torch.from_numpy(np.unpackbits(raw)).float().mul_(2).sub_(1).view(2, -1)


@cache
def _order() -> NDArray[np.int64]:
    """One permutation of SLOTS places."""
    return np.argsort(_philox("permutation").random_raw(SLOTS), kind="stable")


@cache
def _place() -> NDArray[np.int64]:
    """Its inverse, continued cyclically by ROW."""
    inverse = np.argsort(_order(), kind="stable")
    return np.concatenate([inverse, inverse[:ROW]])
