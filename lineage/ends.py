"""One dependency between models is a reading of each of them: from which end it was made, and whether it is known."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch

from lineage import copies, unmerge
from lineage.graph import ancestors
from lineage.kin import Ancestry, Kin
from lineage.unmerge import Reading
from lineage.whitening import sampled


def read_already(kin: Kin, found: Ancestry, reading: Reading) -> bool:
    """Whether a parent was made of the child, or the same models, or such as are no farther from them than the reading
    is from the child, are already one merge, read from another end."""
    above = {m.reading.child: m.reading.parents for m in found.merges}

    def within(few: Collection[int], many: Collection[int]) -> bool:
        return all(unmerge.from_one(kin.g, i, sorted(many)).min() <= reading.floor for i in few)

    known = (m.reading.members for m in found.merges)
    return any(reading.child in ancestors(above, p) for p in reading.parents) or any(
        within(reading.members, members) or within(members, reading.members) for members in known
    )


def made_last(kin: Kin, every: Sequence[Reading]) -> list[Reading]:
    """Without add-differences that are better read from another end: a + w (b - c) = m is also a reading of a, but only
    the one that was made last is what rounding the sum to its dtype gives, wherever their exponents differ."""
    ends: dict[tuple[frozenset[int], float], list[Reading]] = {}
    for r in every:
        if not r.convex:
            ends.setdefault((r.members, copies.precision(kin.prints[r.child])), []).append(r)
    shares = {r: _replayed(kin, r) for same in ends.values() if len(same) > 1 for r in same}
    worse = {r for same in ends.values() for r in same if r in shares and shares[r] < max(shares[s] for s in same)}
    return [r for r in every if r not in worse]


def _replayed(kin: Kin, reading: Reading) -> float:
    """Share of the child's entries that its parents give exactly, at the fitted weights or at these as recipes write
    them, with three decimals; 0 where the files are not to be read."""
    held = kin.held((reading.child, *reading.parents))
    if held is None:
        return 0.0
    same, total = np.zeros(2), 0
    for name in (*kin.matrices, *kin.vectors):
        child, *parents = (sampled(m[name]) for m in held)
        for i, weights in enumerate((reading.weights, [round(w, 3) for w in reading.weights])):
            made = sum(w * p.double() for w, p in zip(weights, parents, strict=True))
            same[i] += int((torch.as_tensor(made).to(child.dtype) == child).sum())
        total += child.numel()
    return float(same.max()) / max(1, total)
