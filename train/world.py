"""A miniature world: Stable Diffusion models with a known family tree, trained on the spot on pictures of known style.

A world owns its folder. Every stage (the autoencoder, then each model after its parent) leaves one file that carries
the hash of all that decided it; a later call keeps what fits, makes what is missing, and refuses another's folder.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from lineage.errors import LineageError
from lineage.results import SvdResult, write_files
from train import pictures, pipeline
from train.fit import Plan, Step, fit_autoencoder, fit_denoiser, pixels
from train.styles import STYLES

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

Progress = Callable[[int, int, str], None]
NEEDED = ("diffusers", "transformers", "accelerate", "dicebear", "dicebear_styles", "resvg_py", "PIL")
STAGE_KEY = "lineage_world_stage"


@dataclass(frozen=True)
class Model:
    """One member of a world: trained on `styles` from `parent`'s file, or from random weights where that is None."""

    name: str
    styles: tuple[str, ...]
    plan: Plan
    parent: str | None = None

    @property
    def file(self) -> str:
        return f"{self.name}.safetensors"


@dataclass(frozen=True)
class World:
    """What is made. Parents come before their children; every style has `pictures` pictures per model."""

    models: tuple[Model, ...]
    autoencoder: Plan
    pictures: int = 300
    size: pipeline.Size = field(default_factory=pipeline.Size)
    seed: int = 0

    @cached_property
    def styles(self) -> tuple[str, ...]:
        return tuple(sorted({style for model in self.models for style in model.styles}))

    @property
    def steps(self) -> int:
        return self.autoencoder.steps + sum(model.plan.steps for model in self.models)

    def to_json(self) -> dict[str, Any]:
        """Plain form, in which two worlds are equal exactly when they give the same files."""
        return json.loads(json.dumps(asdict(self)))


DEMO = World(
    models=(
        Model("vanilla", ("dylan", "micah", "personas", "toon-head"), Plan(steps=750, lr=1e-3, muon_lr=0.02)),
        Model("vanilla-pixel-art", ("pixel-art",), Plan(steps=400, lr=5e-4), parent="vanilla"),
    ),
    autoencoder=Plan(steps=600, lr=2e-3, muon_lr=0.02),
)

PROMPTS = (
    "by dylan, long hair, red hair, smile, pale skin, blue background",
    "by micah, bald, open mouth, dark skin, blue shirt, yellow background",
    "by personas, curly hair, brown hair, smile, tan skin, green shirt, pink background",
    "by toon-head, spiky hair, blonde hair, smile, pale skin, red shirt, green background",
    "long hair, black hair, smile, pale skin, red shirt, white background",
    "by pixel-art, long hair, red hair, smile, pale skin, blue shirt, blue background",
    "by pixel-art, short hair, black hair, frown, glasses, tan skin, black shirt, yellow background",
    "by pixel-art, curly hair, green hair, open mouth, dark skin, red shirt, pink background",
)


@dataclass(frozen=True)
class DemoResult:
    """Where the demo's files lie, and the rank analysis of its pair."""

    folder: Path
    base: Path
    tuned: Path
    samples: Path
    credits: Path
    svd: SvdResult


def demo(folder: Path | str, *, seed: int = 0, progress: Progress | None = None, world: World = DEMO) -> DemoResult:
    """Make the demo's pair, draw samples of both, and measure their difference.

    Raises as `build` does."""
    import lineage

    world = replace(world, seed=seed)
    folder = build(world, folder, progress)
    base, tuned = (folder / model.file for model in world.models[:2])
    samples = folder / "samples.png"
    if not samples.exists():
        write_files(folder, {samples.name: draw_samples(world, folder)}, force=True)
    return DemoResult(folder, base, tuned, samples, folder / "CREDITS.md", lineage.svd(base, tuned, progress=progress))


def build(world: World, folder: Path | str, progress: Progress | None = None) -> Path:
    """Make every model of `world` that `folder` does not hold yet; returns the folder.

    LineageError where it holds something else; ModuleNotFoundError, before anything is written, without the extra."""
    for module in NEEDED:
        import_module(module)
    folder = Path(folder)
    _claim(world, folder)
    write_files(folder, {"CREDITS.md": pictures.credits(world.styles)}, force=True)
    report = _Count(world.steps, progress)
    vae = _autoencoder(world, folder, report)
    for model in world.models:
        _model(world, model, folder, vae, report)
    return folder


class _Count:
    """Adds up the steps of all stages for one progress bar."""

    def __init__(self, total: int, progress: Progress | None):
        self.done, self.total, self.progress = 0, total, progress

    def run(self, steps: Iterator[Step], label: str) -> None:
        for step in steps:
            self.skip(1, f"{label} (loss {step.loss:.3f})")

    def skip(self, steps: int, label: str) -> None:
        self.done += steps
        if self.progress:
            self.progress(self.done, self.total, label)


def _claim(world: World, folder: Path) -> None:
    """The folder becomes this world's, or is refused."""
    plan = folder / "world.json"
    wanted = world.to_json()
    if plan.exists():
        with suppress(ValueError):
            if json.loads(plan.read_text(encoding="utf-8")) == wanted:
                return
        raise LineageError(f"{folder}: holds another world (see {plan.name}). Name another folder, or delete this one.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise LineageError(f"{folder}: is not empty and not a world's folder. Name another folder.")
    write_files(folder, {plan.name: json.dumps(wanted, indent=1) + "\n"})


def _autoencoder(world: World, folder: Path, report: _Count) -> dict[str, Tensor]:
    """The state of the one autoencoder that all models of a world share."""
    file, key = folder / "autoencoder.safetensors", stage_key(world, None)
    if not _kept(file, key):
        tuned = blank(world, folder)
        images = pixels(pictures.gallery(world.styles, world.pictures, world.seed))
        report.run(fit_autoencoder(tuned.vae, images, world.autoencoder, _seed(key)), "autoencoder")
        pipeline.write_tensors(file, tuned.vae.state_dict(), {STAGE_KEY: key})
    else:
        report.skip(world.autoencoder.steps, "autoencoder")
    return load_file(file)


def _model(world: World, model: Model, folder: Path, vae: dict[str, Tensor], report: _Count) -> None:
    file, key = folder / model.file, stage_key(world, model)
    if _kept(file, key):
        return report.skip(model.plan.steps, model.name)
    if model.parent is None:
        tuned = blank(world, folder)
        tuned.vae.load_state_dict(vae)
    else:
        tuned = pipeline.load(folder / f"{model.parent}.safetensors")
    shown = pictures.gallery(model.styles, world.pictures, world.seed)
    report.run(fit_denoiser(tuned, shown, model.plan, _seed(key)), model.name)
    pipeline.save(tuned, file, {STAGE_KEY: key})


def blank(world: World, folder: Path) -> pipeline.Pipeline:
    """A pipeline of random weights; its configuration is written to folder/config if it is not there."""
    tokenizer = folder / "config" / "tokenizer"
    if not (tokenizer / "tokenizer_config.json").exists():
        pipeline.write_tokenizer(tokenizer)
    made = pipeline.build(world.size, tokenizer, world.seed)
    if not (folder / "config" / "model_index.json").exists():
        pipeline.write_config(made, folder / "config")
    return made


def _kept(file: Path, key: str) -> bool:
    if not file.exists():
        return False
    try:
        with safe_open(file, "pt") as found:
            return (found.metadata() or {}).get(STAGE_KEY) == key
    except SafetensorError:
        return False


def stage_key(world: World, model: Model | None) -> str:
    """sha256 of everything that decides a stage's file; None: the autoencoder's."""
    decides: dict[str, Any] = {"seed": world.seed, "size": asdict(world.size), "pictures": world.pictures}
    decides |= {"autoencoder": asdict(world.autoencoder), "styles": world.styles}
    if model is not None:
        decides |= {"model": asdict(model)}
        parent = next((m for m in world.models if m.name == model.parent), None)
        decides |= {"parent": stage_key(world, parent) if parent else None}
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def _seed(key: str) -> int:
    return int(key[:8], 16)


def draw_samples(world: World, folder: Path) -> bytes:
    """PNG: the same prompts and noise by every model of the world, and what the style itself draws of those traits."""
    from train.sample import grid

    cells = [pipeline.sample(pipeline.load(folder / model.file), PROMPTS, world.seed) for model in world.models]
    names = [model.name for model in world.models] + ["the style itself"]
    sheet = io.BytesIO()
    grid(names, PROMPTS, [*cells, [_true(prompt) for prompt in PROMPTS]]).save(sheet, "PNG")
    return sheet.getvalue()


def _true(prompt: str) -> Image.Image | None:
    style, traits = pictures.read(prompt)
    return pictures.draw(STYLES[style], traits, prompt).image if style else None
