"""Does a fine-tune live in few ranks? Put to its function: what base + k ranks of the change still draws.

Common random numbers: every model of a pair meets the same pictures, timesteps and noise, and draws from the same.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean, median
from typing import Any, TypeVar

import torch

import lineage
from lineage.adapters import open_adapter
from lineage.extract_result import AdaptedLayer
from lineage.rank_records import Outcome, RankPair, RankPoint
from lineage.results import SvdResult
from lineage.spectrum import gaussian_energy
from train import pictures, pipeline
from train.applied import Applied
from train.config import NetworkConfig
from train.fit import denoising_loss, encode_latents, fit_denoiser, pixels
from train.judge import Judge
from train.networks import Network
from train.topology import Model, World
from train.world import model_file

Progress = Callable[[int, int, str], None]
Found = TypeVar("Found")
WIDEST = 2**20
"""A rank that no matrix has."""


@dataclass(frozen=True)
class Protocol:
    """ranks: of extraction, ascending. trained: ranks of direct training, ascending, at each of `rates`; the best one
    on pictures of the part "rates" counts; the widest is then compressed to the others. pictures: held out, of each
    style; draws: timesteps and noises of each; drawn: by each model, for the judge."""

    ranks: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    trained: tuple[int, ...] = (1, 4, 32)
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    pictures: int = 24
    draws: int = 8
    drawn: int = 12


class Examiner:
    """Measures models of one pair on pictures of `styles` that belong to `part`."""

    def __init__(self, world: World, model: Model, judge: Judge, protocol: Protocol, part: str = "test"):
        shown = pictures.gallery(model.styles, protocol.pictures, world.seed, part)
        self.shown = [replace(picture, artist=model.artist) for picture in shown]
        self.judge, self.protocol, self.seed = judge, protocol, world.seed

    @cached_property
    def pixels(self) -> torch.Tensor:
        return pixels(self.shown)

    @torch.no_grad()
    def loss(self, model: pipeline.Pipeline) -> float:
        """Mean over pictures, timesteps and noises."""
        latents = encode_latents(model.vae, self.pixels)
        text = pipeline.encode_text(model, [picture.caption for picture in self.shown])
        generator = torch.Generator().manual_seed(self.seed)
        draws = range(self.protocol.draws)
        return fmean(float(denoising_loss(model, latents, text, generator)) for _ in draws)

    def outcome(self, model: pipeline.Pipeline) -> Outcome:
        return Outcome(self.loss(model), self.score(model))

    def score(self, model: pipeline.Pipeline) -> float:
        """What the judge gives to the style asked for."""
        asked = self.shown[:: max(1, len(self.shown) // self.protocol.drawn)][: self.protocol.drawn]
        images = pipeline.sample(model, [picture.caption for picture in asked], self.seed)
        drawn = [replace(picture, image=image) for picture, image in zip(asked, images, strict=True)]
        own = torch.tensor([[self.judge.labels.index(picture.style)] for picture in asked])
        return float(self.judge.scores(pixels(drawn)).gather(1, own).mean())


def examine(
    name: str,
    world: World,
    folder: Path,
    model: Model,
    judge: Judge,
    protocol: Protocol,
    progress: Progress | None = None,
) -> RankPair:
    """All of one fine-tune of a world that lies in `folder`; `name`: the world's. progress counts models measured."""
    assert model.parent
    parent, child = (model_file(folder, m) for m in (model.parent, model.name))
    base, examiner = pipeline.load(parent), Examiner(world, model, judge, protocol)
    total, count = 2 + len(protocol.ranks) + 2 * len(protocol.trained), 0

    def told(found: Found, label: str) -> Found:
        nonlocal count
        count += 1
        if progress:
            progress(count, total, f"{name}, {model.name}: {label}")
        return found

    before = told(examiner.outcome(base), "base")
    after = told(examiner.outcome(pipeline.load(child)), "fine-tune")
    cut = [
        told(extracted(base, parent, child, k, examiner), f"extracted, {k or 'all'}") for k in (*protocol.ranks, None)
    ]
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "trained.safetensors"  # the last, widest one stays
        learned = [told(trained(world, parent, model, k, examiner, file), f"trained, {k}") for k in protocol.trained]
        smaller = [told(compressed(base, file, k, examiner), f"compressed, {k}") for k in protocol.trained[:-1]]
    found = lineage.svd(parent, child, components=("unet", "text_encoder"), solver="full")
    return RankPair(
        world=name,
        parent=model.parent,
        child=model.name,
        styles=model.styles,
        steps=model.plan.steps,
        lr=model.plan.lr,
        base=before,
        tuned=after,
        extracted=tuple(cut),
        trained=tuple(learned),
        compressed=tuple(smaller),
        **facts(found),
    )


def facts(found: SvdResult) -> dict[str, Any]:
    """relative, median_side and effective_rank (medians over the layers that changed) of a RankPair."""
    layers = [layer for layer in found.layers if layer.frobenius > 0]
    return {
        "relative": found.summary.relative or 0.0,
        "median_side": round(median(short_side(layer.shape) for layer in layers)),
        "effective_rank": median(layer.effective_rank for layer in layers if layer.effective_rank is not None),
    }


def short_side(shape: Sequence[int]) -> int:
    """Of a weight seen as the matrix (out, in * kernel): the largest rank it can have."""
    return min(shape[0], math.prod(shape[1:]))


def extracted(base: pipeline.Pipeline, parent: Path, child: Path, rank: int | None, examiner: Examiner) -> RankPoint:
    """The change from `parent` to `child` cut to `rank` (None: all ranks), put on `base` (the parent, opened)."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "cut.safetensors"
        made = lineage.extract(parent, child, file, rank=rank or WIDEST)
        return RankPoint(rank, *applied(base, file, examiner), energy(made.layers), null(made.layers))


def compressed(base: pipeline.Pipeline, file: Path, rank: int, examiner: Examiner) -> RankPoint:
    """The adapter in `file` cut to `rank` after its training, put on `base`."""
    with tempfile.TemporaryDirectory() as scratch:
        small = Path(scratch) / "small.safetensors"
        made = lineage.resize(file, small, rank=rank)
        return RankPoint(rank, *applied(base, small, examiner), energy(made.layers))


def applied(base: pipeline.Pipeline, file: Path, examiner: Examiner) -> tuple[int, Outcome]:
    """(entries of the adapter's factors, what it does on `base`)."""
    adapter = open_adapter(file)
    with Applied(base.unet, [base.text_encoder], [(adapter, 1.0)]):
        outcome = examiner.outcome(base)
    return sum(t.numel() for module in adapter.modules.values() for t in module.tensors.values()), outcome


def energy(layers: Sequence[AdaptedLayer]) -> float:
    """Share of the squared change of all layers that the adapter holds."""
    return 1 - _mean([layer.error**2 for layer in layers], layers)


def null(layers: Sequence[AdaptedLayer]) -> float:
    """`energy` if every change were a Gaussian matrix of its shape and size."""
    sides = [(layer.shape[0], math.prod(layer.shape[1:])) for layer in layers]
    return _mean([gaussian_energy(side, layer.rank) for side, layer in zip(sides, layers, strict=True)], layers)


def _mean(values: Sequence[float], layers: Sequence[AdaptedLayer]) -> float:
    """Weighted by the squared change of each layer."""
    weights = [layer.frobenius**2 for layer in layers]
    return sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)


def trained(world: World, parent: Path, model: Model, rank: int, examiner: Examiner, file: Path) -> RankPoint:
    """A LoCon of `rank` trained on the parent as `model` was: pictures, batches and steps the same, at the rate whose
    loss on other pictures is the lowest. Written to `file`."""
    other = Examiner(world, model, examiner.judge, examiner.protocol, part="rates")
    found = []
    for lr in examiner.protocol.rates:
        tuned, network = learn(world, parent, model, rank, lr)
        found.append((other.loss(tuned), lr, tuned, network))
    _, lr, tuned, network = min(found, key=lambda f: f[:2])
    network.save(file, {})
    return RankPoint(rank, sum(p.numel() for p in network.parameters()), examiner.outcome(tuned), lr=lr)


def learn(world: World, parent: Path, model: Model, rank: int, lr: float) -> tuple[pipeline.Pipeline, Network]:
    """The parent with a trained LoCon on it."""
    tuned = pipeline.load(parent)
    shape = NetworkConfig(algo="locon", dim=rank, alpha=rank, conv_dim=rank, conv_alpha=rank)
    network = Network(tuned.unet, [tuned.text_encoder], shape, world.seed)
    shown = pictures.gallery(model.styles, world.pictures, world.seed)
    shown = [replace(picture, artist=model.artist) for picture in shown]
    parameters = {str(n): p for n, p in enumerate(network.parameters())}
    for _ in fit_denoiser(tuned, shown, replace(model.plan, lr=lr), world.seed, parameters):
        pass
    return tuned, network
