"""`offload_activations`: what autograd saves for backward, in host memory or on disk, for any model."""

from __future__ import annotations

import os
import threading
import weakref
from dataclasses import asdict
from itertools import count

import torch

from memkernels.offload.compression import COMPRESS, Compress
from memkernels.offload.order import Order
from memkernels.offload.session import Counts, Policy, Session
from memkernels.offload.store import Tier, TieredStore
from memkernels.ops.checks import check_integer

_TRIM_EVERY = 64  # exits; memory that any of so many needed is kept, since taking it again takes time


class offload_activations:
    """Within it, what autograd saves for backward goes to host memory or disk, and comes back as backward needs it.

    It is for any model, and without `compress` changes no bit of losses and gradients. Made once, it is entered around
    each forward pass, or around the training loop; it may be entered again, and in several threads. Backward may run
    inside or outside::

        offload = memkernels.offload.offload_activations("disk", path="/scratch")
        for batch in batches:
            with offload:
                loss = model(**batch).loss
            loss.backward()

    A tensor moves as the bytes of its storage: what several saved tensors share (views, transposes, the parts of a
    split) moves once, expanded dimensions take no room, and views come back with their strides. Of tensor subclasses
    that wrap others (DTensor, quantised tensors) the parts move. A tensor is copied when it is saved, so that its
    memory is free as soon as nothing else holds it. A write to it afterwards raises in backward, as without offload.

    Tensors of a GPU are copied to pinned memory and back on streams of their own, beside what is computed, which waits
    for a copy only where it uses what arrives, or where copies hold more than 256 MiB of the GPU's memory. This has not
    run on a GPU yet.

    These stay where they are: parameters and buffers of modules, leaves that require a gradient, tensors of fewer than
    `min_bytes` bytes, those of the last layers, and other kinds of tensors (sparse; nested but not jagged; of torch's
    quantised dtypes; of classes that do not say what they wrap).

    Of a compiled module autograd sees what is saved when its graph has run: so what a graph of the whole model saves
    moves after its forward, and is in memory together until then. Compile its layers instead (`layer.compile()`), whose
    graphs are run one after the other.

    Backward first uses what was saved last. So while one tensor is used, the next `prefetch` are read: those that
    followed it in the step before, and in the first step those saved before it.

    Args:
        tier: "host": memory of the host; CPU tensors are there and stay, so it is for GPUs. "disk": a file without a
            name, mode 0600, that goes with the process however that ends; preallocated, past the page cache where the
            file system offers that, with a CRC32C for each 64 KiB. "auto": host memory to its limit, then disk.
        max_host_bytes: bytes of host memory that offload may hold. "host": of the tensors, default all memory. "disk":
            of the staging blocks that tensors pass through, default 128 MiB; what is larger passes in parts, of a GPU
            through so many more. "auto": of both, default half of what is available; a quarter of it is for staging.
            What backward is using does not count. It is taken as it is needed, as is room on the disk, 256 MiB at a
            time; what 64 entries in a row did not need goes back.
        path: folder of the file, on a disk; default that of `tempfile`.
        min_bytes: what is smaller stays.
        keep_last_layers: what is saved from the beginning of the last so many layers until backward begins, by the
            loss too, stays, since backward needs it first. Layers are the elements of each `nn.ModuleList` or
            `nn.Sequential` of two or more modules of one class, in the module that is called outermost and outside of
            another such list; in a model that has none, nothing stays for this reason.
        prefetch: how many tensors are read ahead, as far as the staging blocks hold them, and sent ahead to a GPU.
        compress: None, or in what tensors without gaps are kept, which is lossy: the loss stays as it is, and gradients
            are those of the rounded values, x' of x. It is for what requires a gradient, and what this package's block
            ops keep of their own; everything else moves as it is: statistics (attention's lse, a norm's rstd), routing
            weights, masks, rotary tables, and what a compiled graph keeps of its own. "bf16": float32 as bfloat16, half
            the bytes; |x' - x| <= max(|x| / 256, 2^-134), infinities and NaN stay, and from 3.3962e38 on values become
            infinite. "fp8": float32, bfloat16 and float16 as e4m3 with a float32 scale for each 128 values, 1.03 bytes
            a value; |x' - x| <= max(|x| / 16, absmax / 458752), absmax of those of the 128 that are finite, or 1e-30
            where that is more, and then rounding to x's dtype; infinities stay, and a NaN makes all 128 values NaN.

    Raises:
        TypeError: min_bytes, keep_last_layers, prefetch or max_host_bytes is no integer, or path no name of a folder.
        ValueError: an argument that does not fit; a path in memory (tmpfs), where a file frees nothing.
        OSError: path does not exist or cannot be written. In forward: the disk is full or a write failed; in backward:
            a read failed or a checksum does not match. It names tier, path, and bytes wanted and available.
        MemoryError: in forward: a tensor does not fit into max_host_bytes.
        RuntimeError: it is left in another thread than it was entered in.
        ImportError: `memkernels._runtime` is not built.

    After an error parameters and optimizer are as they were before the step; after one in backward some gradients have
    been added to, so zero them and run the step again.
    """

    def __init__(
        self,
        tier: Tier,
        *,
        max_host_bytes: int | None = None,
        path: str | os.PathLike[str] | None = None,
        min_bytes: int = Policy.min_bytes,
        keep_last_layers: int = Policy.keep_last_layers,
        prefetch: int = Policy.prefetch,
        compress: Compress | None = None,
    ) -> None:
        check_integer("min_bytes", min_bytes, "an integer of 1 or more")
        check_integer("keep_last_layers", keep_last_layers, "an integer of 0 or more", least=0)
        check_integer("prefetch", prefetch, "an integer of 0 or more", least=0)
        if compress is not None and compress not in COMPRESS:
            raise ValueError(f"compress: expected None, {' or '.join(COMPRESS)}, got {compress!r}.")
        self._store = TieredStore(tier, max_host_bytes=max_host_bytes, path=path)
        self._policy = Policy(min_bytes, keep_last_layers, prefetch, compress)
        self._order = Order()
        self._counts = Counts()
        self._expected_calls: weakref.WeakKeyDictionary[torch.nn.Module, int] = weakref.WeakKeyDictionary()
        self._entered = threading.local()
        self._exits = count(1)

    def __enter__(self) -> offload_activations:
        session = Session(self._store, self._policy, self._order, self._expected_calls, self._counts)
        hooks = torch.autograd.graph.saved_tensors_hooks(session.pack, session.unpack)
        try:
            hooks.__enter__()
        except BaseException:  # torch.autograd.graph.disable_saved_tensors_hooks
            session.end()
            raise
        vars(self._entered).setdefault("stack", []).append((hooks, session))
        return self

    def __exit__(self, *exception: object) -> None:
        entries = vars(self._entered).get("stack")
        if not entries:
            raise RuntimeError("offload_activations: this thread has not entered it; leave it in the thread that did.")
        hooks, session = entries.pop()
        hooks.__exit__()
        session.end()
        if next(self._exits) % _TRIM_EVERY == 0:
            self._store.trim()

    @property
    def statistics(self) -> dict[str, int]:
        """What happened since it was made.

        Saved tensors that `moved`, that `shared` bytes already moved, and that `stayed`; `host_bytes` and
        `disk_bytes_written` that moved, `disk_bytes_read`; how many `loads` there were, and `loads_ready` of bytes that
        were in memory by then.
        """
        return asdict(self._counts) | asdict(self._store.statistics)
