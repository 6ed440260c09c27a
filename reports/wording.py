"""Numbers as a reader of the page meets them."""

from __future__ import annotations

UNKNOWN = "unknown"


def percent(share: float | None) -> str:
    """A share of 1 as a percentage of three significant digits at most: 0.02934 -> "2.93 %"."""
    if share is None:
        return UNKNOWN
    value = 100 * share
    if value == 0 or abs(value) >= 99.95:
        return f"{value:.0f} %"
    return f"{value:.3g} %" if abs(value) >= 1e-4 else f"{value:.1e} %"


def number(value: float | None, digits: int = 3) -> str:
    """A plain number of `digits` significant digits; integers are written whole, with thousands apart."""
    if value is None:
        return UNKNOWN
    return f"{value:,.0f}".replace(",", " ") if float(value).is_integer() else f"{value:.{digits}g}"


def count(n: int, one: str, many: str | None = None) -> str:
    """ "1 layer", "3 layers"."""
    return f"{number(n)} {one if n == 1 else many or one + 's'}"


def size(n: float) -> str:
    """Bytes in decimal units: 2132625432 -> "2.13 GB"."""
    units = ("bytes", "kB", "MB", "GB", "TB")
    step = next((i for i in range(len(units)) if n < 1000 ** (i + 1)), len(units) - 1)
    return f"{n / 1000**step:.3g} {units[step]}"
