"""The CSV schema of benchmark results."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

MEMORY_MODES = ("memory", "memory_with_gradients")


@dataclass(frozen=True)
class Row:
    """One provider in one mode of one case. Rows that differ only in provider were measured in one run.

    Time modes (forward, backward, full) fill the milliseconds; `ratio_to_baseline` is the median over rounds of the
    time over the baseline's in the same round; GB/s and GFLOP/s count the least bytes and FLOPs.
    Memory modes fill `peak_bytes` above what was resident, `ratio_to_baseline` being its ratio: "memory" is one full
    step that accumulates into gradients already there, "memory_with_gradients" one that allocates them.
    `saved_bytes` is what autograd holds between forward and backward, parameters not counted. Of a benchmark with
    `held`, `peak_bytes` are the bytes that it measures.
    """

    op: str
    case: str
    dtype: str
    mode: str
    provider: str
    baseline: str
    median_ms: float | None = None
    p10_ms: float | None = None
    p90_ms: float | None = None
    ratio_to_baseline: float | None = None
    gb_per_s: float | None = None
    gflop_per_s: float | None = None
    peak_bytes: int | None = None
    saved_bytes: int | None = None
    machine: str = ""
    torch: str = ""
    commit: str = ""
    date: str = ""

    @property
    def group(self) -> tuple[str, str, str, str]:
        return (self.op, self.case, self.dtype, self.mode)


COLUMNS = tuple(f.name for f in fields(Row))
_FLOATS = {f.name for f in fields(Row) if "float" in str(f.type)}
_INTS = {f.name for f in fields(Row) if "int" in str(f.type)}


def write(path: Path, rows: Iterable[Row]) -> None:
    """Write `rows` as CSV; floats with six significant digits, None as an empty cell."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in asdict(row).items()})


def read(path: Path) -> list[Row]:
    """Read what `write` wrote; ValueError if the columns are not this schema's."""
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path}: columns must be {COLUMNS}, got {reader.fieldnames}")
        return [_parse(record) for record in reader]


def merge(path: Path, rows: list[Row]) -> None:
    """Write `rows` to `path`, replacing whole groups measured anew and keeping the others, so that a ratio never
    joins two runs."""
    renewed = {row.group for row in rows}
    kept = [row for row in read(path) if row.group not in renewed] if path.exists() else []
    write(path, sorted([*kept, *rows], key=lambda row: row.group))


def _parse(record: dict[str, str]) -> Row:
    cells: dict[str, Any] = dict(record)
    for kind, names in ((float, _FLOATS), (int, _INTS)):
        for name in names:
            cells[name] = kind(record[name]) if record[name] else None
    return Row(**cells)
