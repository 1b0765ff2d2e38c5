"""`python -m memkernels.bench.report`: the committed CSVs as tables, all beside them, some in the README."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterable
from operator import attrgetter
from pathlib import Path

from memkernels.bench.results import Row, read
from memkernels.memory_size import format_bytes

START = "<!-- benchmarks:start, written by `python -m memkernels.bench.report` -->"
END = "<!-- benchmarks:end -->"
TITLE = """# Every figure

Each row is a ratio of two things measured in one run, medians of interleaved rounds; "saved" is what autograd keeps for
backward. Written by `python -m memkernels.bench.report` from the CSVs beside this file.

"""
# Of each benchmark that a user of a whole model or of one op would ask for, the cases that the README shows: one, and
# where the op does worse than there.
SHOWN = {
    "llama": ("d1024-f2816-L6-V32000-T2048",),
    "qlora": ("d1024-f2816-L6-V32000-T2048-r16-dropout5%",),
    "switch": ("d512-f2048-L4+4-E8-V32128-T2x512-dropout10%",),
    "attention": ("S8192-H8-D64",),
    "attention_block": ("T2048-d1024-H16/4-D64",),
    "gated_mlp": ("T8192-d1024-f2816", "T2048-d1024-f2816", "T512-d1024-f2816"),
    "linear_cross_entropy": ("T4096-d1024-V128256", "T2048-d1024-V32000"),
    "lora_linear": ("T4096-K4096-N4096-r16-dropout10%",),
    "moe_mlp": ("T4096-d512-n1024-E16-k2",),
    "rms_norm": ("T4096-d1024",),
    "rotary": ("B2-S2048-H16/4-D64",),
    "gated_activation": ("T4096-f2816-silu",),
    "adamw": ("100M-12 tensors",),
    "zero": ("d512-f1536-L10-V16384-T512-2 ranks",),
}


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
        ordered = sorted(of_machine, key=lambda row: (_rank(row.op), *by_case(row)))
        for (op, case, dtype), group in itertools.groupby(ordered, by_case):
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
    """Update README.md and the results' own; with --check, change nothing and return 1 if one disagrees."""
    parser = argparse.ArgumentParser(prog="python -m memkernels.bench.report", description=main.__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a file is stale")
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args(arguments)
    rows = read_results(args.results)
    shown = [row for row in rows if row.case in SHOWN.get(row.op, ())]
    fresh = {
        args.readme: update(args.readme.read_text(), shown),
        args.results / "README.md": TITLE + render(rows),
    }
    stale = [path for path, text in fresh.items() if not path.exists() or path.read_text() != text]
    for path in stale:
        if args.check:
            print(f"{path} disagrees with {args.results}: run python -m memkernels.bench.report", file=sys.stderr)
        else:
            path.write_text(fresh[path])
    return 1 if args.check and stale else 0


def _rank(op: str) -> int:
    return list(SHOWN).index(op) if op in SHOWN else len(SHOWN)


def _cells(rows: list[Row]) -> tuple[str, str, str]:
    forward, full, memory = ([row for row in rows if row.mode == mode] for mode in ("forward", "full", "memory"))
    time = full or forward  # forward alone is timed of what has no backward
    return (
        _ratios(time, lambda row: _format_ms(row.median_ms or 0.0)),
        _ratios(memory, lambda row: format_bytes(row.peak_bytes or 0)),
        ", ".join(f"{row.provider} {format_bytes(row.saved_bytes)}" for row in memory if row.saved_bytes is not None)
        or "not measured",
    )


def _ratios(rows: list[Row], absolute: Callable[[Row], str]) -> str:
    cells = [
        f"{row.provider} {absolute(row)}"
        if row.provider == row.baseline
        else f"{row.provider} {row.ratio_to_baseline:.2f}x"
        for row in rows
    ]
    return ", ".join(cells) or "not measured"


def _format_ms(value: float) -> str:
    """Three digits, in seconds where the number has more before its point."""
    return f"{value:.3g} ms" if value < 999.5 else f"{value / 1000:.3g} s"


if __name__ == "__main__":
    raise SystemExit(main())
