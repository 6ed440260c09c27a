"""Judges: what a picture shows, as one independent probability per style and per character.

Two that have nothing in common but their training pictures: a small convolutional network, and logistic regressions on
gradients and colours. Both learn from a part of the pictures that no model sees, also as the autoencoder renders them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from train.fit import Plan, decoded, descend, pixels
from train.pictures import Picture, can_portray, gallery, portraits

Kind: TypeAlias = Literal["network", "features"]
KINDS: tuple[Kind, ...] = ("network", "features")
PLAN = Plan(steps=400, lr=2e-3, muon_lr=0.02, batch=64)


@dataclass(frozen=True)
class Judge:
    """labels: styles, then characters. scorer: (n, 3, 64, 64) in [-1, 1] -> logits (n, labels)."""

    labels: tuple[str, ...]
    styles: int
    scorer: Callable[[Tensor], Tensor]

    @torch.no_grad()
    def scores(self, images: Tensor) -> Tensor:
        """Probability of each label by itself, (n, labels): a picture may show several, or none."""
        return self.scorer(images).sigmoid()

    def accuracy(self, pictures: Sequence[Picture], images: Tensor | None = None) -> float:
        """Share of pictures (as drawn, or as `images` in their place) whose own style scores highest of all styles."""
        scores = self.scores(pixels(pictures) if images is None else images)[:, : self.styles]
        own = torch.tensor([self.labels.index(p.style) for p in pictures])
        return float((scores.argmax(1) == own).float().mean())


def fit(
    styles: Sequence[str],
    seed: int,
    part: str = "judge",
    *,
    characters: Sequence[str] = (),
    vae: Any = None,
    kind: Kind = "network",
    count: int = 120,
    plan: Plan | None = None,
) -> Judge:
    """Learn to tell `styles` and `characters` from `count` pictures of each style (and as many with characters).

    vae: half of the pictures are also shown as this autoencoder renders them."""
    labels = (*styles, *characters)
    pictures = examples(styles, characters, count, seed, part)
    images = pixels(pictures)
    truth = torch.tensor([[float(label == p.style or label in p.names) for label in labels] for p in pictures])
    if vae is not None:
        images, truth = torch.cat([images, decoded(vae, images[::2])]), torch.cat([truth, truth[::2]])
    learn = _network if kind == "network" else _features
    return Judge(labels, len(styles), learn(images, truth, plan or PLAN, seed))


def examples(styles: Sequence[str], characters: Sequence[str], count: int, seed: int, part: str) -> list[Picture]:
    """`count` pictures of each style, and of each character spread over the styles that can portray it."""
    found = gallery(styles, count, seed, part)
    for name in characters:
        able = [style for style in styles if can_portray(style, name)]
        found += portraits([name], able, -(-count // max(1, len(able))), seed, part)
    return found


def _network(images: Tensor, truth: Tensor, plan: Plan, seed: int) -> Callable[[Tensor], Tensor]:
    """Four convolutions; trained on shifted and noisy pictures, as generated ones are never clean."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        widths = (3, 24, 48, 96, 96)
        layers: list[nn.Module] = []
        for a, b in pairwise(widths):
            layers += [nn.Conv2d(a, b, 3, stride=2, padding=1), nn.GroupNorm(8, b), nn.SiLU()]
        net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], truth.shape[1]))
    generator = torch.Generator().manual_seed(seed)

    def loss() -> Tensor:
        chosen = torch.randint(len(images), (plan.batch,), generator=generator)
        y, x = (torch.randint(-4, 5, (2,), generator=generator)).tolist()
        shown = images[chosen].roll((y, x), (2, 3))
        shown = shown + 0.2 * torch.rand((), generator=generator) * torch.randn(shown.shape, generator=generator)
        return functional.binary_cross_entropy_with_logits(net(shown), truth[chosen])

    for _ in descend(dict(net.named_parameters()), loss, plan):
        pass
    return net.eval()


def _features(images: Tensor, truth: Tensor, plan: Plan, seed: int) -> Callable[[Tensor], Tensor]:
    from sklearn.linear_model import LogisticRegression

    x = describe(images)
    mean, std = x.mean(0), x.std(0).clamp_min(1e-3)
    scaled = ((x - mean) / std).numpy()
    fitted = [LogisticRegression(C=0.02, max_iter=500).fit(scaled, y.numpy()) for y in truth.T]
    weight = torch.stack([torch.from_numpy(f.coef_[0]).float() for f in fitted])
    bias = torch.tensor([float(f.intercept_[0]) for f in fitted])
    return lambda shown: functional.linear((describe(shown) - mean) / std, weight, bias)


def describe(images: Tensor) -> Tensor:
    """Per cell of an 8 x 8 grid: mean colour and the strength of eight directions of edges (Dalal & Triggs 2005),
    (n, 704)."""
    grey = images.mean(1, keepdim=True)
    dx, dy = grey.roll(-1, 3) - grey.roll(1, 3), grey.roll(-1, 2) - grey.roll(1, 2)
    angle = torch.atan2(dy, dx).div(torch.pi / 4).round().long() % 8
    edges = functional.one_hot(angle[:, 0], 8).permute(0, 3, 1, 2) * torch.hypot(dx, dy)
    return functional.avg_pool2d(torch.cat([images, edges], 1), 8).flatten(1)
