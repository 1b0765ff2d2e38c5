"""What layers with a low-rank adapter have in common: its scaling, and its merge into the weight and out again."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from memkernels.nn.row_squares import kept_row_squares
from memkernels.ops.lora_linear.norm import adapted_row_norms, row_squares, row_tiles
from memkernels.ops.quantized.tensor import QuantizedTensor


class Magnitude(torch.nn.Module):
    """DoRA's magnitude of each row, (N,), under the key that PEFT gives it."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = torch.nn.Parameter(weight)


class LoRALayer(torch.nn.Module):
    """A layer whose weight is W + scaling B A in the place of W, (N, K), or DoRA's.

    Args:
        base_layer: becomes frozen.
        r, alpha, use_rslora, adapter_name: as those layers have them, checked.
    """

    def __init__(self, base_layer: Any, r: int, alpha: float, use_rslora: bool, adapter_name: str):
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.r, self.alpha, self.use_rslora = r, alpha, use_rslora
        self.adapter_name = adapter_name
        self._merged = False
        self._merged_scale: Tensor | None
        self._quantized: Tensor | None
        self.register_buffer("_merged_scale", None, persistent=False)  # DoRA's, which unmerge takes out again
        self.register_buffer("_quantized", None, persistent=False)  # the base's weight, while a merged one is there

    def add_magnitude(self, use_dora: bool, dtype: torch.dtype) -> None:
        """DoRA's, the norm of W's rows at first; none where not."""
        self.lora_magnitude_vector = torch.nn.ModuleDict()
        if use_dora:
            self.lora_magnitude_vector[self.adapter_name] = Magnitude(row_squares(self.weight).sqrt().to(dtype))

    @property
    def weight(self) -> Tensor:
        """W, (N, K)."""
        raise NotImplementedError

    @property
    def adapter(self) -> dict[str, torch.nn.Parameter]:
        """The adapter's parameters by the kinds that PEFT's file has."""
        raise NotImplementedError

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """A, (r, K), and B, (N, r)."""
        return self._own_factors()

    def _own_factors(self) -> tuple[Tensor, Tensor]:
        # For a class that has others as well: torch.compile takes no property of super().
        a, b, *_ = self.adapter.values()
        return a, b

    @property
    def merged(self) -> bool:
        return self._merged

    @property
    def magnitude(self) -> torch.nn.Parameter | None:
        return self.lora_magnitude_vector[self.adapter_name].weight if self.use_dora else None  # type: ignore[return-value]

    @property
    def use_dora(self) -> bool:
        return len(self.lora_magnitude_vector) > 0

    @property
    def scaling(self) -> float:
        return self.alpha / (self.r**0.5 if self.use_rslora else self.r)

    @property
    def _transposed(self) -> bool:
        """Whether the base layer has W^T, and rows of that are merged at a time."""
        return False

    @torch.no_grad()
    def merge(self) -> None:
        """W becomes that with the adapter, rounded to its dtype, a tile of rows at a time; A and B stay as they are.

        A quantised W becomes a dense one, since an adapter is finer than its steps, and is kept for `unmerge`. A dense
        one is written in place: a module that shares it, as an embedding that is tied to the head, changes with it.

        Raises:
            ValueError: it is merged already, or an adapter that is not finite. W is unchanged.
        """
        scale, weight = self.merged_scale(), self._stored()
        quantized = isinstance(weight, QuantizedTensor)
        merged = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device) if quantized else weight
        for tile, rows in row_tiles(weight):
            rows = rows.addmm_(*self._products(tile, rows.dtype), alpha=self.scaling)
            merged[tile].copy_(rows if scale is None else rows.mul_(self._of_tile(scale, tile)))
        if quantized:
            self._quantized = weight.detach()
            self.base_layer.weight = torch.nn.Parameter(merged, requires_grad=False)
        self._merged, self._merged_scale = True, scale

    @torch.no_grad()
    def unmerge(self) -> None:
        """Takes the adapter out of W again: to W's rounding, since `merge` rounded; a quantised W is put back.

        Raises:
            ValueError: it is not merged.
        """
        if not self.merged:
            raise ValueError(f"{type(self).__name__}: it is not merged.")
        if self._quantized is not None:
            self.base_layer.weight = torch.nn.Parameter(self._quantized, requires_grad=False)
        else:
            self._subtract()
        self._merged, self._merged_scale, self._quantized = False, None, None

    @torch.no_grad()
    def merged_scale(self) -> Tensor | None:
        """DoRA's magnitude over the rows' norms, or None; checks that the adapter may be merged."""
        if self.merged:
            raise ValueError(f"{type(self).__name__}: it is merged already.")
        for name, parameter in self.adapter.items():
            if not bool(parameter.isfinite().all()):
                raise ValueError(f"{name}: expected finite numbers to merge, got others.")
        if self.magnitude is None:
            return None
        squares = kept_row_squares(self, self.weight)
        scale = self.magnitude / adapted_row_norms(self.weight, *self.factors, self.scaling, squares)
        if not bool((scale.isfinite() & (scale != 0)).all()):
            raise ValueError("lora_magnitude_vector: expected rows and magnitudes other than zero to merge.")
        return scale

    def _subtract(self) -> None:
        scale, weight = self._merged_scale, self._stored()
        for tile, rows in row_tiles(weight):
            rows = rows if scale is None else rows.div_(self._of_tile(scale, tile))
            weight[tile].copy_(rows.addmm_(*self._products(tile, rows.dtype), alpha=-self.scaling))

    def _stored(self) -> Tensor:
        """W, or W^T."""
        return self.weight.t() if self._transposed else self.weight

    def _products(self, tile: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        a, b = self.factors
        left, right = (a.t(), b.t()) if self._transposed else (b, a)
        return left[tile].to(dtype), right.to(dtype)

    def _of_tile(self, scale: Tensor, tile: slice) -> Tensor:
        return scale if self._transposed else scale[tile, None]

    def extra_repr(self) -> str:
        options = {"r": self.r, "alpha": self.alpha, "use_dora": self.use_dora, "use_rslora": self.use_rslora}
        return ", ".join(f"{name}={value}" for name, value in (options | {"merged": self.merged}).items())


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
