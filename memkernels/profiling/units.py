"""Bytes as people read them."""

from __future__ import annotations


def scale(value: float, units: tuple[str, ...]) -> tuple[float, str]:
    """What to divide by, a power of 1000, and its unit."""
    factor = 1.0
    for unit in units[:-1]:
        if value < 1000 * factor:
            return factor, unit
        factor *= 1000
    return factor, units[-1]
