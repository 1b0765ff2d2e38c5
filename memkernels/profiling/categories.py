"""What memory is for."""

from __future__ import annotations

from typing import NamedTuple


class Category(NamedTuple):
    """`rank`: of several that memory could be of, the highest counts."""

    label: str
    colour: str
    rank: int


# In the order in which a chart stacks them.
CATEGORIES = {
    "parameters": Category("parameters, buffers", "#4c78a8", 4),
    "optimizer": Category("optimizer states", "#5fb3ad", 3),
    "gradients": Category("gradients", "#f2903a", 2),
    "activations": Category("activations", "#5aa354", 1),
    "temporary": Category("inputs, temporary", "#b5bac2", 0),
}
# Not in the device's memory, so not of its stack.
OFFLOADED = Category("offloaded", "#a0559b", 0)
