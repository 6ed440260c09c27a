"""Pictures of a world as training data on disk: one folder of repeats, a caption beside each picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from train.pictures import Picture


def write_pictures(folder: Path, name: str, pictures: Sequence[Picture]) -> Path:
    """folder/1_NAME/000.png with 000.txt, ...; returns the folder that a training configuration names."""
    shelf = folder / f"1_{name}"
    shelf.mkdir(parents=True, exist_ok=True)
    for n, picture in enumerate(pictures):
        picture.image.save(shelf / f"{n:03}.png")
        (shelf / f"{n:03}.txt").write_text(picture.caption + "\n", encoding="utf-8")
    return folder
