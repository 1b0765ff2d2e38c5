"""From a benchmark and a case to rows of results."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from memkernels.bench import machine
from memkernels.bench.memory import measure_memory
from memkernels.bench.registry import Benchmark, Case
from memkernels.bench.results import MEMORY_MODES, Row
from memkernels.bench.step import Step
from memkernels.bench.timer import Plan, cuda_clock, time_interleaved, wall_clock
from memkernels.testing.peak_memory import run_in_child

Say = Callable[[str], None]

# Providers round differently, so this bounds only a gross error: one of them computing something else.
_LARGEST_DIFFERENCE = 0.05


def time_rows(benchmark: Benchmark, case: Case, plan: Plan | None, say: Say) -> list[Row]:
    """Rows of every time mode, all providers in this process; empty where fewer than two are available.

    `plan` overrides the benchmark's own.
    """
    torch.compiler.reset()
    steps = _set_up(benchmark, case, say)
    if not _comparable(benchmark, list(steps), say):
        return []
    _check_agreement(benchmark, case, steps)
    grad_outputs = steps[benchmark.baseline].grad_outputs()
    measure = cuda_clock() if case.device.type == "cuda" else wall_clock
    rows = []
    for mode in benchmark.modes:
        actions = {provider: step.action(mode, grad_outputs) for provider, step in steps.items()}
        timings = time_interleaved(actions, benchmark.baseline, plan=plan or benchmark.plan, measure=measure)
        work = benchmark.work(case, mode)
        for provider, timing in timings.items():
            rows.append(
                replace(
                    _row(benchmark, case, mode, provider),
                    median_ms=timing.median * 1e3,
                    p10_ms=timing.p10 * 1e3,
                    p90_ms=timing.p90 * 1e3,
                    ratio_to_baseline=timing.ratio,
                    gb_per_s=work.bytes / timing.median / 1e9 if work.bytes else None,
                    gflop_per_s=work.flops / timing.median / 1e9 if work.flops else None,
                )
            )
    return rows


def memory_rows(benchmark: Benchmark, case: Case, say: Say) -> list[Row]:
    """Rows of both memory modes, a process per provider; empty where fewer than two are available. Rows of "memory"
    alone where the benchmark's `held` says the bytes."""
    if benchmark.held is not None:
        return _held_rows(benchmark, case, benchmark.held)
    found = {}
    for provider in benchmark.providers:
        answer = run_in_child(measure_memory, str(benchmark.path), case.label, provider)
        if "unavailable" in answer:
            say(f"{provider}: unavailable: {answer['unavailable']}")
        else:
            found[provider] = answer
    if not _comparable(benchmark, list(found), say):
        return []
    rows = []
    for mode in MEMORY_MODES:
        for provider, answer in found.items():
            rows.append(
                replace(
                    _row(benchmark, case, mode, provider),
                    ratio_to_baseline=answer[mode] / max(found[benchmark.baseline][mode], 1),
                    peak_bytes=answer[mode],
                    saved_bytes=answer["saved_bytes"],
                )
            )
    return rows


def _held_rows(benchmark: Benchmark, case: Case, held: Callable[[Case, str], int]) -> list[Row]:
    found = {provider: held(case, provider) for provider in benchmark.providers}
    return [
        replace(
            _row(benchmark, case, "memory", provider),
            ratio_to_baseline=size / max(found[benchmark.baseline], 1),
            peak_bytes=size,
        )
        for provider, size in found.items()
    ]


def _set_up(benchmark: Benchmark, case: Case, say: Say) -> dict[str, Step]:
    steps = {}
    for provider in benchmark.providers:
        torch.manual_seed(0)
        try:
            steps[provider] = benchmark.setup(case, provider)
        except ImportError as error:
            say(f"{provider}: unavailable: {error}")
    return steps


def _comparable(benchmark: Benchmark, available: list[str], say: Say) -> bool:
    if benchmark.baseline in available and len(available) > 1:
        return True
    say(f"no ratio to {benchmark.baseline}: available are {', '.join(available) or 'none'}")
    return False


def _check_agreement(benchmark: Benchmark, case: Case, steps: dict[str, Step]) -> None:
    expected = [out.detach().float() for out in steps[benchmark.baseline].outputs()]
    for provider, step in steps.items():
        for out, other in zip(step.outputs(), expected, strict=True):
            difference = float((out.detach().float() - other).norm() / other.norm())
            if not difference <= _LARGEST_DIFFERENCE:
                raise RuntimeError(
                    f"{benchmark.op} {case.label}: {provider} differs from {benchmark.baseline} by "
                    f"{difference:.3g} of its norm: they do not compute the same thing"
                )


def _row(benchmark: Benchmark, case: Case, mode: str, provider: str) -> Row:
    return Row(
        op=benchmark.op,
        case=case.name,
        dtype=case.dtype_name,
        mode=mode,
        provider=provider,
        baseline=benchmark.baseline,
        machine=machine.describe(),
        torch=torch.__version__,
        commit=machine.commit(Path.cwd()),
        date=datetime.date.today().isoformat(),
    )
