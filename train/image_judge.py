"""A judge of any picture: an image model of transformers (CLIP, DINO) that has seen a few examples of each name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lineage.errors import FileError, LineageError, MissingExtra
from train import images

FEWEST = 3
"""Names that a judge tells apart: with fewer, nothing is left of a picture when the target is left out."""


def references(folder: Path, targets: Iterable[str]) -> dict[str, tuple[Path, ...]]:
    """Name -> its pictures, of a folder with one folder for each name. LineageError where a target has none, or where
    there are too few names to tell apart."""
    if not folder.is_dir():
        raise FileError(folder, "is no folder.", "Name the folder with a folder of pictures for each name.")
    shelves = {f.name: tuple(sorted(p for p in f.iterdir() if p.suffix.lower() in images.SUFFIXES))
               for f in sorted(folder.iterdir()) if f.is_dir()}  # fmt: skip
    found = {name: shown for name, shown in shelves.items() if shown}
    if missing := [name for name in targets if name not in found]:
        raise LineageError(f"{folder}: no pictures of {missing[0]!r}. The judges need a folder {missing[0]}/.")
    if len(found) < FEWEST:
        raise LineageError(
            f"{folder}: pictures of {len(found)} names; at least {FEWEST} are needed, targets among them."
        )
    return found


@dataclass(frozen=True)
class ImageJudge:
    """The image model in a local `folder`; its score of a name is the cosine of a picture's features with the mean of
    the name's references, both from the mean over all names."""

    folder: Path
    shown: Mapping[str, Sequence[Path]]

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(self.shown)

    @torch.no_grad()
    def scores(self, images: Tensor) -> Tensor:
        """(n, labels) in [-1, 1]."""
        centre, names = self._known
        return normalize(self._features(images) - centre) @ names.T

    @cached_property
    def _known(self) -> tuple[Tensor, Tensor]:
        """(1, features), (labels, features)."""
        size = (256, 256)
        means = []
        for shown in self.shown.values():
            found = torch.cat([self._features(images.read_pixels(path, size)[None]) for path in shown])
            means.append(found.mean(0))
        stacked = torch.stack(means)
        centre = stacked.mean(0, keepdim=True)
        return centre, normalize(stacked - centre)

    def _features(self, pixels: Tensor) -> Tensor:
        """(n, features) of length 1, of pictures in [-1, 1]."""
        processor, model = self._model
        shown = [picture.permute(1, 2, 0).add(1).div(2).clamp(0, 1).numpy() for picture in pixels]
        inputs = processor(images=shown, do_rescale=False, return_tensors="pt")
        if hasattr(model, "get_image_features"):
            found = model.get_image_features(**inputs)
            found = getattr(found, "pooler_output", found)  # transformers 5 wraps it
        else:
            found = model(**inputs).last_hidden_state[:, 0]
        return normalize(found)

    @cached_property
    def _model(self) -> tuple[Any, Any]:
        try:
            from transformers import AutoImageProcessor, AutoModel
        except ImportError as e:
            raise MissingExtra("image judges", "train", "transformers") from e
        if not self.folder.is_dir():
            raise FileError(self.folder, "is no folder.", "Name the folder of an image model of transformers.")
        try:
            # weights from safetensors alone: a pickle could run code
            model = AutoModel.from_pretrained(self.folder, local_files_only=True, use_safetensors=True)
            return AutoImageProcessor.from_pretrained(self.folder, local_files_only=True), model.eval()
        except (OSError, ValueError) as e:
            raise FileError(
                self.folder, f"is no image model of transformers ({str(e).splitlines()[0]}).",
                "Name a folder with config.json, model.safetensors and preprocessor_config.json.",
            ) from e  # fmt: skip
