"""`lineage sample`: labelled grids of pictures over any two of model, adapter, weight, step, prompt and seed."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lineage.errors import FileError, LineageError
from train.sheet import grid, image, png

if TYPE_CHECKING:
    from PIL import Image

    from train.models import Base

__all__ = ["AXES", "Drawn", "Request", "draw_grid", "grid"]

Progress = Callable[[int, int, str], None]
AXES = ("model", "adapter", "weight", "step", "prompt", "seed")
_STEP = re.compile(r"(.+)-(\d{6,})")


@dataclass(frozen=True)
class Request:
    """What is drawn. adapters: (file, weight); all at once, unless the axis `adapter` is in the grid. weights: of every
    adapter, in place of its own. embeddings: files of new words, each named as its file. width, height: pixels (None:
    what the model was made for). grid: rows and columns; left out, the axes with more than one value."""

    models: Sequence[Path]
    prompts: Sequence[str]
    adapters: Sequence[tuple[Path, float]] = ()
    weights: Sequence[float] = ()
    seeds: Sequence[int] = (0,)
    negative: str = ""
    steps: int = 20
    guidance: float = 7.0
    width: int | None = None
    height: int | None = None
    clip_skip: int = 1
    embeddings: Sequence[Path] = ()
    config: Path | None = None
    prediction: str = "auto"
    grid: tuple[str, str] | None = None


class Value(NamedTuple):
    """Of an axis: how it is called in the picture ("": nothing to say), and what it is."""

    label: str
    value: Any


Axes = Mapping[str, Sequence[Value]]


@dataclass(frozen=True)
class Drawn:
    """cells[row][column] under their labels; title: what is the same in all of them; request: what was asked for."""

    rows: list[str]
    columns: list[str]
    cells: list[list[Image.Image]]
    title: str
    request: Request

    def png(self) -> bytes:
        """The labelled grid; its text chunk `parameters` tells the request as JSON."""
        return png(grid(self.rows, self.columns, self.cells, self.title), {"parameters": self.parameters})

    @property
    def parameters(self) -> str:
        return json.dumps(asdict(self.request), default=str)


def draw_grid(
    request: Request, *, device: str = "auto", precision: str = "fp32", progress: Progress | None = None
) -> Drawn:
    """Draw all cells: each model is opened once, each set of adapters put on it once, and a seed is the same noise for
    every model and prompt. `progress` counts denoising steps.

    LineageError before anything is drawn where axes are unknown or more than two vary, and where a file is no model or
    its adapter was made for another architecture."""
    axes = _axes(request)
    rows, columns = _sides(request, axes)
    _check(request, axes)
    drawn = dict(_pictures(request, axes, device, precision, progress))
    r, c = AXES.index(rows), AXES.index(columns)
    table = {(place[r], place[c]): picture for place, picture in drawn.items()}
    cells = [[table[i, j] for j in range(len(axes[columns]))] for i in range(len(axes[rows]))]
    title = " | ".join(v.label for axis in AXES if axis not in (rows, columns) for v in axes[axis] if v.label)
    return Drawn([v.label for v in axes[rows]], [v.label for v in axes[columns]], cells, title, request)


def _axes(request: Request) -> Axes:
    asked = request.grid or ()
    if unknown := [axis for axis in asked if axis not in AXES]:
        raise LineageError(
            f"--grid: {unknown[0]!r} is no axis. There are {', '.join(AXES)}, as in --grid modelxprompt."
        )
    if not request.models or not request.prompts:
        raise LineageError("Name at least one model and one --prompt.")
    if not request.adapters and (request.weights or {"adapter", "weight", "step"} & {*asked}):
        raise LineageError("Weights, adapters and steps can only vary with an --adapter.")
    return {
        "model": list(map(Value, names(request.models), request.models)),
        "adapter": _adapters(request),
        "weight": [Value(f"weight {w:g}", w) for w in request.weights] or [Value("", None)],
        "step": _checkpoints(request) if "step" in asked else [Value("", None)],
        "prompt": [Value(p or "(no prompt)", p) for p in request.prompts],
        "seed": [Value(f"seed {s}", s) for s in request.seeds],
    }


def _adapters(request: Request) -> list[Value]:
    """One after the other where they are an axis, else all of them as one value."""
    files = [file for file, _ in request.adapters]
    labels = [
        name if weight == 1 or request.weights else f"{name} at {weight:g}"
        for name, (_, weight) in zip(names(files), request.adapters, strict=True)
    ]
    if "adapter" in (request.grid or ()):
        return [Value(label, [put]) for label, put in zip(labels, request.adapters, strict=True)]
    return [Value(" + ".join(labels), list(request.adapters))]


def names(files: Sequence[Path]) -> list[str]:
    """Names without suffix; with suffix, and with as many folders as it takes, where these do not tell files apart."""
    paths = [file.absolute() for file in files]
    forms = [[path.name if path.is_dir() else path.stem for path in paths]]
    longest = max((len(path.parts) for path in paths), default=0)
    forms += [["/".join(path.parts[-k:]) for path in paths] for k in range(1, longest + 1)]
    return next(form for form in forms if len({*form}) == len({*paths}))


def _checkpoints(request: Request) -> list[Value]:
    """The adapters that a run kept on its way, by step, then the final one."""
    if len(request.adapters) != 1:
        raise LineageError("--grid with step: name one adapter, the final file of a run.")
    [(final, _)] = request.adapters
    found = ((file, _STEP.fullmatch(file.stem)) for file in final.parent.glob("*.safetensors"))
    kept = sorted((int(m[2]), file) for file, m in found if m and m[1] == final.stem)
    if not kept:
        raise FileError(
            final, "has no checkpoints beside it.", f"They are named like it: {final.stem}-001000, -002000 ..."
        )
    return [*(Value(f"step {step}", file) for step, file in kept), Value("final", final)]


def _sides(request: Request, axes: Axes) -> tuple[str, str]:
    """Rows and columns: as asked for, else the axes that vary, with prompts and models where those are too few."""
    varying = [axis for axis in AXES if len(axes[axis]) > 1]
    if request.grid:
        rows, columns = request.grid
        left = [axis for axis in varying if axis not in request.grid]
        if rows == columns or left:
            why = f"{left[0]} varies too" if left else "rows and columns are the same"
            raise LineageError(f"--grid {rows}x{columns}: {why}. Two axes can vary; give one value of the others.")
        return rows, columns
    if len(varying) > 2:
        raise LineageError(f"{', '.join(varying)} vary. Two axes can: give one value of the others.")
    spare = [axis for axis in ("prompt", "model") if axis not in varying]
    rows, columns = sorted([*varying, *spare][:2], key=AXES.index)
    return rows, columns


def _check(request: Request, axes: Axes) -> None:
    """Refuse from headers what would fail after hours of drawing."""
    from lineage.checkpoint import open_checkpoint
    from train.applied import bound
    from train.models import architecture_of

    steps = [v.value for v in axes["step"] if v.value]
    for model in request.models:
        with open_checkpoint(model) as checkpoint:
            architecture_of(checkpoint)
            for file in steps or [file for file, _ in request.adapters]:
                bound(file, checkpoint.specs)


Place = tuple[int, ...]
"""A number along each of AXES."""


def _pictures(
    request: Request, axes: Axes, device: str, precision: str, progress: Progress | None
) -> Iterator[tuple[Place, Image.Image]]:
    from lineage.pairs import pick_device
    from train.applied import Applied
    from train.config import ModelConfig
    from train.embeddings import wear
    from train.models import open_base

    each = [range(len(axes[axis])) for axis in AXES]
    total = math.prod(map(len, each)) * request.steps
    done = itertools.count(1)
    for m in each[0]:
        label, path = axes["model"][m]
        config = ModelConfig(path, request.config, prediction=request.prediction)
        base = open_base(config, device=pick_device(device), precision=precision)
        wear(base, request.embeddings)
        for put in itertools.product(*each[1:4]):
            with Applied(base.unet, base.text_encoders, _put(axes, *put)):
                for p, s in itertools.product(*each[4:]):
                    stepped = (lambda name=label: progress(next(done), total, name)) if progress else _nothing
                    yield (
                        (m, *put, p, s),
                        _picture(base, request, axes["prompt"][p].value, axes["seed"][s].value, stepped),
                    )


def _nothing() -> None: ...


def _put(axes: Axes, a: int, w: int, s: int) -> list[tuple[Path, float]]:
    """Files and weights at these places of the axes adapter, weight and step."""
    weight, file = axes["weight"][w].value, axes["step"][s].value
    return [(file or own, given if weight is None else weight) for own, given in axes["adapter"][a].value]


def _picture(base: Base, request: Request, prompt: str, seed: int, stepped: Callable[[], None]) -> Image.Image:
    height, width = request.height or base.side, request.width or base.side
    if height % base.shrink or width % base.shrink:
        raise LineageError(f"--width {width} --height {height}: name multiples of {base.shrink}.")
    (pixels,) = base.draw(
        [prompt],
        request.negative,
        seeds=[seed],
        steps=request.steps,
        guidance=request.guidance,
        size=(height, width),
        clip_skip=request.clip_skip,
        stepped=stepped,
    )
    return image(pixels)
