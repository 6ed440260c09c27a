"""Pictures in rows and columns, under labels that are wrapped to their place and never cut."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

CELL, GAP, LETTER = 128, 6, 12
"""Pixels: a cell at least, between cells, and the height of letters beside cells of that size."""
MARGIN = 0.9
"""Width of the row labels at most, in cells."""
INK, PAPER = "#1c2330", "#ffffff"

Row = Sequence["Image.Image | None"]


def grid(rows: Sequence[str], columns: Sequence[str], cells: Sequence[Row], title: str = "") -> Image.Image:
    """cells[row][column] (None: empty), small ones enlarged to CELL px without smoothing, under wrapped labels."""
    from PIL import Image, ImageDraw, ImageFont

    width, height = _cell([p for row in cells for p in row if p])
    font = ImageFont.load_default(max(LETTER, width // 24))
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    names = [_wrapped(name, font, int(MARGIN * width)) for name in rows]
    heads = [_wrapped(head, font, width) for head in columns]
    left = GAP + max([0, *(_size(draw, font, name)[0] + 2 * GAP for name in names if name)])
    full = left + len(columns) * (width + GAP)
    title = _wrapped(title, font, full - 2 * GAP)
    head_top = GAP + (_size(draw, font, title)[1] + 2 * GAP if title else 0)
    top = head_top + max([0, *(_size(draw, font, head)[1] + GAP for head in heads if head)])
    heights = [max(height, _size(draw, font, name)[1]) for name in names]
    sheet = Image.new("RGB", (full, top + sum(heights) + len(rows) * GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.multiline_text((GAP, GAP), title, INK, font)
    for c, head in enumerate(heads):
        draw.multiline_text((left + c * (width + GAP), head_top), head, INK, font)
    for r, name in enumerate(names):
        y = top + sum(heights[:r]) + r * GAP
        draw.multiline_text((GAP, y), name, INK, font)
        for c, picture in enumerate(cells[r]):
            if picture:
                sheet.paste(_shown(picture, (width, height)), (left + c * (width + GAP), y))
    return sheet


def _cell(pictures: Sequence[Image.Image]) -> tuple[int, int]:
    """(width, height) that holds every picture: the largest as it is, or as many times as it takes to fill CELL."""
    width, height = (max([1, *(p.size[side] for p in pictures)]) for side in (0, 1))
    times = max(1, -(-CELL // max(width, height)))
    return max(width * times, CELL // 2), max(height * times, CELL // 2)


def _shown(picture: Image.Image, cell: tuple[int, int]) -> Image.Image:
    """As many whole times as the cell holds."""
    from PIL import Image

    times = max(1, min(c // p for c, p in zip(cell, picture.size, strict=True)))
    return picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)


def _size(draw: Any, font: Any, text: str) -> tuple[int, int]:
    """(width, height) from the point where `text` is drawn."""
    if not text:
        return 0, 0
    box = draw.multiline_textbbox((0, 0), text, font)
    return round(box[2] + 0.5), round(box[3] + 0.5)


def _wrapped(text: str, font: Any, width: int) -> str:
    """`text` in lines of at most `width` px: broken at blanks, else behind - _ / . , or, where that is not enough,
    anywhere. What cannot be printed is spelled out."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(text.split()))
    lines = [""]
    for part in _parts(text, lambda part: font.getlength(part) <= width):
        if font.getlength((lines[-1] + part).rstrip()) <= width:
            lines[-1] += part
        else:
            lines.append(part.lstrip())
    return "\n".join(line.strip() for line in lines).strip("\n")


def _parts(text: str, fits: Callable[[str], bool]) -> Iterator[str]:
    """What may stand on a line of its own: words with the blank behind them, their parts, or letters."""
    for word in re.findall(r"\S+ ?", text):
        if fits(word.rstrip()):
            yield word
            continue
        for part in re.findall(r"[^-_/.,]*[-_/.,]+ ?|[^-_/.,]+", word):
            yield from [part] if fits(part) else part


def image(pixels: Tensor) -> Image.Image:
    """A picture of pixels (3, height, width) in [0, 1]."""
    from PIL import Image

    return Image.fromarray((pixels.permute(1, 2, 0) * 255).round().byte().numpy())


def png(picture: Image.Image, told: Mapping[str, str] | None = None) -> bytes:
    """A PNG file with text chunks."""
    from PIL.PngImagePlugin import PngInfo

    info, file = PngInfo(), io.BytesIO()
    for key, text in (told or {}).items():
        info.add_text(key, text)
    picture.save(file, "PNG", pnginfo=info)
    return file.getvalue()
