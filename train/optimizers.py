"""Optimisers and learning-rate schedules: plain functions in a dict, looked up by the names of a configuration."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lineage.errors import LineageError
from train.config import TrainingConfig

Groups = Sequence[dict[str, Any]]
"""Parameter groups as torch takes them: {"params": [...], "lr": ...}."""

ESTIMATING = ("dadapt-adam", "prodigy")
"""Those that find the rate themselves: `lr` is a factor on what they find, the same for all groups."""


def _adamw(groups: Groups, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(list(groups), **options)


def _adam8bit(groups: Groups, **options: Any) -> torch.optim.Optimizer:
    return _bitsandbytes().Adam8bit(groups, **options)


def _adamw8bit(groups: Groups, **options: Any) -> torch.optim.Optimizer:
    return _bitsandbytes().AdamW8bit(groups, **options)


def _dadapt_adam(groups: Groups, **options: Any) -> torch.optim.Optimizer:
    from dadaptation import DAdaptAdam

    return DAdaptAdam(groups, lr=groups[0]["lr"], decouple=True, **options)


def _prodigy(groups: Groups, **options: Any) -> torch.optim.Optimizer:
    from prodigyopt import Prodigy

    return Prodigy(groups, lr=groups[0]["lr"], safeguard_warmup=True, **options)


def _bitsandbytes() -> Any:
    with contextlib.redirect_stderr(io.StringIO()):  # it greets at import
        import bitsandbytes

    return bitsandbytes.optim


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adam8bit": _adam8bit,
    "adamw8bit": _adamw8bit,
    "dadapt-adam": _dadapt_adam,
    "prodigy": _prodigy,
}

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda passed: 1.0,
    "cosine": lambda passed: 0.5 * (1 + math.cos(math.pi * passed)),
    "linear": lambda passed: 1 - passed,
}
"""Share of the learning rate where the share `passed` of the steps after the warmup is done."""


def build(groups: Groups, config: TrainingConfig) -> torch.optim.Optimizer:
    """The optimiser that `config` names. LineageError where it finds its rate itself and `lr` is no factor."""
    rates = {group["lr"] for group in groups}
    if config.optimizer in ESTIMATING and (len(rates) > 1 or not 0.1 <= min(rates) <= 10):
        raise LineageError(
            f"training.optimizer {config.optimizer} finds the learning rate itself, and training.lr is a factor on it, "
            f"here {', '.join(f'{rate:g}' for rate in sorted(rates))}. Set training.lr = 1.0 and no other rate."
        )
    options = {} if config.weight_decay is None else {"weight_decay": config.weight_decay}
    with contextlib.redirect_stdout(io.StringIO()):  # two of them print
        return OPTIMIZERS[config.optimizer](groups, **options)


def share(config: TrainingConfig, step: int, steps: int) -> float:
    """Factor on the learning rate at step `step` (from 1) of `steps`: a linear warmup, then the schedule."""
    if step <= config.warmup:
        return step / config.warmup
    return SCHEDULES[config.scheduler]((step - 1 - config.warmup) / max(1, steps - config.warmup))


def rate(optimizer: torch.optim.Optimizer) -> float:
    """The largest learning rate of the groups; a found one is the factor times `d` (Defazio & Mishchenko 2023)."""
    return max(float(group["lr"] * group.get("d", 1.0)) for group in optimizer.param_groups)


def set_rates(optimizer: torch.optim.Optimizer, rates: Sequence[float], factor: float) -> None:
    """Each group's learning rate becomes its own of `rates` times `factor`."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate * factor
