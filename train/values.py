"""Single values of a run's settings: which are allowed, how they are read, and how TOML writes them."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lineage.errors import LineageError

CHOICES: dict[str, tuple[Any, ...]] = {
    "model.prediction": ("auto", "epsilon", "v_prediction"),
    "network.algo": ("loha", "locon", "lora"),
    "network.init": ("lycoris", "lycoris-0.1.4"),
    "training.optimizer": ("adamw", "adam8bit", "adamw8bit", "dadapt-adam", "prodigy"),
    "training.scheduler": ("constant", "cosine", "linear"),
    "training.precision": ("fp32", "fp16", "bf16"),
    "save.dtype": ("fp32", "fp16", "bf16"),
}
SHARES = ("data.tag_dropout", "data.caption_dropout")
LEAST: dict[str, float] = {
    "network.dim": 1,
    "network.conv_dim": 0,
    "network.pivotal_vectors": 1,
    "training.steps": 1,
    "training.epochs": 1,
    "training.batch": 1,
    "training.warmup": 0,
    "training.weight_decay": 0,
    "training.clip_grad": 0,
    "training.accumulation": 1,
    "training.seed": 0,
    "data.bucket_min": 64,
    "data.bucket_step": 8,
    "data.keep_tokens": 0,
    "data.clip_skip": 1,
    "data.reg_weight": 0,
    "sample.every": 0,
    "sample.steps": 1,
    "sample.guidance": 1,
    "sample.at": 1,
    "sample.seeds": 0,
    "sample.size": 64,
    "save.every": 0,
    "save.at": 1,
    "save.state_every": 1,
}
LEAST |= {f"data.{name}": 64 for name in ("resolution", "bucket_max")}
POSITIVE = (
    "network.alpha",
    "network.conv_alpha",
    *(f"training.{name}" for name in ("lr", "unet_lr", "text_encoder_lr", "pivotal_lr")),
)
NAMES = ("network.pivotal", "save.name")
"""What becomes part of a file's name."""
NO_NAME = r'[\\/:*?"<>|\x00-\x1f]'
"""What no system, or not every system, takes in a file's name."""
GRID = 8
"""Pixels per latent of all known autoencoders; sides must be multiples."""


def check(where: str, value: Any) -> None:
    """LineageError where the value of key `where`, or one of its values, is not allowed; None (left out) is."""
    for v in value if isinstance(value, tuple) else () if value is None else (value,):
        if where in CHOICES and v not in CHOICES[where]:
            raise LineageError(f"{where}: {v!r} is not known. Allowed: {', '.join(map(repr, CHOICES[where]))}.")
        if where in SHARES and not 0 <= v <= 1:
            raise LineageError(f"{where}: {v!r} is not a share. Allowed: 0 to 1.")
        if where in LEAST and not v >= LEAST[where]:
            raise LineageError(f"{where}: {v!r} is too small. Allowed: {LEAST[where]:g} and more.")
        if where in POSITIVE and not v > 0:
            raise LineageError(f"{where}: {v!r} is not allowed. Allowed: more than 0.")
        if where in NAMES and (re.search(NO_NAME, v) or v.strip(" .") != v):
            raise LineageError(
                f"{where}: {v!r} cannot be part of a file's name. Leave out \\ / : * ? \" < > | and dots."
            )


def read_value(where: str, kind: str, value: Any, folder: Path) -> Any:
    """What TOML gave for key `where` as `kind` (a field's annotation); relative paths start at `folder`.

    LineageError for what is of another kind."""
    kind = kind.removesuffix(" | None")
    if kind == "Path" and isinstance(value, str) and value:
        return Path(os.path.abspath(folder / Path(value).expanduser()))
    if kind == "float" and isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    if kind in ("int", "bool", "str") and type(value).__name__ == kind:
        return value
    if kind.startswith("tuple") and isinstance(value, list):
        item = kind[len("tuple[") :].split(",")[0]
        if all(type(v).__name__ == item for v in value):
            return tuple(value)
    if kind.startswith("Mapping") and isinstance(value, dict):
        return {key: _tags(f"{where}.{key}", tags) for key, tags in value.items()}
    raise LineageError(f"{where}: {value!r} is not allowed. Allowed: {SPOKEN[kind]}.")


def _tags(where: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(tag, str) for tag in value):
        raise LineageError(f"{where}: {value!r} is not allowed. Allowed: {SPOKEN['tuple[str, ...]']}.")
    return tuple(value)


SPOKEN = {
    "Path": "a path, in quotes",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text, in quotes",
    "tuple[str, ...]": 'a list of texts, ["...", "..."]',
    "tuple[int, ...]": "a list of whole numbers",
    "Mapping[str, tuple[str, ...]]": 'a table of lists, { word = ["tag", "tag"] }',
}


def toml_text(value: Any) -> str:
    """A value as TOML writes it; paths absolute, as a file's relative ones start where it lies."""
    if isinstance(value, Path):
        value = os.path.abspath(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(toml_text, value))}]"
    if isinstance(value, Mapping):
        return f"{{ {', '.join(f'{toml_text(k)} = {toml_text(v)}' for k, v in value.items())} }}" if value else "{}"
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
