"""Small files beside a model, which strangers wrote: text and JSON, read in part and never trusted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MOST = 2**20  # characters that are read


def text_of(path: Path) -> str:
    """The beginning of a text file; empty where there is none that can be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as f:
            return f.read(MOST)
    except OSError:
        return ""


def json_of(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none that can be read."""
    try:
        found = json.loads(text_of(path))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
