"""Training of a job, timed, with what held-out data says at a few checkpoints."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch

from memkernels.demo.job import LOSS, Job

_CHECKPOINTS = 4


@dataclass(frozen=True)
class Training:
    """What a training run found.

    Args:
        parameters: of the model.
        step_seconds: of a training step, the median.
        checkpoints: numbers of steps after which held-out data was looked at, 0 first.
        held_out: by its name, what it said at each.
    """

    parameters: int
    step_seconds: float
    checkpoints: list[int]
    held_out: dict[str, list[float]]

    @property
    def losses(self) -> list[float]:
        return self.held_out[LOSS]


def train(job: Job) -> Training:
    """Trains in this process, with a progress bar."""
    from tqdm import tqdm

    steps = len(job.batches)
    every = max(1, steps // _CHECKPOINTS)
    checkpoints, seconds = [0], []
    held_out = {name: [value] for name, value in job.evaluate().items()}
    progress = tqdm(job.batches, desc=f"{job.name:12}", unit="step")
    for index, batch in enumerate(progress, 1):
        start = time.perf_counter()
        job.step(batch)
        if job.device.type == "cuda":
            torch.cuda.synchronize(job.device)
        seconds.append(time.perf_counter() - start)
        if index % every == 0 or index == steps:
            checkpoints.append(index)
            for name, value in job.evaluate().items():
                held_out[name].append(value)
            progress.set_postfix_str(", ".join(f"{name} {values[-1]:.3f}" for name, values in held_out.items()))
    parameters = sum(parameter.numel() for parameter in job.model.parameters())
    # The first steps allocate gradients and optimizer state, and warm up.
    return Training(parameters, statistics.median(seconds[2:] or seconds), checkpoints, held_out)
