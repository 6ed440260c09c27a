"""The best factors of few ranks for one delta: of a product (LoRA, LoCon), or of a Hadamard product of two (LoHa)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lineage.factors import khatri_rao_rows
from lineage.spectrum import OVERSAMPLE, fast_dtype, gram, orthonormal, product, random_matrix, squared_norms

POWER_STEPS = 2
GRAMS = 5  # times as many columns as wanted: below that all of the Gram matrix's eigenvectors cost no more
LAST_STEPS = 5  # at most, in float32: beside strong directions, what bfloat16 rounds away can hide the weak ones
SETTLED = 1e-2  # relative gain of such a step below which it is the last
ROUNDS = 100  # of alternating least squares
STALLED = 1e-4  # relative gain of a round below which it stops
ROUNDING = 1e-6  # of the largest singular value: float32 products know no smaller ones
RIDGE = 1e-7  # of the mean diagonal, for rows whose normal equations are singular


def truncate(delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(left (m, rank), right (rank, n)): the first singular triples of delta (m, n), scales shared evenly.

    Randomised subspace iteration (Halko, Martinsson & Tropp 2011), its last steps in float32, where the rank is small
    beside the matrix; else the eigenvectors of the short side's Gram matrix."""
    if delta.shape[0] > delta.shape[1]:
        left, right = truncate(delta.mT, rank)
        return right.mT, left.mT
    basis = _subspace(delta, rank)
    image = product(basis.mT, delta)
    squares, turn = torch.linalg.eigh(product(image.double(), image.double().mT))
    turn = turn[:, -rank:].flip(-1)
    values = squares[-rank:].flip(-1).clamp_min(0).sqrt()
    values = torch.where(values > ROUNDING * values[0], values, 0)  # what is left of a delta of fewer ranks
    scale, inverse = values.sqrt(), torch.where(values > 0, values, torch.inf).rsqrt()
    return (basis.double() @ (turn * scale)).float(), ((turn * inverse).mT @ image.double()).float()


def _subspace(wide: Tensor, rank: int) -> Tensor:
    """Orthonormal columns (m, k), k >= rank, that hold nearly all of what the leading `rank` left vectors hold."""
    columns = rank + OVERSAMPLE
    if GRAMS * columns > wide.shape[0]:
        return torch.linalg.eigh(gram(wide, torch.float32))[1][:, -min(columns, wide.shape[0]) :].contiguous()
    fast = wide.to(fast_dtype(wide.device.type))
    basis = orthonormal(product(fast, random_matrix((wide.shape[1], columns), 2, fast)))
    for _ in range(POWER_STEPS):
        basis = orthonormal(product(fast, product(fast.mT, basis.to(fast.dtype))))
    before, total = math.inf, float(squared_norms(wide[None]))
    for _ in range(LAST_STEPS):
        image = product(wide.mT, basis)
        basis = orthonormal(product(wide, image))
        rest = total - float(squared_norms(image[None]))
        if before - rest <= SETTLED * rest:
            break
        before = rest
    return basis


def fit_hadamard(delta: Tensor, rank: int, rounds: int = ROUNDS) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(a1, b1, a2, b2), a (m, rank), b (rank, n), with (a1 @ b1) * (a2 @ b2) close to delta (m, n).

    Alternating least squares: each factor in turn is the best one for the three others, so the error never grows. Begun
    from delta = sign sqrt|delta| * sqrt|delta|, each half truncated. A local optimum: none is known to be the best."""
    root = delta.abs().sqrt()
    (a1, b1), (a2, b2) = truncate(root.copysign(delta), rank), truncate(root, rank)
    before = error = math.inf
    for _ in range(rounds):
        a1, b1 = _best_half(delta, a1, b1, a2 @ b2)
        a2, b2 = _best_half(delta, a2, b2, a1 @ b1)
        before, error = error, float(squared_norms((delta - (a1 @ b1) * (a2 @ b2))[None]))
        if before - error <= STALLED * error:
            break
    return a1, b1, a2, b2


def _best_half(delta: Tensor, a: Tensor, b: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """(a, b) after a least-squares step of each in ||delta - (a @ b) * other||_F."""
    weighted, squares = delta * other, other.square()
    a = _best_rows(weighted, b, squares)
    b = _best_rows(weighted.mT, a.mT, squares.mT).mT
    return a, b


def _best_rows(weighted: Tensor, b: Tensor, squares: Tensor) -> Tensor:
    """Row by row the least-squares x in ||delta_i - (x @ b) * other_i||: normal equations of r unknowns each.

    weighted: delta * other (m, n); squares: other^2 (m, n); b (r, n). Returns (m, r)."""
    rank = len(b)
    normal = (squares @ khatri_rao_rows(b.mT, b.mT)).view(-1, rank, rank).double()
    ridge = RIDGE * normal.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(torch.finfo(torch.float32).tiny)
    normal.diagonal(dim1=-2, dim2=-1).add_(ridge[:, None])
    return torch.linalg.solve(normal, (weighted @ b.mT).double()[..., None])[..., 0].float()
