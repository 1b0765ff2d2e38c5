"""A linear layer with a low-rank adapter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memkernels.integrations import bitsandbytes
from memkernels.nn.lora_embedding import LoRAEmbedding
from memkernels.nn.lora_layer import LoRALayer, check_adapter
from memkernels.nn.row_squares import kept_row_squares
from memkernels.ops.checks import check_floating
from memkernels.ops.lora_linear.op import adapted_linear
from memkernels.ops.lora_linear.weight import LoRAWeight


class LoRALinear(LoRALayer):
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
        tied_to: the embedding whose weight W is too. A and B are then B^T and A^T of its adapter, (d, r) and (r, V),
            which is what the tied weight's adapter is for a head: one adapter, trained by both. It has no parameters
            of its own, and is merged where the embedding's is.

    Raises:
        TypeError: base_layer is no linear layer, or its weight not of a floating dtype, or one of bitsandbytes that
            cannot be read where it is, as one in FP4; r is no int, or alpha or dropout no number.
        ValueError: r, alpha or dropout is out of its range; beside tied_to, another weight or rank, or use_dora.

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
        tied_to: LoRAEmbedding | None = None,
    ):
        if not is_adaptable(base_layer):
            raise TypeError(f"base_layer: expected a torch.nn.Linear or a Conv1D, got {type(base_layer).__name__}.")
        check_base_weight("base_layer", base_layer)
        check_adapter(r, alpha, dropout)
        if bitsandbytes.is_layer(base_layer):
            base_layer = bitsandbytes.as_linear(base_layer)
        if tied_to is not None:
            _check_tied(base_layer, r, use_dora, tied_to)
        super().__init__(base_layer, r, alpha, use_rslora, adapter_name)
        self.dropout_p = dropout
        self._tied_to = () if tied_to is None else (tied_to,)  # in a tuple, since it is no module of this one
        self.lora_A, self.lora_B = torch.nn.ModuleDict(), torch.nn.ModuleDict()
        if tied_to is None:
            self._add_factors(dtype or torch.promote_types(self.weight.dtype, torch.float32))
        self.add_magnitude(use_dora, dtype or torch.promote_types(self.weight.dtype, torch.float32))

    def _add_factors(self, dtype: torch.dtype) -> None:
        options: dict[str, Any] = {"bias": False, "device": self.weight.device, "dtype": dtype}
        out_features, in_features = self.weight.shape
        self.lora_A[self.adapter_name] = torch.nn.Linear(in_features, self.r, **options)
        self.lora_B[self.adapter_name] = torch.nn.Linear(self.r, out_features, **options)
        torch.nn.init.zeros_(self.lora_B[self.adapter_name].weight)  # type: ignore[arg-type]

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
        """Its own parameters: lora_A, lora_B and, with DoRA, lora_magnitude_vector; none where it is tied."""
        kinds = ("lora_A", "lora_B", "lora_magnitude_vector")
        modules = {kind: getattr(self, kind) for kind in kinds}
        return {kind: of[self.adapter_name].weight for kind, of in modules.items() if self.adapter_name in of}

    @property
    def tied_to(self) -> LoRAEmbedding | None:
        return self._tied_to[0] if self._tied_to else None

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        if self.tied_to is None:
            return self._own_factors()
        a, b = self.tied_to.factors
        return b.t(), a.t()

    @property
    def merged(self) -> bool:
        return self._merged if self.tied_to is None else self.tied_to.merged

    def merge(self) -> None:
        """As of any layer with an adapter; where it is tied, by that of the embedding, which is one weight with it.

        Raises:
            ValueError: as there; it is tied and scaled otherwise than the embedding.
        """
        if self.tied_to is None:
            super().merge()
            return
        self.merged_scale()
        self.tied_to.merge()

    def unmerge(self) -> None:
        if self.tied_to is None:
            super().unmerge()
        else:
            self.tied_to.unmerge()

    def merged_scale(self) -> Tensor | None:
        if self.tied_to is not None and self.scaling != self.tied_to.scaling:
            raise ValueError(f"scaling: expected that of the tied embedding to merge, {self.tied_to.scaling}.")
        return super().merged_scale()

    def adapted(self) -> LoRAWeight:
        """The weight with its adapter, as the block ops take it."""
        dropout_p, magnitude = self.dropout_p if self.training else 0.0, self.magnitude
        squares = None if magnitude is None else kept_row_squares(self, self.weight)
        return LoRAWeight(self.weight, *self.factors, self.scaling, dropout_p, magnitude=magnitude, row_squares=squares)

    def forward(self, x: Tensor) -> Tensor:
        """y, (..., N), for x (..., K) of W's dtype, unless autocast casts both.

        Raises:
            TypeError, ValueError: as `ops.lora_linear`: a dtype, shape or device that does not fit.
        """
        return self.base_layer(x) if self.merged else adapted_linear(x, self.adapted(), self.bias)

    def extra_repr(self) -> str:
        return f"dropout={self.dropout_p}, {super().extra_repr()}"


def _check_tied(base_layer: Any, r: int, use_dora: bool, tied_to: Any) -> None:
    if not isinstance(tied_to, LoRAEmbedding):
        raise TypeError(f"tied_to: expected an nn.LoRAEmbedding, got {type(tied_to).__name__}.")
    if getattr(base_layer, "weight", None) is not tied_to.base_layer.weight or is_conv1d(base_layer):
        raise ValueError("tied_to: expected an embedding of the base layer's weight, got one of another.")
    if r != tied_to.r:
        raise ValueError(f"r: expected {tied_to.r}, that of tied_to, got {r}.")
    if use_dora or tied_to.use_dora:
        raise ValueError("use_dora: expected none beside tied_to: magnitudes are of rows here and of columns there.")


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


def is_conv1d(module: Any) -> bool:
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"
