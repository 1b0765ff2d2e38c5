"""An embedding with a low-rank adapter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memkernels.nn.lora_layer import LoRALayer, check_adapter
from memkernels.nn.row_squares import kept_row_squares
from memkernels.ops.checks import PLAIN_TENSORS, check_floating
from memkernels.ops.lora_embedding.op import lora_embedding


class LoRAEmbedding(LoRALayer):
    """`ops.lora_embedding` around an embedding, under the state_dict keys of PEFT's LoRA layers.

    y = W[ids] + scaling A[:, ids]^T B^T; with DoRA as `ops.lora_embedding` has it. The keys are base_layer.weight,
    lora_embedding_A.<adapter_name> (r, V), lora_embedding_B.<adapter_name> (d, r) and, with DoRA,
    lora_magnitude_vector.<adapter_name>.weight (d,). A is zero, B is drawn from the standard normal distribution and
    the magnitude is the norm of W's columns, so that at first y is the base layer's. There is no dropout. The base
    layer is frozen, and its tensors are read, without a call of it. DoRA's norms of W are kept as `nn.LoRALinear` does.

    Args:
        base_layer: torch.nn.Embedding, or one whose rows are times a scalar `embed_scale` besides, as Gemma 3's. Its
            padding_idx is for A as it is for the layer's own weight: no gradient.
        r: rank, from 1 up.
        alpha: scaling is alpha / r.
        use_dora: weight-decomposed adapter (Liu et al. 2024, arXiv 2402.09353).
        use_rslora: scaling is alpha / sqrt(r) (Kalajdzievski 2023, arXiv 2312.03732).
        adapter_name: in the state_dict.
        dtype: the adapter's; None: float32, or float64 if W's is.

    Raises:
        TypeError: base_layer is no such embedding, or its weight no plain tensor of a floating dtype; r is no int, or
            alpha no number.
        ValueError: r or alpha is out of its range; a base layer with max_norm, scale_grad_by_freq or sparse, which an
            adapter has no meaning for.

    Saved for backward, beside the parameters: ids itself.
    """

    def __init__(
        self,
        base_layer: Any,
        r: int = 16,
        *,
        alpha: float = 32.0,
        use_dora: bool = False,
        use_rslora: bool = False,
        adapter_name: str = "default",
        dtype: torch.dtype | None = None,
    ):
        check_embedding("base_layer", base_layer)
        check_adapter(r, alpha)
        super().__init__(base_layer, r, alpha, use_rslora, adapter_name)
        count, size = base_layer.weight.shape
        dtype = dtype or torch.promote_types(base_layer.weight.dtype, torch.float32)
        options: dict[str, Any] = {"device": base_layer.weight.device, "dtype": dtype}
        self.lora_embedding_A = torch.nn.ParameterDict({adapter_name: torch.zeros(r, count, **options)})
        self.lora_embedding_B = torch.nn.ParameterDict({adapter_name: torch.randn(size, r, **options)})
        self.add_magnitude(use_dora, dtype)

    @property
    def weight(self) -> Tensor:
        """W^T, (d, V): the weight that its adapter is for, as a linear layer's is (N, K)."""
        return self.base_layer.weight.t()

    @property
    def bias(self) -> None:
        return None

    @property
    def adapter(self) -> dict[str, torch.nn.Parameter]:
        """The adapter's parameters: lora_embedding_A, lora_embedding_B and, with DoRA, lora_magnitude_vector."""
        found = {kind: getattr(self, kind)[self.adapter_name] for kind in ("lora_embedding_A", "lora_embedding_B")}
        return found if self.magnitude is None else found | {"lora_magnitude_vector": self.magnitude}

    def forward(self, ids: Tensor) -> Tensor:
        """y, (*ids.shape, d), of W's dtype, for ids of int64 or int32.

        Raises:
            TypeError, ValueError, IndexError: as `ops.lora_embedding`: a dtype, device or id that does not fit.
        """
        if self.merged:
            return self.base_layer(ids)
        squares = None if self.magnitude is None else kept_row_squares(self, self.weight)
        return lora_embedding(
            ids, self.base_layer.weight, *self.factors, scaling=self.scaling, padding_idx=self.base_layer.padding_idx,
            embed_scale=embed_scale(self.base_layer), magnitude=self.magnitude, column_squares=squares,
        )  # fmt: skip

    @property
    def _transposed(self) -> bool:
        return True


def check_embedding(name: str, layer: Any) -> None:
    """That LoRAEmbedding takes it; else a TypeError or ValueError that names it and the option."""
    scaled = isinstance(getattr(layer, "embed_scale", None), (int, float, Tensor))
    if type(layer) is not torch.nn.Embedding and not (isinstance(layer, torch.nn.Embedding) and scaled):
        raise TypeError(f"{name}: expected a torch.nn.Embedding, got {type(layer).__name__}.")
    if type(layer.weight) not in PLAIN_TENSORS:
        raise TypeError(f"{name}.weight: expected a plain tensor, got {type(layer.weight).__name__}.")
    check_floating(f"{name}.weight", layer.weight)
    for option in ("max_norm", "scale_grad_by_freq", "sparse"):
        if getattr(layer, option) not in (None, False):
            raise ValueError(
                f"{name}: {option}: expected none under an adapter, got {getattr(layer, option)}: build the embedding "
                "without it."
            )


def embed_scale(layer: Any) -> Tensor | None:
    scale = getattr(layer, "embed_scale", None)
    return scale if scale is None or isinstance(scale, Tensor) else layer.weight.new_tensor(scale)
