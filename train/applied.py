"""Adapter files on models in memory, to draw with: LoRA, LoCon, LoHa, LoKr, several at once, off again bit by bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from lineage.adapters import Adapter, bind, open_adapter
from lineage.arithmetic import wide
from lineage.errors import LineageError
from lineage.factors import Factors
from lineage.keys import Param, canonical

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")


class Applied:
    """Each adapter's delta times its weight, added to the weights of a UNet and its text encoders until `remove`.

    The sum is made in float32 and rounded once, bit for bit as `lineage.apply` does it. LineageError, with the models
    unchanged, where a file is no adapter or was made for another architecture."""

    def __init__(
        self, unet: nn.Module, text_encoders: Sequence[nn.Module], adapters: Sequence[tuple[Path | Adapter, float]]
    ):
        parts = zip(COMPONENTS, (unet, *text_encoders), strict=False)
        own = {f"{c}.{name}": p for c, part in parts for name, p in part.named_parameters()}
        specs = canonical({name: (tuple(p.shape), p.dtype) for name, p in own.items()})
        sums: dict[str, Tensor] = {}
        for adapter, weight in adapters:
            for name, factors in bound(adapter, specs).items():
                stored = specs[name].stored
                total = sums.get(stored)
                sums[stored] = _added(own[stored].detach() if total is None else total, factors, weight)
        self._own = {name: own[name] for name in sums}
        self._kept = {name: p.detach().clone() for name, p in self._own.items()}
        self._write(sums)

    def remove(self) -> None:
        """The models as they were; a second call does nothing."""
        self._write(self._kept)
        self._kept = {}

    @torch.no_grad()
    def _write(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            self._own[name].copy_(tensor)

    def __enter__(self) -> Applied:
        return self

    def __exit__(self, *raised: object) -> None:
        self.remove()


def bound(adapter: Path | Adapter, specs: Mapping[str, Param]) -> dict[str, Factors]:
    """Canonical name -> factors, by the model's `specs` alone; LineageError where any of them has no place in it."""
    opened = open_adapter(adapter) if isinstance(adapter, Path) else adapter
    found, unmatched = bind(opened, specs)
    if unmatched:
        first = unmatched[0]
        raise LineageError(f"{opened.path}: {first['name']}: {first['reason']}. Was it made for another architecture?")
    return found


def _added(weight: Tensor, factors: Factors, strength: float) -> Tensor:
    """weight + strength * delta, in float32 (float64 where the weight is), on the weight's device."""
    total = weight.to(wide([weight.dtype]))
    delta = factors.delta(total.float().cpu() if factors.needs_weight else None)
    return total + (strength * delta.reshape(total.shape)).to(total)
