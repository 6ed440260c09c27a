"""Controls of an experiment: adapters that differ from a trained one in everything but size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from lineage.adapters import open_adapter, save_adapter
from lineage.factors import Factors


def random_like(adapter: Path, output: Path, seed: int) -> Path:
    """An adapter of random factors whose change of every layer has the Frobenius norm that `adapter`'s has."""
    opened = open_adapter(adapter)
    generator = torch.Generator().manual_seed(seed)
    made = {name: _random(opened.modules[name], generator) for name in sorted(opened.modules)}
    save_adapter(output, made, {"ss_training_comment": f"random factors with the norms of {adapter.name}"})
    return output


def _random(factors: Factors, generator: torch.Generator) -> Factors:
    drawn = {slot: torch.randn(t.shape, generator=generator) for slot, t in factors.tensors.items()}
    found = replace(factors, tensors=drawn)
    last = next(slot for slot in drawn if slot.endswith(("_a", "up.weight")))
    ratio = factors.delta().norm() / found.delta().norm()
    return replace(found, tensors={**drawn, last: drawn[last] * ratio})
