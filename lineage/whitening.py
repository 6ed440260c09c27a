"""Inner products of increments in coordinates where what a whole tree shares weighs little.

Siblings trained on like data move along the same few directions, so their squared distances do not add along paths. Per
matrix of a tree, D -> (L + e)^(-1/2) D (R + e)^(-1/2) with L = sum D D^T and R = sum D^T D over the tree's deviations
from their mean, each of length 1 (a Kronecker estimate of the increments' covariance): in these coordinates they nearly
do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lineage.thresholds import CHOSEN

Array = NDArray[np.float64]
LONGEST_SIDE = 2560  # of a matrix, above which a side is left as it is: its eigenvectors cost more than they tell
Progress = Callable[[int, int, str], None]


def inverse_root(covariance: Tensor, floor: float) -> Tensor:
    """(C + e)^(-1/2) of a positive semidefinite C (m, m), e = floor x its largest eigenvalue; float64."""
    values, vectors = torch.linalg.eigh(covariance)
    top = values[-1].clamp_min(torch.finfo(values.dtype).tiny)
    return (vectors * (values.clamp_min(0) + floor * top).rsqrt()) @ vectors.mT


def whiten(stack: Tensor, floor: float = CHOSEN.whiten_floor) -> Tensor:
    """Deviations of n matrices (n, rows, columns) from their mean, whitened on both sides (single columns are only
    scaled); the mean square over the stack's entries is 1 (all zero where the matrices are equal)."""
    deviation = stack - stack.mean(0)
    if not deviation.any():
        return deviation
    rows, columns = deviation.shape[1:]
    even = deviation / deviation.flatten(1).norm(dim=1).clamp_min(torch.finfo(stack.dtype).tiny)[:, None, None]
    sides = [n <= LONGEST_SIDE and columns > 1 for n in (rows, columns)]
    left = inverse_root(torch.einsum("nij,nkj->ik", even, even), floor) if sides[0] else None
    right = inverse_root(torch.einsum("nji,njk->ik", even, even), floor) if sides[1] else None
    white = deviation if left is None else left @ deviation
    white = white if right is None else white @ right
    return white / white.square().mean().sqrt()


def whitened_table(
    models: Sequence[Mapping[str, Tensor]],
    names: Mapping[str, str],
    *,
    floor: float = CHOSEN.whiten_floor,
    progress: Progress | None = None,
) -> tuple[tuple[str, ...], Array]:
    """(blocks, table (blocks, n, n)): inner products of the whitened matrices of n kin models, one tensor at a time.

    names: parameter -> its block. A tensor counts by its number of entries."""
    blocks = tuple(sorted(set(names.values())))
    table = np.zeros((len(blocks), len(models), len(models)))
    for done, (name, block) in enumerate(sorted(names.items()), 1):
        stack = torch.stack([m[name].double() for m in models])
        stack = stack.flatten(2) if stack.dim() > 2 else stack[..., None]
        white = whiten(stack, floor).flatten(1)
        table[blocks.index(block)] += (white @ white.T).numpy()
        if progress:
            progress(done, len(names), name)
    return blocks, table
