"""Losses."""

from __future__ import annotations

import torch
from torch import Tensor

from memkernels import ops


class LinearCrossEntropy(torch.nn.Linear):
    """A language-model head with its loss, `ops.linear_cross_entropy`; its state_dict is that of `torch.nn.Linear`.

    Args:
        hidden_size: d, the size of the last dimension of x.
        vocab_size: V, the number of labels.
        bias: whether the logits have a bias.
        options: keyword arguments of `ops.linear_cross_entropy`: ignore_index, reduction, softcap, label_smoothing,
            z_loss, shift.
    """

    def __init__(self, hidden_size: int, vocab_size: int, bias: bool = False, *, device=None, dtype=None, **options):
        unknown = options.keys() - {"ignore_index", "reduction", "softcap", "label_smoothing", "z_loss", "shift"}
        if unknown:
            raise TypeError(f"LinearCrossEntropy: unknown options {', '.join(sorted(unknown))}.")
        super().__init__(hidden_size, vocab_size, bias, device=device, dtype=dtype)
        self.options = options

    def forward(self, x: Tensor, target: Tensor, num_items: int | Tensor | None = None) -> Tensor:  # type: ignore[override]
        return ops.linear_cross_entropy(x, self.weight, target, bias=self.bias, num_items=num_items, **self.options)

    def extra_repr(self) -> str:
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        return super().extra_repr() + options
