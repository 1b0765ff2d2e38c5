"""`python -m memkernels info`: what is installed, what each op runs on, and a check that one op computes right."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path

import torch

from memkernels import __version__, _library, ops
from memkernels.memory_size import format_bytes
from memkernels.offload.runtime import load_runtime
from memkernels.ops.rms_norm import reference
from memkernels.testing.cuda_resources import find_nvcc

_BUILD_INFO = Path(__file__).parent / "build_info.json"
# What csrc/cuda implements. Where torch finds no GPU its library is not loaded, and cannot say so itself.
CUDA_OPERATORS = (
    "adafactor_", "adamw_", "cross_entropy_grad_", "cross_entropy_stats", "factored_square_sum", "factored_squares",
    "lion_", "moe_combine", "moe_combine_bwd", "moe_dispatch", "moe_plan", "muon_momentum_", "nf4_dequantize_",
    "nf4_quantize", "sgd_", "square_sum", "wide_norm_bwd", "wide_norm_fwd",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`info` has no options."""


def run(args: argparse.Namespace) -> int:
    """Prints the report; returns 1 where the checked op computes a wrong result."""
    sections = {
        f"memkernels {__version__}": _versions(),
        "built with": _build(),
        "compilers here": _compilers(),
        "devices": _devices(),
        "each operator runs on": _operators(),
    }
    for title, lines in sections.items():
        print(title)
        for name, value in lines.items():
            print(f"  {name:<28} {value}")
    return int(not all(_check(device) for device in _device_types()))


def _versions() -> dict[str, str]:
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    versions = {"python": platform.python_version(), "torch": f"{torch.__version__} ({cuda})"}
    for package in ("triton", "transformers", "peft"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = f"not installed: pip install {package}"
    return versions


def _build() -> dict[str, str]:
    if not _BUILD_INFO.exists():
        return {"nothing": "run `pip install --no-build-isolation -e .` where a compiler is"}
    built = json.loads(_BUILD_INFO.read_text())
    return {name: value if isinstance(value, str) else " ".join(value) for name, value in built.items()}


def _compilers() -> dict[str, str]:
    names = {"C++": os.environ.get("CXX", "g++"), "CUDA": find_nvcc() or "nvcc"}
    return {name: _first_version_line(command) for name, command in names.items()}


def _first_version_line(command: str) -> str:
    try:
        printed = subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return f"{command}: not found"
    lines = printed.splitlines()
    return next((line for line in lines if "release" in line), lines[0])


def _devices() -> dict[str, str]:
    threads = f"{torch.get_num_threads()} of {os.cpu_count()} cores"
    lines = {"cpu": f"{_library.cpu_isa() or _library.cpu_missing} on {threads}"}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        lines[f"cuda:{index}"] = f"{properties.name}, {capability}, {format_bytes(properties.total_memory)}"
    if not torch.cuda.is_available():
        lines["gpu"] = "none that torch can use; 'with a gpu' below says what operators would run on"
    return lines | {"disk": _disk_tier()}


def _disk_tier() -> str:
    try:
        missing = load_runtime().io_uring_missing()
    except ImportError as error:
        return f"no offload: {error}"
    return "offload through io_uring" if missing is None else f"offload by threads without io_uring: {missing}"


def _operators() -> dict[str, str]:
    prefix = "memkernels::"
    names = sorted(name.removeprefix(prefix) for name in torch._C._dispatch_get_all_op_names() if prefix in name)
    return {name: _implementations(name) for name in names}


def _implementations(operator: str) -> str:
    gpu = "gpu" if torch.cuda.is_available() else "with a gpu"
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"memkernels::{operator}", "CompositeExplicitAutograd"):
        everywhere = "other operators and torch's matrix products"
        if _missing(operator, "cuda") is not None:
            return everywhere
        return f"cpu: {everywhere}; {gpu}: {_implementation(operator, 'cuda')} in bfloat16 and float16"
    return f"cpu: {_implementation(operator, 'cpu')}; {gpu}: {_implementation(operator, 'cuda')}"


def _implementation(operator: str, device_type: str) -> str:
    reason = _missing(operator, device_type)
    if reason is not None:
        return f"{_library.alternatives.get(operator, 'plain PyTorch')}, since {reason.rstrip('.')}"
    if device_type == "cpu":
        return f"C++ ({_cpu_build(operator)})"
    return "Triton" if operator in _library.triton_modules else "CUDA C++"


def _missing(operator: str, device_type: str) -> str | None:
    """`_library.missing`; of GPUs, where torch finds none, as it would be with one."""
    if device_type == "cpu" or torch.cuda.is_available() or operator in _library.triton_modules:
        return _library.missing(operator, device_type)
    return _library.not_built("_C_cuda.so") if operator in CUDA_OPERATORS else "it has no implementation for cuda."


def _cpu_build(operator: str) -> str | None:
    """The instruction set of the build that runs: where the one in use has none, that below it."""
    isa = _library.cpu_isa()
    if isa is None or _library.has_cpu_build(operator):
        return isa
    return _library.CPU_ISAS[_library.CPU_ISAS.index(isa) - 1]


def _device_types() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def _check(device: str) -> bool:
    """Runs ops.rms_norm forward and backward in bfloat16 against float64."""
    generator = torch.Generator().manual_seed(0)
    exact = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((64, 512), (512,))]
    rounded = [tensor.to(device, torch.bfloat16).requires_grad_() for tensor in exact]
    exact = [tensor.detach().double().cpu().requires_grad_() for tensor in rounded]
    for rms_norm, (x, weight) in ((reference.rms_norm, exact), (ops.rms_norm, rounded)):
        y = rms_norm(x, weight)
        assert isinstance(y, torch.Tensor)
        y.square().sum().backward()
    errors = []
    for ours, oracle in zip(rounded, exact, strict=True):
        assert ours.grad is not None and oracle.grad is not None
        errors.append(((ours.grad.double().cpu() - oracle.grad).norm() / oracle.grad.norm()).item())
    right = max(errors) < 0.02
    verdict = "right" if right else "WRONG"
    print(f"rms_norm on {device}, bfloat16: {verdict}; its gradients differ from float64's by {max(errors):.1e}")
    return right
