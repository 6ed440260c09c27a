"""A miniature world: Stable Diffusion models with a known family tree, trained on the spot on pictures of known style.

A world owns its folder. Every stage (the autoencoder, then each model after its parents) leaves one file that carries
the hash of all that decided it; a later call keeps what fits, makes what is missing, and refuses another's folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

import lineage
from lineage.errors import LineageError
from lineage.recipe import parse
from lineage.results import write_files
from train import pictures, pipeline
from train.fit import Step, fit_autoencoder, fit_denoiser, pixels
from train.permutation import permute
from train.styles import STYLES
from train.topology import Member, Merge, Model, World, to_json

if TYPE_CHECKING:
    from torch import Tensor

Progress = Callable[[int, int, str], None]
NEEDED = ("diffusers", "transformers", "accelerate", "dicebear", "dicebear_styles", "resvg_py", "PIL")
STAGE_KEY = "lineage_world_stage"
AUTOENCODER = "autoencoder.safetensors"
AUTOENCODER_PICTURES = 60
"""Of each style there is: every picture of every world passes this one autoencoder."""


def build(world: World, folder: Path | str, progress: Progress | None = None) -> Path:
    """Make what `folder` does not hold yet: models/NAME.safetensors, config/, truth.json, CREDITS.md; returns it.

    LineageError where it holds something else; ModuleNotFoundError, before anything is written, without the extra."""
    for module in NEEDED:
        import_module(module)
    folder = Path(folder)
    claim(folder, "world.json", to_json(world), "world")
    write_files(folder, {"CREDITS.md": pictures.credits(STYLES)}, force=True)
    report = _Count(world.steps, progress)
    vae = _autoencoder(world, folder, report)
    (folder / "models").mkdir(exist_ok=True)
    for member in world.models:
        _make(world, member, folder, vae, report)
    write_files(folder, {"truth.json": json.dumps(truth(world, folder), indent=1) + "\n"}, force=True)
    return folder


def model_file(folder: Path, name: str) -> Path:
    return folder / "models" / f"{name}.safetensors"


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


def claim(folder: Path, name: str, wanted: Any, kind: str) -> None:
    """The folder becomes that of what `wanted` says, as told in the file `name`; LineageError where it is another's."""
    plan = folder / name
    if plan.exists():
        with suppress(ValueError):
            if json.loads(plan.read_text(encoding="utf-8")) == wanted:
                return
        raise LineageError(f"{folder}: holds another {kind} (see {name}). Name another folder, or delete this one.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise LineageError(f"{folder}: is not empty and no folder of such a {kind}. Name another folder.")
    write_files(folder, {name: json.dumps(wanted, indent=1) + "\n"})


def _autoencoder(world: World, folder: Path, report: _Count) -> dict[str, Tensor]:
    """The state of the one autoencoder that all models share."""
    file, key = folder / AUTOENCODER, autoencoder_key(world)
    if not _kept(file, key):
        tuned = blank(world, folder, 0)
        images = pixels(pictures.gallery(STYLES, min(world.pictures, AUTOENCODER_PICTURES), 0, "autoencoder"))
        report.run(fit_autoencoder(tuned.vae, images, world.autoencoder, _seed(key)), "autoencoder")
        pipeline.write_tensors(file, tuned.vae.state_dict(), {STAGE_KEY: key})
    else:
        report.skip(world.autoencoder.steps, "autoencoder")
    return load_file(file)


def _make(world: World, member: Member, folder: Path, vae: dict[str, Tensor], report: _Count) -> None:
    if isinstance(member, Model):
        _train(world, member, folder, vae, report)
    elif isinstance(member, Merge):
        _merge(member, folder)
    elif not _kept(model_file(folder, member.name), stage_key(world, member)):
        copy = pipeline.load(model_file(folder, member.parent))
        permute(copy, world.seed)
        pipeline.save(copy, model_file(folder, member.name), {STAGE_KEY: stage_key(world, member)})


def _train(world: World, model: Model, folder: Path, vae: dict[str, Tensor], report: _Count) -> None:
    file, key = model_file(folder, model.name), stage_key(world, model)
    if _kept(file, key):
        return report.skip(model.plan.steps, model.name)
    if model.parent is None:
        tuned = blank(world, folder, _seed(f"{world.seed:x}{model.init:x}".zfill(8)))
        tuned.vae.load_state_dict(vae)
    else:
        tuned = pipeline.load(model_file(folder, model.parent))
    shown = pictures.gallery(model.styles, world.pictures, world.seed)
    shown = [replace(picture, artist=model.artist) for picture in shown]
    report.run(fit_denoiser(tuned, shown, model.plan, _seed(key)), model.name)
    pipeline.save(tuned, file, {STAGE_KEY: key})


def _merge(member: Merge, folder: Path) -> None:
    if _record(file := model_file(folder, member.name)).get("recipe") != member.recipe:
        lineage.merge(parse(member.recipe, member.name), file.parent, models=file.parent, force=True)


def _record(file: Path) -> dict[str, Any]:
    """What a merged file says of how it was made; {} where there is none."""
    return json.loads(_metadata(file).get("sd_merge_recipe", "{}"))


def blank(world: World, folder: Path, seed: int) -> pipeline.Pipeline:
    """A pipeline of random weights; its configuration is written to folder/config if it is not there."""
    tokenizer = folder / "config" / "tokenizer"
    if not (tokenizer / "tokenizer_config.json").exists():
        pipeline.write_tokenizer(tokenizer)
    made = pipeline.build(world.size, tokenizer, seed)
    if not (folder / "config" / "model_index.json").exists():
        pipeline.write_config(made, folder / "config")
    return made


def _kept(file: Path, key: str) -> bool:
    return _metadata(file).get(STAGE_KEY) == key


def _metadata(file: Path) -> dict[str, str]:
    """{} where the file is absent or damaged."""
    with suppress(SafetensorError, FileNotFoundError), safe_open(file, "pt") as found:
        return found.metadata() or {}
    return {}


def autoencoder_key(world: World) -> str:
    """sha256 of all that decides the autoencoder; the same for every seed and size of world."""
    count = min(world.pictures, AUTOENCODER_PICTURES)
    return _key(asdict(world.size), asdict(world.autoencoder), list(STYLES), count)


def stage_key(world: World, member: Member) -> str:
    """sha256 of all that decides a member's file."""
    ancestors = [stage_key(world, world[parent]) for parent in world.parents(member.name)]
    return _key(autoencoder_key(world), world.seed, world.pictures, asdict(member), ancestors)


def _key(*decides: Any) -> str:
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def _seed(key: str) -> int:
    return int(key[:8], 16)


def truth(world: World, folder: Path) -> dict[str, Any]:
    """What inference should find: per model its root, parents with weights, and what it draws."""
    return {
        "models": [_facts(world, member, folder) for member in world.models],
        "targets": list(world.targets),
        "characters": {name: list(portraying(world, name)) for name in world.characters},
    }


def _facts(world: World, member: Member, folder: Path) -> dict[str, Any]:
    parents = dict.fromkeys(world.parents(member.name), 1.0)
    if isinstance(member, Merge):
        parents = _record(model_file(folder, member.name))["coefficients"]
    relations = {"Merge": "merge", "Permuted": "permuted", "Model": "finetune" if parents else "root"}
    return {
        "name": member.name,
        "root": world.root(member.name),
        "role": member.role,
        "use": member.use,
        "relation": relations[type(member).__name__],
        "parents": [{"name": name, "weight": weight} for name, weight in parents.items()],
        "styles": list(world.own_styles(member.name)),
    }


def portraying(world: World, character: str) -> tuple[str, ...]:
    """The two styles of the world in which a character is shown."""
    return tuple(style for style in world.styles if pictures.can_portray(style, character))[:2]
