"""Which file a recipe means by a name: an exact stem, file name, path or hash; never a part of a name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from lineage.errors import LineageError
from lineage.hashing import sha256, short_hash
from lineage.recipe import Operand, Recipe, RecipeError, did_you_mean

SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
_HASH = re.compile(r"[0-9a-f]{8}|[0-9a-f]{10}|[0-9a-f]{64}")


def resolve(recipe: Recipe, folder: Path | None, bound: Mapping[str, Path]) -> dict[str, Path]:
    """Operand text -> file, for every original model and adapter of the recipe. Nothing but hashes is read.

    RecipeError for an unbound variable and for a missing or ambiguous name, with the closest names."""
    bound = {f"__{name.strip('_')}__": path for name, path in bound.items()}
    operands = [o for step in recipe.steps for o in (*step.references, *(a for a, _ in step.adapters))]
    unused = set(bound) - {o.text for o in operands} - set(recipe.variables)
    if unused:
        used = {o.text for o in operands if o.is_variable}
        raise LineageError(f"--set {min(unused)}: the recipe has no such variable. {did_you_mean(min(unused), used)}")
    files = _model_files(folder)
    return {o.text: _file(recipe, o, files, folder, bound) for o in operands if o.step is None}


def _model_files(folder: Path | None) -> list[Path]:
    if folder is None:
        return []
    if not folder.is_dir():
        raise LineageError(f"{folder}: is not a folder. Name the folder of the models with --models.")
    return sorted(p for p in folder.rglob("[!.]*") if p.suffix.lower() in SUFFIXES and p.is_file())


def _file(recipe: Recipe, operand: Operand, files: list[Path], folder: Path | None, bound: Mapping[str, Path]) -> Path:
    name = operand.text
    if operand.is_variable and name not in bound:
        advice = f"Bind it: --set {name.strip('_')}=FILE"
        raise RecipeError(recipe.source, operand.place, f"the variable {name} is bound to no file.", advice)
    if name in bound:
        return _existing(bound[name], name)
    found = [p for p in files if name in (p.stem, p.name)] or _by_path(name, folder) or _by_hash(name, files)
    if len(found) > 1:
        names = ", ".join(_shown(p, folder) for p in found)
        raise RecipeError(recipe.source, operand.place, f"{name!r} may be {names}.", "Write the file name or path.")
    if not found:
        where = f"in {folder}" if folder else "here (no --models folder given)"
        advice = did_you_mean(name, {p.stem for p in files}) or "The folder holds no model files."
        raise RecipeError(recipe.source, operand.place, f"no model is named {name!r} {where}.", advice)
    return found[0]


def _existing(path: Path, name: str) -> Path:
    if not path.exists():
        raise LineageError(f"--set {name.strip('_')}: {path} does not exist.")
    return path


def _by_path(name: str, folder: Path | None) -> list[Path]:
    candidates = ([folder / name] if folder else []) + [Path(name)]
    return [p for p in candidates if _there(p)][:1]


def _there(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name too long, or with a null character, is no path
        return False


def _by_hash(name: str, files: Iterable[Path]) -> list[Path]:
    """8 hex digits: the web UI's old hash; 10 or 64: the beginning of the sha256."""
    if not _HASH.fullmatch(name):
        return []
    if len(name) == 8:
        return [p for p in files if short_hash(p) == name]
    return [p for p in files if sha256(p).startswith(name)]


def _shown(path: Path, folder: Path | None) -> str:
    return str(path.relative_to(folder)) if folder and path.is_relative_to(folder) else str(path)
