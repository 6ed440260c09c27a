"""Sparse merges, read entry by entry: of some models' changes from a base the child holds whole entries and none of the
rest. TIES keeps the largest (Yadav et al. 2023), DARE random ones, scaled up (Yu et al. 2024)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations

import torch
from torch import Tensor

from lineage.rounding import ulp
from lineage.thresholds import CHOSEN, Thresholds

CLEAR = 6.0  # roundings of the child, by which what an entry may hold must differ to be told apart
FEWEST = 100  # such entries
DRAWN = 20_000  # of them, in which a scale is looked for
EXACT = 1e-4  # of a change, that arithmetic in single precision may be off
LOWEST, HIGHEST, STEP = 0.1, 4.0, 0.01  # scales, and what they differ by, relative
PARENTS = 4  # most of a merge
Entries = Sequence[Tensor]


@dataclass(frozen=True)
class Sparse:
    """child = base + the kept entries of scale x (parent - base), of each parent; where several are kept, their sum or
    mean. base, parents: places in the pool. scales: medians over tensors, as DARE is also done to keep their norms.
    explained: share of the entries for which that is so. random: whether what was dropped is as large as the rest, as
    in DARE, and not the smallest, as in TIES."""

    base: int
    parents: tuple[int, ...]
    scales: tuple[float, ...]
    explained: float
    random: bool


def sparse(child: Entries, pool: Sequence[Entries], chosen: Thresholds = CHOSEN) -> Sparse | None:
    """The base and the parents of a pool that explain most; None where nothing explains nearly all entries.

    child, pool: entries of the same tensors, as stored."""
    step = torch.cat([ulp(t).double() for t in child])
    alike = sorted((-untouched(child, other), i) for i, other in enumerate(pool))
    bases = [i for share, i in alike[: chosen.sparse_bases] if -share > chosen.untouched]
    found = [s for base in bases if (s := _read(child, base, pool, step, chosen))]
    return max(found, key=lambda s: round(s.explained, 2), default=None)  # the likeliest base of those that do as well


def untouched(child: Entries, base: Entries) -> float:
    """Share of the child's entries that are the base's in the child's precision, beyond those that lie near by chance:
    half of those one or minus one rounding away."""
    pairs = zip(child, base, strict=True)
    off = torch.cat([((c.double() - b.to(c.dtype).double()) / ulp(c).double()).abs() for c, b in pairs])
    return float((off < 0.5).double().mean() - ((off >= 0.5) & (off < 1.5)).double().mean() / 2)


def _read(child: Entries, base: int, pool: Sequence[Entries], step: Tensor, chosen: Thresholds) -> Sparse | None:
    """The pair of parents that explains most with this base, and what explains much more beside it."""
    moved = _change(child, pool[base], step)
    changes = {i: _change(other, pool[base], step) for i, other in enumerate(pool) if i != base}
    sizes = [t.numel() for t in child]
    scales = {i: _scales(moved, change, sizes) for i, change in changes.items()}
    likely = sorted((-share, i) for i, (share, _) in scales.items() if share > chosen.sparse_share)
    parts = {i: scales[i][1] * changes[i] for _, i in likely[: chosen.sparse_parents]}

    def worth(parents: Sequence[int]) -> float:
        return explained(moved, [parts[i] for i in parents])

    parents = max(combinations(sorted(parts), 2), key=worth, default=())
    while parents and len(parents) < PARENTS:
        more = max((tuple(sorted((*parents, i))) for i in parts if i not in parents), key=worth, default=())
        if not more or worth(more) < worth(parents) + chosen.sparse_share:
            break
        parents = more
    if not parents:
        return None
    apart, alone = told_apart(moved, [parts[i] for i in parents])
    if apart < chosen.sparse_explained or min(alone) < chosen.sparse_alone:
        return None
    random = _random(moved, [parts[i] for i in parents], step, sizes, chosen)
    return Sparse(base, parents, tuple(float(scales[i][1].median()) for i in parents), worth(parents), random)


def _change(model: Entries, base: Entries, step: Tensor) -> Tensor:
    """Entries of model - base, in roundings of the child."""
    return torch.cat([m.double() - b.double() for m, b in zip(model, base, strict=True)]) / step


def _scales(moved: Tensor, change: Tensor, sizes: Sequence[int]) -> tuple[float, Tensor]:
    """(share of the larger changes that the child holds whole, the scale at every entry: one for all tensors, but a
    tensor's own where more of it is held at that)."""
    usual, shares, scales = fitted(moved, change), [], []
    for m, c in zip(moved.split(sizes), change.split(sizes), strict=True):
        share, at = max(((held(m, c, at), at) for at in (usual, fitted(m, c))), key=lambda found: found[0])
        shares.append(share)
        scales.append(at)
    each = torch.tensor(scales, dtype=moved.dtype).repeat_interleave(torch.tensor(sizes))
    return sum(share * n for share, n in zip(shares, sizes, strict=True)) / sum(sizes), each


def _far(change: Tensor) -> Tensor:
    """Where changes are large, at most DRAWN places, evenly spread."""
    far = (change.abs() > CLEAR).nonzero().flatten()
    return far[torch.arange(min(len(far), DRAWN)) * len(far) // min(len(far), DRAWN)] if len(far) else far


def fitted(moved: Tensor, change: Tensor) -> float:
    """The scale at which the child holds most of the larger changes whole; 1 where there are too few."""
    far = _far(change)
    if len(far) < FEWEST:
        return 1.0
    moved, change = moved[far], change[far]
    ratio, width = moved / change, _off(change) / change.abs()
    found = _fullest(ratio, width)
    for close in (2 * STEP, STEP / 2, STEP / 10):
        near = (ratio / found - 1).abs() < close + width
        if int(near.sum()) < FEWEST // 4:
            break
        found = _median(ratio[near], width[near].square().reciprocal())
    return found


def held(moved: Tensor, change: Tensor, scale: float) -> float:
    """Share of the larger changes that the child holds whole at a scale, beyond chance; 0 where there are too few."""
    far = _far(change)
    if len(far) < FEWEST:
        return 0.0
    off, most = (moved[far] - scale * change[far]).abs(), _off(scale * change[far])
    beside = ((off > 2 * most) & (off <= 4 * most)).double().mean() / 2
    return float((off <= most).double().mean() - beside)


def _off(*changes: Tensor) -> Tensor:
    """How far from a sum of changes an entry may lie that holds it, in roundings."""
    return 0.55 + EXACT * torch.stack(changes).abs().sum(0)


def _fullest(ratio: Tensor, width: Tensor) -> float:
    """Where most of the intervals ratio +- width overlap, more than to either side; each interval weighs 1 in all."""
    low, high = math.log(LOWEST), math.log(HIGHEST)
    bins = round((high - low) / STEP)
    ends = torch.stack([ratio - width, ratio + width]).clamp(LOWEST / 2, 2 * HIGHEST).log()
    first, last = ((ends - low) / STEP).round().long().clamp(0, bins)
    inside = (ratio > LOWEST) & (ratio < HIGHEST)
    share = inside / (last - first + 1).double()
    rises = torch.zeros(bins + 2, dtype=torch.float64)
    rises.index_add_(0, first, share).index_add_(0, last + 1, -share)
    count = rises.cumsum(0)[None, None, :-1]
    mean = partial(torch.nn.functional.avg_pool1d, count, stride=1, count_include_pad=False)
    beyond = mean(kernel_size=3, padding=1) - mean(kernel_size=31, padding=15)
    return math.exp(low + STEP * int(beyond.argmax()))


def _median(values: Tensor, weights: Tensor) -> float:
    """Where the cumulated weights pass a half."""
    order = values.argsort()
    total = weights[order].cumsum(0)
    return float(values[order][torch.searchsorted(total, total[-1] / 2)])


def _sums(parts: Entries) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """What an entry holds if it holds some of the parts: which, and their sum; nothing first."""
    for size in range(len(parts) + 1):
        for some in combinations(range(len(parts)), size):
            yield some, sum((parts[i] for i in some), torch.zeros_like(parts[0]))


def _hits(moved: Tensor, parts: Entries) -> dict[tuple[int, ...], Tensor]:
    """Of every set of the parts, the entries that hold their sum or mean, up to rounding."""
    most = _off(*parts)
    found = {}
    for some, total in _sums(parts):
        found[some] = (moved - total).abs() <= most
        if len(some) > 1:
            found[some] |= (moved - total / len(some)).abs() <= most
    return found


def explained(moved: Tensor, parts: Entries) -> float:
    """Share of the entries that hold the sum or mean of some of the parts."""
    return float(torch.stack([*_hits(moved, parts).values()]).any(0).double().mean())


def _clear(parts: Entries) -> Tensor:
    """Entries at which all sums of the parts differ clearly."""
    ends = torch.stack([total for _, total in _sums(parts)]).sort(0).values
    return ends.diff(dim=0).amin(0) > CLEAR


def told_apart(moved: Tensor, parts: Entries) -> tuple[float, list[float]]:
    """(share explained, shares that hold nothing and each part alone) of the entries at which sums of parts differ
    clearly."""
    clear = _clear(parts)
    if int(clear.sum()) < FEWEST:
        return 0.0, [0.0]
    moved, parts = moved[clear], [part[clear] for part in parts]
    hits = _hits(moved, parts)
    return explained(moved, parts), [float(hit.double().mean()) for some, hit in hits.items() if len(some) < 2]


def _random(moved: Tensor, parts: Entries, step: Tensor, sizes: Sequence[int], chosen: Thresholds) -> bool:
    """Whether the changes that the child holds are no larger than those it does not, as chance would leave them: by the
    probability that one of the former exceeds one of the latter of the same tensor. sizes: of the tensors."""
    clear, hits = _clear(parts), _hits(moved, parts)
    wins = pairs = 0.0
    for i, part in enumerate(parts):
        whole = torch.stack([hit for some, hit in hits.items() if i in some]).any(0)
        for size, kept, told in zip(*(t.split(sizes) for t in ((part * step).abs(), whole, clear)), strict=True):
            order, kept = size[told].argsort().argsort().double(), kept[told]
            n = int(kept.sum())
            wins += float(order[kept].sum()) - n * (n - 1) / 2  # Mann & Whitney 1947
            pairs += n * (len(kept) - n)
    return wins < chosen.sparse_larger * pairs
