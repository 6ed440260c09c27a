"""Do adapters learn a style that their base never saw? On miniature worlds, beside a full fine-tune of equal steps.

    python benchmarks/learning.py [--seeds 1,2,3] [--steps 150] [--worlds DIR]

Per world: quick worlds of these seeds (kept under DIR, default benchmarks/data/worlds), their first fine-tune as the
base, the world's first target as the style: 100 pictures to learn from, 48 held-out ones, whose captions are unseen
too, to be judged by. Loss: mean squared error of the predicted noise over fixed timesteps and noises, the same for all.
`share` is what an adapter gains of the full fine-tune's gain. `random` has LoHa's norms, layer by layer. Learning rates
were chosen on seed 0. Prints a table in Markdown and draws grid.png beside each world.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lineage.adapters import Adapter, open_adapter
from train import lessons, pictures, pipeline, topology, world
from train.applied import Applied
from train.config import SaveConfig
from train.fit import Plan, denoising_loss, encode_latents, encode_text, fit_denoiser, pixels
from train.loop import train
from train.measures import random_like
from train.sample import grid
from train.topology import World

DATA = Path(__file__).parent / "data" / "worlds"
FULL = 5e-4
DRAWS = 8


class Lesson:
    """One style on one base of a world."""

    def __init__(self, plan: World, folder: Path, steps: int):
        self.plan, self.folder, self.steps = plan, folder, steps
        self.base = next(m for m in plan.trained if m.parent)
        self.file, self.style = world.model_file(folder, self.base.name), plan.targets[0]
        self.shown = pictures.gallery([self.style], 100, plan.seed, "lesson")
        self.held_out = pictures.gallery([self.style], 48, plan.seed, "test")

    def loss(self, tuned: Any) -> float:
        generator = torch.Generator().manual_seed(self.plan.seed)
        with torch.no_grad():
            latents = encode_latents(tuned.vae, pixels(self.held_out))
            text = encode_text(tuned, [p.caption for p in self.held_out])
            return sum(float(denoising_loss(tuned, latents, text, generator)) for _ in range(DRAWS)) / DRAWS

    def draw(self, tuned: Any) -> list[Any]:
        return pipeline.sample(tuned, [p.caption for p in self.held_out[:6]], self.plan.seed)

    def contenders(self) -> Iterator[tuple[str, float, list[Any]]]:
        """(name, held-out loss, pictures): the base, a full fine-tune, each kind of adapter, a random one."""
        tuned = pipeline.load(self.file)
        yield "base", self.loss(tuned), self.draw(tuned)
        plan = Plan(self.steps, FULL, batch=lessons.BATCH, weight_cap=1.0)
        for _ in fit_denoiser(tuned, self.shown, plan, self.plan.seed):
            pass
        yield "full", self.loss(tuned), self.draw(tuned)
        tuned = pipeline.load(self.file)
        adapters: dict[str, Adapter] = {algo: open_adapter(self.train(algo)) for algo in lessons.RATES}
        adapters["random"] = random_like(adapters["loha"], self.plan.seed)
        for name, adapter in adapters.items():
            with Applied(tuned.unet, [tuned.text_encoder], [(adapter, 1.0)]):
                yield name, self.loss(tuned), self.draw(tuned)

    def train(self, algo: str) -> Path:
        """The finished adapter; a run that is there is not repeated."""
        home = self.folder / "learning"
        shown = lessons.write_pictures(home / "pictures", f"by {self.style}", self.shown)
        save = SaveConfig(home / f"{algo}-{self.steps}", at=())
        config = lessons.lesson(self.file, shown, save, steps=self.steps, algo=algo, seed=self.plan.seed)
        for _ in train(config):
            pass
        return config.save.folder / f"{config.name}.safetensors"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--worlds", type=Path, default=DATA)
    args = parser.parse_args()
    args.worlds = args.worlds.absolute()
    print("| world | base | style | network | held-out loss | share of the full fine-tune's gain |")
    print("|---|---|---|---|---|---|")
    for seed in map(int, args.seeds.split(",")):
        plan = topology.draw("quick", seed)
        lesson = Lesson(plan, world.build(plan, args.worlds / f"quick-{seed}"), args.steps)
        rows: dict[str, list[Any]] = {}
        losses: dict[str, float] = {}
        for name, loss, drawn in lesson.contenders():
            rows[name], losses[name] = drawn, loss
            gained = "" if len(losses) < 2 else f"{(losses['base'] - loss) / (losses['base'] - losses['full']):.2f}"
            print(f"| {seed} | {lesson.base.name} | {lesson.style} | {name} | {loss:.4f} | {gained} |", flush=True)
        rows["the style itself"] = [p.image for p in lesson.held_out[:6]]
        sheet = io.BytesIO()
        grid(list(rows), [p.caption for p in lesson.held_out[:6]], list(rows.values())).save(sheet, "PNG")
        (lesson.folder / "learning" / "grid.png").write_bytes(sheet.getvalue())


if __name__ == "__main__":
    main()
