"""What an adapter does to a model, measured so that cells can be compared: the same pictures, noise and timesteps.

Held-out loss says how well a model draws what a picture shows; scores of a judge say what its own pictures look like.
Common random numbers: they depend on a picture's number and the draw alone, never on the model or the adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from lineage.adapters import Adapter
from lineage.factors import Factors
from train import folders, images
from train.config import DataConfig
from train.folders import Picture
from train.loop import denoising_errors, randomness
from train.models import Base, Text

LOSS = 2  # whose randomness, beside that of a training run


class Judge(Protocol):
    """Says of pictures which styles they show; scores are independent of each other, so they need not sum to 1."""

    @property
    def styles(self) -> tuple[str, ...]: ...

    def scores(self, images: Tensor) -> Tensor:
        """(n, styles) in [0, 1] of pictures (n, 3, height, width) in [-1, 1]."""
        ...


def held_out(folder: Path, data: DataConfig, limit: int) -> tuple[Picture, ...]:
    """The first `limit` pictures of kohya-style folders by name, read and pruned as `data` says.

    FileError as `train.folders.pictures` raises it."""
    found, _ = folders.pictures(replace(data, folder=folder, reg=None))
    return found[:limit]


def losses(base: Base, pictures: Sequence[Picture], draws: int, clip_skip: int, without: str = "") -> list[float]:
    """Denoising loss of each picture under its own caption, the tag `without` left out; mean over `draws` timesteps,
    one in each of as many equal parts of the schedule."""
    return [_loss(base, p, number, draws, clip_skip, without) for number, p in enumerate(pictures)]


@torch.no_grad()
def _loss(base: Base, picture: Picture, number: int, draws: int, clip_skip: int, without: str) -> float:
    latents = base.encode_images(images.read_pixels(picture.path, picture.bucket)[None])
    with base.arithmetic():
        text = base.encode_text([caption(picture, without)], clip_skip)
    t, noise = common(number, draws, latents.shape[1:], base.schedule.config.num_train_timesteps)
    repeated = latents.expand(draws, -1, -1, -1)
    device = latents.device
    errors = denoising_errors(base, repeated, _repeated(text, draws), t.to(device), noise.to(device))
    return float(errors.double().mean())


def common(number: int, draws: int, shape: Sequence[int], timesteps: int) -> tuple[Tensor, Tensor]:
    """(timesteps (draws,), noise (draws, *shape)) of picture `number`: the common random numbers of every loss."""
    part = timesteps // draws
    drawn = [randomness(LOSS, draw, number, shape, part) for draw in range(draws)]
    return torch.stack([t + part * i for i, (t, _) in enumerate(drawn)]), torch.stack([noise for _, noise in drawn])


def caption(picture: Picture, without: str = "") -> str:
    return ", ".join(tag for tag in picture.caption.tags if tag != without)


def _repeated(text: Text, count: int) -> Text:
    pooled = None if text.pooled is None else text.pooled.expand(count, -1)
    return Text(text.states.expand(count, -1, -1), pooled)


def retention(now: Tensor, before: Tensor, target: int | None) -> Tensor:
    """How much each picture still looks as it did without the adapter: cosine (n,) of two tables of scores (n, styles),
    the column of the `target` style left out of both."""
    kept = [i for i in range(now.shape[1]) if i != target]
    return cosine_similarity(now[:, kept].double(), before[:, kept].double(), dim=1)


def random_like(adapter: Adapter, seed: int) -> Adapter:
    """An adapter of the same modules and kinds whose deltas have the same Frobenius norms in random directions."""
    generator = torch.Generator().manual_seed(seed)
    return replace(adapter, modules={name: _random_like(f, generator) for name, f in sorted(adapter.modules.items())})


def _random_like(f: Factors, generator: torch.Generator) -> Factors:
    drawn = replace(f, tensors={slot: torch.randn(t.shape, generator=generator) for slot, t in f.tensors.items()})
    return replace(drawn, alpha=drawn.alpha * float(f.delta().norm() / drawn.delta().norm()))
