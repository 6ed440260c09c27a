"""What an adapter adds to one weight: LoRA / LoCon, LoHa and LoKr factors, or a plain difference.

Tensors keep the names that kohya's files give them ("lora_up", "hada_w1_a", ...) and their stored dtype; arithmetic is
float32. Every family is made of products `left @ right` (Pair); a convolution's kernel is flattened into the columns.
Sources: LoRA, Hu et al. 2021; LoHa, Hyeon-Woo et al. 2022 (FedPara); LoKr, Yeh et al. 2024 (LyCORIS); DoRA, Liu et al.
2024. A tucker LoHa trained before October 2023 used its first core for both halves, which its file does not tell.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lineage.errors import LineageError

LARGEST = 2**31  # entries of one weight; small factors can claim a weight that no memory holds
DORA = "dora_scale"


@dataclass(frozen=True, eq=False)
class Pair:
    """A product left (m, r) @ right (r, n); n = prod(columns), columns = (in,) or (in, *kernel)."""

    left: Tensor
    right: Tensor
    columns: tuple[int, ...]

    @property
    def rank(self) -> int:
        return self.left.shape[1]

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.left.shape[0], *self.columns)

    def product(self) -> Tensor:
        return self.left @ self.right


@dataclass(frozen=True, eq=False)
class Factors:
    """One module of an adapter. shape: of the weight, (out, in) or (out, in, *kernel), as far as the file knows it.

    tensors: by kohya's slot name, as stored. rank: the adapter's dim. alpha: as the trainer was given it."""

    tensors: Mapping[str, Tensor]
    rank: int
    alpha: float
    shape: tuple[int, ...]

    kind: ClassVar[str] = ""

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def needs_weight(self) -> bool:
        """Whether the delta depends on the weight that it is added to (DoRA)."""
        return DORA in self.tensors

    @property
    @abstractmethod
    def rank_bound(self) -> int:
        """No delta of these factors has a larger rank, short of DoRA's rescaling, which can reach full rank."""

    @abstractmethod
    def _product(self) -> Tensor:
        """The delta at scale 1, (out, in * kernel) float32."""

    def _thin(self) -> tuple[Tensor, Tensor] | None:
        """(left, right) at scale 1 with left @ right = _product(), where that is a saving."""
        return None

    def delta(self, weight: Tensor | None = None) -> Tensor:
        """What is added to the weight at strength 1, float32 of `shape`. `weight` (out, ...) is needed by DoRA only.

        LineageError where it is needed and missing."""
        added = self._product().mul_(self.scale).view(self.shape)
        if not self.needs_weight:
            return added
        if weight is None:
            raise LineageError("is a DoRA adapter: its delta depends on the weight it is added to. Give the base too.")
        weight = weight.float().view(self.shape)
        return _rescaled(weight + added, self.tensors[DORA].float()).sub_(weight)

    def left_right(self) -> tuple[Tensor, Tensor] | None:
        """(u (out, k), v (k, in * kernel)) with u @ v = delta().flatten(1), k < min(out, in * kernel); None where
        the factors are no smaller than the delta, or the delta is no product of them (DoRA)."""
        thin = None if self.needs_weight or self.rank_bound >= min(_matrix(self.shape)) else self._thin()
        return None if thin is None else (thin[0] * self.scale, thin[1])

    def shaped(self, shape: tuple[int, ...]) -> Factors:
        """The same for a weight of `shape`: files flatten kernels, and models differ in 1x1 convolution or Linear."""
        if _matrix(shape) != _matrix(self.shape):
            raise LineageError(f"fits a weight of shape {self.shape}, not {tuple(shape)}.")
        return replace(self, shape=tuple(shape))


class LowRank(Factors):
    """LoRA and LoCon: up @ down, or up @ (mid . down) for a CP-decomposed kernel. rank(delta) <= rank."""

    kind = "lora"

    @property
    def pair(self) -> Pair:
        return _pair(self.tensors, "lora_up.weight", "lora_down.weight", "lora_mid.weight", transposed=False)

    @property
    def rank_bound(self) -> int:
        return min(self.rank, *_matrix(self.shape))

    def _product(self) -> Tensor:
        return self.pair.product()

    def _thin(self) -> tuple[Tensor, Tensor]:
        return self.pair.left, self.pair.right


class Hadamard(Factors):
    """LoHa: (w1_a @ w1_b) * (w2_a @ w2_b), which is a LoRA of rank r^2 in Khatri-Rao factors."""

    kind = "loha"

    @property
    def pairs(self) -> tuple[Pair, Pair]:
        first, second = (_pair(self.tensors, f"hada_w{i}_a", f"hada_w{i}_b", f"hada_t{i}") for i in (1, 2))
        return first, second

    @property
    def rank_bound(self) -> int:
        return min(self.rank**2, *_matrix(self.shape))

    def _product(self) -> Tensor:
        return self.pairs[0].product().mul_(self.pairs[1].product())

    def _thin(self) -> tuple[Tensor, Tensor]:
        first, second = self.pairs
        return khatri_rao_rows(first.left, second.left), khatri_rao_rows(first.right.mT, second.right.mT).mT


class Kronecker(Factors):
    """LoKr: kron(w1, w2), each whole or a product of two."""

    kind = "lokr"

    @property
    def halves(self) -> tuple[Pair, Pair]:
        return _half(self.tensors, "lokr_w1"), _half(self.tensors, "lokr_w2")

    @property
    def rank_bound(self) -> int:
        return min(self.halves[0].rank * self.halves[1].rank, *_matrix(self.shape))

    def _product(self) -> Tensor:
        first, second = self.halves
        return torch.kron(first.product(), second.product())

    def _thin(self) -> tuple[Tensor, Tensor]:
        first, second = self.halves
        return torch.kron(first.left, second.left), torch.kron(first.right, second.right)


class Plain(Factors):
    """A difference stored whole: of a weight, a norm or a bias."""

    kind = "diff"

    @property
    def rank_bound(self) -> int:
        return min(_matrix(self.shape))

    def _product(self) -> Tensor:
        (stored,) = self.tensors.values()
        return stored.to(torch.float32, copy=True)


def khatri_rao_rows(a: Tensor, b: Tensor) -> Tensor:
    """Row-wise Kronecker product of (m, r) and (m, s): (m, r * s)."""
    return (a[:, :, None] * b[:, None, :]).flatten(1)


def factors(tensors: Mapping[str, Tensor], alpha: float | None = None, rank: int | None = None) -> Factors:
    """One module's tensors, by kohya's slot names, as the Factors of their family, checked.

    alpha: None or 0 means alpha = rank, as kohya and LyCORIS read it. rank: for a LoKr of two whole halves only, which
    does not show it; without it such a module has scale 1. LineageError for parts missing, unknown or inconsistent."""
    if alpha is not None and not math.isfinite(alpha):
        raise LineageError(f"has alpha {alpha}.")
    slots = set(tensors) - {DORA}
    build = next((b for marks, b in _FAMILIES if any(s.startswith(marks) for s in slots)), None)
    if build is None:
        raise LineageError(f"holds {_names(slots)}, not the factors of a LoRA, LoCon, LoHa or LoKr.")
    for slot, tensor in tensors.items():
        if not tensor.is_floating_point() or not torch.isfinite(tensor.float()).all():
            raise LineageError(f"{slot} holds {tensor.dtype if not tensor.is_floating_point() else 'NaN or infinity'}.")
    built = build(tensors, alpha, rank)
    _check_dora(built)
    return built


def _low_rank(tensors: Mapping[str, Tensor], alpha: float | None, rank: int | None) -> Factors:
    _expect(tensors, "lora_up.weight", "lora_down.weight", optional=("lora_mid.weight",))
    pair = _pair(tensors, "lora_up.weight", "lora_down.weight", "lora_mid.weight", transposed=False)
    return LowRank(tensors, pair.rank, alpha or pair.rank, _bounded(pair.shape))


def _hadamard(tensors: Mapping[str, Tensor], alpha: float | None, rank: int | None) -> Factors:
    cores = ("hada_t1", "hada_t2") if {"hada_t1", "hada_t2"} & set(tensors) else ()
    _expect(tensors, "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", *cores)
    first, second = (_pair(tensors, f"hada_w{i}_a", f"hada_w{i}_b", f"hada_t{i}") for i in (1, 2))
    if first.rank != second.rank or first.shape != second.shape:
        raise LineageError(f"hada_w1 is {first.shape} of rank {first.rank}, hada_w2 {second.shape} of {second.rank}.")
    return Hadamard(tensors, first.rank, alpha or first.rank, _bounded(first.shape))


def _kronecker(tensors: Mapping[str, Tensor], alpha: float | None, rank: int | None) -> Factors:
    expected = [slot for half in ("lokr_w1", "lokr_w2") for slot in _half_slots(tensors, half)]
    _expect(tensors, *expected, optional=("lokr_t2",) if "lokr_w2_a" in expected else ())
    first, second = _half(tensors, "lokr_w1"), _half(tensors, "lokr_w2")
    if len(first.columns) != 1:
        raise LineageError(f"lokr_w1 is {first.shape}, not a matrix.")
    split = [p.rank for p, half in ((second, "lokr_w2"), (first, "lokr_w1")) if f"{half}_a" in tensors]
    if not split:  # LyCORIS fixes the scale of two whole halves at 1; peft's configuration gives rank and alpha
        alpha, split = (alpha, [rank]) if rank else (1.0, [1])
    shape = (first.shape[0] * second.shape[0], first.shape[1] * second.shape[1], *second.shape[2:])
    return Kronecker(tensors, split[0], alpha or split[0], _bounded(shape))


def _plain(tensors: Mapping[str, Tensor], alpha: float | None, rank: int | None) -> Factors:
    (slot,) = _expect(tensors, next(iter(sorted(set(tensors) - {DORA}))))
    shape = _bounded(tuple(tensors[slot].shape))
    bound = min(_matrix(shape))
    return Plain(tensors, bound, bound, shape)


_FAMILIES = (("lora_", _low_rank), ("hada_", _hadamard), ("lokr_", _kronecker), ("diff", _plain))


def _expect(tensors: Mapping[str, Tensor], *needed: str, optional: tuple[str, ...] = ()) -> tuple[str, ...]:
    slots = set(tensors)
    if missing := set(needed) - slots:
        raise LineageError(f"has {_names(slots)} but lacks {_names(missing)}.")
    if unknown := slots - {*needed, *optional, DORA}:
        raise LineageError(f"has {_names(unknown)} beside {_names(needed)}, which do not go together.")
    return needed


def _pair(tensors: Mapping[str, Tensor], left: str, right: str, core: str, transposed: bool = True) -> Pair:
    """left (m, r) @ right (r, in, ...), or with a tucker core (r, s, *kernel): left^T core right, where right is
    (s, in) and left is stored (r, m) if `transposed`. LineageError where the shapes do not fit."""
    a, b = tensors[left].float(), tensors[right].float()
    described = f"{left} is {tuple(a.shape)}, {right} is {tuple(b.shape)}"
    if a.ndim < 2 or b.ndim < 2 or a[:1, :1].numel() != 1 or 0 in b.shape:
        raise LineageError(f"{described}: no factors of rank 1 or more.")
    a = a.flatten(1)
    t = tensors.get(core)
    if t is None:
        inner, right_inner, columns = a.shape[1], b.shape[0], tuple(b.shape[1:])
    else:
        described += f", {core} is {tuple(t.shape)}"
        a = a.mT if transposed else a
        if t.ndim < 3 or 0 in t.shape or t.shape[1] != b.shape[0] or b[:1, :1].numel() != 1:
            raise LineageError(f"{described}: inner ranks do not agree.")
        inner, right_inner, columns = a.shape[1], t.shape[0], (b.shape[1], *t.shape[2:])
        b = torch.einsum("ij...,jn->in...", t.float(), b.flatten(1))
    if inner != right_inner:
        raise LineageError(f"{described}: inner ranks do not agree.")
    return Pair(a.contiguous(), b.flatten(1).contiguous(), columns)


def _half_slots(tensors: Mapping[str, Tensor], half: str) -> tuple[str, ...]:
    return (half,) if half in tensors else (f"{half}_a", f"{half}_b")


def _half(tensors: Mapping[str, Tensor], half: str) -> Pair:
    """lokr_w1 or lokr_w2; one that is stored whole is a product with an identity on its shorter side."""
    if half not in tensors:
        return _pair(tensors, f"{half}_a", f"{half}_b", f"lokr_t{half[-1]}")
    whole = tensors[half].float()
    if whole.ndim < 2 or 0 in whole.shape:
        raise LineageError(f"{half} is {tuple(whole.shape)}, not a matrix or a convolution.")
    matrix = whole.flatten(1)
    rows, columns = matrix.shape
    left, right = (torch.eye(rows), matrix) if rows <= columns else (matrix, torch.eye(columns))
    return Pair(left, right, tuple(whole.shape[1:]))


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    return shape[0], math.prod(shape[1:])


def _bounded(shape: tuple[int, ...]) -> tuple[int, ...]:
    if not shape or not 0 < math.prod(shape) <= LARGEST:
        raise LineageError(f"claims a weight of shape {shape}, which no model has.")
    return shape


def _check_dora(f: Factors) -> None:
    scale = f.tensors.get(DORA)
    if scale is not None and (f.kind == "diff" or scale.shape[:1] not in ((f.shape[0],), (1,))):
        raise LineageError(f"{DORA} is {tuple(scale.shape)}, which does not fit {f.kind} factors of {f.shape}.")


def _rescaled(weight: Tensor, scale: Tensor) -> Tensor:
    """DoRA: each row (or input channel) of `weight` brought to the norm that `scale` gives it."""
    axis = 0 if scale.shape[0] == weight.shape[0] == scale.numel() else 1
    if scale.numel() != weight.shape[axis]:
        raise LineageError(
            f"{DORA} is {tuple(scale.shape)}, the weight {tuple(weight.shape)}: neither its rows nor "
            "its input channels."
        )
    other = tuple(i for i in range(weight.ndim) if i != axis)
    norm = torch.linalg.vector_norm(weight, dim=other, keepdim=True) + torch.finfo(torch.float32).eps
    return weight * (scale.view(norm.shape) / norm)


def _names(slots) -> str:
    return ", ".join(sorted(slots)) or "nothing"
