"""The operators `torch.ops.memkernels.*`: their schemas, and which implementation each has on each device.

A schema is defined once, beside its fake, in `memkernels/ops/<op>/op.py`. Implementations come from three places:
`_C_cpu.so` (csrc/cpu), `_C_cuda.so` (csrc/cuda), and the op's `triton.py`, imported at its first call. Where a device
has none, the public functions compute by the op's `reference.py`, and `missing(...)` says why.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

FLOATING = (torch.float32, torch.bfloat16, torch.float16)
CPU_ISAS = ("baseline", "avx2", "avx512", "amx")
# Values of MEMKERNELS_PRODUCTS.
PRODUCTS = ("auto", "triton", "matmul")

_FOLDER = Path(__file__).parent
_library = torch.library.Library("memkernels", "DEF")
# Operator name -> the devices that a native library implements it for, and the Triton module that does so on GPUs.
_native_devices: dict[str, list[str]] = {}
triton_modules: dict[str, str] = {}
# What computes instead of operators without an implementation on a device, where it is not an op's reference.
alternatives: dict[str, str] = {}
_python_implementations: dict[str, Callable] = {}
_triton_missing = None if importlib.util.find_spec("triton") else "Triton is not installed: `pip install triton`."


def not_built(name: str) -> str | None:
    """The sentence that says so of a native library; None where it is built."""
    if (_FOLDER / name).exists():
        return None
    compiler = "nvcc" if name == "_C_cuda.so" else "a compiler"
    return f"{name} is not built: run `pip install --no-build-isolation -e .` where {compiler} is."


def _load(name: str) -> tuple[ctypes.CDLL | None, str | None]:
    """Loads a native library: the library, or the sentence that says why it is missing."""
    missing = not_built(name)
    if missing is not None:
        return None, missing
    path = _FOLDER / name
    try:
        torch.ops.load_library(path)
        return ctypes.CDLL(str(path)), None
    except OSError as error:
        return None, f"{name} does not load with torch {torch.__version__}: {error}"


def _load_cuda() -> tuple[ctypes.CDLL | None, str | None]:
    if torch.version.cuda is None:
        return None, "this torch is built without CUDA."
    if not torch.cuda.is_available():
        return None, "torch finds no CUDA device."
    return _load("_C_cuda.so")


cpu_library, cpu_missing = _load("_C_cpu.so")
cuda_library, cuda_missing = _load_cuda()


def cpu_isa() -> str | None:
    """The instruction set that the native CPU kernels run with, or None without the native library."""
    if cpu_library is None:
        return None
    cpu_library.memkernels_cpu_isa.restype = ctypes.c_char_p
    return cpu_library.memkernels_cpu_isa().decode()


def has_cpu_build(operator: str) -> bool:
    """Whether a native CPU kernel has a build of its own for the instruction set in use, not that of a lower one."""
    return cpu_library is not None and bool(cpu_library.memkernels_has_build(operator.encode()))


def set_cpu_isa(name: str | None) -> None:
    """Makes the native CPU kernels run with `name`: baseline, avx2, avx512 or amx.

    Raises:
        ValueError: an unknown name.
        RuntimeError: this processor lacks it, or the native library is missing.
    """
    if name not in CPU_ISAS:
        raise ValueError(f"MEMKERNELS_CPU: got {name!r}, it takes {', '.join(CPU_ISAS)}.")
    if cpu_library is None:
        raise RuntimeError(f"MEMKERNELS_CPU={name}: {cpu_missing}")
    if cpu_library.memkernels_set_cpu_isa(name.encode()) != 0:
        raise RuntimeError(f"MEMKERNELS_CPU={name}: this processor does not have that instruction set.")


if "MEMKERNELS_CPU" in os.environ:
    set_cpu_isa(os.environ["MEMKERNELS_CPU"])


_products = os.environ.get("MEMKERNELS_PRODUCTS", "auto")
if _products not in PRODUCTS:
    raise ValueError(f"MEMKERNELS_PRODUCTS: got {_products!r}, it takes {', '.join(PRODUCTS)}.")


def _no_outputs(*args: Any) -> None:
    """The fake of operators that only write into their arguments."""


def define(schema: str, fake: Callable = _no_outputs, *, alternative: str | None = None) -> None:
    """Defines `memkernels::<schema>` and the fake that gives its outputs' shapes and dtypes.

    Args:
        alternative: names what computes where a device has no implementation, if that is not the op's reference.
    """
    name = schema.split("(", 1)[0]
    if alternative is not None:
        alternatives[name] = alternative
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"memkernels::{name}", fake, lib=_library)
    has_native = torch._C._dispatch_has_kernel_for_dispatch_key
    _native_devices[name] = [d for d in ("cpu", "cuda") if has_native(f"memkernels::{name}", d.upper())]


def implement_with_python(operator: str, function: Callable) -> None:
    """Registers `function` for every device: an operator that calls other operators, opaque to the compiler."""
    _library.impl(operator, function, "CompositeExplicitAutograd")
    _python_implementations[f"memkernels::{operator}"] = function


def python_implementation(operator: torch._ops.OpOverload, device_type: str) -> Callable | None:
    """What `implement_with_python` registered for an operator, where a device has nothing else; else None."""
    name = operator._schema.name
    if device_type == "cuda" and name.removeprefix("memkernels::") in triton_modules and _triton_missing is None:
        return None
    return _python_implementations.get(name)


def implement_with_triton(module: str, *operators: str, otherwise: ModuleType | None = None) -> None:
    """Registers functions of `module`, named as the operators are, for GPUs; imported when first called.

    Args:
        otherwise: a module of functions of the same names, by torch's matrix products, for calls that do not take the
            kernels: in float32 (unless MEMKERNELS_PRODUCTS=triton) or float64, with MEMKERNELS_PRODUCTS=matmul, or
            without Triton.
    """

    def lazy(name: str) -> Callable:
        def call(*args, **kwargs):
            if otherwise is not None and not _takes_triton(args):
                return getattr(otherwise, name)(*args, **kwargs)
            # Triton launches on torch's current device, which need not be that of the tensors.
            with torch.cuda.device_of(next(arg for arg in args if isinstance(arg, torch.Tensor))):
                return getattr(importlib.import_module(module), name)(*args, **kwargs)

        return call

    for name in operators:
        triton_modules[name] = module
        # Without Triton the operator is left with what else it has.
        if otherwise is not None or _triton_missing is None:
            _library.impl(name, lazy(name), "CUDA")


def prefers_matmul() -> bool:
    """Whether MEMKERNELS_PRODUCTS asks for torch's products where there is a choice."""
    return _products == "matmul"


def _takes_triton(args: tuple) -> bool:
    """Whether a product with a choice is by Triton: as `ops.gated_mlp`'s, if operands are bfloat16 or float16."""
    if _triton_missing is not None or prefers_matmul():
        return False
    dtypes = {arg.dtype for arg in args if isinstance(arg, torch.Tensor) and arg.is_floating_point()}
    return dtypes <= set(FLOATING) and (_products == "triton" or dtypes != {torch.float32})


def missing(operator: str, device_type: str) -> str | None:
    """Why `operator` has no implementation on a device; None where it has one."""
    if device_type in _native_devices[operator]:
        return None
    if device_type == "cuda" and operator in triton_modules:
        return _triton_missing
    return {"cpu": cpu_missing, "cuda": cuda_missing}.get(device_type) or f"it has no implementation for {device_type}."


def has_kernel(operator: str, x: torch.Tensor) -> bool:
    """Whether `operator` runs on the device and dtype of x; otherwise the op's reference computes."""
    return x.dtype in FLOATING and missing(operator, x.device.type) is None
