"""A state dict from which quantised weights are put together: its tensors taken by key, and checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class StateDict:
    """`source` is the name of the file, for errors."""

    tensors: dict[str, Tensor]
    source: str

    def check(self, condition: bool, key: str, message: str) -> None:
        if not condition:
            raise ValueError(f"{self.source}: {key}: {message}.")

    def dtype(self, key: str, said: Any) -> torch.dtype:
        """The dtype of which a key says the name."""
        known = isinstance(said, str) and said in _DTYPES
        self.check(known, key, f"expected a dtype of {', '.join(_DTYPES)}, got {said!r}")
        return _DTYPES[said]

    def take(self, key: str, dtype: torch.dtype, size: int, kind: str) -> Tensor:
        """The tensor of a key, flat, out of the state dict; `kind` says how its weight is stored."""
        self.check(key in self.tensors, key, f"missing, though the weight is {kind}")
        tensor = self.tensors.pop(key)
        self.check(tensor.dtype == dtype, key, f"expected {dtype}, got {tensor.dtype}")
        expected = f"expected {size} elements, as the weight's shape says, got {tensor.numel()}"
        self.check(tensor.numel() == size, key, expected)
        finite = not dtype.is_floating_point or bool(tensor.isfinite().all())
        self.check(finite, key, "expected finite values")
        return tensor.reshape(-1)
