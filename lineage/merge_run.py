"""The part of a merge that needs torch: plan from headers, one pass over the tensors, files that appear whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from lineage.checkpoint import Checkpoint
from lineage.errors import FileError
from lineage.merge_metadata import file_hash, metadata, placeholders
from lineage.merge_plan import Plan, make_plan, warnings_of
from lineage.merge_report import input_records, output_record, overflow_warnings, specs, step_records
from lineage.raw import SafetensorsRaw
from lineage.recipe import Recipe
from lineage.results import MergeOutput, MergeResult, provenance
from lineage.streaming import FileReader, Output, Reader, TensorReader, stream
from lineage.target import Target, check_space
from lineage.writer import WRITERS, file_size

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Written:
    """What a run left: a record of each output, the sha256 of every input (None: not read), and warnings."""

    outputs: Sequence[MergeOutput]
    hashes: Sequence[str | None]
    warnings: Sequence[str] = ()


def explain(recipe: Recipe, paths: Mapping[str, Path], written: Sequence[int]) -> MergeResult:
    """What the merge would do; reads headers only."""
    with ExitStack() as stack:
        plan = make_plan(recipe, paths, stack)
        return _result(plan, Written([output_record(plan, i) for i in written], [None] * len(plan.inputs)), True)


def run(
    recipe: Recipe,
    paths: Mapping[str, Path],
    written: Sequence[int],
    folder: Path,
    *,
    hashed: bool,
    force: bool,
    progress: Progress | None,
) -> MergeResult:
    """Write the outputs of the steps `written` into `folder`. paths: operand -> file."""
    with ExitStack() as stack:
        plan = make_plan(recipe, paths, stack)
        return _result(plan, _write(plan, written, folder, hashed, force, stack, progress), False)


@dataclass(frozen=True)
class _Job:
    """One output file under way: of step `step`."""

    step: int
    target: Target
    output: Output


def _write(
    plan: Plan,
    written: Sequence[int],
    folder: Path,
    hashed: bool,
    force: bool,
    stack: ExitStack,
    progress: Progress | None,
) -> Written:
    before = [_state(path) for path in plan.originals]
    jobs = list(_jobs(plan, written, folder, hashed, force, stack))
    with ExitStack() as readers:
        stream([job.output for job in jobs], [_reader(c, readers) for c in plan.inputs], progress)
    known = [file_hash(c.path) if hashed else "" for c in plan.inputs]
    for job in jobs:
        job.output.writer.finish(metadata(plan, job.step, known))
        job.target.sync()
    _check_unchanged(plan.originals, before)
    for job in jobs:
        job.target.commit()
    records = [output_record(plan, job.step, job.target.path, job.output) for job in jobs]
    return Written(records, known, [w for job in jobs for w in overflow_warnings(plan, job.step, job.output)])


def _jobs(
    plan: Plan, written: Sequence[int], folder: Path, hashed: bool, force: bool, stack: ExitStack
) -> Iterator[_Job]:
    """All that can be refused is, then the files are opened under temporary names."""
    steps = [plan.recipe.steps[i] for i in written]
    paths = [folder / f"{step.name}.{step.container}" for step in steps]
    _check_targets(paths, plan.originals, folder, force)
    room = [metadata(plan, i, placeholders(plan, hashed)) for i in written]
    sizes = [file_size(step.container, specs(plan, i), m) for i, step, m in zip(written, steps, room, strict=True)]
    check_space(folder, sum(sizes))
    for i, step, path, m, size in zip(written, steps, paths, room, sizes, strict=True):
        target = stack.enter_context(Target(path))
        target.reserve(size)
        writer = WRITERS[step.container](target.file, specs(plan, i), m)
        yield _Job(i, target, Output(plan.steps[i].table, writer, {j: plan.tables[j] for j in plan.sources(i)}))


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
            raise FileError(path, "is an input of this merge.", "Name another place with -o.")
        if path.exists() and not force:
            raise FileError(path, "exists already.", "Name another place with -o, or add --force.")


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


def _result(plan: Plan, written: Written, dry_run: bool) -> MergeResult:
    inputs = input_records(plan, written.hashes)
    files = {i.name: {"path": i.file, "sha256": i.sha256, "bytes": i.bytes} for i in inputs}
    return MergeResult(
        provenance=provenance("merge", files),
        recipe=plan.recipe.text,
        recipe_name=plan.recipe.source,
        arithmetic=plan.recipe.arithmetic,
        dry_run=dry_run,
        inputs=inputs,
        steps=step_records(plan),
        outputs=tuple(written.outputs),
        warnings=(*warnings_of(plan), *written.warnings),
    )
