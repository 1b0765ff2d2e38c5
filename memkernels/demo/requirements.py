"""What a job needs of the machine."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from memkernels._library import cpu_missing
from memkernels.bench import machine


def unmet(modules: Sequence[str], extras: str) -> str | None:
    """Why a job cannot run here, of modules that these extras of memkernels install; None: it can."""
    if missing := [module for module in modules if importlib.util.find_spec(module) is None]:
        return f"{', '.join(missing)} missing: pip install 'memkernels[{extras}]'"
    if machine.device().type == "cpu" and cpu_missing is not None:
        return f"without native kernels memkernels computes by its reference: {cpu_missing}"
    return None
