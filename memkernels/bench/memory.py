"""Memory of one provider's step, measured in a process of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from memkernels.bench import machine
from memkernels.bench.registry import load
from memkernels.testing import saved_bytes
from memkernels.testing.peak_memory import peak_bytes


def measure_memory(path: str, label: str, provider: str) -> dict[str, Any]:
    """Peak and saved bytes of one full step; run it through `run_in_child`.

    Args:
        path: the benchmark's file.
        label: the case's label.
        provider: one of the benchmark's providers.

    Returns:
        "memory": peak above inputs and gradients, the step accumulating into gradients that exist already;
        "memory_with_gradients": peak above inputs, the step allocating its gradients; "saved_bytes": held between
        forward and backward. Or "unavailable": why the provider could not be set up.
    """
    machine.set_threads()
    benchmark = load(Path(path))
    case = benchmark.case(label)
    torch.manual_seed(0)
    try:
        step = benchmark.setup(case, provider)
    except ImportError as error:
        return {"unavailable": str(error)}
    grad_outputs = step.grad_outputs()

    def full_step() -> None:
        torch.autograd.backward(step.outputs(), grad_outputs)

    full_step()  # one-time costs, compilation among them; leaves the gradients in place
    step.release()
    accumulating = peak_bytes(full_step, device=case.device)
    step.clear_gradients()
    step.release()
    allocating = peak_bytes(full_step, device=case.device)
    return {
        "memory": accumulating,
        "memory_with_gradients": allocating,
        "saved_bytes": saved_bytes(step.forward, exclude=step.parameters),
    }
