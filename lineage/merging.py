"""`lineage merge` and `lineage apply`: a recipe run over files of any size, in the memory of a few pieces."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from lineage.checkpoint import Checkpoint
from lineage.errors import FileError, LineageError
from lineage.hashing import begin
from lineage.merge_metadata import file_hash, metadata, placeholders
from lineage.merge_plan import Plan, make_plan, warnings_of
from lineage.merge_report import input_records, output_record, overflow_warnings, specs, step_records
from lineage.plan import Table
from lineage.raw import SafetensorsRaw
from lineage.recipe import Operand, Place, Recipe, Step, did_you_mean, parse
from lineage.recipe_toml import parse_toml
from lineage.resolution import resolve
from lineage.results import MergeOutput, MergeResult, provenance
from lineage.streaming import FileReader, Output, Reader, TensorReader, stream
from lineage.target import Target, check_space
from lineage.writer import WRITERS, file_size

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
    overrides the recipe's. hashes: read the sha256 of inputs and outputs for the record (most of the work). dry_run:
    plan and explain from headers, write nothing. LineageError, before tensors are read, for all headers can tell."""
    began = time.monotonic()
    recipe = recipe if isinstance(recipe, Recipe) else read_recipe(Path(recipe))
    recipe = _overridden(recipe, arithmetic, container)
    written = _written(recipe, keep)
    with ExitStack() as stack:
        plan = make_plan(recipe, resolve(recipe, Path(models) if models else None, bound or {}), stack)
        if dry_run:
            outputs, known, warnings = [output_record(plan, i) for i in written], [None for _ in plan.inputs], []
        elif folder is None:
            raise LineageError("merge: no folder to write to. Name one with -o, or look first with --dry-run.")
        else:
            outputs, known, warnings = _run(plan, written, Path(folder), hashes, force, stack, progress)
        return _result(plan, outputs, known, warnings, dry_run, time.monotonic() - began)


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


def _run(
    plan: Plan,
    written: Sequence[int],
    folder: Path,
    hashed: bool,
    force: bool,
    stack: ExitStack,
    progress: Progress | None,
) -> tuple[list[MergeOutput], list[str], list[str]]:
    """Write the outputs of the steps `written`; their records, the sha256 of every input, and new warnings."""
    steps = [plan.recipe.steps[i] for i in written]
    paths = [folder / f"{step.name}.{step.container}" for step in steps]
    _check_targets(paths, plan.originals, folder, force)
    room = [metadata(plan, i, placeholders(plan, hashed)) for i in written]
    check_space(
        folder, sum(file_size(s.container, specs(plan, i), m) for s, i, m in zip(steps, written, room, strict=True))
    )
    before = [_state(path) for path in plan.originals]
    hash_of = file_hash if hashed else (lambda path: "")
    if hashed:
        begin(*(c.path for c in plan.inputs))
    targets = [stack.enter_context(Target(path)) for path in paths]
    writers = [
        WRITERS[s.container](t.file, specs(plan, i), m)
        for s, t, i, m in zip(steps, targets, written, room, strict=True)
    ]
    outputs = [Output(plan.steps[i].table, w, _originals(plan, i)) for i, w in zip(written, writers, strict=True)]
    with ExitStack() as readers:
        stream(outputs, [_reader(c, readers) for c in plan.inputs], progress)
    known = [hash_of(c.path) for c in plan.inputs]
    for i, writer, target in zip(written, writers, targets, strict=True):
        writer.finish(metadata(plan, i, known))
        target.file.flush()
    if hashed:
        begin(*(target.part for target in targets))
    for target in targets:
        target.sync()
    digests = [hash_of(target.part) for target in targets]
    _check_unchanged(plan.originals, before)
    for target in targets:
        target.commit()
    records = [output_record(plan, *row) for row in zip(written, paths, digests, outputs, strict=True)]
    return records, known, [w for i, o in zip(written, outputs, strict=True) for w in overflow_warnings(plan, i, o)]


def _originals(plan: Plan, i: int) -> dict[int, Table]:
    return {j: plan.tables[j] for j in plan.sources(i)}


def _reader(checkpoint: Checkpoint, stack: ExitStack) -> Reader:
    """Ranges straight from the file where its bytes lie in the open; else from the tensors that the checkpoint maps."""
    raw = checkpoint.raw
    if not isinstance(raw, SafetensorsRaw):
        return TensorReader(raw)
    reader = FileReader(raw.path, {name: (s.offset or 0, s.dtype) for name, s in raw.specs.items()})
    stack.callback(reader.close)
    return reader


def _check_targets(paths: Sequence[Path], originals: Sequence[Path], folder: Path, force: bool) -> None:
    for path in paths:
        if not path.resolve().is_relative_to(folder.resolve()):
            raise FileError(path, "lies outside the output folder.", "Name the output otherwise.")
        if any(path.exists() and original.exists() and path.samefile(original) for original in originals):
            raise FileError(path, "is an input of this merge.", "Name another folder with -o.")
        if path.exists() and not force:
            raise FileError(path, "exists already.", "Name another folder with -o, or add --force.")


def _state(path: Path) -> list[tuple[int, int, int]]:
    """Size, time of change and identity of a file, or of every file in a folder."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [(s.st_size, s.st_mtime_ns, s.st_ino) for s in (file.stat() for file in files)]


def _check_unchanged(originals: Sequence[Path], before: Sequence[list[tuple[int, int, int]]]) -> None:
    for path, state in zip(originals, before, strict=True):
        try:
            now = _state(path)
        except OSError:
            now = None
        if now != state:
            raise FileError(path, "changed while it was read.", "Nothing was written. Run again when it is at rest.")


def _result(
    plan: Plan,
    outputs: Sequence[MergeOutput],
    hashes: Sequence[str | None],
    warnings: Sequence[str],
    dry_run: bool,
    seconds: float,
) -> MergeResult:
    inputs = input_records(plan, hashes)
    files = {i.name: {"path": i.file, "sha256": i.sha256, "bytes": i.bytes} for i in inputs}
    return MergeResult(
        provenance=provenance("merge", files, seconds=seconds),
        recipe=plan.recipe.text,
        recipe_name=plan.recipe.source,
        arithmetic=plan.recipe.arithmetic,
        dry_run=dry_run,
        inputs=inputs,
        steps=step_records(plan),
        outputs=tuple(outputs),
        warnings=(*warnings_of(plan), *warnings),
    )
