"""The operators of products with a quantised matrix W, of which never more than a tile is dequantised at a time.

x: (T, K); dy: (T, N); W: (N, K), the values of `parts` by the encoding of `kind` and `sizes`, in x's dtype.
"""

from __future__ import annotations

from memkernels._library import define, implement_with_python, implement_with_triton
from memkernels.ops.quantized import products

STORED = "Tensor[] parts, str kind, int[] sizes"


def _linear_fake(x, bias, parts, kind, sizes):
    return x.new_empty(x.shape[0], sizes[0])


def _input_grad_fake(dy, parts, kind, sizes):
    return dy.new_empty(dy.shape[0], sizes[1])


# y = x W^T + bias
define(f"quantized_linear(Tensor x, Tensor? bias, {STORED}) -> Tensor", _linear_fake)
# dx = dy W
define(f"quantized_input_grad(Tensor dy, {STORED}) -> Tensor", _input_grad_fake)
# dx += dy W
define(f"quantized_input_grad_add_(Tensor(a!) dx, Tensor dy, {STORED}) -> ()")

_NAMES = ("quantized_linear", "quantized_input_grad", "quantized_input_grad_add_")
for _name in _NAMES:
    implement_with_python(_name, getattr(products, _name))
implement_with_triton("memkernels.ops.quantized.triton", *_NAMES, otherwise=products)
