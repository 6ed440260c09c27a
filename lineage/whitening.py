"""Inner products of increments in coordinates where what a whole tree shares weighs little.

Siblings trained on like data move along the same few directions, so their squared distances do not add along paths. Per
matrix of a tree, D -> (L + e)^(-1/2) D (R + e)^(-1/2) with L = sum D D^T and R = sum D^T D over the steps between
nearest members, each of length 1 (a Kronecker estimate of the increments' covariance): in these coordinates they nearly
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
SHORT, LONG, SLOTS = 256, 1024, 65536  # of a matrix that are looked at, evenly spread: eigenvectors cost sides cubed
Progress = Callable[[int, int, str], None]


def inverse_root(covariance: Tensor, floor: float) -> Tensor:
    """(C + e)^(-1/2) of a positive semidefinite C (m, m), e = floor x its largest eigenvalue; float64."""
    values, vectors = torch.linalg.eigh(covariance)
    top = values[-1].clamp_min(torch.finfo(values.dtype).tiny)
    return (vectors * (values.clamp_min(0) + floor * top).rsqrt()) @ vectors.mT


def steps(stack: Tensor) -> Tensor:
    """(n, rows, columns) from each of n matrices to the nearest one that differs, each of length 1."""
    flat = stack.flatten(1)
    g = flat @ flat.mT
    d = g.diag()[:, None] + g.diag() - 2 * g
    near = d.masked_fill(d <= 1e-14 * d.max(), torch.inf).argmin(1)
    way = stack - stack[near]
    return way / way.flatten(1).norm(dim=1).clamp_min(torch.finfo(stack.dtype).tiny)[:, None, None]


def whiten(stack: Tensor, floor: float = CHOSEN.whiten_floor) -> Tensor:
    """Deviations of n matrices (n, rows, columns) from their mean, whitened on both sides (single columns are only
    scaled); the mean square over the stack's entries is 1 (all zero where the matrices are equal)."""
    white = stack - stack.mean(0)
    if not white.any():
        return white
    way = steps(white)
    white = inverse_root(torch.einsum("nij,nkj->ik", way, way), floor) @ white
    if stack.shape[2] > 1:
        white = white @ inverse_root(torch.einsum("nji,njk->ik", way, way), floor)
    return white / white.square().mean().sqrt()


def sampled(matrix: Tensor) -> Tensor:
    """Rows and columns of a tensor's matrix (out, in * kernel), evenly spread, at most SLOTS entries in all."""
    matrix = matrix.flatten(1) if matrix.dim() > 1 else matrix[:, None]
    rows, columns = matrix.shape
    short = min(rows, columns, SHORT)
    long = min(max(rows, columns), LONG, SLOTS // short)
    across = rows <= columns
    return matrix[_spread(rows, short if across else long)][:, _spread(columns, long if across else short)]


def _spread(size: int, count: int) -> Tensor:
    return torch.arange(count) * size // count


def whitened_table(
    models: Sequence[Mapping[str, Tensor]],
    names: Mapping[str, str],
    *,
    floor: float = CHOSEN.whiten_floor,
    progress: Progress | None = None,
) -> tuple[tuple[str, ...], Array]:
    """(blocks, table (blocks, n, n)): inner products of the whitened matrices of n kin models, one tensor at a time.

    names: parameter -> its block. A tensor counts by its number of entries, however many of them are looked at."""
    blocks = tuple(sorted(set(names.values())))
    table = np.zeros((len(blocks), len(models), len(models)))
    for done, (name, block) in enumerate(sorted(names.items()), 1):
        held = [m[name] for m in models]
        white = whiten(torch.stack([sampled(t).double() for t in held]), floor).flatten(1)
        table[blocks.index(block)] += (white @ white.T).numpy() * (held[0].numel() / white.shape[1])
        if progress:
            progress(done, len(names), name)
    return blocks, table
