"""A plan as stacked bars."""

from __future__ import annotations

from pathlib import Path

from memkernels.planner.estimate import PARTS, Technique
from memkernels.planner.report import offloaded, shown
from memkernels.planner.search import Plan

_GB = 1e9


def save_plot(plan: Plan, path: Path) -> Path:
    """Writes a PNG: a bar for each row of the table, in its order, and a line at the limit."""
    from matplotlib.figure import Figure  # not pyplot, which has a state that is the user's

    estimates = shown(plan)
    figure = Figure(figsize=(10, 1.5 + 0.4 * len(estimates)), layout="constrained")
    axes = figure.subplots()
    names = [_name(estimate.technique) for estimate in estimates]
    before = [0.0] * len(estimates)
    for part in PARTS:
        sizes = [estimate.parts[part] / _GB for estimate in estimates]
        axes.barh(names, sizes, left=before, label=part)
        before = [left + size for left, size in zip(before, sizes, strict=True)]
    axes.axvline(plan.memory / _GB, color="black", linestyle="--", label="limit")
    axes.invert_yaxis()
    axes.set(xlabel="GB at the highest moment of a step, on each rank", title=plan.title)
    axes.title.set_fontsize(8)
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


def _name(technique: Technique) -> str:
    parts = [technique.recompute, f"{technique.state_bits} bits", f"rows {technique.micro_batch}"]
    parts += [what for what in (offloaded(technique),) if what] + [f"ZeRO {technique.stage}"] * (technique.stage > 0)
    return ", ".join(parts + ["steps in backward"] * technique.step_in_backward)
