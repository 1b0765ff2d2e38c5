"""The operators of the gated MLP's hidden layer: two products, the activation and their backward in one kernel each."""

from __future__ import annotations

from memkernels._library import define, implement_with_triton


def _fwd_fake(x, w_gate, w_up, b_gate, b_up, activation):
    return x.new_empty(x.shape[0], w_up.shape[0])


def _bwd_fake(dy, w_down, x, w_gate, w_up, b_gate, b_up, activation):
    h, dup = (x.new_empty(x.shape[0], w_up.shape[0]) for _ in range(2))
    return h, x.new_empty(0) if w_gate is None else x.new_empty(h.shape), dup


# h = act(x w_gate^T + b_gate) * (x w_up^T + b_up), or act(x w_up^T + b_up) without w_gate.
# x: (T, d); w_gate, w_up: (f, d); b_gate, b_up: (f,); h: (T, f).
define(
    "gated_hidden_fwd(Tensor x, Tensor? w_gate, Tensor w_up, Tensor? b_gate, Tensor? b_up, str activation) -> Tensor",
    _fwd_fake,
)
# Recomputes gate and up; with dh = dy w_down: dgate = dh * up * act'(gate), dup = dh * act(gate), and h itself for
# w_down's gradient. Without w_gate dgate is empty and dup = dh * act'(up). dy: (T, d); w_down: (d, f).
define(
    "gated_hidden_bwd(Tensor dy, Tensor w_down, Tensor x, Tensor? w_gate, Tensor w_up, Tensor? b_gate, Tensor? b_up,"
    " str activation) -> (Tensor h, Tensor dgate, Tensor dup)",
    _bwd_fake,
)
implement_with_triton("memkernels.ops.gated_mlp.triton", "gated_hidden_fwd", "gated_hidden_bwd")
