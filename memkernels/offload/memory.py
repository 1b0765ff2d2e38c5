"""The host's memory: what there is, and what is free within the limits of the process's control groups."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

# Of each version of control groups: where its memory controller is mounted, and its files: limit, usage, and in
# memory.stat the cache that can be dropped.
_V1 = "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
_V2 = "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"


def total_memory() -> int:
    """Bytes of the machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that can be taken without swapping, and without passing a limit of a control group that holds the process.

    Args:
        root: where proc and sys are mounted.
    """
    free = total_memory()
    for line in (root / "proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            free = int(value.split()[0]) * 1024
    return max(min([free, *_left_of_limits(root)]), 0)


def _left_of_limits(root: Path) -> Iterator[int]:
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in groups:
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            mount, *files = _V2
        elif "memory" in controllers.split(","):
            mount, *files = _V1
        else:
            continue
        group = PurePosixPath(path.lstrip("/"))
        # A limit of any group above holds too. In a container the path may be that of the host, and be missing here.
        for folder in (group, *group.parents):
            left = _left(root / mount / folder, *files)
            if left is not None:
                yield left


def _left(folder: Path, limit_file: str, usage_file: str, cache: str) -> int | None:
    """What a group may still take; None where it has no limit."""
    try:
        limit = (folder / limit_file).read_text().strip()
        if limit == "max":
            return None
        used = int((folder / usage_file).read_text())
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except OSError:
        return None
    return int(limit) - used + int(statistics.get(cache, 0))
