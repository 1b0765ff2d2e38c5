"""`python -m memkernels.bench.plot`: a PNG beside each CSV of results (needs the extra `plot`)."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from memkernels.bench.results import Row, read

PANELS = ("forward", "backward", "full", "memory")


def draw(rows: list[Row], path: Path) -> None:
    """Draw one op's ratios to the baseline: a panel per mode, a group of bars per case, a bar per provider.

    The error bars of a time are its 10th and 90th percentile over the baseline's median.
    """
    from matplotlib.figure import Figure  # not pyplot, which has a state that is the user's

    panels = [mode for mode in PANELS if any(row.mode == mode for row in rows)]
    figure = Figure(figsize=(10, 3 * len(panels)), layout="constrained")
    grid = figure.subplots(len(panels), 1, squeeze=False)
    for axes, mode in zip(grid[:, 0], panels, strict=True):
        _draw_panel(axes, mode, [row for row in rows if row.mode == mode])
    grid[0, 0].legend(ncols=5, loc="lower left", bbox_to_anchor=(0, 1.12), frameon=False)
    figure.suptitle(f"{rows[0].op}: {rows[0].machine}, torch {rows[0].torch}")
    figure.savefig(path, dpi=100)


def main(arguments: list[str] | None = None) -> int:
    """Draw every CSV below benchmarks/results."""
    parser = argparse.ArgumentParser(prog="python -m memkernels.bench.plot", description=main.__doc__)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args(arguments)
    for path in sorted(args.results.glob("*/*.csv")):
        try:
            draw(read(path), path.with_suffix(".png"))
        except ModuleNotFoundError as error:
            print(f"plot: {error}: pip install 'memkernels[plot]'", file=sys.stderr)
            return 2
        print(path.with_suffix(".png"))
    return 0


def _draw_panel(axes: Any, mode: str, rows: list[Row]) -> None:
    labels = list(dict.fromkeys(f"{row.case}\n{row.dtype}" for row in rows))
    providers = list(dict.fromkeys(row.provider for row in rows))
    medians = {(row.case, row.dtype): row.median_ms for row in rows if row.provider == row.baseline}
    width = 0.8 / len(providers)
    for offset, provider in enumerate(providers):
        own = [row for row in rows if row.provider == provider]
        places = [labels.index(f"{row.case}\n{row.dtype}") + (offset + 0.5) * width - 0.4 for row in own]
        bars = axes.bar(places, [row.ratio_to_baseline for row in own], width, label=provider)
        axes.bar_label(bars, fmt="%.2f", fontsize=7)
        for place, row in zip(places, own, strict=True):
            unit = medians[row.case, row.dtype]
            if row.p10_ms is not None and row.p90_ms is not None and unit:
                axes.vlines(place, row.p10_ms / unit, row.p90_ms / unit, color="black", linewidth=0.8)
    axes.axhline(1.0, color="grey", linewidth=0.8)
    axes.set_xticks(range(len(labels)), labels, fontsize=8)
    axes.set_ylabel(f"{mode}, x {rows[0].baseline}")


if __name__ == "__main__":
    raise SystemExit(main())
