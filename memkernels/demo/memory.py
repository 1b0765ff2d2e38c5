"""Memory of one training step, above weights, gradients and optimizer state."""

from __future__ import annotations

import resource
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from memkernels.demo.job import Job
from memkernels.testing import peak_bytes

_INTERVAL = 0.005  # seconds
_MB = 1e6


@dataclass(frozen=True)
class Memory:
    """The peak, and (seconds since the step began, MB) while it ran."""

    peak: float
    timeline: list[tuple[float, float]]


def measure(job: Job) -> Memory:
    """Of the first batch's step, in this process, whose allocator must return what is freed: see `run_in_child`."""
    first, device = job.batches[0], job.device
    job.step(first)  # allocates gradients and optimizer state
    timeline: list[tuple[float, float]] = []
    peak = peak_bytes(lambda: timeline.extend(record(lambda: job.step(first), device)), device=device)
    return Memory(peak / _MB, timeline)


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
