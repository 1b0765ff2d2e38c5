"""The extension module that csrc/runtime is built into, or the sentence that says why it is missing."""

from __future__ import annotations

import sys
from types import ModuleType


def load_runtime() -> ModuleType:
    """`memkernels._runtime`.

    Raises:
        ImportError: it is not built for this Python.
    """
    try:
        from memkernels import _runtime
    except ImportError as error:
        version = ".".join(map(str, sys.version_info[:2]))
        raise ImportError(
            f"memkernels._runtime is not built for Python {version}: run `pip install --no-build-isolation -e .` where"
            " pybind11 and a compiler are."
        ) from error
    return _runtime
