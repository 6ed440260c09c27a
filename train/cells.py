"""The cells of a transfer experiment: one adapter is trained, put on every model, and measured; each job by itself.

A job's cells lie in one JSON file under the hash of the predictions that stood before it; what is there is not done
again, and what is there under another hash is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from statistics import fmean, stdev

import torch
from torch import Tensor

from lineage.adapters import Adapter, open_adapter
from lineage.errors import LineageError
from lineage.records import restore
from lineage.results import write_files
from lineage.transfer_records import CHARACTER, NONE, RANDOM, STYLE, Cell
from train import lessons, measures, pictures, topology, world
from train.applied import Applied
from train.config import ModelConfig, SaveConfig
from train.experiment import Experiment
from train.judge import KINDS, Judge, Kind
from train.loop import train
from train.models import Base, open_base
from train.pictures import Picture
from train.showcase import world_judge
from train.topology import World

SIDE = pictures.SIZE


@dataclass(frozen=True)
class Job:
    """What is measured at once: the adapter of `target` trained on `base` with `seed`, on every model of a world; base
    None: the models themselves. stamp: hash of the predictions."""

    folder: Path
    experiment: Experiment
    world_seed: int
    target: str
    base: str | None
    seed: int
    stamp: str

    def __str__(self) -> str:
        return f"{self.world}: {self.target} on {self.base or 'nothing'}, seed {self.seed}"

    @property
    def world(self) -> str:
        return f"{self.experiment.worlds.size}-{self.world_seed}"

    @property
    def file(self) -> Path:
        name = f"{self.base}-{self.seed}" if self.base else "untouched"
        return self.folder / "cells" / self.world / self.target / f"{name}.json"


def targets(plan: World, experiment: Experiment) -> dict[str, str]:
    """Target -> its kind."""
    styles, names = plan.targets[: experiment.worlds.styles], plan.characters[: experiment.worlds.characters]
    return dict.fromkeys(styles, STYLE) | dict.fromkeys(names, CHARACTER)


def jobs(folder: Path, experiment: Experiment, seed: int, stamp: str) -> list[Job]:
    """All of one world, the untouched models first."""
    plan = topology.draw(experiment.worlds.size, seed)
    found = []
    for target in targets(plan, experiment):
        found.append(Job(folder, experiment, seed, target, None, 0, stamp))
        found += [
            Job(folder, experiment, seed, target, m.name, s, stamp)
            for m in plan.models
            for s in experiment.training.seeds
        ]
    return found


def finished(job: Job) -> list[Cell] | None:
    """The job's cells if they are there. LineageError where they were made after other predictions."""
    if not job.file.exists():
        return None
    found = json.loads(job.file.read_text(encoding="utf-8"))
    if found["predictions"] != job.stamp:
        raise LineageError(
            f"{job.file}: was measured under other predictions ({found['predictions'][:12]}, not {job.stamp[:12]}). "
            "Name another folder: predictions come before what they predict."
        )
    return [restore(Cell, cell) for cell in found["cells"]]


def run(job: Job) -> list[Cell]:
    """Measure what is not there yet; the result is written whole."""
    found = finished(job)
    if found is None:
        found = list(_Bench(job).cells())
        told = {"predictions": job.stamp, "cells": [asdict(cell) for cell in found]}
        job.file.parent.mkdir(parents=True, exist_ok=True)
        write_files(job.file.parent, {job.file.name: json.dumps(told, indent=1) + "\n"}, force=True)
    return found


class _Bench:
    """One job under way."""

    def __init__(self, job: Job):
        self.job, self.experiment = job, job.experiment
        self.plan = topology.draw(self.experiment.worlds.size, job.world_seed)
        self.home = job.folder / "worlds" / job.world
        self.kind = targets(self.plan, self.experiment)[job.target]
        self._before: dict[tuple[str, Kind], Tensor] = {}

    def cells(self) -> Iterator[Cell]:
        names, settings = [m.name for m in self.plan.models], self.experiment.measures
        base, steps = self.job.base, self.experiment.training.steps
        if base is None:
            for name in names:
                yield self.cell(None, name, 0.0, 0, NONE)
            return
        final, kept = self.trained(base)
        for name in names:
            if name != base:
                yield self.cell(final, name, settings.weight, steps, self.experiment.training.network)
        for step, adapter in {**kept, steps: final}.items():
            yield self.cell(adapter, base, settings.reference_weight, step, self.experiment.training.network)
        if base == names[0] and self.job.seed == self.experiment.training.seeds[0]:
            control = measures.random_like(final, self.job.seed)
            for name in names[1:]:
                yield self.cell(control, name, settings.weight, steps, RANDOM)

    def trained(self, base: str) -> tuple[Adapter, dict[int, Adapter]]:
        """The adapter, and its checkpoints by step. Its seed is that of no other adapter."""
        lesson, job = self.experiment.training, self.job
        shown = self.pictures("lesson", lesson.pictures)
        data = lessons.write_pictures(self.home / "lessons" / f"{job.target}-{lesson.pictures}", job.target, shown)
        home = job.folder / "adapters" / job.world / job.target / f"{base}-{job.seed}"
        told = f"{job.world} {job.target} {base} {job.seed}"
        seed = int(hashlib.sha256(told.encode()).hexdigest()[:8], 16) % 2**31
        save = SaveConfig(home, at=lesson.at, name="adapter")
        usual = lessons.lesson(
            world.model_file(self.home, base), data, save, steps=lesson.steps, algo=lesson.network, seed=seed
        )
        config = replace(
            usual,
            data=replace(usual.data, keep_tokens=2, clip_skip=lesson.clip_skip),
            training=replace(usual.training, batch=lesson.batch, lr=lesson.lr),
        )
        for _ in train(config, device="cpu"):
            pass
        kept = {
            step: open_adapter(home / f"adapter-{step:06d}.safetensors") for step in lesson.at if step < lesson.steps
        }
        return open_adapter(home / "adapter.safetensors"), kept

    def pictures(self, part: str, count: int) -> list[Picture]:
        """Of the target: a style's own, or a character in the styles that the world shows it in."""
        target, seed = self.job.target, self.job.world_seed
        if self.kind == STYLE:
            return pictures.gallery([target], count, seed, part)
        styles = world.portraying(self.plan, target)
        return pictures.portraits([target], styles, -(-count // len(styles)), seed, part)

    def cell(self, adapter: Adapter | None, model: str, weight: float, step: int, network: str) -> Cell:
        settings, job = self.experiment.measures, self.job
        base = _opened(world.model_file(self.home, model))
        with Applied(base.unet, base.text_encoders, [(adapter, weight)] if adapter else []):
            losses = self.losses(base, self.pictures("test", settings.held_out), f"{job.target}-{settings.held_out}")
            own = self.losses(base, self.own(model), f"own-{model}")
            drawn = self.drawn(base)
        scores = {judge: _scores(self.home, self.plan, judge, drawn) for judge in KINDS}
        at = _judge(self.home, self.plan, KINDS[0]).labels.index(job.target)
        kept: dict[str, float] = {}
        if adapter:
            before = {judge: self.before(model, judge) for judge in KINDS}
            kept = {j: float(measures.retention(scores[j], before[j], at).mean()) for j in KINDS}
        return Cell(
            job.world, job.seed if adapter else 0, job.target, self.kind, network, job.base, model, weight, step,
            fmean(losses), stdev(losses) / len(losses) ** 0.5, tuple(losses),
            {j: float(scores[j][:, at].mean()) for j in KINDS}, kept, fmean(own),
            self.strip(drawn, f"{network}-{job.base}-{job.seed}-{model}-{weight:g}-{step}"),
        )  # fmt: skip

    def own(self, model: str) -> list[Picture]:
        """Held-out pictures of what a model draws by itself; no caption holds the target's word."""
        styles = self.plan.own_styles(model)
        each = -(-self.experiment.measures.held_out // (2 * len(styles)))
        return pictures.gallery(styles, each, self.job.world_seed, "test")

    def losses(self, base: Base, shown: Sequence[Picture], name: str) -> list[float]:
        folder = lessons.write_pictures(self.home / "held-out" / name, name, shown)
        found = measures.held_out(folder, lessons.data(folder), len(shown))
        settings = self.experiment
        return measures.losses(base, found, settings.measures.draws, settings.training.clip_skip)

    def drawn(self, base: Base) -> Tensor:
        settings = self.experiment.measures
        prompts = [p.caption for p in self.pictures("prompts", settings.drawn)[: settings.drawn]]
        drawn = base.draw(
            prompts,
            seeds=range(len(prompts)),
            steps=settings.steps,
            guidance=settings.guidance,
            size=(SIDE, SIDE),
            clip_skip=self.experiment.training.clip_skip,
        )
        return drawn * 2 - 1

    def before(self, model: str, judge: Kind) -> Tensor:
        """Scores of what the untouched model draws of the same prompts and noise."""
        if (model, judge) not in self._before:
            drawn = self.drawn(_opened(world.model_file(self.home, model)))
            self._before |= {(model, kind): _scores(self.home, self.plan, kind, drawn) for kind in KINDS}
        return self._before[model, judge]

    def strip(self, drawn: Tensor, name: str) -> str | None:
        """The first pictures side by side, as a file beside the result; of the first seed only."""
        from PIL import Image

        if self.job.seed != self.experiment.training.seeds[0]:
            return None
        row = torch.cat([*drawn[:3]], -1).add(1).mul(127.5).round().clamp(0, 255).byte()
        file = Path("samples") / self.job.world / self.job.target / f"{name}.png"
        (self.job.folder / file).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(row.permute(1, 2, 0).numpy()).save(self.job.folder / file)
        return file.as_posix()


@lru_cache(maxsize=32)
def _opened(file: Path) -> Base:
    return open_base(ModelConfig(file))


@cache
def _judge(home: Path, plan: World, kind: Kind) -> Judge:
    return world_judge(plan, home, kind)


def _scores(home: Path, plan: World, kind: Kind, drawn: Tensor) -> Tensor:
    return _judge(home, plan, kind).scores(drawn)
