"""Experts' weights as the ops take them, and the projection that each kind makes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from memkernels._library import missing, prefers_matmul
from memkernels.ops.autocast import as_product_dtype
from memkernels.ops.checks import check_floating, check_same_device
from memkernels.ops.moe.lora import ExpertsLoRAWeight, LoRAExpertsProjection
from memkernels.ops.moe.plan import DispatchPlan, num_experts_of
from memkernels.ops.moe.projection import DenseExpertsProjection, GroupedProjection
from memkernels.ops.moe.quantized import QuantizedExperts, QuantizedExpertsProjection
from memkernels.ops.moe.separate import SeparateExpertsProjection, check_separate
from memkernels.ops.quantized.tensor import QuantizedTensor, check_frozen

# (E, out, in), dense or quantised; that with an adapter; or a dense (out, in) for each expert.
ExpertsWeight = Tensor | ExpertsLoRAWeight | Sequence[Tensor]
BACKENDS = ("auto", "loop", "grouped_mm", "triton")


def select_backend(backend: str, x: Tensor, *weights: ExpertsWeight) -> str:
    """How products of x's dtype with weights (E, out, in) are computed.

    "auto": by Triton where it is, unless MEMKERNELS_PRODUCTS=matmul; else by `grouped_mm` where it has a kernel, which
    is on CUDA in bfloat16 for dense weights of rows and columns of multiples of 16 bytes; else by a loop.

    Raises:
        ValueError: an unknown backend, one that does not run here, or does not take the weights.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}.")
    no_triton = missing("grouped_product", x.device.type)
    if backend == "triton" and no_triton is not None:
        raise ValueError(f"backend: triton does not run on {x.device.type}: {no_triton}")
    dense = not any(isinstance(weight, (QuantizedTensor, ExpertsLoRAWeight)) for weight in weights)
    if backend == "grouped_mm" and not dense:
        raise ValueError("backend: grouped_mm takes dense weights, got quantised or adapted ones.")
    for weight in weights if backend in ("grouped_mm", "triton") else ():
        if not isinstance(weight, (Tensor, ExpertsLoRAWeight)):
            raise ValueError(f"backend: {backend} takes weights (E, out, in), got one for each expert.")
    if backend != "auto":
        return backend
    if no_triton is None and not prefers_matmul():
        return "triton"
    fits = dense and x.is_cuda and x.dtype == torch.bfloat16
    fits = fits and all(size % 8 == 0 for weight in weights for size in stand_in("weights", weight).shape[1:])
    return "grouped_mm" if fits else "loop"


def check_expert_weights(name: str, weights: Tensor, x_name: str, x: Tensor, plan: DispatchPlan) -> None:
    """(E, out, in) of a plan's E experts, for x's last dimension, on its device."""
    check_floating(name, weights)
    if weights.dim() != 3 or weights.shape[0] != num_experts_of(plan) or weights.shape[2] != x.shape[1]:
        raise ValueError(
            f"{name}: expected shape ({num_experts_of(plan)}, out, {x.shape[1]}) (experts, out, the last dimension of"
            f" {x_name}), got {tuple(weights.shape)}."
        )
    check_same_device(x_name, x, **{name: weights})


def stand_in(name: str, weights: ExpertsWeight) -> Tensor:
    """A tensor of the shape (E, out, in), dtype and device of weights of any kind.

    Raises:
        TypeError, ValueError: of a sequence, as `check_separate`.
    """
    if isinstance(weights, ExpertsLoRAWeight):
        return weights.weight
    if isinstance(weights, Tensor):
        return weights
    check_separate(name, weights)
    return weights[0].detach().expand(len(weights), *weights[0].shape)


def as_product_weights(x: Tensor, dtype: torch.dtype, **weights: ExpertsWeight) -> dict[str, Any]:
    """`as_product_dtype` of weights of any kind."""

    def cast(name: str, of: ExpertsWeight) -> ExpertsWeight:
        if isinstance(of, ExpertsLoRAWeight):
            return of.as_product_dtype(name, x, dtype)
        if isinstance(of, Tensor):
            return as_product_dtype(x, dtype, **{name: of})[name]
        return [as_product_dtype(x, dtype, **{name: weight})[name] for weight in of]

    return {name: cast(name, of) for name, of in weights.items()}


def projection_of(weights: ExpertsWeight, backend: str) -> GroupedProjection:
    if isinstance(weights, ExpertsLoRAWeight):
        base = projection_of(weights.weight, backend)
        return LoRAExpertsProjection(base, weights.lora_a, weights.lora_b, float(weights.scaling), backend)
    if not isinstance(weights, Tensor):
        return SeparateExpertsProjection(weights)
    if not isinstance(weights, QuantizedTensor):
        return DenseExpertsProjection(weights, backend)
    check_frozen(weights)
    return QuantizedExpertsProjection(QuantizedExperts(weights.encoding, backend), weights.parts)


def dense_of(weights: ExpertsWeight) -> Tensor:
    """The values in one tensor, for the references."""
    if isinstance(weights, ExpertsLoRAWeight):
        return dense_of(weights.weight) + (weights.scaling * weights.lora_b @ weights.lora_a).to(weights.weight.dtype)
    if not isinstance(weights, Tensor):
        return torch.stack(tuple(weights))
    return weights.dequantize() if isinstance(weights, QuantizedTensor) else weights
