"""Laws of reading sparse merges entry by entry; the oracle is what was planted, as the papers define it."""

import pytest
import torch

from lineage.sparse import sparse, untouched

SIZES = (4000, 3000, 2500, 2000, 1500)


def models(seed: int, count: int, size: float = 0.1) -> list[list[torch.Tensor]]:
    """A base and its fine-tunes, float32, of five tensors of different spread."""
    g = torch.Generator().manual_seed(seed)
    base = [torch.randn(n, generator=g) for n in SIZES]
    tuned = [[w + size * (i + 1) * torch.randn(len(w), generator=g) for i, w in enumerate(base)] for _ in range(count)]
    return [base, *tuned]


def dare(base, parents, weights, density, seed=0):
    """Yu et al. 2024: each entry of each change kept with probability `density`, and divided by it."""
    g = torch.Generator().manual_seed(seed)
    made = []
    for i, w in enumerate(base):
        kept = [(torch.rand(len(w), generator=g) < density) / density * (p[i] - w) for p in parents]
        made.append(w + sum(s * k for s, k in zip(weights, kept, strict=True)))
    return made


def dare_of_equal_norm(base, parents, weight, density, seed=0):
    """As some do: what is kept of a tensor is scaled to the mean size of the whole."""
    g = torch.Generator().manual_seed(seed)
    made = []
    for i, w in enumerate(base):
        changes = [p[i] - w for p in parents]
        kept = [c * (torch.rand(len(w), generator=g) < density) for c in changes]
        made.append(w + sum(weight * k * (c.abs().sum() / k.abs().sum()) for c, k in zip(changes, kept, strict=True)))
    return made


def ties(base, parents, weight, density):
    """Yadav et al. 2023: trim, elect signs, mean of those that agree."""
    made = []
    for i, w in enumerate(base):
        changes = torch.stack([p[i] - w for p in parents])
        changes[changes.abs() < changes.abs().quantile(1 - density, 1, keepdim=True)] = 0
        agree = (changes.sign() == changes.sum(0).sign()) & (changes != 0)
        made.append(w + weight * (changes * agree).sum(0) / agree.sum(0).clamp_min(1))
    return made


def stored(tensors, dtype):
    return [t.to(dtype) for t in tensors]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("density", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("random", [True, False])
def test_base_parents_and_scales_are_found(random, density, dtype):
    base, a, b, other, more = models(1, 4)
    child = dare(base, (a, b), (0.4, 0.4), density) if random else ties(base, (a, b), 0.8, density)
    found = sparse(stored(child, dtype), [other, b, base, more, a])
    assert found is not None
    assert (found.base, found.parents) == (2, (1, 4))
    assert found.scales == pytest.approx([0.4 / density] * 2 if random else [0.8] * 2, rel=1e-3)
    assert found.random == random
    assert found.explained > 0.99


def test_parents_may_have_different_weights_and_be_three():
    base, a, b, c, other = models(2, 4)
    found = sparse(dare(base, (a, b), (0.2, 0.7), 0.5), [base, a, b, c, other])
    assert found is not None
    assert found.scales == pytest.approx((0.4, 1.4), rel=1e-3)
    three = (a, b, c)
    for child in (
        dare(base, three, (0.3, 0.3, 0.3), 0.5),
        dare_of_equal_norm(base, three, 0.3, 0.5),
        ties(base, three, 1.0, 0.5),
    ):
        found = sparse(child, [other, c, base, b, a])
        assert found is not None
        assert (found.base, found.parents) == (2, (1, 3, 4))


def test_what_is_no_sparse_merge_is_not_read_as_one():
    base, a, b, c = models(3, 3)
    linear = [0.4 * x + 0.3 * y + 0.3 * z for x, y, z in zip(base, a, b, strict=True)]
    partly = [a[0], *base[1:]]  # a fine-tune of one tensor alone
    noise = [torch.randn(n, generator=torch.Generator().manual_seed(9)) for n in SIZES]
    near = [w + 0.002 * e for w, e in zip(a, noise, strict=True)]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for child in (c, linear, partly, near, base):
            pool = [m for m in (base, a, b, c) if m is not child]
            assert sparse(stored(child, dtype), pool) is None


def test_a_sparse_merge_that_was_trained_on_is_not_one():
    base, a, b, c = models(7, 3)
    child = dare(base, (a, b), (0.5, 0.5), 0.5)
    trained = [torch.where(torch.arange(len(w)) % 5 == 0, w + 0.05, w) for w in child]
    assert sparse(child, [base, a, b, c]) is not None
    assert sparse(trained, [base, a, b, c]) is None


def test_a_child_of_one_model_with_entries_of_its_base_is_no_merge_from_a_third():
    base, tuned, noisy = models(8, 2)
    child = [torch.where(torch.arange(len(w)) % 2 == 0, w, t) for w, t in zip(base, tuned, strict=True)]
    third = [torch.where(torch.arange(len(w)) % 3 == 0, w, n) for w, n in zip(base, noisy, strict=True)]
    assert sparse(child, [third, base, tuned]) is None


def test_without_one_of_the_parents_or_the_base_there_is_no_reading():
    base, a, b, c = models(4, 3)
    child = dare(base, (a, b), (0.5, 0.5), 0.5)
    assert sparse(child, [base, a, c]) is None
    assert sparse(child, [a, b, c]) is None


def test_changes_below_the_rounding_of_the_child_tell_nothing():
    base, a, b, c = models(5, 3, size=1e-5)
    child = stored(dare(base, (a, b), (0.5, 0.5), 0.5), torch.bfloat16)
    assert sparse(child, [base, a, b, c]) is None


def test_untouched_entries_count_only_beyond_chance():
    base, a, *_ = models(6, 2)
    half = [torch.where(torch.arange(len(w)) % 2 == 0, w, t) for w, t in zip(base, a, strict=True)]
    assert untouched(half, base) == pytest.approx(0.5, abs=0.01)
    assert untouched(a, base) == pytest.approx(0, abs=0.01)
    flat = torch.Generator().manual_seed(0)
    near = [w * (1 + 4e-3 * (2 * torch.rand(len(w), generator=flat) - 1)) for w in base]
    assert abs(untouched(stored(near, torch.float16), stored(base, torch.float16))) < 0.03
