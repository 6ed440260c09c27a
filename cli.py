"""The command line: one command per verb. Parse, call one library function of the same name, save, print.

A verb that gives a result is a function `verb(run, ...) -> result` under `@result_verb()`, which adds the shared
options, refuses an existing target before the work, saves, and prints. Heavy modules are imported inside commands.
"""

from __future__ import annotations

import ctypes
import functools
import json
import logging
import math
import platform
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import click

from lineage.errors import LineageError, MissingExtra

RESULT_FILES = ["result.json", "report.html"]
GRAPH_FILES = ["graph.graphml", "graph.mmd", "edges.csv", "model_cards.yaml"]
OWN_PACKAGES = {"lineage", "train", "reports", "cli"}
EXISTING = click.Path(exists=True, path_type=Path)
INTERRUPTED = 130
BROKEN_PIPE = 141
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Run:
    """The shared options of one call. verbosity: -1 with -q, else the number of -v."""

    folder: Path | None = None
    force: bool = False
    as_json: bool = False
    verbosity: int = 0
    device: str = "auto"

    @contextmanager
    def progress(self) -> Iterator[Progress | None]:
        """A progress callback (done, total, label) drawn on stderr, or None with -q or where stderr is no terminal."""
        if self.verbosity < 0 or not sys.stderr.isatty():
            yield None
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        from reports.tables import printable

        label = TextColumn("{task.description}", markup=False)
        columns = (label, BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("", total=None)
            yield lambda done, total, label: bar.update(task, completed=done, total=total, description=printable(label))

    def show(self, result: Any) -> None:
        """Print a result: its JSON with --json, nothing with -q, else a short table."""
        from lineage import results

        if self.as_json:
            click.echo(json.dumps(results.to_json(result), indent=1, allow_nan=False))
        elif self.verbosity >= 0:
            from reports import tables

            tables.show(results.to_json(result), self.verbosity)

    def save(self, result: Any) -> None:
        """Write result.json, report.html and the result's exports into the folder of -o, all or none."""
        if self.folder is None:
            return
        from lineage import results
        from lineage.exports import exports
        from reports import build

        page = build.build(results.to_json(result), self.folder)
        files = {"result.json": results.dumps(result), "report.html": page, **exports(result)}
        results.write_files(self.folder, files, self.force)
        self.say(f"Written: {', '.join(str(self.folder / name) for name in files)}")

    def finish(self, result: Any) -> None:
        """Save a result, and print it even where it cannot be saved."""
        try:
            self.save(result)
        finally:
            self.show(result)

    def say(self, text: str) -> None:
        """A line for people, on stderr; none with -q."""
        if self.verbosity >= 0:
            _complain(text)


def _complain(text: str) -> None:
    from reports.tables import printable

    click.echo(printable(text), err=True)


OUTPUT = click.option(
    "-o", "--output", type=click.Path(path_type=Path), metavar="DIR", help="Write result.json and report.html here."
)
FORCE = click.option("--force", is_flag=True, help="Overwrite an existing result.")
JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON instead of a table.")
VERBOSE = click.option("-v", "--verbose", count=True, help="Longer tables and the log.")
QUIET = click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors (and --json).")
DEVICE = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1 ...")


def _options(*options: Callable, check: Sequence[str] = ()) -> Callable:
    """Decorator: adds `options` and hands them over as one Run; refuses a target that already holds one of `check`."""

    def decorate(command: Callable) -> Callable:
        @functools.wraps(command)
        def wrapped(*, verbose=0, quiet=False, output=None, force=False, as_json=False, device="auto", **own):
            run = Run(output, force, as_json, -1 if quiet else verbose, device)
            logging.basicConfig(level=logging.INFO if run.verbosity > 0 else logging.ERROR, format="%(message)s")
            if check and output is not None:
                from lineage import results

                results.check_target(output, list(check), force)
            return command(run, **own)

        return functools.reduce(lambda f, option: option(f), reversed(options), wrapped)

    return decorate


def result_verb(*more: str) -> Callable:
    """Decorator of a verb `f(run, **own options) -> result`: adds -o, --force, --json, -v, -q and --device, refuses an
    existing target (`more`: files it has besides the usual ones) before any work, then saves and prints what `f`
    returns."""

    def decorate(verb: Callable[..., Any]) -> Callable:
        @functools.wraps(verb)
        def finished(run: Run, **own) -> None:
            with extras(verb.__name__):
                result = verb(run, **own)
            run.finish(result)

        return _options(OUTPUT, FORCE, JSON, VERBOSE, QUIET, DEVICE, check=[*RESULT_FILES, *more])(finished)

    return decorate


@contextmanager
def extras(verb: str, extra: str = "train") -> Iterator[None]:
    """Turns the lack of an optional package into the pip line; a module of ours that is missing stays a bug."""
    try:
        yield
    except ModuleNotFoundError as e:
        root = (e.name or "").split(".")[0]
        if not root or root in OWN_PACKAGES:
            raise
        raise MissingExtra(verb, extra, root) from e


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="model-lineage", prog_name="lineage")
def cli() -> None:
    """Where do Stable Diffusion models come from? Answers from the weights alone."""


@cli.command()
@click.argument("models", nargs=-1, required=True, type=EXISTING, metavar="[BASE] TUNED")
@click.option("--component", "components", multiple=True, help="Only this one (unet, text_encoder, ...); repeatable.")
@click.option("--rank", default=64, show_default=True, type=click.IntRange(1), help="The largest k to report.")
@click.option(
    "--solver",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "gram", "randomized", "full"]),
    help="auto takes the cheapest that certifies the tolerance; full is LAPACK in float64.",
)
@click.option("--tolerance", default=1e-3, show_default=True, help="Width of the certified energy intervals.")
@result_verb()
def svd(run: Run, models: Sequence[Path], components: tuple[str, ...], rank: int, solver: str, tolerance: float):
    """In how many ranks does TUNED differ from BASE, layer by layer?

    Both are checkpoints (.safetensors, .ckpt, a diffusers or transformers folder). TUNED may be an adapter file
    (LoRA, LoCon, LoHa, LoKr); then BASE is optional.
    """
    import lineage
    from lineage.cache import begin

    if len(models) > 2:
        raise click.UsageError(f"{len(models)} models given: BASE TUNED, or one adapter file.")
    begin(*models)  # before torch is imported
    base, tuned = models[0] if len(models) == 2 else None, models[-1]
    options = {"rank": rank, "components": components or None, "solver": solver, "tolerance": tolerance}
    with run.progress() as progress:
        return lineage.svd(base, tuned, device=run.device, progress=progress, **options)


@cli.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--add", type=EXISTING, metavar="FILE", help="Say what this one more file is made of.")
@click.option("--base", metavar="NAME", help="This model is the root of its tree.")
@click.option("--dates", type=EXISTING, metavar="CSV", help="Lines of name,date: no child is older than its parent.")
@click.option("--metadata/--no-metadata", default=True, help="Let files speak of their origin, or use weights alone.")
@click.option("--sketch", is_flag=True, help="Take distances from sketches, not from all files again.")
@click.option("--min-confidence", default=0.0, type=click.FloatRange(0, 1), metavar="P", help="Keep what is surer.")
@click.option("--engine", type=click.Choice(["ray", "dask"]), help="Read files on this cluster, not in this process.")
@click.option("--address", help="Where the cluster is reached; a local one is started without it.")
@result_verb(*GRAPH_FILES)
def cluster(run: Run, folder: Path, sketch: bool, **options):
    """Which models of FOLDER are kin, who descends from whom, which are merges of which.

    Reads every checkpoint below FOLDER and, with -o, writes the graph for other programs too (GraphML, Mermaid, CSV,
    model-card YAML).
    """
    import lineage

    with run.progress() as progress:
        return lineage.cluster(folder, sketch=sketch or None, device=run.device, progress=progress, **options)


@cli.command()
@click.argument("paths", nargs=-1, required=True, metavar="[ADAPTER | TARGET...] FOLDER")
@click.option("--targets", "listed", is_flag=True, help="The arguments before FOLDER are models to train for.")
@click.option("--target", "more", multiple=True, metavar="MODEL", help="A model to train for; repeatable.")
@result_verb()
def predict(run: Run, paths: Sequence[str], listed: bool, more: Sequence[str]):
    """On which models of FOLDER will ADAPTER work, by the family tree alone; with targets, on what to train for them.

    No model is run: every file is read once, later calls take its fingerprint from the cache.
    """
    import lineage

    *before, folder = paths
    adapters, targets = ([], [*more, *before]) if listed else (before, [*more])
    if len(adapters) + bool(targets) != 1:
        raise click.UsageError("Give ADAPTER FOLDER, or --targets MODEL... FOLDER.")
    with run.progress() as progress:
        return lineage.predict(adapters[0] if adapters else None, folder, targets=targets, progress=progress)


@cli.command()
@click.argument("file", type=EXISTING)
@_options(JSON, VERBOSE, QUIET)
def inspect(run: Run, file: Path) -> None:
    """What is in a model file: layout, architecture, components, dtypes, hashes, metadata, lineage records."""
    import lineage

    run.show(lineage.inspect(file))


@cli.command()
@click.argument("recipe", type=EXISTING)
@click.option("--models", type=EXISTING, metavar="DIR", help="The folder that holds the models the recipe names.")
@click.option("--set", "bound", multiple=True, metavar="NAME=PATH", help="Bind the recipe's __NAME__; repeatable.")
@click.option("--explain", is_flag=True, help="Only say what each output is made of; reads no tensor.")
@click.option("--dry-run", is_flag=True, help="The same, and list the keys that would not be plainly merged.")
@click.option(
    "--arithmetic", type=click.Choice(["webui", "float32"]), help="Default: webui for text, float32 for TOML."
)
@click.option("--keep", multiple=True, metavar="NAME|all", help="Write this intermediate output too; repeatable.")
@click.option("--container", type=click.Choice(["safetensors", "ckpt"]), help="Instead of what the recipe says.")
@click.option("--hashes/--no-hashes", default=True, help="Record the sha256 of every input, which is much of the work.")
@_options(OUTPUT, FORCE, JSON, VERBOSE, QUIET, check=RESULT_FILES)
def merge(run: Run, recipe: Path, models: Path | None, bound: Sequence[str], explain: bool, dry_run: bool, **options):
    """Run a merge RECIPE: text of a web UI's merge board (to the bit), or TOML.

    Writes the outputs that no later line uses into the folder of -o, beside result.json and report.html.
    """
    import lineage

    folder = None if explain or dry_run else run.folder
    pairs = dict(_binding(text) for text in bound)
    with run.progress() as progress:
        result = lineage.merge(
            recipe,
            folder,
            models=models,
            bound=pairs,
            force=run.force,
            dry_run=explain or dry_run,
            progress=progress,
            **options,
        )
    if explain:
        result = replace(result, steps=tuple(replace(step, changed_keys=()) for step in result.steps))
    run.finish(result)


def _binding(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise click.UsageError(f"--set {text}: write NAME=PATH.")
    return name, Path(path)


@cli.command()
@click.argument("model", type=EXISTING)
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER[:WEIGHT]...")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), metavar="FILE", help="The new model.")
@click.option("--half", is_flag=True, help="Write single-precision tensors as fp16.")
@_options(FORCE, JSON, VERBOSE, QUIET)
def apply(run: Run, model: Path, adapters: Sequence[str], half: bool) -> None:
    """Bake adapters (LoRA, LoCon, LoHa, LoKr) into MODEL: W + weight * delta, rounded once.

    FILE ends in .safetensors or .ckpt. WEIGHT is 1 where none is given.
    """
    import lineage

    weights: dict[str | Path, float] = dict(_weighted(text) for text in adapters)
    assert run.folder is not None
    with run.progress() as progress:
        run.show(lineage.apply(model, weights, run.folder, half=half, force=run.force, progress=progress))


def _weighted(text: str) -> tuple[str, float]:
    path, colon, weight = text.rpartition(":")
    try:
        value = float(weight) if colon else math.nan
    except ValueError:
        value = math.nan
    if math.isfinite(value):
        return path, value
    if colon and Path(path).exists():
        raise click.BadParameter(f"{text}: {weight!r} is no weight. Write a number, as in {path}:0.65.")
    return text, 1.0  # no colon, or one that belongs to the path: C:\file


ADAPTER = click.Path(path_type=Path)
FILE = click.option("-o", "--output", "file", required=True, type=ADAPTER, metavar="FILE", help="The new adapter.")
REPORT = click.option(
    "--report", "output", type=click.Path(path_type=Path), metavar="DIR", help="Write result.json and report.html here."
)
ENERGY = click.option("--energy", type=float, metavar="SHARE", help="The fewest ranks that hold this share, as 0.9.")


@cli.command()
@click.argument("base", type=EXISTING)
@click.argument("tuned", type=EXISTING)
@FILE
@click.option(
    "--kind",
    default="locon",
    show_default=True,
    type=click.Choice(["locon", "lora", "loha"]),
    help="lora holds transformers' Linear and 1x1 layers only.",
)
@click.option("--rank", type=click.IntRange(1), help="Of every module; default 64, LoHa 8.")
@ENERGY
@click.option("--signal", is_flag=True, help="As many ranks as stand out of storage rounding, layer by layer.")
@click.option("--conv-rank", type=click.IntRange(1), help="Of convolutions; default as --rank.")
@click.option("--component", "components", multiple=True, help="Only this one (unet, text_encoder, ...); repeatable.")
@click.option("--diffs", is_flag=True, help="Store whole what has no factors: norms, biases, the outermost layers.")
@click.option(
    "--dtype",
    default="float16",
    show_default=True,
    type=click.Choice(["float16", "bfloat16", "float32"]),
    help="Of the factors.",
)
@_options(REPORT, FORCE, JSON, VERBOSE, QUIET, DEVICE, check=RESULT_FILES)
def extract(run: Run, base: Path, tuned: Path, file: Path, **options):
    """An adapter (kohya's names) out of the change from BASE to TUNED, written as FILE; what it lacks is listed."""
    from lineage.cache import begin

    begin(base, tuned)  # before torch is imported
    import lineage

    with run.progress() as progress:
        found = lineage.extract(base, tuned, file, device=run.device, force=run.force, progress=progress, **options)
    run.finish(found)


@cli.command()
@click.argument("adapter", type=EXISTING)
@FILE
@click.option("--rank", type=click.IntRange(1), help="At most so many ranks in every module.")
@ENERGY
@click.option("--ratio", type=float, metavar="X", help="Singular values down to 1/X of the module's largest.")
@click.option("--kind", type=click.Choice(["locon", "loha"]), help="loha keeps a LoHa a LoHa; default: locon.")
@click.option("--dtype", type=click.Choice(["float16", "bfloat16", "float32"]), help="Default: as in the file.")
@_options(REPORT, FORCE, JSON, VERBOSE, QUIET, check=RESULT_FILES)
def resize(run: Run, adapter: Path, file: Path, **options):
    """ADAPTER with fewer ranks, written as FILE: compression after training."""
    import lineage

    with run.progress() as progress:
        found = lineage.resize(adapter, file, force=run.force, progress=progress, **options)
    run.finish(found)


@cli.command()
@click.argument("config", required=False, type=EXISTING)
@click.option("--from-kohya", type=EXISTING, metavar="FILE", help="Print kohya's settings, or an adapter's, as ours.")
@click.option("--set", "changes", multiple=True, metavar="KEY=VALUE", help="Such as training.lr=5e-4; repeatable.")
@click.option("--dry-run", is_flag=True, help="Only say what would be done: steps, buckets, tags, memory.")
@click.option("--find-lr", "find", is_flag=True, help="Sweep the learning rate instead, and suggest one.")
@_options(OUTPUT, FORCE, JSON, VERBOSE, QUIET, DEVICE)
def train(run: Run, config: Path | None, from_kohya: Path | None, changes: Sequence[str], dry_run: bool, find: bool):
    """Train a LoHa, LoCon or LoRA as CONFIG (TOML) says; -o names the run's folder.

    That folder is its own: the same call continues where it was stopped, or says that it is done.
    """
    with extras("train"):
        if from_kohya:
            return _translate(run, from_kohya)
        if config is None:
            raise click.UsageError("Give CONFIG, or --from-kohya FILE to make one.")
        settings = _settings(run, config, changes)
        work = _forecast if dry_run else _find_rate if find else _train
        work(run, settings)


def _translate(run: Run, file: Path) -> None:
    from train import kohya

    found = kohya.from_kohya(file)
    click.echo(found.to_toml(), nl=False)
    for note in found.notes:
        run.say(f"Mind: {note}")
    for key, why in found.ignored.items():
        run.say(f"Ignored: {key}: {why}")


def _settings(run: Run, config: Path, changes: Sequence[str]) -> Any:
    from train.config import Config

    if run.folder is not None:
        changes = [*changes, f"save.folder={json.dumps(str(run.folder.absolute()))}"]
    return Config.read(config, changes)


def _forecast(run: Run, settings: Any) -> None:
    from reports.tables import printable
    from train import data, forecast

    with run.progress() as progress:
        plan = data.plan(settings, progress)
    click.echo(printable(forecast.summary(settings, plan)))
    click.echo(forecast.memory_line(forecast.memory(settings, plan)))


def _find_rate(run: Run, settings: Any) -> None:
    from lineage import results
    from train.rate_sweep import find_lr

    folder = run.folder or settings.save.folder.with_name(f"{settings.save.folder.name}-rates")
    results.check_target(folder, RESULT_FILES, run.force)
    with run.progress() as progress:
        result = find_lr(settings, device=run.device, progress=progress)
    replace(run, folder=folder).finish(result)


def _train(run: Run, settings: Any) -> None:
    from train.loop import train
    from train.runs import RunFolder

    folder = RunFolder(settings)
    if folder.done:
        return run.say(f"Done already: {folder.adapter()}")
    with run.progress() as progress, _patient() as stopped:
        recent: deque[Any] = deque(maxlen=50)
        steps = train(settings, device=run.device, progress=progress)
        for record in steps:
            recent.append(record)
            if run.as_json:
                click.echo(json.dumps(asdict(record)))
            if progress:
                progress(record.step, record.of, _pace(recent))
            if stopped():
                steps.close()
                raise click.Abort
    run.say(f"Written: {folder.adapter()}")


def _pace(recent: Sequence[Any]) -> str:
    """Mean loss and time of the last steps."""
    loss, seconds = (sum(getattr(r, what) for r in recent) / len(recent) for what in ("loss", "seconds"))
    return f"loss {loss:.4f}, {seconds:.2f} s a step"


@contextmanager
def _patient() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed: the step under way may end, so that nothing is lost; a second one interrupts it."""
    pressed: list[bool] = []

    def press(*_: Any) -> None:
        pressed.append(True)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


@cli.command()
@click.argument("result", type=EXISTING)
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="PAGE", help="Default: report.html beside it.")
@_options(FORCE, VERBOSE, QUIET)
def report(run: Run, result: Path) -> None:
    """Build the page of any result.json again."""
    from lineage import results
    from reports import build

    result = result / "result.json" if result.is_dir() else result
    page = run.folder or result.with_name("report.html")
    results.check_target(page.parent, [page.name], run.force)
    results.write_files(page.parent, {page.name: build.build(results.load_json(result), result.parent)}, run.force)
    run.say(f"Written: {page}")


PICTURE = click.option(
    "-o", "--output", "file", required=True, type=ADAPTER, metavar="FILE", help="The picture, a .png."
)


@cli.command()
@click.argument("models", nargs=-1, required=True, type=EXISTING)
@click.option("--adapter", "adapters", multiple=True, metavar="FILE[:WEIGHT]", help="Put on the models; repeatable.")
@click.option("--weights", metavar="W,W,...", help="Weights of every adapter, one after the other.")
@click.option("--prompt", "prompts", multiple=True, required=True, help="Also with (tag:1.2); repeatable.")
@click.option("--negative", default="", help="What not to draw.")
@click.option("--seed", "seeds", multiple=True, type=int, default=(0,), help="Of the noise; repeatable.")
@click.option("--grid", metavar="ROWSxCOLUMNS", help="Two of model, adapter, weight, step, prompt, seed.")
@click.option("--steps", default=20, show_default=True, type=click.IntRange(1, 1000), help="Of DDIM.")
@click.option("--guidance", default=7.0, show_default=True, help="How closely the prompt is followed.")
@click.option("--width", type=click.IntRange(8), help="Of a picture in pixels; default: the model's own.")
@click.option("--height", type=click.IntRange(8), help="The same.")
@click.option("--clip-skip", default=1, show_default=True, type=click.IntRange(1, 12), help="1: the last layer.")
@click.option("--embedding", "embeddings", multiple=True, type=EXISTING, metavar="FILE", help="A new word; repeatable.")
@click.option("--config", type=EXISTING, metavar="DIR", help="Configuration and tokenizer of a single file.")
@click.option(
    "--prediction",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "epsilon", "v_prediction"]),
    help="auto: what the model's markers say.",
)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "bf16"]),
    default="fp32",
    show_default=True,
    help="Of the arithmetic.",
)
@PICTURE
@_options(FORCE, VERBOSE, QUIET, DEVICE)
def sample(run: Run, adapters: Sequence[str], precision: str, file: Path, **options: Any) -> None:
    """Draw a labelled grid of pictures by MODELS, with adapters at their weights.

    Prompt, seed and noise are the same in every cell that does not vary them. Several adapters are added up, unless
    they stand along a side of the grid.
    """
    from lineage import results

    if file.suffix.lower() != ".png":
        raise click.UsageError(f"{file}: the name must end in .png.")
    results.check_target(file.parent, [file.name], run.force)
    options["weights"] = [_number(w) for w in (options["weights"] or "").split(",") if w.strip()]
    options["grid"] = _sides(options["grid"])
    with extras("sample"), run.progress() as progress:
        from train.sample import Request, draw_grid

        request = Request(adapters=[(Path(path), weight) for path, weight in map(_weighted, adapters)], **options)
        drawn = draw_grid(request, device=run.device, precision=precision, progress=progress)
    results.write_files(file.parent, {file.name: drawn.png()}, run.force)
    run.say(f"Written: {file}")


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise click.UsageError(f"--weights: {text!r} is no number. Write them as 0,0.65,1.") from None


def _sides(text: str | None) -> tuple[str, str] | None:
    if text is None:
        return None
    sides = text.lower().split("x")
    if len(sides) != 2:
        raise click.UsageError(f"--grid {text}: write rows and columns as modelxprompt.")
    return sides[0], sides[1]


@cli.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--size",
    type=click.Choice(["quick", "small", "article"]),
    default="quick",
    show_default=True,
    help="6 models, 11, or every role of the article.",
)
@click.option("--seed", default=0, show_default=True, help="Another seed: other trees, styles and rates.")
@_options(VERBOSE, QUIET)
def world(run: Run, folder: Path, size: str, seed: int) -> None:
    """Make a miniature world: Stable Diffusion models of known descent, trained on the spot.

    FOLDER is its own: the same call continues, or says that it is done.
    """
    with extras("world"), run.progress() as progress:
        from train import showcase, topology
        from train import world as worlds

        plan = topology.draw(size, seed)
        worlds.build(plan, folder, progress)
        judged = showcase.show(plan, folder, progress)
    rows = "\n".join(f"{share:6.0%}  {name}" for name, share in judged.models.items())
    click.echo(f"A judge names the style of {judged.real:.0%} of held-out pictures, and of samples by\n{rows}")
    run.say(f"Models: {folder / 'models'}\nTheir descent: {folder / 'truth.json'}\nPictures: {folder / 'samples.png'}")


@cli.command("transfer-test")
@click.argument("config", required=False, type=EXISTING)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), metavar="DIR", help="Its own folder.")
@click.option("--dry-run", is_flag=True, help="Only say how much would be trained and measured.")
@click.option("--finished-only", is_flag=True, help="Conclude from the worlds that are finished, and run nothing.")
@DEVICE
@click.option("--workers", default=1, show_default=True, type=click.IntRange(1), help="Processes at once.")
@click.option("--engine", type=click.Choice(["ray", "dask"]), help="Measure on a cluster of this kind instead.")
@click.option("--address", metavar="ADDRESS", help="Of that cluster.")
@_options(VERBOSE, QUIET)
def transfer_test(run: Run, config: Path | None, dry_run: bool, **options: Any) -> None:
    """Train an adapter on each model of a family, apply it to all, and say how well the family tree foretold it.

    CONFIG (TOML) names the worlds and the training; without it, the quick miniature world. DIR is its own: the same
    call continues where it was stopped.
    """
    assert run.folder is not None
    with extras("transfer-test"), run.progress() as progress:
        from train import transfer
        from train.experiment import Experiment

        experiment = Experiment.read(config)
        if dry_run:
            return click.echo("\n".join(f"{n:>8}  {what}" for n, what in transfer.forecast(experiment, run.folder)))
        found = transfer.transfer_test(experiment, run.folder, progress=progress, **options)
    replace(run, force=True).finish(found)


@cli.command()
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="DIR",
    default=Path("demo"),
    show_default=True,
    help="Its own folder.",
)
@click.option("--seed", default=0, show_default=True, help="Another seed, another world.")
@click.option("--open/--no-open", "show", default=False, help="Open the page in a browser when done.")
@_options(VERBOSE, QUIET)
def demo(run: Run, seed: int, show: bool) -> None:
    """Make a quick world and go round: what a fine-tune changed, the family tree, a merge, an adapter.

    The folder is its own: the same call continues, or says that it is done.
    """
    assert run.folder is not None
    folder, stops = run.folder, []
    with extras("demo"), run.progress() as progress:
        from lineage import results
        from reports.build import ANSWERS
        from reports.tour_page import Stop, tour
        from train.demo import demo as stations

        for station in stations(folder, seed=seed, progress=progress):
            run.say(f"{station.title}: {station.words}")
            if station.result is not None:
                replace(run, folder=folder / station.name, force=True).save(station.result)
            report = f"{station.name}/report.html" if station.result is not None else None
            found = ANSWERS[type(station.result)](station.result) if station.result is not None else None
            picture = station.picture and station.picture.read_bytes()
            stops.append(Stop(station.title, station.words, found, picture, report))
        results.write_files(folder, {"index.html": tour("A family of miniature models", stops)}, force=True)
    run.say(f"The page: {folder / 'index.html'}")
    if show:
        click.launch(str(folder / "index.html"))


@cli.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script of a shell, to be evaluated in its start-up file."""
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(cli, {}, "lineage", "_LINEAGE_COMPLETE").source())


def main(args: Sequence[str] | None = None) -> None:
    """Entry point. Exits with 0, 2 (the user's to mend), 130 (Ctrl-C) or, after a traceback, 1."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    _keep_freed_memory()
    sys.exit(_exit_code(args))


def _keep_freed_memory() -> None:
    """Tensors come and go piece by piece: to give each back to the system and get new, zeroed pages costs as much as
    the arithmetic on it. Blocks up to 32 MiB come from what was freed before, and 256 MiB of that are kept; with glibc,
    which else decides anew (mallopt(3))."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 25)
        libc.mallopt(M_TRIM_THRESHOLD, 1 << 28)


def _exit_code(args: Sequence[str] | None) -> int:
    try:
        return cli.main(args, prog_name="lineage", standalone_mode=False) or 0
    except click.ClickException as e:
        e.show()
        return 2
    except LineageError as e:
        _complain(f"Error: {e}")
        return 2
    except click.Abort as e:
        if isinstance(e.__cause__, EOFError):
            raise e.__cause__ from None
        click.echo("Interrupted.", err=True)
        return INTERRUPTED
    except SystemExit as e:  # click and rich end with 1 when the reader of a pipe has left
        return BROKEN_PIPE if e.code == 1 else int(e.code or 0)


if __name__ == "__main__":
    main()
