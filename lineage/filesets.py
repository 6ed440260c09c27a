"""Which files of a folder are one thing: a pipeline, a transformers or peft folder, a set of shards, a lone file."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from lineage.raw import PICKLES, is_index, stays_inside

_PIPELINE = "model_index.json"
_CONFIGS = ("config.json", "adapter_config.json")
_ITS_FOLDERS = {
    *("unet", "vae", "text_encoder", "text_encoder_2", "transformer", "tokenizer", "tokenizer_2"),
    *("scheduler", "feature_extractor", "safety_checker", "image_encoder"),
}
_STANDARD = re.compile(
    r"(diffusion_pytorch_model|pytorch_model|adapter_model|model)"
    r"(\.fp16)?(-[0-9]{5}-of-[0-9]{5})?\.(safetensors|bin)(\.index(\.fp16)?\.json)?"
)


class Fileset(NamedTuple):
    """A model's file or folder, how many files belong to it, and its card (a README), where it has one.

    problem: why nothing can be said about it, "" mostly."""

    path: Path
    files: int
    card: Path | None = None
    problem: str = ""


def filesets(folder: Path) -> list[Fileset]:
    """Everything below `folder`, sorted by path; the files add up to all there are.

    Links to folders are followed, but no folder is entered twice, so loops do no harm."""
    return sorted(_below(folder, set()), key=lambda found: found.path.as_posix())


def lone(path: Path) -> Fileset:
    """One file or model folder, wherever it lies, with the card that `filesets` of its folder would give it."""
    if path.is_dir():
        return next(_below(path, set()))
    beside = sorted(e for e in path.parent.iterdir() if not e.is_dir())
    return next((one for one in _loose(beside) if one.path == path), Fileset(path, 1))


def is_weights(path: Path) -> bool:
    """Whether a file is named as one that holds tensors."""
    return path.suffix.lower() in (".safetensors", *PICKLES) or is_index(path)


def _below(place: Path, seen: set[str]) -> Iterator[Fileset]:
    if (real := os.path.realpath(place)) in seen:
        return
    seen.add(real)
    try:
        entries = sorted(place.iterdir())
    except OSError as e:
        yield Fileset(place, 0, None, f"cannot be listed ({e.strerror or e}).")
        return
    files = [e for e in entries if not e.is_dir()]
    folders = sorted((e for e in entries if e.is_dir()), key=lambda e: (e.is_symlink(), e.name))
    own = _pipeline_folders(files, folders)
    if own or _is_one(files):
        mine = [f for f in files if _STANDARD.fullmatch(f.name) or not is_weights(f)]
        inside = sum(found.files for sub in own for found in _below(sub, seen))
        yield Fileset(place, len(mine) + inside, _card(files))
        files = [f for f in files if f not in mine]
    yield from _loose(files)
    for sub in folders:
        yield from _below(sub, seen)


def _pipeline_folders(files: Sequence[Path], folders: Sequence[Path]) -> list[Path]:
    """The folders of a diffusers pipeline, if this is one: marked as one, or with a UNet under its usual name."""
    marked = any(f.name == _PIPELINE for f in files)
    if marked or any(f.name == "unet" and _holds_weights(f) for f in folders):
        return [f for f in folders if f.name in _ITS_FOLDERS or _holds_weights(f)]
    return []


def _holds_weights(folder: Path) -> bool:
    try:
        return any(_STANDARD.fullmatch(e.name) for e in folder.iterdir())
    except OSError:
        return False


def _is_one(files: Sequence[Path]) -> bool:
    """Whether a folder is one model: settings, and weights under their usual name, beside them."""
    return any(f.name in _CONFIGS for f in files) and any(_STANDARD.fullmatch(f.name) for f in files)


def _loose(files: Sequence[Path]) -> Iterator[Fileset]:
    """Shard sets as one, every other file for itself. A card beside a lone model is that model's."""
    left = dict.fromkeys(files)
    sets = [[index, *(f for f in shards(index) if f in left)] for index in files if is_index(index)]
    for part in (part for parts in sets for part in parts):
        left.pop(part, None)
    alone = len(sets) + sum(map(is_weights, left)) == 1
    card = _card(files) if alone else None
    taken = set[Path]()
    for index, *own in sets:
        yield Fileset(index, 1 + len(set(own) - taken), card)
        taken |= set(own)
    yield from (Fileset(f, 1, card if is_weights(f) else None) for f in left)


def shards(index: Path) -> list[Path]:
    """The files that an index of shards names and that lie beside it."""
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return []
    paths = [index.parent / n for n in names if isinstance(n, str) and stays_inside(n)]
    return sorted(p for p in paths if p.is_file() and not is_index(p))


def _card(files: Sequence[Path]) -> Path | None:
    return next((f for f in files if f.name.lower() == "readme.md"), None)
