"""Huge pages for large results of torch's products on CPU, as the kernels ask for theirs (csrc/cpu/outputs.h)."""

from __future__ import annotations

from torch import Tensor, ops

from memkernels._library import define, has_kernel

define("on_huge_pages_(Tensor(a!) fresh) -> ()", alternative="memory as torch gives it")


def on_huge_pages(fresh: Tensor) -> Tensor:
    """`fresh`, contiguous and not written yet; where it is of a CPU and of 4 MiB or more, its memory by huge pages.

    It is a hint to the system, heeded where transparent huge pages are granted on request. Without, a page is faulted
    in for each 4 KiB written, which takes longer than writing them.
    """
    if has_kernel("on_huge_pages_", fresh):
        ops.memkernels.on_huge_pages_(fresh)
    return fresh
