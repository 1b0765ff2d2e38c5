"""The operators of grouped products: rows in groups, each multiplied by its expert's matrix.

offsets: (E + 1,) int32, the rows of group e being offsets[e] to offsets[e + 1]. rows: (R,) int32, which row of a matrix
each of R rows is; without them a matrix has a row for each. backend: "loop", "grouped_mm" or "triton".
"""

from __future__ import annotations

import torch

from memkernels._library import define, implement_with_python, implement_with_triton
from memkernels.ops.moe import products
from memkernels.ops.quantized.operators import STORED


def _product_fake(x, rows, weights, offsets, num_rows, backend):
    return weights.new_empty(num_rows, weights.shape[2])


def _weight_grad_fake(dy, dy_rows, x, x_rows, offsets, backend):
    dtype = torch.promote_types(dy.dtype, x.dtype)
    return x.new_empty(offsets.shape[0] - 1, dy.shape[1], x.shape[1], dtype=dtype)


def _quantized_product_fake(x, rows, parts, kind, sizes, offsets, num_rows, by_rows, backend):
    return x.new_empty(num_rows, sizes[0] // (offsets.shape[0] - 1) if by_rows else sizes[1])


# y[r] = x[rows[r]] weights[e] for the rows r of group e; zero beyond the last group. weights are (E, in, out), of
# any strides; x is multiplied in their dtype, which y has.
define(
    "grouped_product(Tensor x, Tensor? rows, Tensor weights, Tensor offsets, SymInt num_rows, str backend) -> Tensor",
    _product_fake,
)
# y[r] += x[r] weights[e]; x of weights' dtype, y of that or a narrower one, to which a sum is rounded once.
define("grouped_product_add_(Tensor(a!) y, Tensor x, Tensor weights, Tensor offsets, str backend) -> ()")
# dweights[e] = sum over the rows r of group e of dy[dy_rows[r]]^T x[x_rows[r]], (E, out, in), in the wider dtype.
define(
    "grouped_weight_grad(Tensor dy, Tensor? dy_rows, Tensor x, Tensor? x_rows, Tensor offsets, str backend) -> Tensor",
    _weight_grad_fake,
)
# y[r] = x[rows[r]] W_e^T where by_rows, else x[rows[r]] W_e. W_e is (out, in), the e-th of E parts of the rows of a
# quantised matrix (E out, in), which is stored as in `quantized/operators.py`. No backend "grouped_mm".
define(
    f"grouped_quantized_product(Tensor x, Tensor? rows, {STORED}, Tensor offsets, SymInt num_rows, bool by_rows,"
    " str backend) -> Tensor",
    _quantized_product_fake,
)
for _name in ("grouped_product", "grouped_product_add_", "grouped_weight_grad", "grouped_quantized_product"):
    implement_with_python(_name, getattr(products, _name))
    implement_with_triton("memkernels.ops.moe.triton_grouped", _name)
