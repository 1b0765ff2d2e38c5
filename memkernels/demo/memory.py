"""Memory of one training step, above weights, gradients and optimizer state."""

from __future__ import annotations

import resource
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from memkernels.demo.job import Settings, make_job
from memkernels.testing import peak_bytes, run_in_child

_INTERVAL = 0.005  # seconds
_MB = 1e6


@dataclass(frozen=True)
class Memory:
    """The peak, and (seconds since the step began, MB) while it ran."""

    peak: float
    timeline: list[tuple[float, float]]


def run(settings: Settings) -> Memory:
    """Measures in a new process, one whose allocator returns what is freed: which would cost `train` time.

    Raises:
        RuntimeError: the process failed.
    """
    return Memory(**run_in_child(measure, asdict(settings)))


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    """A `Memory` as a dictionary."""
    job = make_job(Settings(**settings))
    first, device = job.batches[0], job.batches.device
    job.step(first)  # allocates gradients and optimizer state
    timeline: list[tuple[float, float]] = []
    peak = peak_bytes(lambda: timeline.extend(record(lambda: job.step(first), device)), device=device)
    return asdict(Memory(peak / _MB, timeline))


def record(step: Callable[[], object], device: torch.device) -> list[tuple[float, float]]:
    """(seconds, MB above those in use before) while `step` runs, sampled by a thread."""
    samples: list[tuple[float, float]] = []
    done = threading.Event()
    start, before = time.perf_counter(), _bytes_in_use(device)

    def sample() -> None:
        while not done.wait(_INTERVAL):
            samples.append((time.perf_counter() - start, (_bytes_in_use(device) - before) / _MB))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        step()
    finally:
        done.set()
        thread.join()
    return samples


def _bytes_in_use(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
    return resident_pages * resource.getpagesize()
