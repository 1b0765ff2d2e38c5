"""How an op declares what the checks without a GPU need to know about its Triton kernels, and where they are found.

Each op with a `triton.py` has a `triton_cases.py` beside it, with a list KERNEL_CASES: the configurations that users
meet, by dtype and representative size. A case calls the op's own launcher, so what is checked is what is shipped:

    def _forward(dtype, device):
        x, weight = torch.ones(256, 4096, dtype=dtype, device=device), torch.ones(4096, dtype=dtype, device=device)
        y, _, rstd = rms_norm_fwd(x, None, weight, 1e-6, 0.0)
        return x, weight, y, rstd

    KERNEL_CASES = [KernelCase("forward bfloat16 4096", functools.partial(_forward, torch.bfloat16))]

The launcher runs on "meta" tensors to record the kernels it launches, each then compiled for every target
(`memkernels.testing.aot`), and on "cpu" tensors under Triton's interpreter to count the bytes they move
(`memkernels.testing.traffic`). So it may not read a tensor's values on the host, nor ask the device for its properties
unless the tensor is on a GPU, nor autotune; a launcher that chooses by architecture takes the choice as an argument,
and the case says by `targets` where it applies. Take rows enough that what is read once per program is small beside
the rest, and no more: the interpreter takes about a millisecond a tile, and a kernel half a second a target to compile.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

import memkernels.ops


@dataclass(frozen=True)
class Target:
    """A GPU architecture to compile for; `max_shared_bytes` is the shared memory that one block can have there."""

    name: str
    backend: str
    arch: int | str
    warp_size: int
    max_shared_bytes: int

    def __str__(self) -> str:
        return self.name


TARGETS = (
    Target("sm_80", "cuda", 80, 32, 163 << 10),
    Target("sm_86", "cuda", 86, 32, 99 << 10),
    Target("sm_89", "cuda", 89, 32, 99 << 10),
    Target("sm_90", "cuda", 90, 32, 227 << 10),
    Target("sm_100", "cuda", 100, 32, 227 << 10),
    Target("sm_120", "cuda", 120, 32, 99 << 10),
    Target("gfx942", "hip", "gfx942", 64, 64 << 10),
)


NVIDIA, AMD = (tuple(target for target in TARGETS if target.backend == backend) for backend in ("cuda", "hip"))


def targets_of(architecture: str) -> tuple[Target, ...]:
    """The targets that take the tiles chosen for `architecture`: sm_89 takes those of sm_86."""
    names = ("sm_86", "sm_89") if architecture == "sm_86" else (architecture,)
    return tuple(target for target in TARGETS if target.name in names)


@dataclass(frozen=True)
class KernelCase:
    """One shipped configuration of an op's Triton kernels.

    Args:
        label: unique in the op: direction, dtype, size.
        launch: takes a device, creates the inputs there, calls the launcher, and returns the tensors that have to cross
            global memory once: inputs and outputs, and twice what is read and written. Their bytes are the least.
        traffic_limit: the bytes moved may be at most this many times the least; None where arithmetic is the bound.
        targets: the architectures that this configuration is for.
    """

    label: str
    launch: Callable[[str], tuple[Tensor, ...]]
    traffic_limit: float | None = 1.05
    targets: tuple[Target, ...] = TARGETS


def ops_with_triton() -> list[str]:
    """The names of the ops that have a `triton.py`."""
    names = [module.name for module in pkgutil.iter_modules(memkernels.ops.__path__) if module.ispkg]
    return [name for name in names if importlib.util.find_spec(f"memkernels.ops.{name}.triton")]


def kernel_cases(op: str) -> list[KernelCase]:
    """What `op` declares.

    Raises:
        LookupError: the op has no `triton_cases.py`, or two of its cases share a label.
    """
    name = f"memkernels.ops.{op}.triton_cases"
    if importlib.util.find_spec(name) is None:
        raise LookupError(f"op {op!r} has no triton_cases.py; memkernels.testing.cases says what it holds.")
    cases = importlib.import_module(name).KERNEL_CASES
    labels = [case.label for case in cases]
    if len(set(labels)) < len(labels):
        raise LookupError(f"{name}: labels must be unique, got {labels}.")
    return cases


def kernel_case(op: str, label: str) -> KernelCase:
    """The case of `op` with this label."""
    return next(case for case in kernel_cases(op) if case.label == label)
