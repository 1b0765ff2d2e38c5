"""Fewer bits for what moves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from memkernels.ops.fp8_blocks import BLOCK, fp8_decode_, fp8_encode_

Compress = Literal["bf16", "fp8"]
COMPRESS = get_args(Compress)

_ALIGNMENT = 64
_DTYPES = {"bf16": (torch.float32,), "fp8": (torch.float32, torch.bfloat16, torch.float16)}


@dataclass(frozen=True)
class Codec:
    """Values of `dtype` as bfloat16 or in fp8; both on the device that they are on."""

    kind: Compress
    dtype: torch.dtype

    def encode(self, values: Tensor) -> Tensor:
        """(n,) uint8 to fewer bytes; values: the bytes of (m,) `dtype`."""
        typed = values.view(self.dtype)
        if self.kind == "bf16":
            return typed.bfloat16().view(torch.uint8)
        count = typed.numel()
        encoded = torch.empty(self._scales_at(count) + 4 * -(-count // BLOCK), dtype=torch.uint8, device=values.device)
        fp8_encode_(typed, *self._parts(encoded, count))
        return encoded

    def decode(self, encoded: Tensor, nbytes: int) -> Tensor:
        """The bytes, `nbytes` of them, of the values that came of it."""
        if self.kind == "bf16":
            return encoded.view(torch.bfloat16).to(self.dtype).view(torch.uint8)
        values = torch.empty(nbytes // self.dtype.itemsize, dtype=self.dtype, device=encoded.device)
        fp8_decode_(*self._parts(encoded, values.numel()), values)
        return values.view(torch.uint8)

    @staticmethod
    def _scales_at(count: int) -> int:
        return -(-count // _ALIGNMENT) * _ALIGNMENT

    def _parts(self, encoded: Tensor, count: int) -> tuple[Tensor, Tensor]:
        return encoded[:count], encoded[self._scales_at(count) :].view(torch.float32)


def codec_for(compress: Compress | None, tensor: Tensor) -> Codec | None:
    """What compresses a tensor; None where it moves as it is.

    Only a tensor without gaps is compressed: what lies between the elements of another, in memory that they share,
    may be anything, and would decide over their scale.
    """
    if compress is None or tensor.dtype not in _DTYPES[compress] or tensor.is_neg():
        return None
    extent = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return Codec(compress, tensor.dtype) if extent == tensor.numel() else None
