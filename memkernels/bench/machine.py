"""The machine a figure was measured on."""

from __future__ import annotations

import functools
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

from memkernels._library import cpu_isa


def device() -> torch.device:
    """Where benchmarks run: the GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def set_threads() -> None:
    """Fix torch's threads at MEMKERNELS_BENCH_THREADS (default 2)."""
    torch.set_num_threads(int(os.environ.get("MEMKERNELS_BENCH_THREADS", "2")))


def describe() -> str:
    """The GPU's name, or CPU model, cores, instruction set and threads in use."""
    if device().type == "cuda":
        return torch.cuda.get_device_name()
    isa = torch.backends.cpu.get_cpu_capability()
    if (own := str(cpu_isa()).upper()) != isa:
        isa = f"{isa} (memkernels {own})"
    return f"{_cpu_model()}, {os.cpu_count()} cores, {isa}, {torch.get_num_threads()} threads"


def slug(description: str) -> str:
    """`description` as a folder name."""
    return re.sub(r"[^a-z0-9]+", "-", description.lower()).strip("-")


@functools.cache
def commit(folder: Path) -> str:
    """Short commit of the clone around `folder`, marked where code differs from it; empty outside a clone."""
    code = ["memkernels", "csrc", "benchmarks", ":!benchmarks/results"]
    try:
        head = _git(folder, "rev-parse", "--short=10", "HEAD")
        dirty = _git(folder, "status", "--porcelain", "--", *code)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return f"{head}-dirty" if dirty else head


def _git(folder: Path, *args: str) -> str:
    command = ["git", "-C", str(folder), *args]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _cpu_model() -> str:
    """As /proc/cpuinfo names it; where a virtual machine hides the number, family and model stand for it."""
    cpuinfo = Path("/proc/cpuinfo")
    fields = dict(re.findall(r"^(\S[^:\t]*?)\s*: (.+)$", cpuinfo.read_text(), re.M)) if cpuinfo.exists() else {}
    name = fields.get("model name", "").strip()
    if name and not re.search(r"\d", name) and {"cpu family", "model"} <= fields.keys():
        return f"{name} (family {fields['cpu family']}, model {fields['model']})"
    return name or platform.processor() or platform.machine()
