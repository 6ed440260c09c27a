"""Sizes of one area and many shapes: each picture goes to the one most like it, so that little of it is cut away."""

from __future__ import annotations

import math

from train.config import DataConfig

Size = tuple[int, int]
"""(width, height) in pixels."""


def bucket_sizes(resolution: int, low: int = 256, high: int = 1024, step: int = 64) -> list[Size]:
    """All sizes of at most resolution**2 pixels whose sides are multiples of `step` from `low` to `high`: per width the
    largest height, its transpose, and the square (which may lie outside low .. high). The sizes of kohya's trainer."""
    area, square = resolution**2, max(step, resolution // step * step)
    found = {(square, square)}
    for width in range(-(-low // step) * step, high + 1, step):
        height = min(high, area // width) // step * step
        if height >= low:
            found |= {(width, height), (height, width)}
    return sorted(found)


def bucket(size: Size, data: DataConfig) -> Size:
    """The size a picture of `size` is trained at. Without data.upscale a small one keeps its own, cut to the step."""
    if not data.buckets:
        return data.resolution, data.resolution
    if not data.upscale:
        return _not_enlarged(size, data)
    shape = math.log(size[0] / size[1])
    sizes = bucket_sizes(data.resolution, data.bucket_min, data.bucket_max, data.bucket_step)
    return min(sizes, key=lambda s: (abs(math.log(s[0] / s[1]) - shape), -s[0] * s[1]))


def _not_enlarged(size: Size, data: DataConfig) -> Size:
    shrink = min(1.0, data.resolution / math.sqrt(size[0] * size[1]))
    width, height = (max(data.bucket_step, int(side * shrink) // data.bucket_step * data.bucket_step) for side in size)
    return width, height


def covering(size: Size, target: Size) -> Size:
    """`size` scaled, its shape kept, until it just covers `target`."""
    scale = max(target[0] / size[0], target[1] / size[1])
    width, height = (max(t, round(side * scale)) for side, t in zip(size, target, strict=True))
    return width, height


def corner(covered: Size, target: Size) -> Size:
    """(left, top) of the `target` in the middle of `covered`."""
    return (covered[0] - target[0]) // 2, (covered[1] - target[1]) // 2
