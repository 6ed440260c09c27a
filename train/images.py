"""Picture files of any mode, read as RGB pixels of one size. Every file is foreign: none may fill the memory."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lineage.errors import FileError, MissingExtra
from train.buckets import Size, corner, covering

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif")
LARGEST = 80_000_000
"""Pixels; a file of a few kB can claim any number, and each takes 3 or 4 bytes."""
ORIENTATION = 0x0112
TURNED = (5, 6, 7, 8)
"""EXIF orientations that swap width and height."""


def read_size(path: Path) -> Size:
    """(width, height) as shown, from the header alone. FileError for what is no picture, or too large a one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of sizes that are refused here
        with _opened(path) as image:
            width, height = image.size
            turned = _orientation(image) in TURNED
    if width * height > LARGEST:
        raise FileError(path, f"is {width} x {height} pixels.", f"Scale it below {LARGEST:,} pixels, or remove it.")
    return (height, width) if turned else (width, height)


def check(path: Path) -> None:
    """FileError where the file cannot be decoded to its end."""
    with _opened(path) as image:
        if image.format == "PNG":
            image.verify()  # every chunk's checksum, at the speed of reading
        else:
            image.draft("RGB", (image.width // 8, image.height // 8))
            image.load()


def read_pixels(path: Path, size: Size, flip: bool = False) -> Tensor:
    """(3, height, width) float32 in [-1, 1]: upright, scaled to cover `size` (width, height), its middle cut out,
    mirrored where `flip`; transparent pixels over white. FileError as `read_size` and `check`."""
    from PIL import Image, ImageOps

    read_size(path)
    with _opened(path) as image:
        upright = _rgb(ImageOps.exif_transpose(image) if _orientation(image) != 1 else image)
        covered = covering(upright.size, size)
        if covered != upright.size:
            upright = upright.resize(covered, Image.Resampling.LANCZOS, reducing_gap=3.0)
        left, top = corner(covered, size)
        cut = np.asarray(upright.crop((left, top, left + size[0], top + size[1])))
    pixels = torch.from_numpy(cut[:, ::-1].copy() if flip else cut.copy())
    return pixels.permute(2, 0, 1).float() / 127.5 - 1


def _orientation(image: Image.Image) -> int:
    """EXIF's, 1: upright. Of a PNG only what stands before its pixels: Pillow would decode it to look behind them."""
    if image.format == "PNG" and not {"exif", "Raw profile type exif"} & image.info.keys():
        return 1
    return image.getexif().get(ORIENTATION, 1)


def _rgb(image: Image.Image) -> Image.Image:
    from PIL import Image

    if image.mode.startswith("I"):  # 16 bits of grey, which convert() would clip at 255
        image = Image.fromarray((np.asarray(image).astype(np.uint32).clip(0, 65535) // 257).astype(np.uint8))
    if image.has_transparency_data:
        shown = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", shown.size, "white"), shown).convert("RGB")
    return image.convert("RGB")


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The open picture; everything Pillow may raise over a bad file becomes a FileError."""
    try:
        from PIL import Image
    except ModuleNotFoundError as e:
        raise MissingExtra("train", "train", "pillow") from e
    try:
        with Image.open(path) as image:
            yield image
    except Image.DecompressionBombError as e:
        raise FileError(
            path, f"is too large a picture: {e}", f"Scale it below {LARGEST:,} pixels, or remove it."
        ) from e
    except Image.UnidentifiedImageError as e:
        raise FileError(path, "is not a picture.", "Remove it, or save it again as PNG or JPEG.") from e
    except (OSError, SyntaxError, ValueError, EOFError) as e:
        raise FileError(path, f"is a damaged picture: {e}.", "Remove it, or save it again as PNG or JPEG.") from e
