"""What the models of a world draw: one sheet of all of them, and whether a judge recognises their styles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lineage.results import write_files
from train import pictures, pipeline
from train.fit import pixels
from train.judge import Judge, Kind, fit
from train.pictures import Picture
from train.sheet import grid, png
from train.topology import Model, World
from train.world import model_file

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

Progress = Callable[[int, int, str], None]
PICTURES = 120
"""Per style, that a judge learns from."""

HELD_OUT = 12
"""Captions per style that no model has seen."""


@dataclass(frozen=True)
class Accuracy:
    """Share of pictures whose style the judge names: of real ones it never saw, and of each trained model's samples."""

    real: float
    models: dict[str, float]

    @property
    def samples(self) -> float:
        """Mean over the models."""
        return sum(self.models.values()) / len(self.models)


def sheet(world: World, folder: Path, names: Sequence[str] = ()) -> bytes:
    """PNG: one row per model (all, or those of `names`), one column per style of the world; equal prompt and noise in
    a column. The last row is drawn by the style itself, not generated."""
    shown = pictures.gallery(world.styles, 1, world.seed, "shown")
    prompts = [p.caption for p in shown]
    names = names or [m.name for m in world.models]
    cells = [pipeline.sample(pipeline.load(model_file(folder, name)), prompts, world.seed) for name in names]
    return png(grid([*names, "the style itself"], prompts, [*cells, [p.image for p in shown]]))


def show(world: World, folder: Path, progress: Progress | None = None) -> Accuracy:
    """Draw samples.png where it is not there yet, and judge."""
    file = folder / "samples.png"
    if not file.exists():
        write_files(folder, {file.name: sheet(world, folder)}, force=True)
    return accuracy(world, folder, world_judge(world, folder), progress)


def accuracy(world: World, folder: Path, judge: Judge, progress: Progress | None = None) -> Accuracy:
    """Judge held-out pictures of every style, and what each trained model makes of held-out captions of its own."""
    held_out = pictures.gallery(world.styles, HELD_OUT, world.seed, "test")
    found: dict[str, float] = {}
    for n, model in enumerate(world.trained):
        own = [p for p in held_out if p.style in model.styles]
        found[model.name] = judge.accuracy(own, samples(model, folder, own, world.seed))
        if progress:
            progress(n + 1, len(world.trained), f"judging {model.name}")
    return Accuracy(judge.accuracy(held_out), found)


def samples(model: Model, folder: Path, like: list[Picture], seed: int) -> Tensor:
    """What a model draws for the captions of pictures, (n, 3, 64, 64) in [-1, 1]."""
    prompts = [replace(p, artist=model.artist).caption for p in like]
    images: list[Image.Image] = pipeline.sample(pipeline.load(model_file(folder, model.name)), prompts, seed)
    return pixels([replace(p, image=image) for p, image in zip(like, images, strict=True)])


def world_judge(world: World, folder: Path, kind: Kind = "network") -> Judge:
    """A judge of all styles, targets and characters of a world, its pictures disjoint from everything else."""
    vae = pipeline.load(model_file(folder, world.models[0].name)).vae
    styles, count = [*world.styles, *world.targets], min(PICTURES, world.pictures)
    return fit(styles, world.seed, characters=world.characters, vae=vae, kind=kind, count=count)
