"""A miniature model's lessons: pictures as training data on disk, and the trainer's settings for an adapter of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.config import Config, DataConfig, ModelConfig, NetworkConfig, SaveConfig, TrainingConfig
from train.pictures import SIZE, Picture

BATCH = 16
RATES = {"loha": 2e-2, "locon": 1e-2, "lora": 1e-2}
"""Learning rates of each network, chosen on the quick world of seed 0."""

PRODUCTS = {"loha": 2, "locon": 1, "lora": 1}
"""Products of factors in a layer's delta."""


def write_pictures(folder: Path, name: str, pictures: Sequence[Picture]) -> Path:
    """folder/1_NAME/000.png with 000.txt, ...; returns the folder that a training configuration names."""
    shelf = folder / f"1_{name}"
    shelf.mkdir(parents=True, exist_ok=True)
    for n, picture in enumerate(pictures):
        picture.image.save(shelf / f"{n:03}.png")
        (shelf / f"{n:03}.txt").write_text(picture.caption + "\n", encoding="utf-8")
    return folder


def data(folder: Path, **more: Any) -> DataConfig:
    """Of pictures that `write_pictures` has written."""
    return DataConfig(folder, resolution=SIZE, bucket_min=SIZE, bucket_max=SIZE, **more)


def lesson(base: Path, pictures: Path, save: SaveConfig, *, steps: int, algo: str = "loha", seed: int = 0) -> Config:
    """Settings of an adapter of `pictures` (see write_pictures) on the model in `base`."""
    rate, order = {"optimizer": "adamw", "lr": RATES[algo], "scheduler": "cosine"}, {"shuffle": True, "keep_tokens": 1}
    return Config(
        ModelConfig(base),
        data(pictures, caption_dropout=0.1, **order),
        NetworkConfig(algo=algo),
        TrainingConfig(steps=steps, batch=BATCH, seed=seed, **rate),
        save=save,
    )
