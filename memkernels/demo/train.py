"""One training run in a process of its own: `python -m memkernels.demo.train SETTINGS`, results as JSON on stdout."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from memkernels.demo.job import Settings, make_job

_CHECKPOINTS = 4


@dataclass(frozen=True)
class Training:
    """Losses of text held out, by the number of steps before, and the median seconds of a training step."""

    parameters: int
    losses: dict[int, float]
    step_seconds: float


def run(settings: Settings) -> Training:
    """Trains in a new process, whose progress bar goes to this one's stderr.

    Raises:
        subprocess.CalledProcessError: the process failed; it has said why.
    """
    command = [sys.executable, "-m", __name__, json.dumps(asdict(settings))]
    answer = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    losses = {int(step): loss for step, loss in answer.pop("losses").items()}
    return Training(losses=losses, **answer)


def train(settings: Settings) -> Training:
    """Trains in this process."""
    from tqdm import tqdm

    job = make_job(settings)
    every = max(1, settings.steps // _CHECKPOINTS)
    losses, seconds = {0: evaluate(job.model, job.held_out)}, []
    progress = tqdm(job.batches, desc=f"{settings.name:12}", unit="step")
    for index, batch in enumerate(progress, 1):
        start = time.perf_counter()
        job.step(batch)
        if batch.is_cuda:
            torch.cuda.synchronize(batch.device)
        seconds.append(time.perf_counter() - start)
        if index % every == 0 or index == settings.steps:
            losses[index] = evaluate(job.model, job.held_out)
            progress.set_postfix_str(f"held-out loss {losses[index]:.3f}")
    parameters = sum(parameter.numel() for parameter in job.model.parameters())
    # The first steps allocate gradients and optimizer state, and warm up.
    return Training(parameters, losses, statistics.median(seconds[2:] or seconds))


@torch.no_grad()
def evaluate(model: torch.nn.Module, text: Tensor) -> float:
    """Mean loss of windows of text, (count, tokens)."""
    model.eval()
    losses = [model(input_ids=window[None], labels=window[None]).loss.item() for window in text]
    model.train()
    return statistics.fmean(losses)


if __name__ == "__main__":
    print(json.dumps(asdict(train(Settings(**json.loads(sys.argv[1]))))))
