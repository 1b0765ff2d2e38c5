"""What the main job found: a table, and two plots."""

from __future__ import annotations

from pathlib import Path

import torch

from memkernels.bench.table import Cell, format_table
from memkernels.demo.run import Run


def largest_difference(plain: Run, patched: Run) -> float:
    """Of the losses at any checkpoint."""
    ours, theirs = (torch.tensor(run.training.losses, dtype=torch.float64) for run in (patched, plain))
    return float((ours - theirs).abs().max())


def table(plain: Run, patched: Run) -> str:
    """Memory, time, and what held-out data said at each checkpoint, with ratios and differences."""
    peaks = plain.memory.peak, patched.memory.peak
    times = plain.training.step_seconds, patched.training.step_seconds
    rows: list[list[Cell]] = [
        ["peak memory above the model", *(f"{peak:.0f} MB" for peak in peaks), f"{peaks[1] / peaks[0]:.2f}x"],
        ["step time, median", *(f"{seconds:.3g} s" for seconds in times), f"{times[1] / times[0]:.2f}x"],
    ]
    for name, theirs in plain.training.held_out.items():
        ours = patched.training.held_out[name]
        for step, before, after in zip(plain.training.checkpoints, theirs, ours, strict=True):
            rows.append([f"{name}, step {step}", f"{before:.4f}", f"{after:.4f}", f"{after - before:+.1e}"])
    return format_table(["", "transformers", "memkernels", ""], rows)


def draw(plain: Run, patched: Run, folder: Path) -> list[Path]:
    """memory.png: memory during one training step; loss.png: the two curves. Returns their paths."""
    from matplotlib.figure import Figure  # not pyplot, which has a state that is the user's

    runs = {"transformers": plain, "memkernels": patched}
    paths = [folder / "memory.png", folder / "loss.png"]

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for name, run in runs.items():
        seconds, megabytes = zip(*run.memory.timeline, strict=True)
        axes.fill_between(seconds, megabytes, alpha=0.35)
        axes.plot(seconds, megabytes, label=f"{name}: peak {run.memory.peak:.0f} MB")
    axes.set(xlabel="seconds into one training step", ylabel="MB above the model and its optimizer")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(paths[0], dpi=120)

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for (name, run), style in zip(runs.items(), ("o-", "x--"), strict=True):
        training = run.training
        label = f"{name}: {training.step_seconds:.3g} s a step"
        axes.plot(training.checkpoints, training.losses, style, label=label)
    axes.set(xlabel="training steps", ylabel="loss of held-out text, nats a byte")
    axes.legend()
    figure.savefig(paths[1], dpi=120)
    return paths
