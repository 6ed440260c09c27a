"""What storing weights in few bits does to the spectrum of their difference, and how to see past it.

An entry w stored with spacing ulp(w) carries an error uniform on ulp [-1/2, 1/2], of variance ulp^2 / 12.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lineage.spectrum import fast_dtype, row_blocks, squared_norms

EDGE_MARGIN = 1.02  # above the largest singular value of one simulated noise matrix
KRYLOV_BLOCK, KRYLOV_DEPTH = 16, 8

_MASKS = {torch.float16: (torch.int16, 0x7C00), torch.bfloat16: (torch.int16, 0x7F80)}


def binade(w: Tensor) -> Tensor:
    """2^floor(log2 |w|) of each entry, at least the smallest normal number of its dtype; float16, bfloat16 or float32.

    ulp(w) is this times finfo(w.dtype).eps, subnormals and zeros included."""
    if w.dtype not in _MASKS:
        tiny = torch.finfo(w.dtype).smallest_normal
        w = w.to(torch.float32)
        integer, mask = torch.int32, 0x7F800000
    else:
        tiny = torch.finfo(w.dtype).smallest_normal
        integer, mask = _MASKS[w.dtype]
    return w.view(integer).bitwise_and(mask).view(w.dtype).clamp_min_(tiny)


class Noise:
    """Simulated rounding noise: two pools of uniform numbers (fixed seed), reused by every layer; safe to share.

    entries: of the largest matrix that will be asked for."""

    def __init__(self, device: torch.device, entries: int, seed: int = 0):
        dtype = fast_dtype(device.type)
        generator = torch.Generator().manual_seed(seed)
        self._pools = tuple(torch.empty(entries, dtype=dtype) for _ in range(2))
        for part in (part for pool in self._pools for part in pool.split(2**22)):
            part.copy_(torch.rand(len(part), generator=generator).sub_(0.5))
        self._pools = tuple(pool.to(device) for pool in self._pools)

    def simulate(self, base: Tensor, tuned: Tensor) -> tuple[Tensor, Tensor]:
        """Noise of tuned - base, stacks (b, m, n): entries ulp(base) U1 + ulp(tuned) U2 with U uniform on [-1/2, 1/2];
        and its expected energy sum (ulp(base)^2 + ulp(tuned)^2) / 12 per matrix, (b,) float64."""
        noise = torch.empty(base.shape, dtype=self._pools[0].dtype, device=base.device)
        energy = torch.zeros(len(base), dtype=torch.float64, device=base.device)
        uniform = [pool[: base[0].numel()].view(base.shape[1:]) for pool in self._pools]
        for rows in row_blocks(base):
            steps = [binade(w[:, rows]).float().to(noise.dtype).mul_(torch.finfo(w.dtype).eps) for w in (base, tuned)]
            for step in steps:
                energy += squared_norms(step.float()) / 12
            torch.mul(steps[0], uniform[0][rows], out=noise[:, rows])
            noise[:, rows].addcmul_(steps[1], uniform[1][rows])
        return noise, energy


def edge(noise: Tensor) -> Tensor:
    """1.02 x the largest singular value of each simulated noise matrix (b, m, n): (b,) float64.

    Block Krylov (Musco & Musco 2015), products in the noise's dtype: at most 0.3 % low on the flat spectra of noise."""
    if min(noise.shape[-2:]) <= KRYLOV_BLOCK * KRYLOV_DEPTH:
        return EDGE_MARGIN * torch.linalg.svdvals(noise.float())[..., 0].double()
    wide = noise if noise.shape[-2] <= noise.shape[-1] else noise.mT
    block = torch.randn(wide.shape[-2], KRYLOV_BLOCK, generator=torch.Generator().manual_seed(3)).to(wide.device)
    basis = torch.linalg.qr(block).Q.expand(len(wide), -1, -1)
    for _ in range(KRYLOV_DEPTH - 1):
        block = (wide @ (wide.mT @ basis[..., -KRYLOV_BLOCK:].to(wide.dtype))).float()
        for _ in range(2):  # once is not enough in float32
            block = block - basis @ (basis.mT @ block)
        basis = torch.cat([basis, torch.linalg.qr(block).Q], -1)
    image = (wide.mT @ basis.to(wide.dtype)).float()
    return EDGE_MARGIN * torch.linalg.eigvalsh((image.mT @ image).double())[..., -1].clamp_min(0).sqrt()


def clean(singular_values: Tensor, noise_energy: float, shape: tuple[int, int], rank: int) -> Tensor:
    """Singular values of the signal behind the first `rank` observed ones: theta^2 = (q + sqrt(q^2 - 4 v^2 m n)) / 2,
    q = s^2 - v (m + n), v the mean noise variance (Gavish & Donoho 2017, equation 9). (rank,) float64."""
    m, n = shape
    v = noise_energy / (m * n)
    q = singular_values[:rank].square() - v * (m + n)
    return ((q + (q.square() - 4 * v * v * m * n).clamp_min(0).sqrt()) / 2).clamp_min(0).sqrt()
