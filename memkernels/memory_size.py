"""Numbers of bytes, as people write them."""

from __future__ import annotations

import re

_UNITS = {
    "": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip


def parse_bytes(name: str, value: int | str) -> int:
    """A number of bytes, or "24GB" (10^9) or "80GiB" (2^30).

    Raises:
        ValueError: it is none, or not positive.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(value))
    if match is None or isinstance(value, bool) or match[2].upper() not in _UNITS:
        raise ValueError(f"{name}: expected a number of bytes, as 24GB or 80GiB, got {value!r}.")
    number = int(float(match[1]) * _UNITS[match[2].upper()])
    if number < 1:
        raise ValueError(f"{name}: expected a positive number of bytes, got {value!r}.")
    return number


def unit_of(value: float) -> tuple[int, str]:
    """The decimal unit of a number of bytes: what to divide by, and its name."""
    for unit in ("B", "kB", "MB", "GB"):
        factor = _UNITS[unit.upper()]
        if value < 999.5 * factor:  # from there on three digits make it 1000
            return factor, unit
    return _UNITS["TB"], "TB"


def format_bytes(value: int) -> str:
    """Three significant digits, in decimal units; from 1000 TB on whole terabytes."""
    factor, unit = unit_of(value)
    scaled = value / factor
    return f"{scaled:.0f} {unit}" if scaled >= 999.5 else f"{scaled:.3g} {unit}"
