"""A weight with a low-rank adapter, as the block ops take it in the place of a plain one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from memkernels.ops.autocast import as_product_dtype, is_autocast
from memkernels.ops.checks import check_dropout_p, check_finite, check_floating, check_same_device, check_shape
from memkernels.ops.lora_linear import reference
from memkernels.ops.lora_linear.norm import adapted_row_norms
from memkernels.ops.lora_linear.projection import LoRA, LoRAProjection, Tensors
from memkernels.ops.philox import seed_tensor
from memkernels.ops.quantized.encoding import Encoding
from memkernels.ops.quantized.tensor import QuantizedTensor, check_frozen


@dataclass(frozen=True, eq=False)
class LoRAWeight:
    """W + scaling B A, with dropout in front of A, or DoRA's: magnitude * (W + scaling B A) / its rows' norms.

    The block ops, `ops.gated_mlp`, `ops.attention_block` and `ops.decoder_layer`, take it wherever they take a weight,
    and so does `ops.linear_cross_entropy`.
    Hu et al. 2021, arXiv 2106.09685; rsLoRA by `scaling`; DoRA: Liu et al. 2024, arXiv 2402.09353, with the norm a
    constant for backward.

    Args:
        weight: W, (N, K); dense, or quantised (`memkernels.quant`) and frozen.
        lora_a: A, (r, K), of weight's dtype or float32; any r from 1 up.
        lora_b: B, (N, r), of A's dtype.
        scaling: s, a finite number.
        dropout_p: probability with which an element of A's input is dropped, in [0, 1).
        seed: of the dropout mask, an integer or a 0-dim int64 tensor; None: drawn from torch's generator at each use.
            An element's mask is a function of the seed, its row and its column.
        magnitude: (N,), of weight's dtype or float32; None: LoRA.
        row_squares: (N,), |w|^2 of each row w of W, from `ops.row_squares`, if W is frozen; with magnitude only. None:
            computed at each use.

    Raises:
        TypeError: a dtype other than those above; a scaling or probability that is no number.
        ValueError: a shape, device, scaling or probability that does not fit.
    """

    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    scaling: float = 1.0
    dropout_p: float = 0.0
    seed: int | Tensor | None = None
    magnitude: Tensor | None = None
    row_squares: Tensor | None = None

    def __post_init__(self):
        weight, lora_a, lora_b = self.weight, self.lora_a, self.lora_b
        for name in ("weight", "lora_a", "lora_b"):
            check_floating(name, getattr(self, name))
        if weight.dim() != 2:
            raise ValueError(f"weight: expected shape (N, K), got {tuple(weight.shape)}.")
        if lora_a.dim() != 2 or lora_a.shape[0] == 0 or lora_a.shape[1] != weight.shape[1]:
            raise ValueError(
                f"lora_a: expected shape (r, {weight.shape[1]}), r > 0, that of weight's rows,"
                f" got {tuple(lora_a.shape)}."
            )
        check_shape("lora_b", lora_b, (weight.shape[0], lora_a.shape[0]), "weight's rows and lora_a's")
        if lora_b.dtype != lora_a.dtype:
            raise TypeError(f"lora_b: expected {lora_a.dtype}, as lora_a, got {lora_b.dtype}.")
        check_finite("scaling", self.scaling)
        check_dropout_p(self.dropout_p)
        for name in ("magnitude", "row_squares"):
            tensor = getattr(self, name)
            if tensor is not None:
                check_floating(name, tensor)
                check_shape(name, tensor, (weight.shape[0],), "weight's rows")
        if self.row_squares is not None and self.magnitude is None:
            raise ValueError("row_squares: expected None without magnitude, got a tensor.")
        check_same_device(
            "weight", weight, lora_a=lora_a, lora_b=lora_b, magnitude=self.magnitude, row_squares=self.row_squares
        )

    def as_product_dtype(self, name: str, x: Tensor, dtype: torch.dtype) -> LoRAWeight:
        """With its tensors cast under autocast, else checked to be of x's dtype or, the adapter's, float32."""
        weight = as_product_dtype(x, dtype, **{name: self.weight})[name]
        return replace(self.adapter_as_product_dtype(name, x, dtype), weight=weight)

    def adapter_as_product_dtype(self, name: str, x: Tensor, dtype: torch.dtype) -> LoRAWeight:
        """With those of the adapter so, and W as it is."""
        if is_autocast(x):
            return replace(self, lora_a=self.lora_a.to(dtype), lora_b=self.lora_b.to(dtype))
        for part in ("lora_a", "magnitude"):
            tensor = getattr(self, part)
            if tensor is not None and tensor.dtype not in (dtype, torch.float32):
                raise TypeError(f"{part} of {name}: expected {dtype}, as x, or float32, got {tensor.dtype}.")
        return self

    def split(self, sizes: Sequence[int]) -> list[LoRAWeight]:
        """The weights of `sizes` outputs each that lie in this one, over one input and its one dropout mask."""
        seed = seed_tensor(self.seed, self.weight.device) if self.dropout_p > 0 else None
        by_row = (self.weight, self.lora_b, self.magnitude, self.row_squares)
        rows = zip(*([None] * len(sizes) if of is None else of.split(list(sizes)) for of in by_row), strict=True)
        return [
            replace(self, weight=weight, lora_b=b, magnitude=magnitude, row_squares=squares, seed=seed)
            for weight, b, magnitude, squares in rows
        ]

    def projection(self, bias: Tensor | None) -> LoRAProjection:
        out_scale = None
        if self.magnitude is not None:
            norms = adapted_row_norms(self.weight, self.lora_a, self.lora_b, self.scaling, self.row_squares)
            out_scale = self.magnitude / norms
        seed = seed_tensor(self.seed, self.weight.device) if self.dropout_p > 0 else None
        weight: Tensor | None = self.weight
        base: Encoding | None = None
        parts: tuple[Tensor, ...] = ()
        if isinstance(weight, QuantizedTensor):
            check_frozen(weight)
            base, parts = weight.encoding, weight.parts
            weight = None
        description = LoRA(float(self.scaling), float(self.dropout_p), bias is not None, out_scale is not None, base)
        return LoRAProjection(description, Tensors(weight, self.lora_a, self.lora_b, bias, out_scale, seed), parts)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The reference."""
        seed = seed_tensor(self.seed, self.weight.device) if self.dropout_p > 0 else None
        weight = self.weight.dequantize() if isinstance(self.weight, QuantizedTensor) else self.weight
        return reference.lora_linear(
            x, weight, self.lora_a, self.lora_b, scaling=self.scaling, bias=bias, dropout_p=self.dropout_p,
            seed=seed, magnitude=self.magnitude,
        )  # fmt: skip
