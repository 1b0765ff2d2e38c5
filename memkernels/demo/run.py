"""Runs of a job, each trained in one process, its memory measured in another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from memkernels.demo.memory import Memory
from memkernels.demo.train import Training
from memkernels.testing import run_in_child


@dataclass(frozen=True)
class Run:
    """What was found of one job."""

    training: Training
    memory: Memory


def run_both(
    train: Callable[..., dict], measure: Callable[..., dict], settings: dict[str, Any], recompute: str
) -> tuple[Run, Run]:
    """Runs with plain transformers and then with `memkernels.patch(model, recompute=recompute)`.

    Training shows its progress on stderr; memory is measured in a process whose allocator returns what is freed, which
    would cost training time.

    Args:
        train: train(settings), at the top level of a file: a `Training` as a dictionary.
        measure: measure(settings), likewise: a `Memory`.
        settings: what JSON can carry; "recompute" is added, None for plain transformers.

    Raises:
        RuntimeError: one of the processes failed.
    """

    def run(recompute: str | None) -> Run:
        chosen = settings | {"recompute": recompute}
        training = Training(**run_in_child(train, chosen, timed=True))
        return Run(training, Memory(**run_in_child(measure, chosen)))

    return run(None), run(recompute)
