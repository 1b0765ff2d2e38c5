"""A timeline as one HTML page that needs nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from memkernels.profiling.categories import CATEGORIES, OFFLOADED
from memkernels.profiling.timeline import Timeline

_TEMPLATE = Path(__file__).with_name("page.html")
_STRETCHES = 1500
_ALLOCATIONS = 1500  # the largest, that the page can list


def write(found: list[Timeline], path: Path) -> None:
    """Writes the page: `page.html` with the data in it."""
    data = {
        "categories": {name: {"label": c.label, "colour": c.colour} for name, c in CATEGORIES.items()},
        "offloaded": {"label": OFFLOADED.label, "colour": OFFLOADED.colour},
        "devices": [_device(timeline) for timeline in found],
    }
    # `<` ends no script element in a string's escape.
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    path.write_text(_TEMPLATE.read_text(encoding="utf-8").replace("/*DATA*/", text), encoding="utf-8")


def _device(timeline: Timeline) -> dict[str, Any]:
    drawn = timeline.reduced(_STRETCHES)
    largest = sorted(timeline.allocations, key=lambda allocation: -allocation.nbytes)[:_ALLOCATIONS]
    end = timeline.times[-1]
    return {
        "name": timeline.device,
        "times": [round(time, 7) for time in drawn.times],
        "series": drawn.series,
        "offloaded": drawn.offloaded,
        "phases": timeline.phases,
        "peak": {"time": round(timeline.times[timeline.peak_index], 7), "bytes": timeline.peak},
        "allocations": [
            [
                round(timeline.seconds(a.first), 7),
                round(end if a.last is None else timeline.seconds(a.last), 7),
                a.nbytes,
                a.category,
                a.op,
                a.module,
            ]
            for a in largest
        ],
    }
