"""`python -m memkernels.bench.report`: the README's figures, rendered from the committed CSVs."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterable
from operator import attrgetter
from pathlib import Path

from memkernels.bench.results import Row, read

START = "<!-- benchmarks:start, written by `python -m memkernels.bench.report` -->"
END = "<!-- benchmarks:end -->"


def render(rows: Iterable[Row]) -> str:
    """Markdown: a table per machine and torch, a line per case, with each provider's ratio to the case's baseline."""
    parts = []
    place = attrgetter("machine", "torch")
    for (machine, version), of_machine in itertools.groupby(sorted(rows, key=place), place):
        lines = [
            f"{machine}; torch {version}:",
            "",
            "| Benchmark | Case | Time | Peak memory | Saved for backward |",
            "| --- " * 5 + "|",
        ]
        by_case = attrgetter("op", "case", "dtype")
        for (op, case, dtype), group in itertools.groupby(sorted(of_machine, key=by_case), by_case):
            lines.append(f"| {op} | {case}, {dtype} | {' | '.join(_cells(list(group)))} |")
        parts.append("".join(f"{line}\n" for line in lines))
    return "\n".join(parts)


def update(text: str, rows: Iterable[Row]) -> str:
    """`text` with what stands between the two markers rendered anew; ValueError where they are missing."""
    before, found, rest = text.partition(START)
    _, closed, after = rest.partition(END)
    if not found or not closed:
        raise ValueError(f"text must hold the lines {START!r} and {END!r}")
    return f"{before}{START}\n{render(rows)}{END}{after}"


def read_results(folder: Path) -> list[Row]:
    """Rows of every CSV below `folder`."""
    return [row for path in sorted(folder.glob("*/*.csv")) for row in read(path)]


def main(arguments: list[str] | None = None) -> int:
    """Update README.md; with --check, change nothing and return 1 if it disagrees with the CSVs."""
    parser = argparse.ArgumentParser(prog="python -m memkernels.bench.report", description=main.__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if the file is stale")
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args(arguments)
    text = args.readme.read_text()
    fresh = update(text, read_results(args.results))
    if args.check and fresh != text:
        print(f"{args.readme} disagrees with {args.results}: run python -m memkernels.bench.report", file=sys.stderr)
        return 1
    if fresh != text:
        args.readme.write_text(fresh)
    return 0


def _cells(rows: list[Row]) -> tuple[str, str, str]:
    forward, full, memory = ([row for row in rows if row.mode == mode] for mode in ("forward", "full", "memory"))
    time = full or forward  # forward alone is timed of what has no backward
    return (
        _ratios(time, lambda row: f"{row.median_ms:.3g} ms"),
        _ratios(memory, lambda row: _megabytes(row.peak_bytes)),
        ", ".join(f"{row.provider} {_megabytes(row.saved_bytes)}" for row in memory) or "not measured",
    )


def _ratios(rows: list[Row], absolute: Callable[[Row], str]) -> str:
    cells = [
        f"{row.provider} {absolute(row)}"
        if row.provider == row.baseline
        else f"{row.provider} {row.ratio_to_baseline:.2f}x"
        for row in rows
    ]
    return ", ".join(cells) or "not measured"


def _megabytes(count: int | None) -> str:
    return f"{(count or 0) / 1e6:.3g} MB"


if __name__ == "__main__":
    raise SystemExit(main())
