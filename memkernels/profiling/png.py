"""A timeline as a PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from memkernels.memory_size import unit_of
from memkernels.profiling.categories import CATEGORIES, OFFLOADED
from memkernels.profiling.timeline import Timeline

_STRETCHES = 1500
_INK, _FAINT = "#2b2f36", "#8a9099"


def draw(found: list[Timeline], path: Path) -> None:
    """A panel for each device: stacked areas, the peak and what it consists of, the phases above."""
    from matplotlib.figure import Figure  # not pyplot, which has a state that is the user's

    figure = Figure(figsize=(11, 0.6 + 4.6 * len(found)), layout="constrained")
    grid = figure.subplots(len(found), 1, squeeze=False)
    for axes, timeline in zip(grid[:, 0], found, strict=True):
        _draw_panel(axes, timeline)
    figure.savefig(path, dpi=150)


def _draw_panel(axes: Any, timeline: Timeline) -> None:
    peak, drawn = timeline.peak_index, timeline.reduced(_STRETCHES)
    top = max(timeline.peak, *timeline.offloaded)
    bytes_scale, bytes_unit = unit_of(top)
    time_scale, time_unit = (1e3, "ms") if drawn.times[-1] < 2 else (1.0, "s")
    times = [time * time_scale for time in drawn.times]
    used = [name for name, values in drawn.series.items() if any(values)]
    layers = [[value / bytes_scale for value in drawn.series[name]] for name in used]
    at_peak = timeline.by_category(peak)
    labels = [f"{CATEGORIES[name].label}  {at_peak[name] / bytes_scale:.3g} {bytes_unit}" for name in used]
    colours = [CATEGORIES[name].colour for name in used]
    areas = axes.stackplot(times, layers, colors=colours, labels=labels, step="post", linewidth=0)
    handles = list(reversed(areas))
    if any(drawn.offloaded):
        label = f"{OFFLOADED.label}, up to {max(timeline.offloaded) / bytes_scale:.3g} {bytes_unit}"
        line = axes.step(
            times, [v / bytes_scale for v in drawn.offloaded], where="post", color=OFFLOADED.colour, ls="--", lw=1.6,
            label=label,
        )  # fmt: skip
        handles = [*line, *handles]
    total, when = timeline.peak / bytes_scale, timeline.times[peak] * time_scale
    height = 1.22 * top / bytes_scale
    axes.plot([when], [total], "o", color=_INK, ms=4.5, zorder=5)
    right = when > 0.72 * times[-1]
    axes.annotate(
        f"peak {total:.4g} {bytes_unit}", (when, total), xytext=(-8 if right else 8, 5), textcoords="offset points",
        ha="right" if right else "left", color=_INK, weight="bold", fontsize=10,
    )  # fmt: skip
    for i, (name, first, last) in enumerate(timeline.phases):
        first, last = first * time_scale, last * time_scale
        if i % 2 == 0:
            axes.axvspan(first, last, color="#000000", alpha=0.045, lw=0, zorder=0)
        if last - first > 0.05 * times[-1]:
            axes.text((first + last) / 2, 0.985 * height, name, ha="center", va="top", color=_FAINT, fontsize=9.5)
    axes.set(xlim=(0, times[-1]), ylim=(0, height), xlabel=time_unit, ylabel=bytes_unit)
    axes.set_title(f"Memory on {timeline.device}", loc="left", color=_INK, weight="bold", fontsize=12)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(axis="y", color="#000000", alpha=0.08, lw=0.8)
    axes.tick_params(colors=_INK, labelsize=9)
    axes.legend(
        handles=handles, title="at the peak", alignment="left", loc="upper left", bbox_to_anchor=(1.005, 1),
        frameon=False, fontsize=9.5, title_fontsize=9.5, labelspacing=0.7,
    )  # fmt: skip
