"""`lineage sample`: labelled grids of pictures over any two of model, adapter, weight, step, prompt and seed."""

from __future__ import annotations

import io
import itertools
import json
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lineage.errors import FileError, LineageError

if TYPE_CHECKING:
    from PIL import Image

Progress = Callable[[int, int, str], None]
AXES = ("model", "adapter", "weight", "step", "prompt", "seed")
CELL, GAP, MARGIN, LINE = 128, 6, 150, 17
INK, PAPER = "#1c2330", "#ffffff"
_STEP = re.compile(r"(.+)-(\d{6,})")


@dataclass(frozen=True)
class Request:
    """What is drawn. adapters: file -> weight; all at once, unless the axis `adapter` is in the grid. weights: of every
    adapter, in place of its own. size: pixels of a square's side (None: what the model was made for). grid: rows and
    columns; left out, the axes with more than one value."""

    models: tuple[Path, ...]
    prompts: tuple[str, ...]
    adapters: Mapping[Path, float] = field(default_factory=dict)
    weights: tuple[float, ...] = ()
    seeds: tuple[int, ...] = (0,)
    negative: str = ""
    steps: int = 20
    guidance: float = 7.0
    size: int | None = None
    clip_skip: int = 1
    config: Path | None = None
    grid: tuple[str, str] | None = None


def sample(
    request: Request, *, device: str = "auto", precision: str = "fp32", progress: Progress | None = None
) -> bytes:
    """The grid as a PNG, whose text chunk "parameters" tells the request as JSON.

    LineageError where more than two axes vary, an axis has nothing to vary, or a file does not fit."""
    from PIL.PngImagePlugin import PngInfo

    axes = _axes(request)
    rows, columns = request.grid or _varying(axes)
    if rows == columns or not {rows, columns} <= set(AXES):
        raise LineageError(f"--grid {rows}x{columns}: give two of {', '.join(AXES)}.")
    for axis, values in axes.items():
        if axis not in (rows, columns) and len(values) > 1:
            raise LineageError(
                f"{axis} has {len(values)} values, but the grid is {rows} x {columns}. Draw it along one side, with "
                f"--grid {axis}x{columns} for instance, or name one value only."
            )
    cells = _cells(request, axes, rows, columns, device, precision, progress)
    heads = [[label for label, _ in axes[axis]] for axis in (rows, columns)]
    told = PngInfo()
    told.add_text(
        "parameters",
        json.dumps({**asdict(request), "adapters": {str(k): v for k, v in request.adapters.items()}}, default=str),
    )
    file = io.BytesIO()
    grid(heads[0], heads[1], cells).save(file, "PNG", pnginfo=told)
    return file.getvalue()


Axes = Mapping[str, Sequence[tuple[str, Any]]]
"""Axis -> its values, each with a label."""


def _axes(request: Request) -> Axes:
    if not request.models or not request.prompts:
        raise LineageError("sample: name at least one model, and one --prompt.")
    apart = "adapter" in (request.grid or ())
    files = list(request.adapters)
    together = [(" + ".join(labels(files)), files)]
    return {
        "model": list(zip(labels(request.models), request.models, strict=True)),
        "adapter": [(name, [f]) for name, f in zip(labels(files), files, strict=True)] if apart else together,
        "weight": [(f"weight {w:g}", w) for w in request.weights] or [("", None)],
        "step": _checkpoints(request) if "step" in (request.grid or ()) else [("", None)],
        "prompt": [(p or "(no prompt)", p) for p in request.prompts],
        "seed": [(f"seed {s}", s) for s in request.seeds],
    }


def labels(files: Sequence[Path]) -> list[str]:
    """Stems; with their folder where two are the same."""
    stems = [f.stem for f in files]
    return [f"{f.absolute().parent.name}/{s}" if stems.count(s) > 1 else s for f, s in zip(files, stems, strict=True)]


def _varying(axes: Axes) -> tuple[str, str]:
    """Rows and columns: the axes with more than one value; models and prompts where there are fewer than two such."""
    found = [axis for axis in AXES if len(axes[axis]) > 1]
    if len(found) > 2:
        raise LineageError(f"{', '.join(found)} vary: name rows and columns with --grid, and one value of the rest.")
    spare = [axis for axis in ("prompt", "model") if axis not in found]
    rows, columns = sorted([*found, *spare][:2], key=AXES.index)
    return rows, columns


def _checkpoints(request: Request) -> list[tuple[str, Path]]:
    """The adapters that a run kept on its way, by step, then the final one."""
    if len(request.adapters) != 1:
        raise LineageError("--grid with step: name one adapter, the final file of a run.")
    [final] = request.adapters
    found = ((f, _STEP.fullmatch(f.stem)) for f in final.parent.glob("*.safetensors"))
    kept = sorted((int(m[2]), f) for f, m in found if m and m[1] == final.stem)
    if not kept:
        raise FileError(final, "has no checkpoints beside it.", "They are named like it, with -001000 at the end.")
    return [*((f"step {step}", f) for step, f in kept), ("final", final)]


def _cells(
    request: Request, axes: Axes, rows: str, columns: str, device: str, precision: str, progress: Progress | None
) -> list[list[Image.Image | None]]:
    """Every picture; each model is opened once, each set of adapters put on it once."""
    from lineage.pairs import pick_device
    from train.applied import Applied
    from train.config import ModelConfig
    from train.models import open_base

    cells: list[list[Image.Image | None]] = [[None] * len(axes[columns]) for _ in axes[rows]]
    done, total = 0, len(axes[rows]) * len(axes[columns])
    for m, (name, path) in enumerate(axes["model"]):
        base = open_base(ModelConfig(path, request.config), device=pick_device(device), precision=precision)
        for put, places in _settings(request, axes, m):
            with Applied(base.unet, base.text_encoders, put):
                for place, prompt, seed in places:
                    cells[place[rows]][place[columns]] = _picture(base, request, prompt, seed)
                    done += 1
                    if progress:
                        progress(done, total, name)
    return cells


def _settings(
    request: Request, axes: Axes, m: int
) -> Iterator[tuple[list[tuple[Path, float]], list[tuple[dict[str, int], str, int]]]]:
    """What is put on model `m`, and the places, prompts and seeds that are drawn with it."""
    numbered = [list(enumerate(axes[axis])) for axis in ("adapter", "weight", "step")]
    for (a, (_, files)), (w, (_, weight)), (s, (_, file)) in itertools.product(*numbered):
        own = [(f, request.adapters[f]) for f in files]
        put = [(file or f, own_weight if weight is None else weight) for f, own_weight in own]
        places = [
            ({"model": m, "adapter": a, "weight": w, "step": s, "prompt": p, "seed": n}, prompt, seed)
            for (p, (_, prompt)), (n, (_, seed)) in itertools.product(
                enumerate(axes["prompt"]), enumerate(axes["seed"])
            )
        ]
        yield put, places


SIDES = {"sd1": 512, "sd2": 768, "sdxl": 1024}


def _picture(base: Any, request: Request, prompt: str, seed: int) -> Image.Image:
    from PIL import Image

    side = request.size or (base.unet.config.sample_size or SIDES[base.architecture] // base.shrink) * base.shrink
    pixels = base.draw(
        prompt,
        request.negative,
        seed=seed,
        steps=request.steps,
        guidance=request.guidance,
        size=(side, side),
        clip_skip=request.clip_skip,
    )
    return Image.fromarray((pixels.permute(1, 2, 0) * 255).round().byte().numpy())


def grid(rows: Sequence[str], columns: Sequence[str], cells: Sequence[Sequence[Image.Image | None]]) -> Image.Image:
    """cells[row][column] (None: empty) under wrapped labels; small pictures are enlarged to CELL px, unsmoothed."""
    from PIL import Image, ImageDraw, ImageFont

    side = max([CELL, *(p.width for row in cells for p in row if p is not None)])
    heads = [textwrap.wrap(column, side // 7) for column in columns]
    names = [textwrap.wrap(row, 20) for row in rows]
    height = max([side, *(LINE * len(name) + GAP for name in names)])
    top = LINE * max(map(len, heads)) + 2 * GAP
    sheet = Image.new("RGB", (MARGIN + len(columns) * (side + GAP), top + len(rows) * (height + GAP)), PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for c, head in enumerate(heads):
        draw.multiline_text((MARGIN + c * (side + GAP), GAP), "\n".join(head), INK, font)
    for r, name in enumerate(names):
        y = top + r * (height + GAP)
        draw.multiline_text((GAP, y + GAP), "\n".join(name), INK, font)
        for c, picture in enumerate(cells[r]):
            if picture is not None:
                shown = picture.resize((side, side), Image.Resampling.NEAREST)
                sheet.paste(shown, (MARGIN + c * (side + GAP), y))
    return sheet
