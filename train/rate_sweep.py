"""`lineage train --find-lr`: one training step per rate, judged on pictures whose noise stays the same."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch

from lineage.errors import LineageError
from lineage.pairs import pick_device
from lineage.results import provenance
from train.config import Config
from train.data import Batch
from train.loop import Progress, Training
from train.optimizers import ESTIMATING, set_rates
from train.rates import RatePoint, RatesResult, rates_result, rising

JUDGED = 8
HOPELESS = 4.0  # the sweep ends where the loss is this many times what it was


def find_lr(
    config: Config,
    *,
    device: str = "auto",
    low: float = 1e-6,
    high: float = 1e-1,
    steps: int = 100,
    progress: Progress | None = None,
) -> RatesResult:
    """Sweep the learning rate from `low` to `high`; the ratio of the UNet's to the text encoders' stays as configured.

    Writes nothing. LineageError where the optimiser finds its rate itself, and as `train` raises it."""
    if config.training.optimizer in ESTIMATING:
        raise LineageError(f"training.optimizer {config.training.optimizer} finds the learning rate itself.")
    begun = time.perf_counter()
    run = Training(config, pick_device(device), progress)
    judged = _judged(run)
    start, points = _loss(run, judged), []
    for number, rate in enumerate(rising(low, high, steps), 1):
        set_rates(run.optimizer, run.rates, rate / max(run.rates))
        run.descend(number)
        points.append(RatePoint(rate, _loss(run, judged)))
        if progress:
            progress(number, steps, f"lr {rate:.1e}, loss {points[-1].loss:.4f}")
        if not points[-1].loss < HOPELESS * start:
            break
    points = [p for p in points if math.isfinite(p.loss)]
    source = provenance(
        f"lineage train --find-lr (lr {low:g} to {high:g})",
        {"base": {"path": run.base.path.name, "sha256": run.hashes["ss_new_sd_model_hash"]}},
        str(run.base.device),
        seed=config.training.seed,
        seconds=time.perf_counter() - begun,
    )
    return rates_result(source, config.training.optimizer, sum(map(len, judged)), start, points)


def _judged(run: Training) -> list[Batch]:
    """The batches of the first steps, JUDGED pictures or one step."""
    found: list[Batch] = []
    while sum(map(len, found)) < JUDGED:
        found += run.batches()
    return found


@torch.no_grad()
def _loss(run: Training, judged: Sequence[Batch]) -> float:
    """Mean loss at noise and timesteps that no training step draws."""
    losses = [run.loss(batch, 0, JUDGED * i) for i, batch in enumerate(judged)]
    return float(torch.cat(losses).mean())
