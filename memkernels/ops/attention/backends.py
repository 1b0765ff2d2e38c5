"""Which backend computes a call of attention, and what each lacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from memkernels._library import FLOATING, missing
from memkernels.ops.attention import aten

BACKENDS = ("auto", "triton", "aten", "cpu", "reference")
MAX_GPU_HEAD = 256


class Call(NamedTuple):
    """What of a call decides who can compute it."""

    device: torch.device
    dtype: torch.dtype
    head_sizes: tuple[int, int]  # of q and k, and of v
    lengths: tuple[int, int]  # of the longest sequence of queries and of keys
    same_lengths: bool  # every sequence has as many keys as queries
    packed: bool
    grouped: bool  # fewer heads of k and v than of q
    empty: bool
    window: tuple[int, int]  # the causal mask included
    softcap: bool
    alibi_slopes: bool
    sinks: bool
    dropout: bool
    deterministic: bool
    lse: bool  # returned


def select_implementation(backend: str, call: Call) -> str:
    """What computes a call: "kernels", for this package's operators, a name of `aten.OPERATORS`, or "reference".

    "auto" takes torch's operators on NVIDIA GPUs where they can, this package's kernels else, and the reference where
    there are none. FlashAttention-2 in CUDA is 1.3 to 2.5 times as fast as flash attention in Triton on an A100 (Dao
    2023, arXiv 2307.08691); nothing has been measured here.

    Raises:
        ValueError: an unknown backend, or one that lacks what the call needs: it says what.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}.")
    if backend == "reference":
        return "reference"
    if backend == "auto":
        by_torch = _select_aten(call)[0] if call.device.type == "cuda" else None
        return by_torch or ("reference" if _kernels_lack(call) else "kernels")
    if backend == "aten":
        implementation, lacks = _select_aten(call)
    else:
        device_type = {"triton": "cuda", "cpu": "cpu"}[backend]
        lacks = _kernels_lack(call) if call.device.type == device_type else [f"tensors on {call.device.type}"]
        implementation = "kernels"
    if implementation is None or lacks:
        raise ValueError(f"backend: {backend!r} lacks {', '.join(lacks)}, which this call needs.")
    return implementation


def operators(implementation: str) -> tuple[Callable, Callable]:
    """Forward and backward of an implementation other than "reference"."""
    if implementation == "kernels":
        return torch.ops.memkernels.attention_fwd, torch.ops.memkernels.attention_bwd
    return aten.OPERATORS[implementation]


def _kernels_lack(call: Call) -> list[str]:
    lacks = [] if call.dtype in FLOATING else [str(call.dtype)]
    if reason := missing("attention_fwd", call.device.type):
        lacks.append(f"an implementation here ({reason.rstrip('.')})")
    if call.device.type != "cpu" and max(call.head_sizes) > MAX_GPU_HEAD:
        lacks.append(f"head sizes over {MAX_GPU_HEAD}")
    return lacks


def _head_limits(device: str) -> tuple[tuple[str, int], ...]:
    return tuple(aten.head_limits(torch.device(device)).items())


# As torch.compiler.assume_constant_result does, which would import Dynamo, and Triton with it, along with memkernels.
_head_limits._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _select_aten(call: Call) -> tuple[str | None, list[str]]:
    """The first of torch's operators that lacks nothing; else None and what the last lacks."""
    lacks = [f"tensors on {call.device.type}, or this GPU"]
    for name, limit in _head_limits(str(call.device)):
        lacks = _aten_lacks(name, limit, call)
        if not lacks:
            return name, []
    return None, lacks


def _aten_lacks(name: str, head_limit: int, call: Call) -> list[str]:
    size, value_size = call.head_sizes
    queries, keys = call.lengths
    on_gpu = name != "flash_for_cpu"
    hides, causal = call.window != (-1, -1), call.window == (-1, 0)
    conditions = {
        str(call.dtype): call.dtype not in (FLOATING[1:] if on_gpu else FLOATING),
        "a head size of v that is not q's": size != value_size,
        f"head sizes over {head_limit}": size > head_limit,
        "head sizes that are not multiples of 8": on_gpu and size % 8 != 0,
        "softcap": call.softcap,
        "alibi_slopes": call.alibi_slopes,
        "sinks": call.sinks,
        "the mask of dropout_p that other backends have": call.dropout,
        "return_lse with a gradient": call.lse,
        "deterministic gradients": on_gpu and call.deterministic,
        "empty tensors": call.empty,
    }
    if name == "flash":
        conditions |= {
            "packed keys of other starts than the queries'": call.packed and not call.same_lengths,
            "queries that see nothing": hides and not call.same_lengths and queries > keys,
        }
    else:
        conditions |= {
            "packed sequences": call.packed,
            "grouped heads": not on_gpu and call.grouped,
            "a window": hides and not causal,
            "a causal mask of more or fewer keys than queries": causal and not call.same_lengths,
            "a single key": on_gpu and keys == 1,
        }
    return [what for what, lacks in conditions.items() if lacks]
