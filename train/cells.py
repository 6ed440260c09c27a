"""The cells of a transfer experiment: one adapter is trained, put on every model, and measured; each job by itself.

A job's cells lie in one JSON file under the hash of the predictions that stood before it; what is there is not done
again, and what is there under another hash is refused.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor

from lineage.adapters import Adapter, open_adapter
from lineage.errors import LineageError
from lineage.records import restore
from lineage.results import write_files
from lineage.transfer_records import NONE, RANDOM, Cell, Failed
from train import measures
from train.applied import Applied
from train.config import ModelConfig, SaveConfig
from train.experiment import Experiment
from train.folders import Picture
from train.loop import Diverged, train
from train.measures import Judge
from train.models import Base, open_base
from train.setups import Way, applied_clip_skip, changed
from train.sites import Site

BEFORE: dict[tuple, dict[str, Tensor]] = {}
"""What this process knows of untouched models; a row of scores for each."""


@dataclass(frozen=True)
class Job:
    """What is measured at once: the adapter of `target` trained on `base` in some `way` with `seed`, on models of a
    site; base None: the models themselves. stamp: hash of the predictions."""

    folder: Path
    experiment: Experiment
    site: Site
    target: str
    base: str | None
    seed: int
    way: Way
    stamp: str
    device: str = "cpu"

    def __str__(self) -> str:
        return f"{self.site.name}: {self.target} on {self.base or 'nothing'}, {self.way}, seed {self.seed}"

    @property
    def clip_skip(self) -> int:
        """In use."""
        return applied_clip_skip(self.experiment.training.clip_skip, self.way.setup)

    @property
    def usual(self) -> bool:
        """Whether it belongs to the main matrix."""
        return self.way == Way(self.experiment.training.network)

    @property
    def name(self) -> str:
        """Of its files."""
        way = "" if self.usual else f"-{str(self.way).replace(' ', '-')}"
        return f"{self.base}-{self.seed}{way}" if self.base else "untouched"

    @property
    def file(self) -> Path:
        return self.folder / "cells" / self.site.name / self.target / f"{self.name}.json"

    @property
    def models(self) -> list[str]:
        """Those that the adapter is put on, beside its own."""
        others = [name for name in self.site.models if name != self.base]
        if not self.usual:
            return [name for name in others if name in self.site.models[: self.experiment.secondary.models]]
        return others if self.base is None or self.base in self.site.bases else []

    @property
    def count(self) -> int:
        """Of its cells, but for the random control's."""
        if self.base is None:
            return len(self.models)
        lesson, measured = self.experiment.training, self.experiment.measures
        early = sum(step < lesson.steps for step in lesson.at)
        return len(self.models) + 1 + early + (self.usual and measured.weight != measured.reference_weight)


def jobs(folder: Path, experiment: Experiment, site: Site, stamp: str, device: str = "cpu") -> list[Job]:
    """All of one site, the untouched models first, secondary trainings last."""
    usual, more = Way(experiment.training.network), experiment.secondary
    told = [(name, usual) for name in site.models]
    told += [(name, way) for way in _ways(experiment) for name in site.bases[: more.bases]]
    found = []
    for target in site.targets:
        found.append(Job(folder, experiment, site, target, None, 0, usual, stamp, device))
        found += [
            Job(folder, experiment, site, target, name, seed, way, stamp, device)
            for name, way in told
            for seed in experiment.training.seeds
        ]
    return found


def _ways(experiment: Experiment) -> list[Way]:
    usual, more = experiment.training.network, experiment.secondary
    return [Way(name) for name in more.networks if name != usual] + [Way(usual, setup) for setup in more.setups]


def finished(job: Job) -> list[Cell] | None:
    """The job's cells if they are there. LineageError where they were made after other predictions."""
    found = _written(job)
    return None if found is None else [restore(Cell, cell) for cell in found["cells"]]


def failed(job: Job) -> Failed | None:
    """What the job has in place of cells, where its training diverged."""
    reason = (_written(job) or {}).get("failed")
    return Failed(job.site.name, job.target, job.base or "", str(job.way), job.seed, reason) if reason else None


def _written(job: Job) -> dict[str, Any] | None:
    if not job.file.exists():
        return None
    found = json.loads(job.file.read_text(encoding="utf-8"))
    if found["predictions"] != job.stamp:
        raise LineageError(
            f"{job.file}: was measured under other predictions ({found['predictions'][:12]}, not {job.stamp[:12]}). "
            "Name another folder: predictions come before what they predict."
        )
    return found


def run(job: Job) -> list[Cell]:
    """Measure what is not there yet; the result is written whole. A training that diverges is a result too."""
    found, began, told = finished(job), time.monotonic(), {}
    if found is None:
        try:
            found = list(_Bench(job).cells())
        except Diverged as e:
            found, told = [], {"failed": str(e)}
        seconds = round(time.monotonic() - began, 1)
        told |= {"predictions": job.stamp, "seconds": seconds, "cells": [asdict(cell) for cell in found]}
        job.file.parent.mkdir(parents=True, exist_ok=True)
        write_files(job.file.parent, {job.file.name: json.dumps(told) + "\n"}, force=True)
    return found


class _Bench:
    """One job under way."""

    def __init__(self, job: Job):
        self.job, self.experiment, self.site = job, job.experiment, job.site

    def cells(self) -> Iterator[Cell]:
        job, settings, steps = self.job, self.experiment.measures, self.experiment.training.steps
        if job.base is None:
            for name in job.models:
                yield self.cell(None, name, 0.0, 0, NONE)
            return
        final, kept = self.trained(job.base)
        for name in job.models:
            yield self.cell(final, name, settings.weight, steps, job.way.network)
        for step, adapter in {**kept, steps: final}.items():
            yield self.cell(adapter, job.base, settings.reference_weight, step, job.way.network)
        if job.usual and settings.weight != settings.reference_weight:
            yield self.cell(final, job.base, settings.weight, steps, job.way.network)
        if job.usual and job.base == self.site.bases[0] and job.seed == self.experiment.training.seeds[0]:
            control = measures.random_like(final, job.seed)
            for name in job.models:
                yield self.cell(control, name, settings.weight, steps, RANDOM)

    def trained(self, base: str) -> tuple[Adapter, dict[int, Adapter]]:
        """The adapter, and its checkpoints by step. Its seed is that of no other adapter."""
        lesson, job = self.experiment.training, self.job
        home = job.folder / "adapters" / job.site.name / job.target / job.name
        seed = int(hashlib.sha256(f"{job.site.name} {job.target} {job.name}".encode()).hexdigest()[:8], 16) % 2**31
        save = SaveConfig(home, at=lesson.at, name="adapter")
        config = changed(self.site.lesson(job.target, base, save, seed), job.way, self.site)
        for _ in train(config, device=job.device):
            pass
        kept = {
            step: open_adapter(home / f"adapter-{step:06d}.safetensors") for step in lesson.at if step < lesson.steps
        }
        return open_adapter(home / "adapter.safetensors"), kept

    def cell(self, adapter: Adapter | None, model: str, weight: float, step: int, network: str) -> Cell:
        site, job = self.site, self.job
        base, judges = _opened(site, model, job.device), _judges(site)
        before = self.before(base, model) if adapter else {}
        with Applied(base.unet, base.text_encoders, [(adapter, weight)] if adapter else []):
            losses, own = self.losses(base, site.held_out(job.target)), self.losses(base, site.own(model))
            drawn = _drawn(base, job)
        scores = {name: judge.scores(drawn) for name, judge in judges.items()}
        at = {name: judge.labels.index(job.target) for name, judge in judges.items()}
        kept = {n: float(measures.retention(scores[n], before[n], at[n]).mean()) for n in before}
        return Cell(
            site.name, job.seed if adapter else 0, job.target, site.targets[job.target], network, job.base, model,
            weight, step, fmean(losses), stdev(losses) / len(losses) ** 0.5, tuple(losses),
            {n: float(scores[n][:, at[n]].mean()) for n in judges}, kept, fmean(own) if own else None,
            self.strip(drawn, f"{network}-{job.name}-{model}-{weight:g}-{step}"), job.way.setup,
        )  # fmt: skip

    def losses(self, base: Base, shown: Sequence[Picture]) -> list[float]:
        return measures.losses(base, shown, self.experiment.measures.draws, self.job.clip_skip)

    def before(self, base: Base, model: str) -> dict[str, Tensor]:
        """Judge -> scores of what the untouched model draws of the same prompts and noise."""
        key = self.experiment, self.site, self.job.target, self.job.clip_skip, self.job.device, model
        if key not in BEFORE:
            drawn = _drawn(base, self.job)
            BEFORE[key] = {name: judge.scores(drawn) for name, judge in _judges(self.site).items()}
        return BEFORE[key]

    def strip(self, drawn: Tensor, name: str) -> str | None:
        """The first pictures side by side, as a file beside the result; of the first seed only."""
        from PIL import Image

        if self.job.seed != self.experiment.training.seeds[0]:
            return None
        row = torch.cat([*drawn[:3]], -1).add(1).mul(127.5).round().clamp(0, 255).byte()
        file = Path("samples") / self.site.name / self.job.target / f"{name}.png"
        (self.job.folder / file).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(row.permute(1, 2, 0).numpy()).save(self.job.folder / file)
        return file.as_posix()


@lru_cache(maxsize=1)
def _judges(site: Site) -> Mapping[str, Judge]:
    return site.judges()


@lru_cache(maxsize=32)
def _light(model: ModelConfig, device: str) -> Base:
    return open_base(model, device=device)


def _opened(site: Site, model: str, device: str) -> Base:
    """Miniatures stay in memory; of models of full size there is one at a time."""
    if site.light:
        return _light(site.model(model), device)
    return open_base(site.model(model), device=device, precision=site.precision)


def _drawn(base: Base, job: Job) -> Tensor:
    """Of the target's prompts, (n, 3, height, width) in [-1, 1]."""
    settings, prompts = job.experiment.measures, job.site.prompts(job.target)
    drawn = base.draw(
        prompts,
        seeds=range(len(prompts)),
        steps=settings.steps,
        guidance=settings.guidance,
        size=job.site.size,
        clip_skip=job.clip_skip,
    )
    return drawn * 2 - 1
