"""Runs the same test on every implementation of an op: native CPU code by instruction set, Triton, CUDA C++."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch

from memkernels import _library
from memkernels.testing.interpreter import hardware_bfloat16


@dataclass(frozen=True)
class Implementation:
    """One way to compute the operators: `name` says which, `device` where its tensors live."""

    name: str
    device: str

    def __str__(self) -> str:
        return self.name

    @contextmanager
    def active(self) -> Iterator[str]:
        """While active, `torch.ops.memkernels` runs this implementation; yields the device for the inputs."""
        if self.name.startswith("cpu-"):
            before = _library.cpu_isa()
            _library.set_cpu_isa(self.name.removeprefix("cpu-"))
            try:
                yield self.device
            finally:
                _library.set_cpu_isa(before)
        elif self.name == "triton-interpreter":
            functions = {operator: (module, operator) for operator, module in _library.triton_modules.items()}
            with _override_cpu(functions), hardware_bfloat16():
                yield self.device
        else:
            yield self.device


@contextmanager
def _override_cpu(functions: dict[str, tuple[str, str]]) -> Iterator[None]:
    """Puts Python functions, given as (module, name), in the place of the CPU kernels of the same operators."""
    library = torch.library.Library("memkernels", "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)
            for operator, (module, name) in functions.items():
                library.impl(operator, getattr(importlib.import_module(module), name), "CPU", allow_override=True)
        with mock.patch.dict(_library._native_devices, {name: ["cpu"] for name in functions}):
            yield
    finally:
        library._destroy()


def implementations(operator: str) -> list[Implementation]:
    """Every implementation of `operator` that can run on this machine.

    Triton kernels run on the GPU where there is one, else under the interpreter (TRITON_INTERPRET=1).
    """
    found = []
    if _library.missing(operator, "cpu") is None:
        before = _library.cpu_isa()
        for isa in _library.CPU_ISAS:
            try:
                _library.set_cpu_isa(isa)
            except RuntimeError:
                continue
            if _library.has_cpu_build(operator):
                found.append(Implementation(f"cpu-{isa}", "cpu"))
        _library.set_cpu_isa(before)
    if torch.cuda.is_available() and _library.missing(operator, "cuda") is None:
        found.append(Implementation("gpu", "cuda"))
    elif operator in _library.triton_modules:
        found.append(Implementation("triton-interpreter", "cpu"))
    return found
