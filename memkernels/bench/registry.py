"""What a benchmark file declares, and how the files are found.

A file `benchmarks/ops/<op>.py` or `benchmarks/steps/<name>.py` ends in `benchmark = Benchmark(...)`.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from memkernels.bench.machine import device
from memkernels.bench.step import TIME_MODES, Step
from memkernels.bench.timer import Plan


@dataclass(frozen=True)
class Case:
    """One size and dtype to measure; `sizes` holds whatever the benchmark's `setup` and `work` read."""

    name: str
    dtype: torch.dtype
    sizes: Mapping[str, int] = field(default_factory=dict)

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def label(self) -> str:
        return f"{self.name}/{self.dtype_name}"

    @property
    def device(self) -> torch.device:
        return device()


@dataclass(frozen=True)
class Work:
    """The least a mode can do: bytes with each input read once and each output written once, and FLOPs."""

    bytes: int = 0
    flops: int = 0


def _no_work(case: Case, mode: str) -> Work:
    return Work()


def _no_steps(case: Case, provider: str) -> Step:
    raise ValueError("setup: expected a function, of a benchmark whose providers are not measured by `held`")


@dataclass(frozen=True)
class Benchmark:
    """Providers of one computation, measured against each other.

    Args:
        op: name on the command line and of the CSV file.
        cases: what to measure.
        providers: names, in the order they are shown.
        setup: builds one provider's `Step`. Called with the generator seeded, so that every provider sees the same
            numbers; an ImportError makes that provider unavailable, with its message.
        work: least bytes and FLOPs of a mode of `TIME_MODES`, for GB/s and GFLOP/s; zero where it says nothing.
        baseline: the provider that ratios are taken to.
        modes: which of `TIME_MODES` are timed; none where the providers are compared by memory alone, and "forward"
            alone of what has no backward, of which no memory is measured.
        plan: how many rounds are timed, where one takes so long that it should be fewer than usual.
        held: bytes of a provider, which it measures in its own way, in place of a step's; then modes are none.
        path: the file it was loaded from; filled in by `load`.
    """

    op: str
    cases: tuple[Case, ...]
    providers: tuple[str, ...]
    setup: Callable[[Case, str], Step] = _no_steps
    work: Callable[[Case, str], Work] = _no_work
    baseline: str = "eager"
    modes: tuple[str, ...] = TIME_MODES
    plan: Plan | None = None
    held: Callable[[Case, str], int] | None = None
    path: Path | None = None

    def __post_init__(self) -> None:
        if self.baseline not in self.providers:
            raise ValueError(f"baseline must be one of providers {self.providers}, got {self.baseline!r}")
        if unknown := set(self.modes) - set(TIME_MODES):
            raise ValueError(f"modes must be among {TIME_MODES}, got {sorted(unknown)}")
        if (self.held is None) == (self.setup is _no_steps):
            raise ValueError("setup or held: expected one of the two")
        if self.held is not None and self.modes:
            raise ValueError(f"modes: expected none of what `held` measures, got {self.modes}")
        labels = [case.label for case in self.cases]
        if len(set(labels)) != len(labels):
            raise ValueError(f"cases must differ in name or dtype, got {labels}")

    @property
    def has_backward(self) -> bool:
        """Whether a step has one."""
        return self.modes != ("forward",)

    def case(self, label: str) -> Case:
        """The case of that label; ValueError if there is none."""
        for case in self.cases:
            if case.label == label:
                return case
        raise ValueError(f"label must be one of {[case.label for case in self.cases]}, got {label!r}")


def find(folder: Path) -> dict[str, Path]:
    """Benchmark files below `folder` (ops/ and steps/), by the name they go by on the command line."""
    paths = [path for room in ("ops", "steps") for path in sorted((folder / room).glob("[!_]*.py"))]
    if not paths:
        raise FileNotFoundError(f"no benchmark files in {folder}/ops or {folder}/steps: run from a clone of memkernels")
    return {path.stem: path for path in paths}


def load(path: Path) -> Benchmark:
    """The `benchmark` that a file declares."""
    spec = importlib.util.spec_from_file_location(f"memkernels_benchmark_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"path must be a Python file, got {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    if not isinstance(getattr(module, "benchmark", None), Benchmark):
        raise ValueError(f"{path} must define `benchmark = Benchmark(...)`")
    return replace(module.benchmark, path=path.resolve())
