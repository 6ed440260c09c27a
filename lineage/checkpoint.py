"""Checkpoint: a lazy Mapping of canonical name -> tensor over any file that holds a model, and its raw contents.

Nothing is run and nothing large is allocated before a header has been checked. Tensors are mapped from the file where
its format allows; `close` drops the maps, so that the file can be replaced (Windows refuses while one is held).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from lineage.errors import FileError
from lineage.keys import EMA_PREFIX, Param, architecture_of, canonical, layout_of
from lineage.raw import Raw, Spec, open_parts
from lineage.sidecars import json_of, text_of

__all__ = ["Checkpoint", "Spec", "open_checkpoint"]


def open_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """Open a .safetensors, a sharded *.index.json, a .ckpt/.pt/.pth/.bin, a diffusers or a transformers folder.

    Reads headers only (of a pickle: everything but the tensors' bytes). FileError for what cannot be read safely."""
    path = Path(path)
    if not path.exists():
        raise FileError(path, "does not exist.", "Check the path.")
    return Checkpoint(path, open_parts(path))


class Checkpoint(Mapping[str, Tensor]):
    """Canonical name -> tensor in its stored dtype. A context manager.

    raw: everything in the file, under stored names. specs: canonical name -> Param, from headers, no EMA copies."""

    def __init__(self, path: Path, raw: Raw):
        self.path = path
        self.raw = raw
        stored = {name: (spec.shape, spec.dtype) for name, spec in raw.specs.items()}
        self.specs: dict[str, Param] = canonical(stored)
        self.ema = tuple(name for name in stored if name.startswith(EMA_PREFIX))

    @property
    def layout(self) -> str:
        """ldm, diffusers, hf or other; see keys.layout_of. A folder with a transformers config is hf."""
        return "hf" if self._model_type else layout_of(self.raw.specs)

    @property
    def architecture(self) -> str:
        """sd1, sd2, sdxl, sdxl-refiner, sd3, flux, controlnet, vae, clip; the model_type of a transformers config;
        or unknown."""
        found = architecture_of(self.specs)
        return self._model_type or found if found == "unknown" else found

    @property
    def _model_type(self) -> str:
        return str(json_of(self.path / "config.json").get("model_type") or "") if self.path.is_dir() else ""

    @property
    def metadata(self) -> dict[str, str]:
        """The header's metadata; empty for a pickle."""
        return self.raw.metadata

    @property
    def prediction_type(self) -> str | None:
        """ "epsilon" or "v", None where nothing says: marker keys, modelspec, a yaml beside the file, the scheduler."""
        if "v_pred" in self.raw.specs:
            return "v"
        said = self.metadata.get("modelspec.prediction_type") or _said_beside(self.path)
        if said in (None, "", "None"):
            return None
        return "v" if str(said).startswith("v") else "epsilon"

    @property
    def zero_terminal_snr(self) -> bool:
        """Whether the marker key `ztsnr` is there."""
        return "ztsnr" in self.raw.specs

    def __getitem__(self, name: str) -> Tensor:
        param = self.specs[name]
        return param.view(self.raw[param.stored])

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    def close(self) -> None:
        """Let go of the file; tensors taken from it must be dropped too before it can be replaced on Windows."""
        self.raw.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _said_beside(path: Path) -> str | None:
    """Prediction type from a diffusers scheduler config, or from `parameterization` in a yaml beside a file."""
    scheduler = path / "scheduler" / "scheduler_config.json"
    if scheduler.is_file():
        return str(json_of(scheduler).get("prediction_type", "epsilon"))
    yaml = path.with_suffix(".yaml")
    if not path.is_file() or not yaml.is_file():
        return None
    lines = (line.partition(":") for line in text_of(yaml).splitlines())
    values = (value.strip(" \"'") for key, _, value in lines if key.strip() == "parameterization")
    return next(values, "epsilon")
