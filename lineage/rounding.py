"""What storing weights in few bits does to the spectrum of their difference, and how to see past it.

An entry w stored with spacing ulp(w) carries an error uniform on ulp [-1/2, 1/2], of variance ulp^2 / 12.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lineage.spectrum import fast_dtype, product, row_blocks, squared_norms

SPIKE = 0.25  # of the edge: an entry whose error can reach it may stand out of the noise on its own
SPIKE_SIZE = 0.8  # of that error at its largest; two errors of one size exceed it together in 4 of 100 draws
KRYLOV_BLOCK, KRYLOV_DEPTH = 16, 8

_BITS = {  # integer of the same size, mask of the exponent, its shift to bfloat16's place, its bias
    torch.float16: (torch.int16, 0x7C00, 3, 15),
    torch.bfloat16: (torch.int16, 0x7F80, 0, 127),
    torch.float32: (torch.int32, 0x7F800000, 16, 127),
}


def ulp(w: Tensor) -> Tensor:
    """Spacing of each entry's dtype at that entry, subnormals and zeros included: a power of two, in bfloat16, which
    holds it exactly from 2^-126 on; below that 2^-126."""
    info = torch.finfo(w.dtype)
    wide = w if w.dtype in _BITS else w.float()
    integer, mask, shift, bias = _BITS[wide.dtype]
    digits = -round(math.log2(info.eps))
    lowest = max(round(math.log2(info.smallest_normal)), digits - 126)
    exponent = wide.view(integer).bitwise_and(mask).bitwise_right_shift_(shift).to(torch.int16)
    return exponent.clamp_min_((lowest + bias) << 7).add_((127 - bias - digits) << 7).view(torch.bfloat16)


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
            steps = [ulp(w[:, rows]) for w in (base, tuned)]
            for step in steps:
                energy += squared_norms(step) / 12
            torch.mul(steps[0], uniform[0][rows], out=noise[:, rows])
            noise[:, rows].addcmul_(steps[1], uniform[1][rows])
        return noise, energy

    def edges(self, base: Tensor, tuned: Tensor) -> tuple[Tensor, Tensor]:
        """Noise edge and expected noise energy of each pair of the stacks (b, m, n): (b,) float64 both.

        A few entries much larger than the rest can alone reach the edge, and one draw says little about them: there
        the noise is taken close to its largest."""
        noise, energy = self.simulate(base, tuned)
        found = edge(noise)
        spiked = (_largest_step(base) + _largest_step(tuned)) / 2 > SPIKE * found
        for i in spiked.nonzero().flatten().tolist():
            _harden(noise[i], base[i], tuned[i], float(found[i]))
            found[i] = edge(noise[i][None])[0]
        return found, energy


def _largest_step(w: Tensor) -> Tensor:
    """ulp of the entry of largest magnitude of each matrix (b, m, n): (b,) float64."""
    wide = w if w.element_size() > 1 else w.float()
    top = torch.stack([torch.stack(torch.aminmax(matrix)).abs().amax() for matrix in wide])
    return ulp(top.to(w.dtype)).double()


def _harden(noise: Tensor, base: Tensor, tuned: Tensor, found: float) -> None:
    """Raise, in place, the noise (m, n) of entries whose error alone can reach SPIKE x the edge `found`."""
    for rows in row_blocks(noise[None]):
        steps = [ulp(w[rows]).float() for w in (base, tuned)]
        worst = (steps[0] + steps[1]) / 2
        drawn = noise[rows].float()
        raised = torch.maximum(drawn.abs(), SPIKE_SIZE * worst).copysign(drawn)
        noise[rows] = torch.where(worst > SPIKE * found, raised, drawn).to(noise.dtype)


def margin(shape: tuple[int, ...]) -> float:
    """By how much the edge exceeds one draw's largest singular value: 1 % for the solver, and three standard deviations
    of the difference of two draws, each 0.4 n^(-2/3) at short side n (Johnstone 2001, for square white noise)."""
    return 1.01 + 1.7 * min(shape[-2:]) ** (-2 / 3)


def edge(noise: Tensor) -> Tensor:
    """`margin` x the largest singular value of each simulated noise matrix (b, m, n): (b,) float64.

    Block Krylov (Musco & Musco 2015), products in the noise's dtype: at most 0.3 % low on the flat spectra of noise."""
    if min(noise.shape[-2:]) <= KRYLOV_BLOCK * KRYLOV_DEPTH:
        return margin(noise.shape) * torch.linalg.svdvals(noise.float())[..., 0].double()
    wide = noise if noise.shape[-2] <= noise.shape[-1] else noise.mT
    start = torch.randn(wide.shape[-2], KRYLOV_BLOCK, generator=torch.Generator().manual_seed(3)).to(wide.device)
    basis, images = torch.linalg.qr(start).Q.expand(len(wide), -1, -1), []
    while True:
        images.append(product(wide, product(wide.mT, basis[..., -KRYLOV_BLOCK:].to(wide.dtype))).float())
        if len(images) == KRYLOV_DEPTH:
            break
        block = images[-1]
        for _ in range(2):  # once is not enough in float32
            block = block - product(basis, product(basis.mT, block))
        basis = torch.cat([basis, torch.linalg.qr(block).Q], -1)
    ritz = product(basis.mT, torch.cat(images, -1)).double()
    return margin(noise.shape) * torch.linalg.eigvalsh((ritz + ritz.mT) / 2)[..., -1].clamp_min(0).sqrt()


def clean(singular_values: Tensor, noise_energy: float, shape: tuple[int, int], rank: int) -> Tensor:
    """Singular values of the signal behind the first `rank` observed ones: theta^2 = (q + sqrt(q^2 - 4 v^2 m n)) / 2,
    q = s^2 - v (m + n), v the mean noise variance (Gavish & Donoho 2017, equation 9). (rank,) float64."""
    m, n = shape
    v = noise_energy / (m * n)
    q = singular_values[:rank].square() - v * (m + n)
    return ((q + (q.square() - 4 * v * v * m * n).clamp_min(0).sqrt()) / 2).clamp_min(0).sqrt()
