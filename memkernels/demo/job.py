"""A job: what is trained, and one step of it. The demo's is llama.py; examples/ have others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

LOSS = "held-out loss"


@dataclass(frozen=True)
class Job:
    """A model with its optimizer step, and the data for it.

    Args:
        name: of the run: see `name_of`.
        model: in training mode.
        step: one step of the optimizer on one of the batches. The first allocates gradients and optimizer state, which
            then stay.
        batches: one a step.
        evaluate: what held-out data says of the model now, `LOSS` among it; the model is in training mode after it.
        device: where all this is.
    """

    name: str
    model: torch.nn.Module
    step: Callable[[Any], None]
    batches: Sequence[Any]
    evaluate: Callable[[], dict[str, float]]
    device: torch.device


def name_of(recompute: str | None) -> str:
    """Of a run with that option of `memkernels.patch`; None: plain transformers."""
    return "transformers" if recompute is None else "memkernels"
