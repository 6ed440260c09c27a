"""Pictures in folders named <repeats>_<class tokens>, with their captions: kohya's convention."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lineage.errors import FileError
from train import captions, images
from train.buckets import Size, bucket
from train.captions import Caption
from train.config import DataConfig

Progress = Callable[[int, int, str], None]
NAME = re.compile(r"([0-9]{1,6})_(.+)", re.DOTALL)


@dataclass(frozen=True)
class Picture:
    """A picture of the training set; `size` as it lies on the disk (upright), `bucket` as it is trained, both (width,
    height). `folder` is its folder's name, `bytes` its file's size."""

    path: Path
    folder: str
    repeats: int
    regularisation: bool
    size: Size
    bucket: Size
    caption: Caption
    bytes: int

    @property
    def name(self) -> str:
        """Folder and file, the same wherever the data lies."""
        return f"{'reg' if self.regularisation else 'data'}/{self.folder}/{self.path.name}"


def pictures(data: DataConfig, progress: Progress | None = None) -> tuple[tuple[Picture, ...], tuple[str, ...]]:
    """(all pictures, sorted by name; notes on what was left out). Every file is decoded once.

    FileError for a folder without pictures, a bad picture, an unreadable caption."""
    notes: list[str] = []
    files = list(_files(data.folder, notes))
    counted = len(files)
    files += _files(data.reg, notes) if data.reg else []
    found = []
    for i, (file, repeats, tokens) in enumerate(files):
        found.append(_picture(file, repeats, tokens, i >= counted, data))
        if progress:
            progress(i + 1, len(files), "reading pictures")
    return tuple(found), tuple(notes)


def _picture(file: Path, repeats: int, tokens: str, regularisation: bool, data: DataConfig) -> Picture:
    size = images.read_size(file)
    images.check(file)
    return Picture(
        path=file,
        folder=file.parent.name,
        repeats=repeats,
        regularisation=regularisation,
        size=size,
        bucket=bucket(size, data),
        caption=captions.parse(captions.read_caption(file, tokens), data),
        bytes=file.stat().st_size,
    )


def _files(root: Path, notes: list[str]) -> Iterator[tuple[Path, int, str]]:
    """(picture, repeats, class tokens) of every folder; only direct children count, so no link can lead in circles."""
    found = False
    for folder in _children(root):
        match = NAME.fullmatch(folder.name)
        if not match or not folder.is_dir():
            if folder.is_dir() or folder.suffix.lower() in images.SUFFIXES:
                notes.append(f"{folder.name}: left out, not a folder named <repeats>_<class tokens>")
            continue
        shown = [f for f in _children(folder) if f.suffix.lower() in images.SUFFIXES and not f.name.startswith(".")]
        if not shown:
            raise FileError(folder, "holds no pictures.", f"Known are {', '.join(images.SUFFIXES)}.")
        if int(match[1]) == 0:
            notes.append(f"{folder.name}: left out, 0 repeats")
            continue
        found = True
        yield from ((file, int(match[1]), match[2]) for file in shown)
    if not found:
        raise FileError(root, "holds no pictures to train on.", "Put them in folders named <repeats>_<class tokens>.")


def _children(folder: Path) -> list[Path]:
    try:
        return sorted((Path(entry.path) for entry in os.scandir(folder)), key=lambda path: path.name)
    except OSError as e:
        raise FileError(folder, f"cannot be read as a folder: {e.strerror}.") from e
