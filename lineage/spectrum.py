"""Singular values of real matrices, with energies whose intervals are certified.

Solvers work on a stack (b, m, n) of float32 matrices of one shape, on any device; b is 1 on the CPU.
Precision policy: products that only choose a subspace may be bfloat16, since any orthonormal basis is valid in the
certificate; everything that enters a certificate is float32 products with float64 sums, TF32 off.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from lineage.results import Interval

ROUNDING = 1e-6  # relative; float32 products break the subspace inequality by up to 3e-7 on exactly low-rank input
OVERSAMPLE = 16
PROBES = 8
CACHE_ENTRIES = 2**18
SHORT_SUM = 512  # squares that may be summed in float32
POWER_STEPS = 3
BLUR = 3.0  # up to this multiple of a Gram matrix's floor its values are inflated by 5 % or more
RESOLVED = 1.5  # a singular value below this multiple of the rounding edge cannot be told from one that is missing


@dataclass(frozen=True)
class Spectrum:
    """Leading (or all) singular values of an (m, n) matrix.

    singular_values: (k,) float64, descending. total: ||A||_F^2.
    tail: upper bound of sum_{i<=j} s_i^2(A) - sum_{i<=j} singular_values_i^2, for every j (subspace certificate).
    gram_error: estimate of ||G - A A^T||_F; by Ky Fan the sum of j eigenvalues is then off by at most sqrt(j) times it.
    """

    singular_values: Tensor
    total: float
    shape: tuple[int, int]
    solver: str
    tail: float = 0.0
    gram_error: float = 0.0

    @property
    def complete(self) -> bool:
        """Whether all min(m, n) singular values are known."""
        return len(self.singular_values) == min(self.shape)

    def energy(self, k: int) -> Interval:
        """Share of ||A||_F^2 in the k largest singular values, with its certified interval; 0 for a zero matrix.

        Subspace certificate (Halko, Martinsson & Tropp 2011, section 4.3; Weyl): value <= truth <= value + tail.
        Gram certificate: |sum of k eigenvalues - truth| <= sqrt(k) ||G - A A^T||_F (Ky Fan 1949)."""
        if self.total == 0:
            return Interval(0.0, 0.0, 0.0)
        value = float(self.singular_values[:k].square().sum()) / self.total
        half = min(k, min(self.shape)) ** 0.5 * self.gram_error / self.total + ROUNDING
        if k >= min(self.shape):
            return Interval(1.0, 1.0, 1.0)
        return Interval(max(value - half, 0.0), min(value, 1.0), min(value + half + self.tail / self.total, 1.0))

    def k_at(self, share: float) -> tuple[int | None, int]:
        """(k, at_least): the smallest k whose energy reaches `share`, None where the interval leaves it open, and the
        smallest k that the interval allows."""
        if self.total == 0:
            return 0, 0
        cumulative = self.singular_values.square().cumsum(0) / self.total
        at_least = 1 + int((cumulative + self.tail / self.total + ROUNDING < share).sum())
        reached = 1 + int((cumulative < share).sum())
        if self.complete:
            return min(reached, len(self.singular_values)), min(at_least, len(self.singular_values))
        certain = reached <= len(self.singular_values) and reached == at_least
        return (reached if certain else None), at_least

    def stable_rank(self) -> float:
        """||A||_F^2 / ||A||_2^2 (Rudelson & Vershynin 2007); 0 for a zero matrix."""
        return self.total / float(self.singular_values[0]) ** 2 if self.total else 0.0

    def participation_ratio(self) -> float:
        """(sum s^2)^2 / sum s^4; 0 for a zero matrix. A tail of energy t changes it by at most t^2 / sum s^4."""
        return self.total**2 / float(self.singular_values.pow(4).sum()) if self.total else 0.0

    def effective_rank(self) -> float | None:
        """exp(entropy(s / sum s)) (Roy & Vetterli 2007); None unless all singular values are known."""
        if self.total == 0 or not self.complete:
            return 0.0 if self.total == 0 else None
        p = self.singular_values / self.singular_values.sum().clamp_min(torch.finfo(torch.float64).tiny)
        return float(torch.special.entr(p).sum().exp())

    def numerical_rank(self) -> int | None:
        """Singular values above max(m, n) eps s_1, eps of float32; None unless solved in full."""
        if self.solver != "full":
            return None
        floor = max(self.shape) * torch.finfo(torch.float32).eps * self.singular_values[0]
        return int((self.singular_values > floor).sum())

    def floor(self) -> float:
        """Singular values below this are the solver's own rounding, not the matrix."""
        return max(self.gram_error**0.5, float(self.singular_values[0]) * 1e-6)


@contextmanager
def exact_float32() -> Iterator[None]:
    """No TF32 and no bfloat16 inside float32 products: the certificates rest on them."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def squared_norms(a: Tensor) -> Tensor:
    """||A||_F^2 of each matrix of a stack (b, m, n): (b,) float64, relative error below 1e-7 of what is stored.

    Float32 within runs of 512 entries, float64 across: over long rows float32 errs more than a certificate allows."""
    if a[0].numel() % SHORT_SUM:
        return torch.linalg.vector_norm(a, dim=(-1, -2), dtype=torch.float64).square()
    runs = a.reshape(len(a), -1, SHORT_SUM)
    dtype = torch.promote_types(a.dtype, torch.float32)
    return torch.linalg.vector_norm(runs, dim=-1, dtype=dtype).double().square().sum(-1)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b for stacks (b may be one matrix), the larger factor taken as it lies in memory: on the CPU a product that
    has to transpose it, or a batched one of transposes, is several times slower in bfloat16."""
    if a.dim() == 3 and len(a) == 1:
        return product(a[0], b[0] if b.dim() == 3 else b)[None]
    large = a if a.numel() >= b.numel() else b
    return a @ b if large.stride(-1) == 1 else (b.mT @ a.mT).mT


def row_blocks(a: Tensor) -> list[slice]:
    """Blocks of rows of a stack (b, m, n): on the CPU small enough for the cache, elsewhere all rows."""
    rows = max(1, CACHE_ENTRIES // a.shape[-1]) if a.device.type == "cpu" else a.shape[-2]
    return [slice(i, i + rows) for i in range(0, a.shape[-2], rows)]


def _wide(a: Tensor) -> Tensor:
    return a if a.shape[-2] <= a.shape[-1] else a.mT


@cache
def fast_dtype(device: str) -> torch.dtype:
    """bfloat16 where the device multiplies it in hardware, else float32; for products outside certificates only."""
    if device == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    native = device == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if native and torch.cpu._is_avx512_bf16_supported() else torch.float32


def random_matrix(shape: tuple[int, ...], seed: int, like: Tensor, sign: bool = False) -> Tensor:
    """Gaussian or random-sign matrix, the same on every device."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (x.sign() if sign else x).to(like)


def gram(a: Tensor, dtype: torch.dtype, blocks: int = 8) -> Tensor:
    """A A^T for a stack of wide matrices, multiplying each symmetric pair of row blocks once."""
    rows = a.to(dtype).tensor_split(min(blocks, a.shape[-2]), dim=-2)
    out = torch.empty(*a.shape[:-1], a.shape[-2], dtype=dtype, device=a.device)
    offset = 0
    for i, row in enumerate(rows):
        start = offset
        for other in rows[i:]:
            block = product(row, other.mT)
            h, w = block.shape[-2:]
            out[..., offset : offset + h, start : start + w] = block
            out[..., start : start + w, offset : offset + h] = block.mT
            start += w
        offset += row.shape[-2]
    return out


def gram_error(a: Tensor, g: Tensor, columns: int = 512) -> Tensor:
    """Estimate of ||G - A A^T||_F for a stack of wide matrices: (b,), root mean square over random sign vectors z of
    ||G z - A (A^T z)||, in float64 (Hutchinson 1990)."""
    z = random_matrix((a.shape[-2], PROBES), 1, g, sign=True).double()
    image = torch.zeros(*a.shape[:-1], PROBES, dtype=torch.float64, device=a.device)
    for part in a.split(columns, dim=-1):
        part = part.double()
        image += product(part, product(part.mT, z))
    return (product(g.double(), z) - image).square().sum((-1, -2)).div(PROBES).sqrt()


def _eigenvalues(g: Tensor) -> Tensor:
    """Ascending; LAPACK's float32 routine gives up on a few near-empty matrices that its float64 one solves."""
    try:
        return torch.linalg.eigvalsh(g)
    except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
        return torch.linalg.eigvalsh(g.double())


def solve_gram(a: Tensor, dtype: torch.dtype = torch.float32) -> list[Spectrum]:
    """All singular values through the Gram matrix of the short side: good to s / s_1 = 3e-4 (float32), 1e-7."""
    wide = _wide(a)
    g = gram(wide, dtype)
    errors = gram_error(wide, g).tolist()
    values = _eigenvalues(g).flip(-1).double().clamp_min(0).sqrt().cpu()
    name = "gram32" if dtype is torch.float32 else "gram64"
    totals = squared_norms(a).tolist()
    shape = (a.shape[-2], a.shape[-1])
    return [Spectrum(s, t, shape, name, gram_error=e) for s, t, e in zip(values, totals, errors, strict=True)]


def solve_full(a: Tensor) -> list[Spectrum]:
    """All singular values by LAPACK's SVD in float64: slow, the reference."""
    totals = a.double().square().sum((-1, -2)).tolist()
    values = torch.linalg.svdvals(a.double()).cpu()
    return [Spectrum(s, t, (a.shape[-2], a.shape[-1]), "full") for s, t in zip(values, totals, strict=True)]


def orthonormal(y: Tensor) -> Tensor:
    return torch.linalg.qr(y.float()).Q


def _leading(a: Tensor, q: Tensor, totals: Tensor) -> list[Spectrum]:
    """Certified leading values from an orthonormal basis: those of B = Q^T A; the rest is ||A||^2 - ||B||^2."""
    b = product(q.mT, a).double()
    squares = torch.linalg.eigvalsh(product(b, b.mT)).flip(-1).clamp_min(0)
    tails = (totals - squares.sum(-1)).clamp_min(0)
    shape = (a.shape[-2], a.shape[-1])
    rows = zip(squares.sqrt().cpu(), totals.tolist(), tails.tolist(), strict=True)
    return [Spectrum(s, t, shape, "randomized", tail=r) for s, t, r in rows]


def _unresolved(found: list[Spectrum], edges: list[float], tolerance: float) -> bool:
    """Another power step may help: the certificate is too wide, or a value lies close to the rounding edge."""
    return any(
        s.tail > tolerance * s.total or bool(((s.singular_values > e) & (s.singular_values < 2 * e)).any())
        for s, e in zip(found, edges, strict=True)
    )


def solve_randomized(
    a: Tensor, rank: int = 64, edges: list[float] | None = None, tolerance: float = 1e-3, hopeless: float = math.inf
) -> list[Spectrum | None]:
    """Leading rank + 16 singular values by randomised subspace iteration (Halko, Martinsson & Tropp 2011).

    After the first product, a matrix whose estimated residual energy is above `hopeless` is given up (None).
    `edges`: rounding edges (b,); power steps go on while a value lies close to one, or `tolerance` is not reached."""
    wide = _wide(a)
    columns = min(rank + OVERSAMPLE, wide.shape[-2])
    totals = squared_norms(a)
    fast = wide.to(fast_dtype(a.device.type))
    y = product(fast, random_matrix((wide.shape[-1], columns + PROBES), 2, fast)).float()
    q = orthonormal(y[..., :columns])
    probe = y[..., columns:]
    left = (probe - product(q, product(q.mT, probe))).double().square().sum((-1, -2)) / PROBES
    hope = left <= hopeless * totals
    if not bool(hope.any()):
        return [None] * len(a)
    kept = hope.nonzero().flatten().tolist()
    if len(kept) < len(a):
        wide, fast, q, totals = wide[kept], fast[kept], q[kept], totals[kept]
    found: list[Spectrum | None] = [None] * len(a)
    near = [(edges or [0.0] * len(a))[i] for i in kept]
    for i, s in zip(kept, _iterate(wide, fast, q, totals, near, tolerance), strict=True):
        found[i] = s
    return found


def _iterate(
    wide: Tensor, fast: Tensor, q: Tensor, totals: Tensor, edges: list[float], tolerance: float
) -> list[Spectrum]:
    for _ in range(POWER_STEPS):
        q = orthonormal(product(fast, product(fast.mT, q.to(fast.dtype))))
        found = _leading(wide, q, totals)
        if not _unresolved(found, edges, tolerance):
            break
    return found


def _sufficient(s: Spectrum | None, edge: float, tolerance: float, rank: int) -> bool:
    """Whether leading values are enough: the interval is narrow, and the count above the edge ends within them."""
    return (
        s is not None
        and s.tail <= (tolerance - 2 * ROUNDING) * s.total
        and int((s.singular_values > max(edge, s.floor())).sum()) < rank + OVERSAMPLE // 2
    )


def solve_auto(a: Tensor, rank: int, edges: list[float], tolerance: float) -> list[Spectrum]:
    """The cheapest solver that certifies `tolerance` for each matrix: randomised, Gram in float32, Gram in float64."""
    found: list[Spectrum | None] = [None] * len(a)
    if min(a.shape[-2:]) > 3 * (rank + OVERSAMPLE):
        found = solve_randomized(a, rank, edges, tolerance, hopeless=20 * tolerance)
    rest = [i for i, s in enumerate(found) if not _sufficient(s, edges[i], tolerance, rank)]
    for dtype in (torch.float32, torch.float64):
        if rest:
            part = a if len(rest) == len(a) else a[rest]
            for i, s in zip(rest, solve_gram(part, dtype), strict=True):
                found[i] = s
        rest = [i for i in rest if not _gram_resolves(found[i], edges[i], rank, tolerance)]
    return [s for s in found if s is not None]


def _gram_resolves(s: Spectrum | None, edge: float, rank: int, tolerance: float) -> bool:
    """A float32 Gram matrix will do: the interval is narrow, no value that matters lies under the solver's floor."""
    assert s is not None
    interval = s.energy(rank)
    blurred = max(float(s.singular_values[-1]), edge) < BLUR * s.floor()
    return s.solver == "gram64" or (interval.high - interval.low <= tolerance and not blurred)


SOLVERS: dict[str, Callable[[Tensor, int, list[float], float], list[Spectrum]]] = {
    "auto": solve_auto,
    "gram": lambda a, rank, edges, tolerance: solve_gram(a),
    "randomized": lambda a, rank, edges, tolerance: [
        s for s in solve_randomized(a, rank, edges, tolerance) if s is not None
    ],
    "full": lambda a, rank, edges, tolerance: solve_full(a),
}


def solve_factors(u: Tensor, v: Tensor) -> Spectrum:
    """All singular values of u @ v without forming it: QR of both factors, SVD of the small core, in float64.

    u: (m, r), v: (r, n). Formed where r reaches half the short side. Zeros are appended up to min(m, n)."""
    shape = (u.shape[0], v.shape[1])
    u, v = u.double(), v.double()
    core = u @ v if 2 * u.shape[1] >= min(shape) else torch.linalg.qr(u).R @ torch.linalg.qr(v.mT).R.mT
    s = torch.linalg.svdvals(core).cpu()
    s = torch.cat([s, s.new_zeros(max(min(shape) - len(s), 0))])
    return Spectrum(s, float(s.square().sum()), shape, "factors")


@cache
def gaussian_energy(shape: tuple[int, int], k: int) -> float:
    """Expected share of ||A||_F^2 in the k largest singular values of an i.i.d. Gaussian (m, n) matrix, in the limit of
    large m and n at fixed ratio (Marchenko & Pastur 1967); error O(1 / min(m, n))."""
    short, long = sorted(shape)
    if k >= short:
        return 1.0
    ratio = short / long
    phi = torch.linspace(0, math.pi, 8193, dtype=torch.float64)  # eigenvalue = 1 + c + 2 sqrt(c) cos(phi)
    value = 1 + ratio + 2 * ratio**0.5 * phi.cos()
    energy = torch.cumulative_trapezoid(2 / math.pi * phi.sin().square(), phi)
    count = torch.cumulative_trapezoid(2 / math.pi * phi.sin().square() / value.clamp_min(1e-12), phi)
    i = int(torch.searchsorted(count / count[-1], k / short))
    return float(energy[min(i, len(energy) - 1)] / energy[-1])
