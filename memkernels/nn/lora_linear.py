"""A linear layer with a low-rank adapter."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from memkernels.integrations import bitsandbytes
from memkernels.nn.row_squares import kept_row_squares
from memkernels.ops.checks import check_floating
from memkernels.ops.lora_linear.norm import adapted_row_norms, row_squares, row_tiles
from memkernels.ops.lora_linear.op import adapted_linear
from memkernels.ops.lora_linear.weight import LoRAWeight
from memkernels.ops.quantized.tensor import QuantizedTensor


class Magnitude(torch.nn.Module):
    """DoRA's magnitude of each row, (N,), under the key that PEFT gives it."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = torch.nn.Parameter(weight)


class LoRALinear(torch.nn.Module):
    """`ops.lora_linear` around a linear layer, under the state_dict keys of PEFT's LoRA layers.

    y = x W^T + bias + scaling (m * x) A^T B^T, m the dropout mask; with DoRA as `ops.lora_linear` has it. The keys are
    base_layer.weight, base_layer.bias, lora_A.<adapter_name>.weight (r, K), lora_B.<adapter_name>.weight (N, r) and,
    with DoRA, lora_magnitude_vector.<adapter_name>.weight (N,). A is drawn as torch.nn.Linear draws its weight, B is
    zero and the magnitude is the norm of W's rows, so that at first y is the base layer's. In training the dropout mask
    is drawn from torch's generator as a seed. The base layer is frozen, and its tensors are read, without a call of it:
    hooks on it, or a forward of its own, do not run. DoRA's norms of W are kept until W is written; a write through
    `.data` or to a shard of FSDP2 is not seen.

    Args:
        base_layer: torch.nn.Linear, whose weight may be one of `memkernels.quant`; transformers' Conv1D, whose weight
            is (K, N); or a Linear4bit in NF4 or Linear8bitLt of bitsandbytes, which becomes a torch.nn.Linear over a
            weight of `memkernels.quant` in the same memory, for inputs of the bias's dtype or, without one, of that
            of what was quantised (float16 in 8 bits): `.to(dtype)` changes it, and no input is rounded to 8 bits.
        r: rank, from 1 up.
        alpha: scaling is alpha / r.
        dropout: probability with which an element of A's input is dropped in training, in [0, 1).
        use_dora: weight-decomposed adapter (Liu et al. 2024, arXiv 2402.09353).
        use_rslora: scaling is alpha / sqrt(r) (Kalajdzievski 2023, arXiv 2312.03732).
        adapter_name: in the state_dict.
        dtype: the adapter's; None: float32, or float64 if W's is.

    Raises:
        TypeError: base_layer is no linear layer, or its weight not of a floating dtype, or one of bitsandbytes that
            cannot be read where it is, as one in FP4; r is no int, or alpha or dropout no number.
        ValueError: r, alpha or dropout is out of its range.

    Saved for backward, beside the parameters: x itself, K elements a token, r elements of A's dtype, and dropout's
    seed, 8 bytes. Merged: what the base layer saves.
    """

    def __init__(
        self,
        base_layer: Any,
        r: int = 16,
        *,
        alpha: float = 32.0,
        dropout: float = 0.0,
        use_dora: bool = False,
        use_rslora: bool = False,
        adapter_name: str = "default",
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if not is_adaptable(base_layer):
            raise TypeError(f"base_layer: expected a torch.nn.Linear or a Conv1D, got {type(base_layer).__name__}.")
        check_base_weight("base_layer", base_layer)
        check_adapter(r, alpha, dropout)
        if bitsandbytes.is_layer(base_layer):
            base_layer = bitsandbytes.as_linear(base_layer)
        self.base_layer = base_layer.requires_grad_(False)
        self.r, self.alpha, self.dropout_p, self.use_rslora = r, alpha, dropout, use_rslora
        self.adapter_name = adapter_name
        self.merged = False
        self._merged_scale: Tensor | None
        self._quantized: Tensor | None
        self.register_buffer("_merged_scale", None, persistent=False)  # DoRA's, which unmerge takes out again
        self.register_buffer("_quantized", None, persistent=False)  # the base's weight, while a merged one is there
        dtype = dtype or torch.promote_types(self.weight.dtype, torch.float32)
        options: dict[str, Any] = {"bias": False, "device": self.weight.device, "dtype": dtype}
        out_features, in_features = self.weight.shape
        self.lora_A = torch.nn.ModuleDict({adapter_name: torch.nn.Linear(in_features, r, **options)})
        self.lora_B = torch.nn.ModuleDict({adapter_name: torch.nn.Linear(r, out_features, **options)})
        torch.nn.init.zeros_(self.lora_B[adapter_name].weight)  # type: ignore[arg-type]
        self.lora_magnitude_vector = torch.nn.ModuleDict()
        if use_dora:
            self.lora_magnitude_vector[adapter_name] = Magnitude(row_squares(self.weight).sqrt().to(dtype))

    @property
    def weight(self) -> Tensor:
        """W, (N, K)."""
        weight = self.base_layer.weight
        return weight.t() if is_conv1d(self.base_layer) else weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    @property
    def adapter(self) -> dict[str, torch.nn.Parameter]:
        """The adapter's parameters: lora_A, lora_B and, with DoRA, lora_magnitude_vector."""
        kinds = ("lora_A", "lora_B", "lora_magnitude_vector")
        modules = {kind: getattr(self, kind) for kind in kinds}
        return {kind: of[self.adapter_name].weight for kind, of in modules.items() if self.adapter_name in of}

    @property
    def use_dora(self) -> bool:
        return len(self.lora_magnitude_vector) > 0

    @property
    def scaling(self) -> float:
        return self.alpha / (self.r**0.5 if self.use_rslora else self.r)

    def adapted(self) -> LoRAWeight:
        """The weight with its adapter, as the block ops take it."""
        a, b, magnitude = (self.adapter.get(of) for of in ("lora_A", "lora_B", "lora_magnitude_vector"))
        assert a is not None and b is not None
        dropout_p = self.dropout_p if self.training else 0.0
        squares = None if magnitude is None else kept_row_squares(self, self.weight)
        return LoRAWeight(self.weight, a, b, self.scaling, dropout_p, magnitude=magnitude, row_squares=squares)

    def forward(self, x: Tensor) -> Tensor:
        """y, (..., N), for x (..., K) of W's dtype, unless autocast casts both.

        Raises:
            TypeError, ValueError: as `ops.lora_linear`: a dtype, shape or device that does not fit.
        """
        return self.base_layer(x) if self.merged else adapted_linear(x, self.adapted(), self.bias)

    @torch.no_grad()
    def merge(self) -> None:
        """W becomes that with the adapter, rounded to its dtype, a tile of rows at a time; A and B stay as they are.

        A quantised W becomes a dense one, since an adapter is finer than its steps, and is kept for `unmerge`. A dense
        one is written in place: a module that shares it, as an embedding that is tied to the head, changes with it.

        Raises:
            ValueError: it is merged already, or an adapter that is not finite. W is unchanged.
        """
        scale, weight = self.merged_scale(), self.weight
        quantized = isinstance(weight, QuantizedTensor)
        merged = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device) if quantized else weight
        for tile, rows in row_tiles(weight):
            rows = rows.addmm_(*self._factors(tile, rows.dtype), alpha=self.scaling)
            merged[tile].copy_(rows if scale is None else rows.mul_(scale[tile, None]))
        if quantized:
            self._quantized = weight.detach()
            self.base_layer.weight = torch.nn.Parameter(merged, requires_grad=False)
        self.merged, self._merged_scale = True, scale

    @torch.no_grad()
    def unmerge(self) -> None:
        """Takes the adapter out of W again: to W's rounding, since `merge` rounded; a quantised W is put back.

        Raises:
            ValueError: it is not merged.
        """
        if not self.merged:
            raise ValueError("LoRALinear: it is not merged.")
        if self._quantized is not None:
            self.base_layer.weight = torch.nn.Parameter(self._quantized, requires_grad=False)
        else:
            self._subtract()
        self.merged, self._merged_scale, self._quantized = False, None, None

    @torch.no_grad()
    def merged_scale(self) -> Tensor | None:
        """DoRA's magnitude over the rows' norms, or None; checks that the adapter may be merged."""
        if self.merged:
            raise ValueError("LoRALinear: it is merged already.")
        for name, parameter in self.adapter.items():
            if not bool(parameter.isfinite().all()):
                raise ValueError(f"{name}: expected finite numbers to merge, got others.")
        magnitude = self.adapter.get("lora_magnitude_vector")
        if magnitude is None:
            return None
        squares = kept_row_squares(self, self.weight)
        a, b = self.adapter["lora_A"], self.adapter["lora_B"]
        scale = magnitude / adapted_row_norms(self.weight, a, b, self.scaling, squares)
        if not bool((scale.isfinite() & (scale != 0)).all()):
            raise ValueError("lora_magnitude_vector: expected rows and magnitudes other than zero to merge.")
        return scale

    def _subtract(self) -> None:
        scale = self._merged_scale
        for tile, rows in row_tiles(self.weight):
            rows = rows if scale is None else rows.div_(scale[tile, None])
            self.weight[tile].copy_(rows.addmm_(*self._factors(tile, rows.dtype), alpha=-self.scaling))

    def _factors(self, tile: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return self.adapter["lora_B"][tile].to(dtype), self.adapter["lora_A"].to(dtype)

    def extra_repr(self) -> str:
        return (
            f"r={self.r}, alpha={self.alpha}, dropout={self.dropout_p}, use_dora={self.use_dora}, "
            f"use_rslora={self.use_rslora}, merged={self.merged}"
        )


def is_adaptable(module: Any) -> bool:
    """Whether it is a linear layer that LoRALinear takes, if `check_base_weight` lets its weight pass."""
    return type(module) is torch.nn.Linear or is_conv1d(module) or bitsandbytes.is_layer(module)


def check_base_weight(name: str, layer: Any) -> None:
    if not bitsandbytes.is_layer(layer):
        check_floating(f"{name}.weight", layer.weight)
        return
    unreadable = bitsandbytes.why_unreadable(layer)
    if unreadable is not None:
        raise TypeError(
            f"{name}: expected a weight that can be read where it is, got {unreadable}: quantise to NF4 or 8 bits, and "
            "before the model is evaluated; or take PEFT's adapters, whose products bitsandbytes then computes."
        )


def shape_of(layer: Any) -> tuple[int, int]:
    """(N, K) of a layer that `is_adaptable`."""
    if is_conv1d(layer):
        k, n = layer.weight.shape
        return n, k
    return layer.out_features, layer.in_features


def check_adapter(r: Any, alpha: Any = 1.0, dropout: Any = 0.0) -> None:
    if type(r) is not int:
        raise TypeError(f"r: expected an int, got {r!r}.")
    for name, value in (("alpha", alpha), ("dropout", dropout)):
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise TypeError(f"{name}: expected a number, got {value!r}.")
    if r < 1:
        raise ValueError(f"r: expected a positive number, got {r}.")
    if not math.isfinite(alpha):
        raise ValueError(f"alpha: expected a finite number, got {alpha}.")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout: expected a number in [0, 1), got {dropout}.")


def is_conv1d(module: Any) -> bool:
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"
