"""The training set as a plan, and the plan as batches that depend on (seed, step) alone: any step can be the first."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, MutableMapping
from dataclasses import dataclass
from functools import cached_property
from itertools import count, islice
from random import Random
from typing import Any

import torch
from torch import Tensor

from train import images
from train.buckets import Size, corner, covering
from train.config import Config
from train.folders import Picture, Progress, pictures


@dataclass(frozen=True)
class DataPlan:
    """What is trained on: all pictures sorted by name, how many batches an epoch has, how many steps the run takes, and
    notes on what was left out."""

    pictures: tuple[Picture, ...]
    batches_per_epoch: int
    steps: int
    accumulation: int
    notes: tuple[str, ...] = ()

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.batches_per_epoch / self.accumulation)

    @property
    def epochs(self) -> float:
        return self.steps * self.accumulation / self.batches_per_epoch

    def shown(self, regularisation: bool) -> int:
        """Pictures per epoch, repeats counted."""
        return sum(p.repeats for p in self.pictures if p.regularisation is regularisation)

    @cached_property
    def buckets(self) -> dict[Size, int]:
        """(width, height) -> pictures per epoch, repeats counted."""
        return _counted((p.bucket, p.repeats) for p in self.pictures)

    @cached_property
    def tags(self) -> dict[str, int]:
        """Tag -> pictures that carry it, the most frequent first."""
        found = _counted((tag, 1) for p in self.pictures for tag in dict.fromkeys(p.caption.tags))
        return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of names, sizes, repeats and captions: what decides the batches, beside the settings. The pixels count
        through the sizes of their files alone."""
        told = [(p.name, p.repeats, p.size, p.bytes, p.caption.tags) for p in self.pictures]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()

    @property
    def metadata(self) -> dict[str, Any]:
        """The ss_* facts of a data set, under kohya's names."""
        return {
            "ss_num_train_images": self.shown(False),
            "ss_num_reg_images": self.shown(True),
            "ss_num_batches_per_epoch": self.batches_per_epoch,
            "ss_num_epochs": math.ceil(self.epochs),
            "ss_max_train_steps": self.steps,
            "ss_dataset_dirs": self.folders(False),
            "ss_reg_dataset_dirs": self.folders(True),
            "ss_tag_frequency": self._tag_frequency,
        }

    def folders(self, regularisation: bool) -> dict[str, dict[str, int]]:
        """Name -> {"n_repeats", "img_count"}."""
        chosen = [p for p in self.pictures if p.regularisation is regularisation]
        sizes = _counted((p.folder, 1) for p in chosen)
        return {p.folder: {"n_repeats": p.repeats, "img_count": sizes[p.folder]} for p in chosen}

    @property
    def _tag_frequency(self) -> dict[str, dict[str, int]]:
        found: dict[str, Counter[str]] = {}
        for p in self.pictures:
            found.setdefault(p.folder, Counter()).update(p.caption.tags)
        return {folder: dict(tags) for folder, tags in found.items()}


def _counted(pairs: Any) -> dict[Any, int]:
    total: Counter[Any] = Counter()
    for key, number in pairs:
        total[key] += number
    return dict(sorted(total.items()))


@dataclass(frozen=True)
class Batch:
    """Pictures of one size and what this step shows of them: `flips` (mirrored or not), `captions`, and `weights` (n,),
    the factors of their losses. Pixels are read when they are asked for."""

    pictures: tuple[Picture, ...]
    flips: tuple[bool, ...]
    captions: tuple[str, ...]
    weights: Tensor

    def __len__(self) -> int:
        return len(self.pictures)

    @property
    def keys(self) -> tuple[Hashable, ...]:
        """Of each picture: equal for equal pixels."""
        return tuple(zip((p.name for p in self.pictures), self.flips, strict=True))

    def read(self, number: int) -> Tensor:
        """(3, height, width) in [-1, 1]. FileError where the file went bad since the plan was made."""
        picture = self.pictures[number]
        return images.read_pixels(picture.path, picture.bucket, self.flips[number])

    @property
    def pixels(self) -> Tensor:
        """(n, 3, height, width) in [-1, 1]."""
        return torch.stack([self.read(i) for i in range(len(self))])

    @property
    def sizes(self) -> Tensor:
        """(n, 6): height and width of the file, top and left of the cut in the scaled picture, height and width of the
        cut (Podell et al. 2023, section 2.2)."""
        return torch.tensor([_sizes(p, flip) for p, flip in zip(self.pictures, self.flips, strict=True)])


def _sizes(p: Picture, flip: bool) -> list[int]:
    covered = covering(p.size, p.bucket)
    left, top = corner(covered, p.bucket)
    left = covered[0] - p.bucket[0] - left if flip else left
    return [p.size[1], p.size[0], top, left, p.bucket[1], p.bucket[0]]


def plan(config: Config, progress: Progress | None = None) -> DataPlan:
    """Read the folders, check every picture, and count. FileError for what cannot be trained on."""
    found, notes = pictures(config.data, progress)
    training = config.training
    shown = _counted((p.bucket, p.repeats) for p in found)
    batches_per_epoch = sum(math.ceil(n / training.batch) for n in shown.values())
    steps = training.steps or math.ceil((training.epochs or 0) * batches_per_epoch / training.accumulation)
    return DataPlan(found, batches_per_epoch, steps, training.accumulation, notes)


def batches(plan: DataPlan, config: Config, start_step: int = 0) -> Iterator[Batch]:
    """Endless batches, training.accumulation of them per step, from the first of step `start_step` (counted from 0).

    An epoch shows every picture as often as it repeats; batches hold one bucket, so some are smaller than asked for."""
    first = start_step * config.training.accumulation
    for epoch in count(first // plan.batches_per_epoch):
        skipped = max(0, first - epoch * plan.batches_per_epoch)
        for number, members in islice(enumerate(_epoch(plan, config, epoch)), skipped, None):
            yield _batch(members, config, _random(config, "batch", epoch, number))


def _epoch(plan: DataPlan, config: Config, epoch: int) -> list[list[Picture]]:
    """The pictures of every batch of an epoch."""
    random, size = _random(config, "epoch", epoch), config.training.batch
    by_bucket: dict[Size, list[Picture]] = {bucket: [] for bucket in plan.buckets}
    for picture in plan.pictures:
        by_bucket[picture.bucket] += [picture] * picture.repeats
    found = []
    for members in by_bucket.values():
        random.shuffle(members)
        found += [members[i : i + size] for i in range(0, len(members), size)]
    random.shuffle(found)
    return found


def _batch(members: list[Picture], config: Config, random: Random) -> Batch:
    data = config.data
    flips = tuple(data.flip and random.random() < 0.5 for _ in members)
    shown = tuple(p.caption.drawn(data, random) for p in members)
    weights = torch.tensor([data.reg_weight if p.regularisation else 1.0 for p in members])
    return Batch(tuple(members), flips, shown, weights)


def _random(config: Config, *of: Any) -> Random:
    return Random(repr((config.training.seed, *of)))


def latents(batch: Batch, encode: Callable[[Tensor], Tensor], kept: MutableMapping[Hashable, Tensor]) -> Tensor:
    """(n, channels, height, width): those in `kept`, and encode(pixels (1, 3, height, width)) of the others, which are
    kept from then on. One at a time: what an encoder makes of a picture may depend on those beside it, by rounding."""
    for i, key in enumerate(batch.keys):
        if key not in kept:
            kept[key] = encode(batch.read(i)[None])[0]
    return torch.stack([kept[key] for key in batch.keys])
