"""Trainings that differ from the default in one thing, as the article compares them (lineage.hypotheses.SETUPS)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from lineage.transfer_records import DEFAULT
from train import folders, lessons
from train.config import Config
from train.sites import Site
from train.values import GRID

LARGE = {"dim": 32, "conv_dim": 16, "alpha": 1.0, "conv_alpha": 1.0}
HALF = {"alpha": LARGE["dim"] / 2, "conv_alpha": LARGE["conv_dim"] / 2}
FASTER = 2.5  # 5e-4 over 2e-4


@dataclass(frozen=True)
class Way:
    """How an adapter is trained: by which network, and how that differs from the default."""

    network: str
    setup: str = DEFAULT

    def __str__(self) -> str:
        return self.network if self.setup == DEFAULT else self.setup


def changed(config: Config, way: Way, site: Site) -> Config:
    """The site's default `config`, trained that way."""
    if way.network != config.network.algo:
        config = _other_network(config, way.network)
    return CHANGES[way.setup](config, site)


def applied_clip_skip(usual: int, setup: str) -> int:
    """With which clip skip the adapter is used."""
    return _other_skip(usual) if setup == "other clip skip" else usual


def _other_skip(usual: int) -> int:
    return 1 if usual == 2 else 2


def _other_network(config: Config, algo: str) -> Config:
    """Of the same size for each layer: LoHa has two products of factors, the others have one, of twice the dim. The
    learning rate keeps the proportion that suits them (lessons.RATES)."""
    network, training = config.network, config.training
    size = lessons.PRODUCTS[network.algo] / lessons.PRODUCTS[algo]
    scaled = {name: getattr(network, name) * size for name in ("alpha", "conv_alpha")}
    dims = {name: round(getattr(network, name) * size) for name in ("dim", "conv_dim")}
    rate = training.lr * lessons.RATES[algo] / lessons.RATES[network.algo]
    return replace(config, network=replace(network, algo=algo, **dims, **scaled), training=replace(training, lr=rate))


def _data(**changes: Any) -> Callable[[Config, Site], Config]:
    return lambda config, site: replace(config, data=replace(config.data, **changes))


def _training(**changes: Any) -> Callable[[Config, Site], Config]:
    return lambda config, site: replace(config, training=replace(config.training, **changes))


def _large(faster: float = 1.0, **changes: Any) -> Callable[[Config, Site], Config]:
    def change(config: Config, site: Site) -> Config:
        training = replace(config.training, lr=config.training.lr * faster)
        return replace(config, network=replace(config.network, **{**LARGE, **changes}), training=training)

    return change


def _other_pictures(photographic: bool) -> Callable[[Config, Site], Config]:
    return lambda config, site: replace(config, data=replace(config.data, reg=site.other(photographic)))


def _no_tags(config: Config, site: Site) -> Config:
    bare = replace(config.data, keep_tokens=0, prune={})
    shown, _ = folders.pictures(bare)
    tags = {tag for p in shown for tag in p.caption.free}
    return replace(config, data=replace(bare, prune={"*": tuple(sorted(tags))}))


def _higher(config: Config, site: Site) -> Config:
    """1.5 times the side."""
    data = config.data
    resolution, most = (side * 3 // 2 // GRID * GRID for side in (data.resolution, data.bucket_max))
    buckets = data.buckets and data.bucket_min < data.bucket_max
    return replace(config, data=replace(data, resolution=resolution, bucket_max=most, buckets=buckets))


def _half_text(config: Config, site: Site) -> Config:
    return replace(config, training=replace(config.training, text_encoder_lr=config.text_encoder_lr / 2))


def _skip(config: Config, site: Site) -> Config:
    return replace(config, data=replace(config.data, clip_skip=_other_skip(config.data.clip_skip)))


CHANGES: dict[str, Callable[[Config, Site], Config]] = {
    DEFAULT: lambda config, site: config,
    "no tags": _no_tags,
    "all tags": _data(prune={}),
    "regularisation": _other_pictures(False),
    "photo regularisation": _other_pictures(True),
    "higher resolution": _higher,
    "large": _large(),
    "large fast": _large(FASTER),
    "large half alpha": _large(**HALF),
    "constant": _training(scheduler="constant"),
    "cosine": _training(scheduler="cosine"),
    "dadaptation": _training(optimizer="dadapt-adam", lr=1.0, unet_lr=None, text_encoder_lr=None),
    "half text rate": _half_text,
    "other clip skip": _skip,
    "mixed clip skip": _skip,
}
