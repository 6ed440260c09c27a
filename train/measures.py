"""What an adapter does to a model, measured so that cells can be compared: the same pictures, noise and timesteps.

Held-out loss says how well a model draws what a picture shows; scores of a judge say what its own pictures look like.
Common random numbers: they depend on a picture's number and the draw alone, never on the model or the adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
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
AT_ONCE = 2**14  # latent pixels: four samples of SD1.5 at 512 px


class Judge(Protocol):
    """Says of pictures what they show; scores are independent of each other, so they need not sum to 1."""

    @property
    def labels(self) -> tuple[str, ...]: ...

    def scores(self, images: Tensor) -> Tensor:
        """(n, labels), larger for more, of pictures (n, 3, height, width) in [-1, 1]."""
        ...


def held_out(data: DataConfig, limit: int) -> tuple[Picture, ...]:
    """The first `limit` pictures of kohya-style folders by name, read and pruned as `data` says.

    FileError as `train.folders.pictures` raises it."""
    found, _ = folders.pictures(replace(data, reg=None))
    return found[:limit]


def losses(base: Base, pictures: Sequence[Picture], draws: int, clip_skip: int) -> list[float]:
    """Denoising loss of each picture under its own caption; mean over `draws` timesteps, one in each of as many equal
    parts of the schedule."""
    found = []
    for (width, height), alike in groupby(enumerate(pictures), lambda numbered: numbered[1].bucket):
        numbered = list(alike)
        count = max(1, AT_ONCE * base.shrink**2 // (width * height * draws))
        for start in range(0, len(numbered), count):
            found += _losses(base, numbered[start : start + count], draws, clip_skip)
    return found


@torch.no_grad()
def _losses(base: Base, numbered: Sequence[tuple[int, Picture]], draws: int, clip_skip: int) -> list[float]:
    """Of pictures of one size."""
    pixels = torch.stack([images.read_pixels(p.path, p.bucket) for _, p in numbered])
    latents = base.encode_images(pixels)
    with base.arithmetic():
        text = base.encode_text([", ".join(p.caption.tags) for _, p in numbered], clip_skip)
    steps = base.schedule.config.num_train_timesteps
    drawn = [common(number, draws, latents.shape[1:], steps) for number, _ in numbered]
    t, noise = (torch.cat(each).to(latents.device) for each in zip(*drawn, strict=True))
    errors = denoising_errors(base, latents.repeat_interleave(draws, 0), _repeated(text, draws), t, noise)
    return errors.double().view(-1, draws).mean(1).tolist()


def common(number: int, draws: int, shape: Sequence[int], timesteps: int) -> tuple[Tensor, Tensor]:
    """(timesteps (draws,), noise (draws, *shape)) of picture `number`: the common random numbers of every loss."""
    part = timesteps // draws
    drawn = [randomness(LOSS, draw, number, shape, part) for draw in range(draws)]
    return torch.stack([t + part * i for i, (t, _) in enumerate(drawn)]), torch.stack([noise for _, noise in drawn])


def _repeated(text: Text, count: int) -> Text:
    pooled = None if text.pooled is None else text.pooled.repeat_interleave(count, 0)
    return Text(text.states.repeat_interleave(count, 0), pooled)


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
