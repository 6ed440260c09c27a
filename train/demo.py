"""The tour: a quick world, and every verb of `lineage` on it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lineage
from lineage.recipe import parse
from lineage.results import write_files
from train import lessons, pictures, showcase, topology, transfer, world
from train.config import Config, SaveConfig
from train.experiment import Experiment, Lessons, Measures, Worlds
from train.sites import WorldSite

if TYPE_CHECKING:
    from train.topology import Merge, Model, World

Progress = Callable[[int, int, str], None]
WEIGHTS = (0.0, 0.65, 1.0)
STEPS = 250
EXPERIMENT = Experiment(training=Lessons(steps=60, seeds=(0,)), measures=Measures(16, 2, 4, steps=12))
"""One seed of one style: enough for pictures, too little for conclusions, and its page says so."""


@dataclass(frozen=True)
class Station:
    """One stop of the tour. `folder`: where its result belongs; `picture`: a PNG that is already there."""

    name: str
    title: str
    words: str
    picture: Path | None = None
    result: Any = None


def demo(
    folder: Path | str,
    *,
    seed: int = 0,
    progress: Progress | None = None,
    steps: int = STEPS,
) -> Iterator[Station]:
    """Make the world in `folder` and go round; each station is yielded when it is done, and kept for the next call.

    steps: of the LoHa's training. Raises as `world.build` does."""
    plan = topology.draw("quick", seed)
    folder = world.build(plan, folder, progress)
    yield _models(plan, folder, progress)
    tuned = next(m for m in plan.trained if m.parent)
    yield _difference(plan, folder, tuned, progress)
    yield _family(folder, progress)
    yield _merge(plan, folder, progress)
    yield _adapter(plan, folder, tuned, steps, progress)
    yield _transfer(plan, folder, progress)


def _models(plan: World, folder: Path, progress: Progress | None) -> Station:
    judged = showcase.show(plan, folder, progress)
    words = (
        f"{len(plan.models)} models, trained here. A judge that never saw their training pictures names the style of "
        f"{judged.samples:.0%} of their samples and of {judged.real:.0%} of held-out pictures."
    )
    return Station("models", "The models", words, folder / "samples.png")


def _difference(plan: World, folder: Path, tuned: Model, progress: Progress | None) -> Station:
    assert tuned.parent
    base, file = (world.model_file(folder, name) for name in (tuned.parent, tuned.name))
    found = lineage.svd(base, file, progress=progress)
    words = f"How much the fine-tune {tuned.name} changed {tuned.parent}, and in how many ranks."
    return Station("svd", "One fine-tune", words, result=found)


def _family(folder: Path, progress: Progress | None) -> Station:
    found = lineage.cluster(folder / "models", metadata=False, progress=progress)
    words = "The family tree as it follows from the weights alone; what the files say of themselves is not read."
    return Station("cluster", "The family tree", words, result=found)


def _merge(plan: World, folder: Path, progress: Progress | None) -> Station:
    merge: Merge = next(m for m in plan.models if isinstance(m, topology.Merge))
    models = folder / "models"
    found = lineage.merge(
        parse(merge.recipe, merge.name), folder / "merge", models=models, force=True, progress=progress
    )
    names = [*plan.parents(merge.name), merge.name]
    picture = _once(folder / "merge" / "samples.png", lambda: showcase.sheet(plan, folder, names))
    return Station("merge", "A merge", f"{merge.recipe.strip()}: both models and what is between them.", picture, found)


def _adapter(plan: World, folder: Path, base: Model, steps: int, progress: Progress | None) -> Station:
    """A LoHa of a style that no model has seen."""
    from train.loop import train

    style = plan.targets[0]
    config = lesson(plan, folder, base, style, steps)
    for record in train(config):
        if progress:
            progress(record.step, record.of, f"LoHa of {style} (loss {record.loss:.3f})")
    file = config.save.folder / f"{config.name}.safetensors"
    picture = _once(folder / "loha" / "samples.png", lambda: _weights(plan, folder, base, style, file))
    words = f"A LoHa of {style}, which no model has seen, trained on {base.name}: at weights 0, 0.65 and 1."
    return Station("loha", "An adapter", words, picture)


def lesson(plan: World, folder: Path, base: Model, style: str, steps: int) -> Config:
    """The trainer's settings for a LoHa of `style` on one model of the world; writes the pictures beside it."""
    shown = pictures.gallery([style], 100, plan.seed, "lesson")
    data = lessons.write_pictures(folder / "loha" / "pictures", f"by {style}", shown)
    save = SaveConfig(folder / "loha" / "run", at=(), name=f"{style}-on-{base.name}")
    return lessons.lesson(world.model_file(folder, base.name), data, save, steps=steps, seed=plan.seed)


def _weights(plan: World, folder: Path, base: Model, style: str, file: Path) -> bytes:
    """PNG: equal prompts and noise at each weight, and what the style itself draws."""
    from train.sample import Request, draw_grid
    from train.sheet import grid, png

    shown = pictures.gallery([style], 6, plan.seed, "shown")
    model, prompts = world.model_file(folder, base.name), [p.caption for p in shown]
    asked = Request([model], prompts, [(file, 1.0)], WEIGHTS, [plan.seed], guidance=4.0, grid=("weight", "prompt"))
    drawn = draw_grid(asked, device="cpu")
    rows = [*drawn.rows, "the style itself"]
    return png(grid(rows, drawn.columns, [*drawn.cells, [p.image for p in shown]], drawn.title))


def _transfer(plan: World, folder: Path, progress: Progress | None) -> Station:
    """The experiment on a copy of the world, as both own their folders."""
    experiment = replace(EXPERIMENT, worlds=Worlds(seeds=(plan.seed,)))
    home = WorldSite(experiment, plan.seed, folder / "transfer-test").home
    if not home.exists():
        world.claim(folder / "transfer-test", "experiment.json", experiment.to_json(), "experiment")
        shutil.copytree(folder, home, ignore=lambda _, names: {n for n in names if n in ASIDE})
    found = transfer.transfer_test(experiment, folder / "transfer-test", progress=progress)
    words = "An adapter trained on each model and put on every other: does the family tree foretell where it works?"
    return Station("transfer-test", "Transfer", words, result=found)


ASIDE = {"svd", "cluster", "merge", "loha", "transfer-test", "index.html", "samples.png"}
"""What the tour adds to its world."""


def _once(file: Path, make: Callable[[], bytes]) -> Path:
    """A picture that is made only where it is not there yet."""
    if not file.exists():
        file.parent.mkdir(exist_ok=True)
        write_files(file.parent, {file.name: make()}, force=True)
    return file
