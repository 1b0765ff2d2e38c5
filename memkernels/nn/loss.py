"""Losses."""

from __future__ import annotations

import torch
from torch import Tensor

from memkernels import ops
from memkernels.ops.checks import check_flag, check_integer, check_parameter_dtype
from memkernels.ops.linear_cross_entropy.checks import check_options


class LinearCrossEntropy(torch.nn.Linear):
    """A language-model head with its loss, `ops.linear_cross_entropy`; its state_dict is that of `torch.nn.Linear`.

    The cross-entropy of logits = x weight^T + bias, which exist a tile of the vocabulary at a time. The weight may be
    replaced by a frozen one of `memkernels.quant`.

    Args:
        hidden_size: d, the size of the last dimension of x.
        vocab_size: V, the number of labels; weight is (V, d).
        bias: whether the logits have a bias, (V,).
        dtype: of weight and bias: x's, unless autocast casts both.
        options: keyword arguments of `ops.linear_cross_entropy`: ignore_index, reduction, softcap, label_smoothing,
            z_loss, shift.

    Raises:
        TypeError: an option other than those, or of another type; a size that is no integer; a bias that is no
            bool; a dtype that the op does not take.
        ValueError: an option that does not fit, or a size that is not positive.

    Saved for backward, beside the parameters: x itself, target (with `shift` a shifted copy, 8 bytes a token) and 4
    bytes a token; nothing of size V.
    """

    def __init__(self, hidden_size: int, vocab_size: int, bias: bool = False, *, device=None, dtype=None, **options):
        unknown = options.keys() - {"ignore_index", "reduction", "softcap", "label_smoothing", "z_loss", "shift"}
        if unknown:
            raise TypeError(f"LinearCrossEntropy: unknown options {', '.join(sorted(unknown))}.")
        check_integer("hidden_size", hidden_size)
        check_integer("vocab_size", vocab_size)
        check_flag("bias", bias)
        check_parameter_dtype(dtype)
        check_options(**options)
        super().__init__(hidden_size, vocab_size, bias, device=device, dtype=dtype)
        self.options = options

    def forward(  # type: ignore[override]
        self, x: Tensor, target: Tensor, num_items: int | Tensor | None = None
    ) -> Tensor:
        """The loss in float32 (float64 of float64): a scalar, or with reduction "none" target's shape.

        Args:
            x: (..., d); float32, bfloat16, float16 or float64.
            target: (...), int64: the label of each token, in [0, V), or ignore_index.
            num_items: what reduction "mean" divides by, a positive number or a tensor of one; None: the tokens of
                target that are not ignored. In gradient accumulation those of all micro-batches.

        Raises:
            TypeError, ValueError, IndexError: as `ops.linear_cross_entropy`: a dtype, shape, device or option that does
                not fit; on CPU a label out of range.
        """
        return ops.linear_cross_entropy(x, self.weight, target, bias=self.bias, num_items=num_items, **self.options)

    def extra_repr(self) -> str:
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        return super().extra_repr() + options
