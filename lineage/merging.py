"""`lineage merge` and `lineage apply`: a recipe run over files of any size, in the memory of a few pieces."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path

from lineage.cache import begin
from lineage.errors import FileError, LineageError
from lineage.recipe import Operand, Place, Recipe, Step, did_you_mean, parse
from lineage.recipe_toml import parse_toml
from lineage.resolution import resolve
from lineage.results import MergeResult

Progress = Callable[[int, int, str], None]


def merge(
    recipe: str | Path | Recipe,
    folder: str | Path | None = None,
    *,
    models: str | Path | None = None,
    bound: Mapping[str, Path] | None = None,
    arithmetic: str | None = None,
    keep: Collection[str] = (),
    container: str | None = None,
    hashes: bool = True,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> MergeResult:
    """Run a recipe (a file, or already parsed) over the models in `models` and write its outputs into `folder`.

    bound: user variable -> file. arithmetic: "webui" (stored dtype, rounded per operation and line) or "float32"
    (rounded once); default: the recipe's own. keep: names of intermediate outputs to write too, or "all". container:
    overrides the recipe's. hashes: read the sha256 of inputs for the record (much of the work). dry_run:
    plan and explain from headers, write nothing. LineageError, before tensors are read, for all headers can tell."""
    began = time.monotonic()
    recipe = recipe if isinstance(recipe, Recipe) else read_recipe(Path(recipe))
    recipe = _overridden(recipe, arithmetic, container)
    written = _written(recipe, keep)
    paths = resolve(recipe, Path(models) if models else None, bound or {})
    if hashes and not dry_run:
        begin(*{paths[name].resolve() for name in recipe.originals})
    from lineage import merge_run  # only now, as it imports torch: the hashes are under way meanwhile

    if dry_run:
        result = merge_run.explain(recipe, paths, written)
    elif folder is None:
        raise LineageError("merge: no folder to write to. Name one with -o, or look first with --dry-run.")
    else:
        result = merge_run.run(recipe, paths, written, Path(folder), hashed=hashes, force=force, progress=progress)
    seconds = round(time.monotonic() - began, 3)
    return replace(result, provenance=replace(result.provenance, seconds=seconds))


def apply(
    model: str | Path,
    adapters: Mapping[str | Path, float],
    output: str | Path,
    *,
    half: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> MergeResult:
    """W + weight * delta for each adapter file, in float32, rounded once to the model's dtype; written as `output`."""
    output = Path(output)
    if output.suffix not in (".safetensors", ".ckpt"):
        raise LineageError(f"{output}: the name must end in .safetensors or .ckpt.")
    step = Step(
        name=output.stem,
        place=Place(output.stem),
        method="copy",
        operands=(_path_operand(model),),
        half=half,
        container=output.suffix[1:],
        adapters=tuple((_path_operand(path), weight) for path, weight in adapters.items()),
    )
    text = " + ".join([Path(model).name, *(f"{Path(path).name}:{weight}" for path, weight in adapters.items())])
    recipe = Recipe("apply", text, (step,), "float32")
    return merge(recipe, output.parent, force=force, progress=progress)


def _path_operand(path: str | Path) -> Operand:
    return Operand(Place(str(path)))


def read_recipe(path: Path) -> Recipe:
    """Parse a recipe file: TOML where the name ends so, else recipe text."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise FileError(path, f"cannot be read as a recipe ({e}).", "A recipe is a UTF-8 text or TOML file.") from e
    return parse_toml(text, path.name) if path.suffix.lower() == ".toml" else parse(text, path.name)


def _overridden(recipe: Recipe, arithmetic: str | None, container: str | None) -> Recipe:
    steps = tuple(replace(s, container=container or s.container) for s in recipe.steps)
    return replace(recipe, steps=steps, arithmetic=arithmetic or recipe.arithmetic)


def _written(recipe: Recipe, keep: Collection[str]) -> list[int]:
    """Steps whose output is written: those no later step uses, and the kept ones."""
    names = [s.name for s in recipe.steps]
    keep = names if "all" in keep else keep
    for name in keep:
        if name not in names:
            raise LineageError(f"--keep {name}: the recipe makes no such output. {did_you_mean(name, names)}")
    return sorted({*recipe.results, *(names.index(name) for name in keep)})
