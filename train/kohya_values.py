"""Values as kohya's trainers write them: numbers may be text, lists JSON or Python, and nothing may be "None"."""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from train.kohya_keys import PRECISIONS


def is_empty(value: Any) -> bool:
    return str(value).strip() in ("", "None", "none")


def is_off(value: Any) -> bool:
    """Whether a setting that may be left out says nothing."""
    return str(value).strip().lower() in ("", "none", "0", "0.0", "false", "[]", "{}")


def one_line(text: str) -> str:
    """Foreign text for a message or a comment."""
    return "".join(c if c.isprintable() else " " for c in text)[:200]


def literal(value: Any) -> Any:
    """JSON or Python's notation of lists and tables, which both occur; anything else as it is."""
    if not isinstance(value, str):
        return value
    for read in (json.loads, ast.literal_eval):
        try:
            return read(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return value


def _whole(value: Any) -> int:
    number = float(value)
    if not number.is_integer():
        raise ValueError
    return int(number)


def _real(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError
    return number


def _flag(value: Any) -> bool:
    return {"true": True, "1": True, "false": False, "0": False}[str(value).strip().lower()]


def _numbers(value: Any) -> list[float]:
    """One number or several: `0.1`, `[0.1, 0.2]`, `512,768`, `(512, 512)`."""
    parts = value if isinstance(value, list) else str(value).strip("()[] ").replace(",", " ").split()
    return [_real(part) for part in parts]


def _pairs(value: Any) -> dict[str, Any]:
    """{"a": 1}, ["a=1", ...] or "a=1 b=2"."""
    value = literal(value)
    if isinstance(value, dict):
        return value
    parts = value if isinstance(value, list) else str(value).split()
    return dict(str(part).split("=", 1) for part in parts)


READERS: dict[str, Callable[[Any], Any]] = {
    "text": str,
    "path": Path,
    "whole": _whole,
    "real": _real,
    "flag": _flag,
    "numbers": _numbers,
    "pairs": _pairs,
    "precision": lambda value: PRECISIONS[str(value).lower()],
}
SPOKEN = {
    "text": "text",
    "path": "a path",
    "whole": "a whole number",
    "real": "a number",
    "flag": "true or false",
    "numbers": "a number or several",
    "pairs": "a list of name=value",
    "precision": f"known ({', '.join(PRECISIONS)})",
}
