"""What storing weights in few bits does to the spectrum of their difference, and how to see past it.

An entry w stored with spacing ulp(w) carries an error uniform on ulp [-1/2, 1/2], of variance ulp^2 / 12.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lineage.spectrum import fast_dtype

EDGE_MARGIN = 1.02  # above the largest singular value of one simulated noise matrix
LANCZOS_STEPS = 40

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
    """Simulated rounding noise: one pool of uniform numbers (fixed seed), reused by every layer."""

    def __init__(self, device: torch.device, seed: int = 0):
        self.device = device
        self.dtype = fast_dtype(device.type)
        self._generator = torch.Generator().manual_seed(seed)
        self._pools = (torch.empty(0), torch.empty(0))

    def _uniform(self, which: int, shape: torch.Size) -> Tensor:
        if self._pools[which].numel() < shape.numel():
            pools = (torch.rand(shape.numel(), generator=self._generator) for _ in self._pools)
            self._pools = tuple(p.sub_(0.5).to(self.device, self.dtype) for p in pools)  # type: ignore[assignment]
        return self._pools[which][: shape.numel()].view(shape)

    def simulate(self, base: Tensor, tuned: Tensor) -> tuple[Tensor, Tensor]:
        """(noise / unit, energy / unit^2) of tuned - base, stacks (b, m, n): entries ulp(base) U1 + ulp(tuned) U2, and
        sum (ulp(base)^2 + ulp(tuned)^2) / 12 per matrix in float64. `unit` keeps float16 binades in range."""
        noise, energy = None, torch.zeros(len(base), dtype=torch.float64, device=base.device)
        for which, w in enumerate((base, tuned)):
            step = binade(w).to(self.dtype).mul_(torch.finfo(w.dtype).eps)
            energy += torch.linalg.vector_norm(step, dim=-1, dtype=torch.float32).double().square().sum(-1) / 12
            uniform = self._uniform(which, w.shape[-2:])
            noise = step.mul_(uniform) if noise is None else noise.addcmul_(step, uniform)
        assert noise is not None
        return noise, energy


def edge(noise: Tensor) -> Tensor:
    """1.02 x the largest singular value of each simulated noise matrix (b, m, n): (b,) float64.

    Lanczos on the Gram matrix of the short side, whose product may be bfloat16: 1 % is all that is asked of it."""
    wide = noise if noise.shape[-2] <= noise.shape[-1] else noise.mT
    scale = wide.abs().amax((-1, -2), keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    wide = wide / scale
    g = (wide @ wide.mT).float()
    return EDGE_MARGIN * _largest_eigenvalue(g).sqrt() * scale.flatten().double()


def _largest_eigenvalue(g: Tensor) -> Tensor:
    """Largest eigenvalue of each symmetric matrix (b, m, m), by Lanczos with full reorthogonalisation."""
    steps = min(LANCZOS_STEPS, g.shape[-1])
    start = torch.randn(g.shape[-1], 1, generator=torch.Generator().manual_seed(3)).to(g)
    basis = (start / start.norm()).expand(len(g), -1, 1)
    for _ in range(steps - 1):
        v = g @ basis[..., -1:]
        for _ in range(2):
            v = v - basis @ (basis.mT @ v)
        basis = torch.cat([basis, v / v.norm(dim=-2, keepdim=True).clamp_min(1e-30)], -1)
    return torch.linalg.eigvalsh((basis.mT @ (g @ basis)).double())[..., -1]


def clean(singular_values: Tensor, noise_energy: float, shape: tuple[int, int], rank: int) -> Tensor:
    """Singular values of the signal behind the first `rank` observed ones: theta^2 = (q + sqrt(q^2 - 4 v^2 m n)) / 2,
    q = s^2 - v (m + n), v the mean noise variance (Gavish & Donoho 2017, equation 9). (rank,) float64."""
    m, n = shape
    v = noise_energy / (m * n)
    q = singular_values[:rank].square() - v * (m + n)
    return ((q + (q.square() - 4 * v * v * m * n).clamp_min(0).sqrt()) / 2).clamp_min(0).sqrt()
