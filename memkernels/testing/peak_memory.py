"""Peak memory of one step, and fresh processes to measure it in.

A process's resident set remembers: freed blocks that the allocator keeps, code paged in by a first call, a
high-water mark set long before the step. `peak_bytes` starts its baseline at the step, and `run_in_child` gives
a process whose allocator returns what is freed, so that the two together measure the step alone.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import importlib.util
import inspect
import json
import mmap
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# glibc otherwise keeps freed blocks of up to 32 MB in its heap, and later allocations from it are not seen as growth.
_RETURN_FREED_MEMORY = {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "1048576"}
_CLEAR_HIGH_WATER_MARK = "5"  # proc(5), /proc/pid/clear_refs


def peak_bytes(step: Callable[[], object], *, device: torch.device | str = "cpu") -> int:
    """Bytes by which memory in use rises, at its highest, while `step` runs.

    On CPU: the high-water mark of the resident set less the resident set before the step; what exists before
    (parameters, inputs, gradients already allocated and touched) is not counted. Exact to about a megabyte, and
    only in a process whose allocator returns freed memory: call it inside `run_in_child`. Run the step once before,
    unless one-time costs (thread pools, compiled code) are what is measured.
    On CUDA: `torch.cuda.max_memory_allocated` less what is allocated before.

    Args:
        step: what to measure; its result is dropped.
        device: where the step allocates.

    Returns:
        Peak, in bytes, above the memory in use before the step.
    """
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    before = resident_bytes()
    if _reset_high_water_mark():
        step()
        return max(_status_bytes("VmHWM") - before, 0)
    return _peak_above_ballast(step)


def _peak_above_ballast(step: Callable[[], object]) -> int:
    # ru_maxrss cannot be reset, so an earlier, higher mark would hide the step: fill memory up to that mark first.
    missing = _maxrss_bytes() - _status_bytes("VmRSS")
    with mmap.mmap(-1, max(missing, 0) + mmap.PAGESIZE) as ballast:
        for page in range(0, len(ballast), mmap.PAGESIZE):
            ballast[page] = 1
        before = _maxrss_bytes()
        step()
        return _maxrss_bytes() - before


def _reset_high_water_mark() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text(_CLEAR_HIGH_WATER_MARK)
    except OSError:
        return False
    return "VmHWM:" in Path("/proc/self/status").read_text()


def resident_bytes() -> int:
    """Memory of this process, less what its allocator can return; as `peak_bytes`, of use within `run_in_child`."""
    ctypes.CDLL(None).malloc_trim(0)
    return _status_bytes("VmRSS")


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise RuntimeError(f"peak_bytes: /proc/self/status has no {field}")


def _maxrss_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run_in_child(function: Callable[..., Any], *args: Any, timeout: float = 1800.0, timed: bool = False) -> Any:
    """Call `function(*args)` in a fresh Python process whose allocator returns freed memory to the system.

    Args:
        function: a function at the top level of a module or of a test file.
        args: anything JSON can carry.
        timeout: seconds after which the process is killed.
        timed: what is measured is time: the allocator is as usual, since returning memory takes time, and stderr is
            this process's, to show progress there.

    Returns:
        What the function returned, through JSON.

    Raises:
        ValueError: `function` is not at the top level of a file.
        RuntimeError: the process failed; the message ends with what it wrote to stderr, unless that was shown.
        subprocess.TimeoutExpired: it took longer than `timeout`.
    """
    path = inspect.getsourcefile(function)
    if path is None or "." in function.__qualname__:
        raise ValueError(f"function must be at the top level of a file, got {function.__qualname__}")
    path = os.path.abspath(path)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}
    if not timed:
        environment |= _RETURN_FREED_MEMORY
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        request = json.dumps([function.__module__, path, function.__name__, args, str(answer)])
        command = [sys.executable, "-c", f"from {__name__} import _serve; _serve()", request]
        stderr = None if timed else subprocess.PIPE
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True, timeout=timeout
        )
        if done.returncode != 0:
            said = (done.stderr or "").strip()[-4000:]
            raise RuntimeError(f"{function.__name__}{args} failed in its own process:\n{said}")
        return json.loads(answer.read_text())


def _serve() -> None:
    module_name, path, name, args, answer = json.loads(sys.argv[1])
    result = getattr(_load(module_name, path), name)(*args)
    Path(answer).write_text(json.dumps(result))


def _load(module_name: str, path: str) -> Any:
    # A test file is often not importable by the name pytest gave it; a package's module must not be loaded twice.
    try:
        found = importlib.util.find_spec(module_name)
    except (ImportError, ValueError):
        found = None
    if found is not None and found.origin == path and module_name != "__main__":
        return importlib.import_module(module_name)
    spec = importlib.util.spec_from_file_location("memkernels_child", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
