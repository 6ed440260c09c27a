"""Picture files beside a result -> data URIs inside its page. A result is not trusted: it may name any path."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from pathlib import Path

LARGEST, ALL = 4_000_000, 40_000_000  # bytes of one file, of all files in a page
TYPES = {b"\x89PNG\r\n\x1a\n": "png", b"\xff\xd8\xff": "jpeg", b"RIFF": "webp"}


def embedded(folder: Path | None, names: Iterable[str]) -> dict[str, str]:
    """Name -> data URI of each picture that lies in `folder` and fits; what does not is left out."""
    found: dict[str, str] = {}
    left = ALL
    for name in dict.fromkeys(names) if folder is not None else ():
        content = _content(folder, name) if folder else None
        if content is not None and len(content[1]) <= left:
            left -= len(content[1])
            found[name] = f"data:image/{content[0]};base64,{base64.b64encode(content[1]).decode()}"
    return found


def _content(folder: Path, name: str) -> tuple[str, bytes] | None:
    """Type and bytes; None for what lies elsewhere, is no picture, is too large or cannot be read."""
    try:
        path = (folder / name).resolve()
        if not path.is_relative_to(folder.resolve()) or path.stat().st_size > LARGEST:
            return None
        content = path.read_bytes()
    except (OSError, ValueError):
        return None
    return next(((kind, content) for magic, kind in TYPES.items() if content.startswith(magic)), None)
