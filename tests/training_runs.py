"""Tiny training runs: pictures of plain colours in kohya's folders, on a tiny base, a few steps of a small network."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image
from training_bases import write_file

from train.config import Config, DataConfig, ModelConfig, NetworkConfig, SampleConfig, SaveConfig, TrainingConfig

COLOURS = {"red": (216, 67, 63), "blue": (60, 99, 196), "green": (63, 154, 86), "black": (43, 43, 48)}


def write_pictures(folder: Path, size: tuple[int, int] = (64, 64)) -> Path:
    """Two folders of two pictures of one colour each; the colour is in the caption."""
    for i, (name, colour) in enumerate(COLOURS.items()):
        inside = folder / ("2_styles~plain" if i < 2 else "1_others")
        inside.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, colour).save(inside / f"{name}.png")
        (inside / f"{name}.txt").write_text(f"{name} shirt, OyamaMahiro, plain", encoding="utf-8")
    return folder


def config(folder: Path, kind: str = "sd1", **changes: Any) -> Config:
    """Settings of a run in folder/run on a base in folder/base; `changes`: "section.key"=value with __ for the dot."""
    base = folder / "base" / "base.safetensors"
    if not base.exists():
        base.parent.mkdir(parents=True, exist_ok=True)
        write_file(base, kind)
        write_pictures(folder / "data")
    sections = {
        "model": ModelConfig(base, prediction="epsilon"),
        "data": DataConfig(folder / "data", resolution=64, bucket_min=64, bucket_max=128),
        "network": NetworkConfig(dim=4, conv_dim=2),
        "training": TrainingConfig(steps=6, batch=2, lr=0.01),
        "sample": SampleConfig(steps=2),
        "save": SaveConfig(folder / "run", at=(), state_every=2),
    }
    for name, value in changes.items():
        section, key = name.split("__")
        sections[section] = replace(sections[section], **{key: value})
    return Config(**sections)
