"""Norm layers."""

from __future__ import annotations

import torch
from torch import Tensor

from memkernels import ops
from memkernels.ops.checks import check_eps, check_finite, check_flag, check_integer, check_parameter_dtype


class RMSNorm(torch.nn.Module):
    """`ops.rms_norm` with a learnable weight of shape (hidden_size,); its state_dict is that of `torch.nn.RMSNorm`.

    y = h / sqrt(mean(h^2) + eps) * (weight + weight_offset) over the last dimension, h = x or x + residual.

    Args:
        hidden_size: d, the size of the last dimension.
        eps: added to the mean of squares.
        weight_offset: added to the weight, which then starts at 1 - weight_offset.
        dtype: the weight's: x's, or float32.

    Raises:
        TypeError, ValueError: a hidden_size that is no positive integer; an eps that is no number, or negative or
            infinite; a weight_offset that is no finite number; a dtype that `ops.rms_norm` does not take.

    Saved for backward, beside the weight: x itself, with a residual h in its place, which is returned; and 4 bytes a
    row.
    """

    def __init__(self, hidden_size: int, eps: float = 1e-6, *, weight_offset: float = 0.0, device=None, dtype=None):
        super().__init__()
        check_integer("hidden_size", hidden_size)
        check_eps("eps", eps)
        check_finite("weight_offset", weight_offset)
        check_parameter_dtype(dtype)
        self.weight = torch.nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.eps = eps
        self.weight_offset = weight_offset
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The weight to 1 - weight_offset: of a module made on the meta device, after `to_empty`."""
        torch.nn.init.constant_(self.weight, 1.0 - self.weight_offset)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """y, like x (..., d) of float32, bfloat16, float16 or float64; with a residual, like x, the pair (y, h).

        Raises:
            TypeError, ValueError: as `ops.rms_norm`: a dtype, shape or device that does not fit the weight or x.
        """
        return ops.rms_norm(x, self.weight, self.eps, residual=residual, weight_offset=self.weight_offset)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}, weight_offset={self.weight_offset}"


class LayerNorm(torch.nn.Module):
    """`ops.layer_norm` with learnable weight and bias of shape (hidden_size,).

    y = (h - mean(h)) / sqrt(var(h) + eps) * weight + bias over the last dimension, h = x or x + residual. Its
    state_dict is that of `torch.nn.LayerNorm` over the last dimension.

    Args:
        hidden_size: d, the size of the last dimension.
        eps: added to the variance.
        bias: whether there is a bias.
        dtype: of weight and bias: x's, or float32.

    Raises:
        TypeError, ValueError: a hidden_size that is no positive integer; an eps that is no number, or negative or
            infinite; a bias that is no bool; a dtype that `ops.layer_norm` does not take.

    Saved for backward, beside the weight: x itself, with a residual h in its place, which is returned; and 8 bytes a
    row.
    """

    bias: torch.nn.Parameter | None

    def __init__(self, hidden_size: int, eps: float = 1e-5, *, bias: bool = True, device=None, dtype=None):
        super().__init__()
        check_integer("hidden_size", hidden_size)
        check_eps("eps", eps)
        check_flag("bias", bias)
        check_parameter_dtype(dtype)
        self.weight = torch.nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", torch.nn.Parameter(torch.empty_like(self.weight)) if bias else None)
        self.eps = eps
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The weight to 1, the bias to 0: of a module made on the meta device, after `to_empty`."""
        torch.nn.init.ones_(self.weight)
        if self.bias is not None:
            torch.nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """y, like x (..., d) of float32, bfloat16, float16 or float64; with a residual, like x, the pair (y, h).

        Raises:
            TypeError, ValueError: as `ops.layer_norm`: a dtype, shape or device that does not fit the weight or x.
        """
        return ops.layer_norm(x, self.weight, self.bias, self.eps, residual=residual)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}, bias={self.bias is not None}"
