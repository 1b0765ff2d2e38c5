"""A plan as a table."""

from __future__ import annotations

import io

from memkernels.memory_size import format_bytes
from memkernels.planner.estimate import PARTS, Estimate, Technique
from memkernels.planner.search import Plan

_ROWS = 12


def shown(plan: Plan) -> list[Estimate]:
    """What the table has: the first of those that differ in state_bits and micro_batch alone; a dozen of them."""
    found: dict[tuple, Estimate] = {}
    for estimate in plan.estimates:
        of = estimate.technique
        tiers = of.offload, of.offload_states, of.offload_gradients
        found.setdefault((of.recompute, *tiers, of.stage, of.step_in_backward), estimate)
    return list(found.values())[:_ROWS]


def as_text(plan: Plan, width: int = 180) -> str:
    """The table, and one line of what it comes to."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(title=plan.title, caption=verdict(plan), box=SIMPLE_HEAD, pad_edge=False)
    for column in ("fits", "recompute", "offload", "ZeRO", "bits", "rows", "steps"):
        table.add_column(column)
    for column in ("peak", *PARTS, "FLOPs", "disk", "host", "sent"):
        table.add_column(column, justify="right", no_wrap=True)
    for estimate in shown(plan):
        of = estimate.technique
        table.add_row(
            "yes" if estimate.peak <= plan.memory else "no",
            of.recompute, offloaded(of), str(of.stage), str(of.state_bits), str(of.micro_batch),
            "in backward" if of.step_in_backward else "",
            format_bytes(estimate.peak), *(format_bytes(estimate.parts[part]) for part in PARTS),
            f"{estimate.extra_flops:+.1%}",
            *(format_bytes(moved) for moved in (estimate.disk_bytes, estimate.host_bytes, estimate.sent_bytes)),
        )  # fmt: skip
    written = io.StringIO()
    Console(file=written, width=width).print(table)
    return written.getvalue()


def offloaded(technique: Technique) -> str:
    """What is offloaded, in words."""
    tiers = {
        "activations": technique.offload,
        "states": technique.offload_states,
        "gradients": technique.offload_gradients,
    }
    to = {tier: [what for what, its in tiers.items() if its == tier] for tier in ("host", "disk")}
    return "; ".join(f"{', '.join(what)} to {tier}" for tier, what in to.items() if what)


def verdict(plan: Plan) -> str:
    """Which combination to take, or that none fits."""
    if plan.best is None:
        smallest = plan.estimates[0]
        return f"none fits into {format_bytes(plan.memory)}: the smallest takes {format_bytes(smallest.peak)}"
    return (
        f"{format_bytes(plan.best.peak)} of {format_bytes(plan.memory)} by the first row, the cheapest that fits; of"
        " tensors alone"
    )
