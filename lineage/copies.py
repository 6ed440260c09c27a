"""Files that show from themselves that they derive from another: copies, re-typed, permuted, quantised, pruned.

All are leaves of the tree: what is known of them is settled before merges and fine-tunes are looked for.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from lineage.fingerprint import Fingerprint, TensorPrint
from lineage.whitening import sampled

ROWS = 64  # of a matrix that are looked at
GRIDS = {"int8": (127, 255), "int4": (7, 15)}  # levels: symmetric around 0, and from least to largest
GROUPS = (32, 64, 128)  # entries of a row that share a scale, where the whole row does not


def identical(prints: Sequence[Fingerprint], names: Collection[str] | None = None) -> list[tuple[int, ...]]:
    """Classes of models whose tensors (or those of `names`) have the same bytes, whatever the files' metadata;
    singletons left out."""
    found: dict[tuple, list[int]] = {}
    for i, p in enumerate(prints):
        key = tuple(sorted((t.name, t.hash) for t in p.tensors if names is None or t.name in names))
        found.setdefault(key, []).append(i)
    return [tuple(members) for members in found.values() if len(members) > 1]


def donors(components: Mapping[str, Mapping[str, str]], parent: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """(donor, model, component): a component unlike the parent's and bit for bit that of another model.

    components: model -> component -> digest. parent: model -> the one it derives from. Of several donors the one with
    the fewest steps to its root, since it had the component first."""
    found = []
    for model, above in sorted(parent.items()):
        for component, digest in sorted(components[model].items()):
            theirs = components.get(above, {}).get(component)
            if theirs is None or theirs == digest:
                continue
            holders = [m for m, own in components.items() if m != model and own.get(component) == digest]
            holders = [m for m in holders if not _descends(m, model, parent)]
            if holders:
                found.append((min(holders, key=lambda m: (_steps(m, parent), m)), model, component))
    return found


def _descends(node: str, above: str, parent: Mapping[str, str]) -> bool:
    seen = set()
    while node in parent and node not in seen:
        seen.add(node)
        node = parent[node]
        if node == above:
            return True
    return False


def _steps(node: str, parent: Mapping[str, str]) -> int:
    seen: set[str] = set()
    while node in parent and node not in seen:
        seen.add(node)
        node = parent[node]
    return len(seen)


def permuted(prints: Sequence[Fingerprint]) -> list[tuple[int, int]]:
    """Pairs of models whose tensors hold the same values in another order, or under other names (shuffled layers)."""
    found: dict[tuple, list[int]] = {}
    for i, p in enumerate(prints):
        found.setdefault(tuple(sorted(t.values_hash for t in p.tensors)), []).append(i)
    pairs = []
    for members in found.values():
        content = {i: sorted((t.name, t.hash) for t in prints[i].tensors) for i in members}
        pairs += [(a, b) for a in members for b in members if a < b and content[a] != content[b]]
    return pairs


def matrices(p: Fingerprint) -> list[TensorPrint]:
    """Prints of the tensors of two or more dimensions."""
    return [t for t in p.tensors if len(t.shape) > 1]


def zero_share(p: Fingerprint) -> float:
    """Share of exact zeros among the entries of a model's matrices."""
    found = matrices(p)
    entries = sum(_numel(t) for t in found)
    return sum(t.zeros for t in found) / entries if entries else 0.0


def _numel(t: TensorPrint) -> int:
    return int(torch.Size(t.shape).numel())


def same_vectors(a: Fingerprint, b: Fingerprint) -> bool:
    """Whether all tensors of one dimension, and there are some, have the same bytes: nothing but matrices changed."""
    ours = {t.name: t.hash for t in a.tensors if len(t.shape) == 1}
    theirs = {t.name: t.hash for t in b.tensors if len(t.shape) == 1}
    return bool(ours) and ours == theirs


def shared_share(a: Fingerprint, b: Fingerprint) -> float:
    """Share of the entries of `a` that lie in tensors with the same bytes in `b`."""
    theirs = {t.name: t.hash for t in b.tensors}
    entries = sum(_numel(t) for t in a.tensors)
    return sum(_numel(t) for t in a.tensors if theirs.get(t.name) == t.hash) / entries if entries else 0.0


def grid(matrix: Tensor) -> str | None:
    """ "int8" or "int4" where the entries of each row (m, n), or of groups of a row, lie on an evenly spaced grid of
    that many levels; else None. Storing the values in few bits afterwards is allowed for."""
    rows = matrix.flatten(1)[:ROWS].double()
    sizes = [n for n in GROUPS if rows.shape[1] % n == 0 and rows.shape[1] > n]
    scaled = [rows, *(rows.reshape(-1, n) for n in sizes)]
    for name in sorted(GRIDS, key=lambda n: GRIDS[n]):
        if any(_on_grid(part, *GRIDS[name]) for part in scaled):
            return name
    return None


def _on_grid(rows: Tensor, symmetric: int, levels: int, tolerance: float = 0.12) -> bool:
    """Off-grid rms of random entries is 0.29 of a step; a few entries prove nothing."""
    if rows.shape[1] < 16:
        return False
    top, low, high = rows.abs().amax(1, keepdim=True), rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    whole = rows.abs().amax()
    steps = (top / symmetric, (high - low) / levels, (whole / symmetric).expand_as(top))
    return any(_off(rows, step) < tolerance for step in steps)


def _off(rows: Tensor, step: Tensor) -> float:
    """Median over rows of the rms distance to the nearest multiple of the row's step, in steps; 1 for constant rows."""
    used = (step > 0).flatten()
    if not used.any():
        return 1.0
    units = rows[used] / step[used]
    return float((units - units.round()).square().mean(1).sqrt().median())


def quantised(model: Mapping[str, Tensor], p: Fingerprint, least: float = 0.5) -> str | None:
    """The grid on which most of a model's larger matrices lie ("int8", "int4"), or None."""
    largest = sorted(matrices(p), key=lambda t: (-_numel(t), t.name))[:8]
    found = [grid(model[t.name]) for t in largest]
    names = [name for name in GRIDS if found.count(name) > least * len(found)]
    return names[0] if names else None


def prunes(child: Mapping[str, Tensor], parent: Mapping[str, Tensor], names: Sequence[str]) -> float:
    """Share of the entries of `names`, evenly spread, at which the child is exactly zero or the parent rounded to the
    child's dtype."""
    same = total = 0
    for name in names:
        c, p = sampled(child[name]), sampled(parent[name])
        same += int(((c == 0) | (c == p.to(c.dtype))).sum())
        total += c.numel()
    return same / total if total else 0.0


def rounds_to(child: Mapping[str, Tensor], parent: Mapping[str, Tensor], names: Sequence[str]) -> bool:
    """Whether the child is the parent rounded to the child's dtypes, in every one of `names`."""
    return all(bool((parent[n].to(child[n].dtype) == child[n]).all()) for n in names)


def precision(p: Fingerprint) -> float:
    """Mean stored bits per entry."""
    bits = {"float64": 64, "float32": 32, "bfloat16": 15, "float16": 16}
    entries = sum(_numel(t) for t in p.tensors)
    total = sum(_numel(t) * bits.get(str(t.dtype).removeprefix("torch."), 8) for t in p.tensors)
    return total / entries if entries else 0.0
