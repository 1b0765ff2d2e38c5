"""Plain-text tables."""

from __future__ import annotations

from collections.abc import Sequence

Cell = str | float | None


def format_table(head: Sequence[str], body: Sequence[Sequence[Cell]]) -> str:
    """Columns padded to their widest cell; text goes left, numbers (three significant digits) go right."""
    texts = [list(head), *([_text(cell) for cell in row] for row in body)]
    widths = [max(len(row[column]) for row in texts) for column in range(len(head))]
    numeric = [not any(isinstance(row[column], str) for row in body) for column in range(len(head))]
    lines = []
    for row in texts:
        cells = [t.rjust(w) if right else t.ljust(w) for t, w, right in zip(row, widths, numeric, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _text(cell: Cell) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, str):
        return cell
    return f"{cell:.0f}" if abs(cell) >= 100 else f"{cell:.3g}"
