"""Gated MLP: the public function, and the choice of path and tile."""

from __future__ import annotations

import torch
from torch import Tensor

from memkernels._library import has_kernel, missing
from memkernels.ops.autocast import product_dtype, without_autocast
from memkernels.ops.block_norm import make_norm, make_rms_norm
from memkernels.ops.checks import check_dropout_p, check_floating, check_same_device, check_shape, check_tile_tokens
from memkernels.ops.dropped_projection import DroppedProjection
from memkernels.ops.gated_activation.op import check_activation
from memkernels.ops.gated_mlp import hidden, reference  # noqa: F401  hidden defines the fused operators
from memkernels.ops.gated_mlp.block import Plan, gated_mlp_block, gated_mlp_plan
from memkernels.ops.philox import seed_tensor
from memkernels.ops.projection import DenseProjection, Projection
from memkernels.ops.weights import Weight, as_product_weights, base_of, projection_of

BACKENDS = ("auto", "triton", "matmul")


def gated_mlp(
    x: Tensor,
    w_gate: Weight | None,
    w_up: Weight,
    w_down: Weight,
    *,
    activation: str = "silu",
    norm: str = "rms",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-6,
    norm_offset: float = 0.0,
    post_norm_weight: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    tile_tokens: int | None = None,
    b_gate: Tensor | None = None,
    b_up: Tensor | None = None,
    b_down: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """A transformer's feed-forward layer, with the norm in front of it, that keeps its input and no hidden layer.

    y = (act(n w_gate^T + b_gate) * (n w_up^T + b_up)) w_down^T + b_down with n = `ops.rms_norm` or `ops.layer_norm` of
    x, or x itself without norm_weight. With w_gate None, y = act(n w_up^T + b_up) w_down^T + b_down. Shazeer 2020,
    arXiv 2002.05202. With dropout_p, elements of what w_down multiplies are dropped and the others scaled by
    1 / (1 - dropout_p), by the mask of Philox at an element's row and column, made anew in backward. Under autocast x
    (after the norm), weights and biases are cast as `torch.nn.functional.linear` casts them.

    Args:
        x: (..., d); float32, bfloat16 or float16 (float64 is computed by the reference).
        w_gate: (f, d), x's dtype, or None. It, w_up and w_down each a tensor, quantised or not,
            or an `ops.LoRAWeight`.
        w_up: (f, d), x's dtype.
        w_down: (d, f), x's dtype.
        activation: silu, gelu (by erf), gelu_tanh, relu or relu_squared.
        norm: rms or layer; of effect with norm_weight.
        norm_weight: (d,); x's dtype or float32.
        norm_bias: (d,), of a layer norm.
        norm_eps: added to the mean of squares, or to the variance.
        norm_offset: added to an RMS norm's weight (1 is Gemma's form); to that of y too.
        post_norm_weight: (d,), of an RMS norm of y with norm_eps (Gemma 2 and 3); x's dtype or float32.
        dropout_p: in [0, 1).
        seed: of the dropout, 64 bits; a tensor of one stays on its device. None: drawn from torch's generator.
        tile_tokens: tokens that are computed at a time, in forward and backward. None: T tokens go in
            max(1, T // max(2048, 2 d)) equal tiles: with fewer tokens the float32 sums of the weights' gradients, which
            only several tiles need, take more memory than tiles save.
        b_gate, b_up: (f,), x's dtype.
        b_down: (d,), x's dtype.
        backend: "matmul": `torch.matmul` and the gated activation. "triton": products with the activation in their
            epilogue, on GPUs, of plain weights without dropout. "auto": triton on GPUs in bfloat16 and float16, else
            matmul.

    Returns:
        y, like x (under autocast, of autocast's dtype).

    Raises:
        TypeError: a dtype other than those above, or an option of another type.
        ValueError: a shape, device, activation, dropout_p, seed, tile or backend that does not fit.

    Saved for backward: x itself, d elements per token, with the norm or without, of an adapter of w_down its r elements
    per token that B multiplies, in its dtype, and the parameters. Under autocast
    without the norm, x as autocast casts it; of weights of another dtype than autocast's a cast copy too, which each
    call makes: autocast's own cache of cast weights does not share it. Backward recomputes the norm and, tile by tile,
    the gate and up products, two GEMMs more than the nine that keep them (ungated: one more than six), and the down
    product only where a norm follows it. A tile holds three buffers of (tile_tokens, f). Weight gradients are summed
    over tiles in float32; frozen ones cost nothing.
    """
    plan, tensors, mask_seed, has_kernels = plan_gated_mlp(
        x, w_gate, w_up, w_down, activation=activation, norm=norm, norm_weight=norm_weight, norm_bias=norm_bias,
        norm_eps=norm_eps, norm_offset=norm_offset, post_norm_weight=post_norm_weight, dropout_p=dropout_p,
        seed=seed, tile_tokens=tile_tokens, b_gate=b_gate, b_up=b_up, b_down=b_down, backend=backend,
    )  # fmt: skip
    if norm_weight is None:
        x = x.to(plan.dtype)
    if has_kernels:
        return gated_mlp_block(x, plan, tensors)
    weights = as_product_weights(
        x, plan.dtype, w_gate=w_gate, w_up=w_up, w_down=w_down, b_gate=b_gate, b_up=b_up, b_down=b_down
    )
    with without_autocast(x):
        return reference.gated_mlp(
            x, **weights, activation=activation, norm=norm, norm_weight=norm_weight, norm_bias=norm_bias,
            norm_eps=norm_eps, norm_offset=norm_offset, post_norm_weight=post_norm_weight, dropout_p=dropout_p,
            seed=mask_seed,
        )  # fmt: skip


def plan_gated_mlp(
    x: Tensor,
    w_gate: Weight | None,
    w_up: Weight,
    w_down: Weight,
    *,
    activation: str = "silu",
    norm: str = "rms",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-6,
    norm_offset: float = 0.0,
    post_norm_weight: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    tile_tokens: int | None = None,
    b_gate: Tensor | None = None,
    b_up: Tensor | None = None,
    b_down: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Plan, tuple[Tensor, ...], Tensor | None, bool]:
    """The checked call of `gated_mlp`: plan, tensors, dropout's seed, and whether every kernel it takes is there."""
    check_activation(activation)
    _check_tensors(x, base_of(w_gate), base_of(w_up), base_of(w_down), b_gate, b_up, b_down)
    in_front = make_norm(x, norm, norm_weight, norm_bias, norm_eps, norm_offset)
    check_tile_tokens(tile_tokens)
    check_dropout_p(dropout_p)
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}.")
    dtype = product_dtype(x)
    weights = as_product_weights(
        x, dtype, w_gate=w_gate, w_up=w_up, w_down=w_down, b_gate=b_gate, b_up=b_up, b_down=b_down
    )
    gate = None if w_gate is None else projection_of(weights["w_gate"], weights["b_gate"])
    up, down = (projection_of(weights[f"w_{name}"], weights[f"b_{name}"]) for name in ("up", "down"))
    post_norm = make_rms_norm(
        "post_norm_weight", x, base_of(w_down).shape[0], post_norm_weight, norm_eps, norm_offset, dtype
    )
    mask_seed = seed_tensor(seed, x.device) if dropout_p > 0.0 else None
    if mask_seed is not None:
        down = DroppedProjection(down, mask_seed, dropout_p)
    plan, tensors = gated_mlp_plan(
        x, in_front, gate, up, down, post_norm, activation=activation, tile_tokens=tile_tokens,
        fused=_is_fused(backend, x.device.type, dtype, (gate, up, down)), dtype=dtype,
    )  # fmt: skip
    has_kernels = has_kernel("gated_activation_fwd", x) and in_front.has_kernel(x) and post_norm.has_kernel(x)
    return plan, tensors, mask_seed, has_kernels


def _is_fused(backend: str, device_type: str, dtype: torch.dtype, projections: tuple[Projection | None, ...]) -> bool:
    """Whether the hidden layer goes through `gated_hidden_fwd` and `gated_hidden_bwd`."""
    reason = missing("gated_hidden_fwd", device_type)
    if not all(projection is None or isinstance(projection, DenseProjection) for projection in projections):
        reason = reason or "its kernels take plain weights without dropout only."
    if backend == "triton" and reason is not None:
        raise ValueError(f"backend: 'triton' cannot run here: {reason}")
    return backend == "triton" or (backend == "auto" and reason is None and dtype != torch.float32)


def _check_tensors(x, w_gate, w_up, w_down, b_gate, b_up, b_down) -> None:
    check_floating("x", x)
    if x.dim() == 0:
        raise ValueError("x: expected at least one dimension, got a scalar.")
    check_floating("w_up", w_up)
    if w_up.dim() != 2 or w_up.shape[1] != x.shape[-1]:
        raise ValueError(f"w_up: expected shape (f, {x.shape[-1]}), got {tuple(w_up.shape)}.")
    (f, d), like_up = w_up.shape, "w_up's first dimension"
    for name, tensor, shape, meaning in (
        ("w_gate", w_gate, (f, d), "that of w_up"),
        ("w_down", w_down, (d, f), "that of w_up, transposed"),
        ("b_gate", b_gate, (f,), like_up),
        ("b_up", b_up, (f,), like_up),
        ("b_down", b_down, (d,), "the last dimension of x"),
    ):
        if tensor is not None:
            check_floating(name, tensor)
            check_shape(name, tensor, shape, meaning)
    if w_gate is None and b_gate is not None:
        raise ValueError("b_gate: expected None without w_gate, got a tensor.")
    check_same_device("x", x, w_gate=w_gate, w_up=w_up, w_down=w_down, b_gate=b_gate, b_up=b_up, b_down=b_down)
