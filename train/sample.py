"""Labelled grids of pictures."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

CELL, GAP, MARGIN, LINE = 128, 6, 150, 17
INK, PAPER = "#1c2330", "#ffffff"


def grid(rows: Sequence[str], columns: Sequence[str], cells: Sequence[Sequence[Image.Image | None]]) -> Image.Image:
    """cells[row][column] (None: empty), enlarged to CELL px without smoothing, under wrapped column labels."""
    from PIL import Image, ImageDraw, ImageFont

    heads = [textwrap.wrap(column, 18) for column in columns]
    top = LINE * max(map(len, heads)) + 2 * GAP
    sheet = Image.new("RGB", (MARGIN + len(columns) * (CELL + GAP), top + len(rows) * (CELL + GAP)), PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for c, head in enumerate(heads):
        draw.multiline_text((MARGIN + c * (CELL + GAP), GAP), "\n".join(head), INK, font)
    for r, row in enumerate(rows):
        y = top + r * (CELL + GAP)
        draw.multiline_text((GAP, y + GAP), "\n".join(textwrap.wrap(row, 20)), INK, font)
        for c, picture in enumerate(cells[r]):
            if picture is not None:
                sheet.paste(picture.resize((CELL, CELL), Image.Resampling.NEAREST), (MARGIN + c * (CELL + GAP), y))
    return sheet
