"""`python -m memkernels.testing.kernel_table`: what each Triton kernel needs on each target, and what it moves.

TRITON_INTERPRET decides for a whole process whether Triton compiles or interprets, so both kinds of work run in
processes of their own, whatever the caller has set.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

from memkernels.testing.cases import TARGETS, Target, kernel_case, kernel_cases, ops_with_triton

if TYPE_CHECKING:
    from memkernels.testing.traffic import CaseTraffic
    from memkernels.testing.triton_resources import Resources

Row = tuple[str, str, str]  # op, case and source

HEADING = """# Triton kernels

Written by `python -m memkernels.testing.kernel_table --output docs/kernels.md`, or with `--op` for one op's rows. It
keeps the rows whose source, a hash of what they follow from, is still the case's; where none stands, that is not known.
These are facts of the compiler and counts of Triton's interpreter, taken on a machine without a GPU: none of it is a
measurement on a GPU.
"""

RESOURCES_HEADING = f"""## Resources

Each cell: registers per thread / shared memory per block in bytes / spills / tensor-core instructions
(their static number and kind).

| op | case | source | kernel | {" | ".join(map(str, TARGETS))} |
{"| --- " * (4 + len(TARGETS))}|"""

TRAFFIC_HEADING = """## Traffic

Bytes moved through global memory, caches or not, over the least possible: each input read once, each output written
once.

Attention has no such least without a cache that holds a whole head, so its own is the lower bound of flash attention
at the tile's size, over the causal half that the cases have: a kernel reads and writes once what its tile keeps, and
reads the rows of the other side that the tile sees, tile by tile. With Q, K, V, O for the bytes of a head's rows, S
rows, tiles of M queries in forward and dQ and of N keys in dK and dV, and sums over heads of queries:

- forward: Q + O + lse + (K + V) (S / M + 1) / 2; the larger M, the less.
- backward, in three passes: O + dO + lse + delta; K + V + dK + dV, once for the heads that share them, and
  (Q + dO + lse + delta) (S / N + 1) / 2; Q + dO + lse + delta + dQ + (K + V) (S / M + 1) / 2.

A ratio of 1 so means that hidden tiles are skipped and that a tile reads nothing twice. How often tiles read the same
rows, from caches or not, is in the bytes, and the choice of M and N.

The products of experts, `moe`, have their least at the tile's size too: a tile of the output moves its rows of the one
factor and its columns of the other once, no tile has rows of two experts, and a token's row is gathered for each of its
choices. In the least of NF4 is the look-up of a code's value, 4 bytes for half a byte of code, of a table of 64 bytes.

| op | case | source | bytes read | bytes written | least | ratio | limit |
| --- | --- | --- | --- | --- | --- | --- | --- |"""


@contextmanager
def triton_processes(*, interpret: bool, workers: int = 2) -> Iterator[ProcessPoolExecutor]:
    """A pool whose processes were started with TRITON_INTERPRET set or unset."""
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        with mock.patch.dict(os.environ):
            # Set before the processes start: an initializer would come too late where importing torch imports Triton.
            os.environ["TRITON_INTERPRET"] = "1" if interpret else "0"
            for started in [pool.submit(os.getpid) for _ in range(workers)]:
                started.result()
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)


def submit_compile(pool: ProcessPoolExecutor, op: str, label: str, target: Target) -> Future[dict[str, Resources]]:
    """Compiles a case in a pool that does not interpret; the result is `aot.compile_case`'s."""
    return pool.submit(_compile, op, label, target)


def submit_count(pool: ProcessPoolExecutor, op: str, label: str) -> Future[CaseTraffic]:
    """Runs a case in a pool that interprets; the result is `traffic.count_case`'s."""
    return pool.submit(_count, op, label)


def submit_launched(pool: ProcessPoolExecutor, op: str) -> Future[set[tuple[str, str]]]:
    """Records an op's launches in a pool that does not interpret; the result is `aot.launched_kernels`'."""
    return pool.submit(_launched, op)


def _sources(op: str) -> dict[str, str]:
    from memkernels.testing.aot import case_source

    return {case.label: case_source(case) for case in kernel_cases(op)}


def case_sources(ops: Sequence[str]) -> dict[str, dict[str, str]]:
    """Of ops' cases, by op and label: the hash of what their rows follow from, `aot.case_source`'s."""
    with triton_processes(interpret=False, workers=1) as pool:
        return {op: pool.submit(_sources, op).result() for op in ops}


def _launched(op: str) -> set[tuple[str, str]]:
    from memkernels.testing.aot import launched_kernels

    return launched_kernels(op)


def _compile(op: str, label: str, target: Target) -> dict[str, Resources]:
    from memkernels.testing.aot import compile_case

    return compile_case(kernel_case(op, label), target)


def _count(op: str, label: str) -> CaseTraffic:
    from memkernels.testing.traffic import count_case

    return count_case(kernel_case(op, label))


def _resources_lines(rows: Sequence[Row]) -> dict[Row, list[str]]:
    lines: dict[Row, list[str]] = {}
    with triton_processes(interpret=False) as pool:
        compiled = {
            (op, label, source): {
                target.name: submit_compile(pool, op, label, target) for target in kernel_case(op, label).targets
            }
            for op, label, source in rows
        }
        for row, futures in compiled.items():
            by_target = {target: future.result() for target, future in futures.items()}
            kernels = dict.fromkeys(kernel for resources in by_target.values() for kernel in resources)
            cells = {
                kernel: [_cell(by_target.get(target.name, {}).get(kernel)) for target in TARGETS] for kernel in kernels
            }
            lines[row] = [_line(*row, f"`{kernel}`", *of_kernel) for kernel, of_kernel in cells.items()]
    return lines


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(resources: Resources | None) -> str:
    if resources is None:
        return ""
    tensor_cores = " ".join(f"{count} {opcode}" for opcode, count in resources.tensor_cores.items())
    return f"{resources.registers} / {resources.shared_bytes} / {resources.spills} / {tensor_cores or 0}"


def _traffic_lines(rows: Sequence[Row]) -> dict[Row, list[str]]:
    lines: dict[Row, list[str]] = {}
    with triton_processes(interpret=True) as pool:
        counted = {(op, label, source): submit_count(pool, op, label) for op, label, source in rows}
        for row, future in counted.items():
            traffic, most = future.result(), kernel_case(*row[:2]).traffic_limit
            limit = "" if most is None else f"{most:.2f}"
            figures = (f"{count:,}" for count in (traffic.read_bytes, traffic.written_bytes, traffic.least_bytes))
            lines[row] = [_line(*row, *figures, f"{traffic.ratio:.3f}", limit)]
    return lines


def _parsed(table: str) -> dict[Row, list[str]]:
    """The lines of a table that was written before."""
    lines: defaultdict[Row, list[str]] = defaultdict(list)
    for line in table.splitlines():
        if line.startswith("| "):
            op, case, source = (cell.strip() for cell in line.split("|")[1:4])
            lines[op, case, source].append(line)
    return dict(lines)


def kernel_table(ops: Sequence[str], before: str = "") -> str:
    """Both tables, in Markdown. Of `before`, earlier ones, it keeps the rows of other ops, and of `ops` the current.

    A kernel takes a second to compile for a target, attention's up to a minute, where Triton's cache has it not yet.
    """
    sources = case_sources(ops)

    def rows(before: str, compute: Callable[[Sequence[Row]], dict[Row, list[str]]]) -> list[str]:
        lines = _parsed(before)
        wanted = {op: [(op, label, source) for label, source in of_op.items()] for op, of_op in sources.items()}
        lines |= compute([row for of_op in wanted.values() for row in of_op if row not in lines])
        others = {op: [row for row in lines if row[0] == op] for op in ops_with_triton()}
        return [line for of_op in (others | wanted).values() for row in of_op for line in lines[row]]

    resources_before, _, traffic_before = before.partition("## Traffic")
    resources, traffic = rows(resources_before, _resources_lines), rows(traffic_before, _traffic_lines)
    return "\n".join([HEADING, RESOURCES_HEADING, *resources, "", TRAFFIC_HEADING, *traffic, ""])


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    summary = "Tabulates what each Triton kernel needs on each target, and the bytes it moves."
    parser = argparse.ArgumentParser(prog="python -m memkernels.testing.kernel_table", description=summary)
    parser.add_argument("--op", choices=ops_with_triton(), help="only this op's rows; all of them without it")
    parser.add_argument("--output", type=Path, help="write here instead of printing, and keep rows that are current")
    options = parser.parse_args(arguments)
    before = options.output.read_text() if options.output and options.output.exists() else ""
    table = kernel_table([options.op] if options.op else ops_with_triton(), before)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(table)
    else:
        print(table)


if __name__ == "__main__":
    main()
