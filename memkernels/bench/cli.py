"""Command line of the benchmarks."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from operator import attrgetter
from pathlib import Path

from memkernels._library import cpu_missing
from memkernels.bench import machine
from memkernels.bench.measure import memory_rows, time_rows
from memkernels.bench.registry import find, load
from memkernels.bench.results import MEMORY_MODES, Row, merge
from memkernels.bench.table import format_table
from memkernels.bench.timer import Plan

_QUICK = Plan(budget=0.5, least=3)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `bench` to `parser`."""
    parser.add_argument("op", nargs="*", help="files of benchmarks/ops and benchmarks/steps to run; all by default")
    parser.add_argument("--case", default="", help="run only cases whose NAME/DTYPE contains this")
    parser.add_argument("--mode", choices=("time", "memory"), help="measure only this; both by default")
    parser.add_argument("--quick", action="store_true", help="few rounds, nothing written")
    parser.add_argument("--benchmarks", type=Path, default=Path("benchmarks"), help="folder of the benchmark files")


def run(args: argparse.Namespace) -> int:
    """Measure, print and write results/<machine>/<op>.csv; returns 1 where a figure is missing, 2 on a wrong name."""
    try:
        files = find(args.benchmarks)
        chosen = {op: files[op] for op in args.op or files}
    except KeyError as error:
        return _refuse(f"op must be among {', '.join(files)}, got {error.args[0]}")
    except FileNotFoundError as error:
        return _refuse(str(error))
    if machine.device().type == "cpu" and cpu_missing is not None:
        return _refuse(f"without native kernels memkernels computes by its reference: {cpu_missing}")
    machine.set_threads()
    print(machine.describe())
    plan = _QUICK if args.quick else None
    measures = {"time": partial(time_rows, plan=plan, say=print), "memory": partial(memory_rows, say=print)}
    modes = [args.mode] if args.mode else list(measures)
    selected = [(op, load(path), case) for op, path in chosen.items() for case in load(path).cases]
    selected = [(op, benchmark, case) for op, benchmark, case in selected if args.case in case.label]
    if not selected:
        return _refuse(f"--case {args.case!r} matches no case of {', '.join(chosen)}")
    missing = False
    for op, benchmark, case in selected:
        print(f"\n{op} {case.label}", flush=True)
        machine.set_threads()  # the case before may have taken fewer
        for mode in modes:
            if not (benchmark.modes if mode == "time" else benchmark.has_backward):
                continue
            rows = measures[mode](benchmark, case)
            missing |= len({row.provider for row in rows}) < len(benchmark.providers)
            if rows:
                print(_table(rows), flush=True)
            if rows and not args.quick:
                merge(args.benchmarks / "results" / machine.slug(rows[0].machine) / f"{op}.csv", rows)
    return int(missing)


def _table(rows: list[Row]) -> str:
    columns: dict[str, Callable[[Row], str | float | None]] = {
        "mode": attrgetter("mode"),
        "provider": attrgetter("provider"),
        f"x {rows[0].baseline}": attrgetter("ratio_to_baseline"),
    }
    if rows[0].mode in MEMORY_MODES:
        columns |= {"peak MB": _megabytes("peak_bytes"), "saved MB": _megabytes("saved_bytes")}
    else:
        columns |= {"median ms": attrgetter("median_ms"), "p10": attrgetter("p10_ms"), "p90": attrgetter("p90_ms")}
        columns |= {"GB/s": attrgetter("gb_per_s"), "GFLOP/s": attrgetter("gflop_per_s")}
    return format_table(list(columns), [[cell(row) for cell in columns.values()] for row in rows])


def _megabytes(name: str) -> Callable[[Row], float | None]:
    return lambda row: None if getattr(row, name) is None else getattr(row, name) / 1e6


def _refuse(message: str) -> int:
    print(f"bench: {message}", file=sys.stderr)
    return 2
