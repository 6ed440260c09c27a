"""Rounding noise: its size against what rounding really does, its edge against LAPACK, signal against planted truth."""

import pytest
import torch

from lineage.rounding import Noise, clean, edge, margin, ulp

HALVES = [torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_ulp_is_the_distance_to_the_next_number(dtype):
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[dtype.itemsize]
    w = torch.tensor([1.0, 1.4, 1.9, 2.0, 3.3, 0.017, 1e-3, 100.0]).to(dtype)
    bits = w.view(integer)
    gap = (bits + 1).view(dtype).double() - w.double()
    assert torch.equal(ulp(w).double(), gap)
    assert torch.equal(ulp((-w.float()).to(dtype)), ulp(w))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_ulp_of_subnormals_and_zero_is_the_smallest_number_as_far_as_it_can_be_told(dtype):
    info = torch.finfo(dtype)
    w = torch.tensor([0.0, info.smallest_normal / 4, -info.smallest_normal], dtype=torch.float64).to(dtype)
    smallest = max(info.smallest_normal * info.eps, 2.0**-126)
    assert torch.equal(ulp(w).double(), torch.full((3,), smallest).double())


@pytest.mark.parametrize(("dtype", "excess"), [(d, 0.02 if d.itemsize == 2 else 0.2) for d in HALVES if d.itemsize < 4])
def test_noise_energy_is_what_rounding_adds_and_never_less(dtype, excess):
    """At powers of two the spacing below is half of that above: with few bits that makes the estimate conservative."""
    g = torch.Generator().manual_seed(1)
    exact = 0.05 * torch.randn(400, 500, generator=g) * torch.logspace(-0.5, 0.5, 500)
    stored = exact.to(dtype)
    _, energy = Noise(torch.device("cpu"), 10**6).simulate(stored[None], torch.ones(1, 400, 500))
    added = (stored.double() - exact.double()).square().sum()
    assert 0.98 < float(energy) / float(added) < 1 + excess


@pytest.mark.parametrize("shape", [(60, 60), (320, 640), (700, 200)])
@pytest.mark.parametrize("scales", [0.0, 0.7])
def test_edge_is_the_largest_singular_value_of_the_noise(shape, scales):
    g = torch.Generator().manual_seed(2)
    rows = torch.exp(scales * torch.randn(shape[0], 1, generator=g))
    w = (0.02 * rows * torch.randn(*shape, generator=g)).half()[None]
    noise, _ = Noise(torch.device("cpu"), 10**6).simulate(w, w)
    truth = margin(shape) * torch.linalg.svdvals(noise[0].double())[0]
    assert float(edge(noise)) == pytest.approx(float(truth), rel=0.01)


@pytest.mark.parametrize("seed", range(4))
def test_the_edge_covers_rounding_that_a_few_entries_dominate(seed):
    """Heavy-tailed weights: the error of the largest entries exceeds all others together."""
    g = torch.Generator().manual_seed(seed)
    chi = torch.randn(3, 96, 200, generator=g).square().sum(0).sqrt()
    exact = (0.05 * torch.randn(96, 200, generator=g) / chi).double()
    exact[3, 5] = 40.0 + seed
    base, tuned = exact.half(), (exact + 1e-3 * torch.randn(96, 200, generator=g)).half()
    edges, energy = Noise(torch.device("cpu"), 10**6).edges(base[None], tuned[None])
    assert float(edges) > 0.7 * 2**-5  # the largest entry has ulp 2^-5, and is rounded in both
    assert torch.equal(energy, Noise(torch.device("cpu"), 10**6).simulate(base[None], tuned[None])[1])


def test_weights_without_outliers_have_the_plain_edge():
    w = (0.02 * torch.rand(1, 400, 400, generator=torch.Generator().manual_seed(5))).bfloat16()
    noise = Noise(torch.device("cpu"), 10**6)
    assert torch.equal(noise.edges(w, w)[0], edge(noise.simulate(w, w)[0]))


def test_the_edge_scales_with_the_weights():
    w = (0.02 * torch.randn(1, 100, 200)).bfloat16()
    noise = Noise(torch.device("cpu"), 10**6)
    assert float(edge(noise.simulate(8 * w, 8 * w)[0])) == pytest.approx(8 * float(edge(noise.simulate(w, w)[0])))


def test_the_same_noise_comes_again():
    w = (0.02 * torch.randn(1, 100, 200)).half()
    first, second = (Noise(torch.device("cpu"), 10**6).simulate(w, w)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_clean_values_undo_what_noise_adds():
    m, n, sigma = 400, 900, 0.01
    g = torch.Generator().manual_seed(4)
    u = torch.linalg.qr(torch.randn(m, 6, generator=g)).Q
    v = torch.linalg.qr(torch.randn(n, 6, generator=g)).Q
    planted = sigma * (m**0.5 + n**0.5) * torch.tensor([8.0, 6.0, 4.0, 3.0, 2.0, 1.6])
    observed = torch.linalg.svdvals(((u * planted) @ v.mT + sigma * torch.randn(m, n, generator=g)).double())
    found = clean(observed, sigma**2 * m * n, (m, n), 6)
    torch.testing.assert_close(found, planted.double(), rtol=0.03, atol=0)
    assert float((observed[:6] - planted).abs().sum()) > 5 * float((found - planted).abs().sum())
