"""The operators of a linear layer with a low-rank adapter.

x: (T, K); dy: (T, N); weight: (N, K); lora_a: (r, K); lora_b: (N, r), both of x's dtype or float32, and s and p (T, r)
of theirs. m is the dropout mask of `dropout.py` over 1 - p, or 1 without a seed; first_row is the number of x's first
row in the whole.
"""

from __future__ import annotations

from memkernels._library import define, implement_with_python, implement_with_triton
from memkernels.ops.lora_linear import products, shared_products
from memkernels.ops.quantized.operators import STORED

_MASK = "Tensor? seed, float dropout_p, int first_row"
_MASKS = "Tensor? seeds, float dropout_p, int first_row"


def _down_fake(x, lora_a, seed, dropout_p, first_row):
    return lora_a.new_empty(x.shape[0], lora_a.shape[0])


def _up_fake(x, weight, *rest):
    return x.new_empty(x.shape[0], weight.shape[0])


def _up_grad_fake(dy, s, lora_b, scaling, p_needed):
    p = lora_b.new_empty((dy.shape[0], lora_b.shape[1]) if p_needed else 0)
    return p, lora_b.new_empty(lora_b.shape if s is not None else 0)


def _input_grad_fake(dy, weight, *rest):
    return dy.new_empty(dy.shape[0], weight.shape[1])


def _quantized_up_fake(x, parts, kind, sizes, *rest):
    return x.new_empty(x.shape[0], sizes[0])


def _quantized_input_grad_fake(dy, parts, kind, sizes, *rest):
    return dy.new_empty(dy.shape[0], sizes[1])


def _down_grad_fake(p, x, seed, dropout_p, first_row):
    return p.new_empty(p.shape[1], x.shape[1])


def _down_shared_fake(x, lora_a, seeds, dropout_p, first_row):
    return lora_a.new_empty(lora_a.shape[0], x.shape[0], lora_a.shape[1])


def _down_grad_shared_fake(p, x, seeds, dropout_p, first_row):
    return p.new_empty(p.shape[0], p.shape[2], x.shape[1])


# s = (m * x) lora_a^T
define(f"lora_down(Tensor x, Tensor lora_a, {_MASK}) -> Tensor", _down_fake)
# y = (x weight^T + scaling s lora_b^T) * out_scale + bias, with out_scale (N,) float32
define(
    "lora_up(Tensor x, Tensor weight, Tensor? bias, Tensor s, Tensor lora_b, float scaling, Tensor? out_scale)"
    " -> Tensor",
    _up_fake,
)
# y = (y + scaling s lora_b^T) * out_scale + bias
define("lora_up_add_(Tensor(a!) y, Tensor s, Tensor lora_b, float scaling, Tensor? out_scale, Tensor? bias) -> ()")
# p = scaling dy lora_b and lora_b's gradient scaling dy^T s; empty where not wanted
define(
    "lora_up_grad(Tensor dy, Tensor? s, Tensor lora_b, float scaling, bool p_needed) -> (Tensor p, Tensor dlora_b)",
    _up_grad_fake,
)
# dx = dy weight + m * (p lora_a)
define(f"lora_input_grad(Tensor dy, Tensor weight, Tensor p, Tensor lora_a, {_MASK}) -> Tensor", _input_grad_fake)
# The same over a quantised weight, which is stored as in `quantized/operators.py`.
define(
    f"lora_quantized_up(Tensor x, {STORED}, Tensor? bias, Tensor s, Tensor lora_b, float scaling, Tensor? out_scale)"
    " -> Tensor",
    _quantized_up_fake,
)
define(
    f"lora_quantized_input_grad(Tensor dy, {STORED}, Tensor p, Tensor lora_a, {_MASK}) -> Tensor",
    _quantized_input_grad_fake,
)
# dx += m * (p lora_a)
define(f"lora_input_add_(Tensor(a!) dx, Tensor p, Tensor lora_a, {_MASK}) -> ()")
# lora_a's gradient p^T (m * x)
define(f"lora_down_grad(Tensor p, Tensor x, {_MASK}) -> Tensor", _down_grad_fake)

# The three that read or write what adapters share, for n of them at once: lora_a (n, r, K), s and p (n, T, r), and a
# seed each, (n,). The sum of dx is that over the adapters.
define(f"lora_down_shared(Tensor x, Tensor lora_a, {_MASKS}) -> Tensor", _down_shared_fake)
define(f"lora_input_add_shared_(Tensor(a!) dx, Tensor p, Tensor lora_a, {_MASKS}) -> ()")
define(f"lora_down_grad_shared(Tensor p, Tensor x, {_MASKS}) -> Tensor", _down_grad_shared_fake)

_NAMES = (
    "lora_down", "lora_up", "lora_quantized_up", "lora_up_add_", "lora_up_grad", "lora_input_grad",
    "lora_quantized_input_grad", "lora_input_add_", "lora_down_grad",
)  # fmt: skip
_SHARED_NAMES = ("lora_down_shared", "lora_input_add_shared_", "lora_down_grad_shared")
for _name in _NAMES:
    implement_with_python(_name, getattr(products, _name))
for _name in _SHARED_NAMES:
    implement_with_python(_name, getattr(shared_products, _name))
implement_with_triton("memkernels.ops.lora_linear.triton", *_NAMES, otherwise=products)
implement_with_triton("memkernels.ops.lora_linear.triton_shared", *_SHARED_NAMES, otherwise=shared_products)
