"""Attention by torch's own operators: flash attention and cuDNN's on NVIDIA GPUs, flash attention on CPU.

They return lse and have a backward operator, so `OPERATORS` holds pairs that stand in for this package's operators,
with the same arguments. `memkernels/ops/attention/backends.py` says which calls they can compute; what they lack is off
in the arguments that come here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def head_limits(device: torch.device) -> dict[str, int]:
    """The largest head size of each pair of operators that runs on a device, by its name, the fastest first.

    cuDNN's comes first where torch's own `scaled_dot_product_attention` prefers it: from cuDNN 9.15.1 on sm_90 and
    sm_100. `torch.backends.cuda.enable_flash_sdp` and `enable_cudnn_sdp` switch these off here too.
    """
    if device.type == "cpu":
        return {"flash_for_cpu": 2**20}
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0):
        return {}
    major, minor = torch.cuda.get_device_capability(device)
    limits = {}
    if major in (9, 10) and torch.backends.cuda.cudnn_sdp_enabled() and (torch.backends.cudnn.version() or 0) > 91500:
        limits["cudnn"] = 128
    if torch.backends.cuda.is_flash_attention_available() and torch.backends.cuda.flash_sdp_enabled():
        # Backward of larger heads needs more shared memory than the consumer architectures have.
        limits["flash"] = 256 if (major, minor) == (8, 0) or major in (9, 10) else 192
    return limits


def _rows(*tensors: Tensor) -> list[Tensor]:
    return [tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in tensors]


def _by_head(*tensors: Tensor) -> list[Tensor]:
    """(B, S, H, D) as (B, H, S, D), and back."""
    return [tensor.transpose(1, 2) for tensor in _rows(*tensors)]


def _window(left: int, right: int) -> dict[str, int | None]:
    return {"window_size_left": None if left < 0 else left, "window_size_right": None if right < 0 else right}


def _flash_fwd(
    q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes, sinks, seed, max_seqlen_q, max_seqlen_k, scale, left, right,
    *off,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    # Its causal mask is aligned bottom-right, as a window is.
    causal = (left, right) == (-1, 0)
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        *_rows(q, k, v), cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, 0.0, causal, False, scale=scale,
        **_window(left, -1 if causal else right),
    )  # fmt: skip
    return out, lse


def _flash_bwd(
    dout, dlse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, alibi_slopes, sinks, seed, max_seqlen_q, max_seqlen_k,
    scale, left, right, *off,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    causal = (left, right) == (-1, 0)
    no_seed = lse.new_empty(0)
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        dout.contiguous(), *_rows(q, k, v), out, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, 0.0,
        causal, no_seed, no_seed, scale=scale, **_window(left, -1 if causal else right),
    )  # fmt: skip
    return dq, dk, dv, None


def _cudnn_fwd(q, k, v, *masks: Any) -> tuple[Tensor, Tensor]:
    *_, scale, _left, right, _softcap, _dropout_p = masks
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *_by_head(q, k, v), None, True, 0.0, right == 0, False, scale=scale
    )
    return out.transpose(1, 2), lse


def _cudnn_bwd(dout, dlse, q, k, v, out, lse, *masks: Any) -> tuple[Tensor | None, ...]:
    *_, max_seqlen_q, max_seqlen_k, scale, _left, right, _softcap, _dropout_p, _deterministic = masks
    no_seed = lse.new_empty((), dtype=torch.int64)
    gradients = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        *_by_head(dout.contiguous(), q, k, v, out), lse, no_seed, no_seed, None, None, None, max_seqlen_q,
        max_seqlen_k, 0.0, right == 0, scale=scale,
    )  # fmt: skip
    return *_by_head(*gradients), None


def _flash_for_cpu_fwd(q, k, v, *masks: Any) -> tuple[Tensor, Tensor]:
    *_, scale, _left, right, _softcap, _dropout_p = masks
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *_by_head(q, k, v), 0.0, right == 0, scale=scale
    )
    return out.transpose(1, 2), lse


def _flash_for_cpu_bwd(dout, dlse, q, k, v, out, lse, *masks: Any) -> tuple[Tensor | None, ...]:
    *_, scale, _left, right, _softcap, _dropout_p, _deterministic = masks
    gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *_by_head(dout, q, k, v, out), lse, 0.0, right == 0, scale=scale
    )
    return *_by_head(*gradients), None


# Forward and backward, with the arguments of `memkernels::attention_fwd` and `attention_bwd`.
OPERATORS = {
    "flash": (_flash_fwd, _flash_bwd),
    "cudnn": (_cudnn_fwd, _cudnn_bwd),
    "flash_for_cpu": (_flash_for_cpu_fwd, _flash_for_cpu_bwd),
}
