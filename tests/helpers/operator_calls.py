"""A right call of each native operator, and what makes it wrong: what its kernel would read or write elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

BFLOAT16, HALF, DOUBLE, INT32, INT64 = torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.int64
BEYOND = 2**62
# Those that csrc/cuda has; the last have no native CPU kernel.
CUDA_OPERATORS = (
    *("cross_entropy_stats", "cross_entropy_grad_"),
    *("nf4_quantize", "nf4_dequantize_"),
    *("moe_plan", "moe_dispatch", "moe_combine", "moe_combine_bwd"),
    *("adamw_", "lion_", "sgd_", "square_sum"),
    *("adafactor_", "factored_square_sum", "factored_squares"),
    *("wide_norm_fwd", "wide_norm_bwd", "muon_momentum_"),
)


@dataclass(frozen=True)
class Call:
    """An operator with right arguments.

    wrong: for arguments by name what cannot stand in their place: a shape or a dtype, of the same tensor, or a value.
    """

    operator: str
    arguments: dict[str, Any]
    wrong: dict[str, list[Any]]

    @property
    def refusal(self) -> str:
        """What an error's text holds, as a regular expression: GPU kernels assert what indices say, by no name."""
        return rf"\b({'|'.join(self.arguments)}|plan)(\[\d+\])?: expected|out of range"

    def fresh(self, **changed: Any) -> dict[str, Any]:
        """The arguments in memory of their own, some of them changed."""
        return {name: _copy(value) for name, value in (self.arguments | changed).items()}

    def with_wrong(self, name: str, wrong: Any) -> dict[str, Any]:
        right = self.arguments[name]
        if isinstance(right, Tensor) and isinstance(wrong, tuple):
            wrong = torch.zeros(wrong, dtype=right.dtype)
        elif isinstance(right, Tensor) and isinstance(wrong, torch.dtype):
            wrong = right.to(wrong)
        return self.fresh(**{name: wrong})


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone() if value.is_contiguous() else value
    return [_copy(of) for of in value] if isinstance(value, list) else value


def assert_refused(operators: Any, call: Call, name: str) -> None:
    """Whatever is wrong in an argument's place, the call raises an error that names it or one that it does not fit, and
    writes nothing."""
    for wrong in call.wrong[name]:
        arguments = call.with_wrong(name, wrong)
        before = {argument: _copy(value) for argument, value in tensors_of(arguments).items()}
        with pytest.raises(RuntimeError, match=call.refusal):
            getattr(operators, call.operator)(**arguments)
        torch.testing.assert_close(tensors_of(arguments), before, rtol=0, atol=0, equal_nan=True)


def tensors_of(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if isinstance(value, (Tensor, list))}


def wrong_calls(calls: list[Call]) -> Any:
    """Parametrises a test by the call and the argument that is wrong."""
    cases = [pytest.param(call, name, id=f"{call.operator}-{name}") for call in calls for name in call.wrong]
    return pytest.mark.parametrize(("call", "name"), cases)


def _floats(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def _ints(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=INT32)


def _moe() -> list[Call]:
    """Three tokens of two choices among two experts of three rows: five rows are in use, one is not."""
    row_of_pair, offsets = _ints([0, 3], [1, 4], [2, -1]), _ints(0, 3, 5)
    x, grouped, weights = _floats(3, 7), _floats(6, 7), _floats(3, 2)
    of_plan = {
        "row_of_pair": [(6,), (2, 2), (3, 2, 1), INT64, _ints([0, 6], [1, 2], [3, 4]), _ints([0, -2], [1, 2], [3, 4])],
        "weights": [(1, 1), (3, 1), (2, 2), (6,), (0,), BFLOAT16, DOUBLE],
    }
    of_offsets = {"offsets": [(0,), (), (1, 3), INT64, _ints(0, 3, 7), _ints(0, 3, -1)]}
    dispatch = {"x": x, "weights": weights, "row_of_pair": row_of_pair, "offsets": offsets, "rows": 6}
    combine = {"y_grouped": grouped, "weights": weights, "row_of_pair": row_of_pair}
    backward = {"dy": x, "y_grouped": grouped, "weights": weights, "row_of_pair": row_of_pair, "offsets": offsets}
    ids = {"expert_ids": torch.tensor([[0, 1], [0, 1], [0, 2]]), "num_experts": 2, "capacity": 3}
    wrong_ids = {
        "expert_ids": [torch.tensor([[0, id_]]) for id_ in (-1, 3, 2**32, -(2**63))] + [DOUBLE, torch.int16],
        "num_experts": [-1, 0, BEYOND],
        "capacity": [-1, -BEYOND],
    }
    of_tokens = [(2, 7), (4, 7), (3,), (3, 7, 1), (0, 7), DOUBLE]
    ragged = {"row_of_pair": _ints(0, 3, 1, 4, 2, -1), "weights": _floats(6), "token_offsets": _ints(0, 1, 5, 5)}
    of_token_offsets = {"token_offsets": [(0,), (), (1, 4), INT64, _ints(0, 1, 5, 7), _ints(0, -1, 5, 5)]}
    of_pairs = {"row_of_pair": [(5,), (3, 2), INT64], "weights": [(5,), (3, 2), BFLOAT16], **of_token_offsets}
    return [
        Call("moe_plan", ids, wrong_ids),
        Call("moe_dispatch", dispatch, of_plan | of_offsets | {"x": of_tokens, "rows": [-1, 4]}),
        Call("moe_dispatch", dispatch | ragged, of_pairs | of_offsets | {"x": of_tokens, "rows": [-1, 4]}),
        Call("moe_combine", combine, of_plan | {"y_grouped": [(4, 7), (6,), (6, 7, 1), (0, 7), DOUBLE]}),
        Call("moe_combine", combine | ragged, of_pairs | {"y_grouped": [(4, 7), (6,), (6, 7, 1), (0, 7), DOUBLE]}),
        Call(
            "moe_combine_bwd",
            backward,
            of_plan | of_offsets | {"dy": [*of_tokens, (3, 6), BFLOAT16], "y_grouped": [(6, 8), (4, 7), (6,)]},
        ),
        Call("moe_combine_bwd", backward | ragged, of_pairs | of_offsets | {"dy": [*of_tokens, (3, 6), BFLOAT16]}),
    ]


def _expert_activation() -> list[Call]:
    gated = {"gate_up": _floats(4, 10), "row_weight": _floats(4), "gated": True, "activation": "silu"}
    backward = {"dh": _floats(4, 5), **gated}
    of_rows = {"row_weight": [(), (3,), (5,), (4, 1), (0,), BFLOAT16], "activation": ["tanh"]}
    of_gate = {"gate_up": [(3, 10), (4,), (4, 10, 1), (4, 9), DOUBLE], **of_rows}
    of_dh = {"dh": [(4, 4), (4, 10), (3, 5), (20,), (0, 5), BFLOAT16], **of_gate}
    of_dh["dh"].append(strided(backward["dh"]))
    in_place = of_dh | {"gate_up": [*of_dh["gate_up"], strided(backward["gate_up"])]}
    return [
        Call("expert_activation_fwd", gated, of_gate),
        Call("expert_activation_bwd", backward, of_dh),
        Call("expert_activation_bwd_", backward, in_place),
    ]


def _gated_activation() -> list[Call]:
    forward = {"gate": _floats(4, 5), "up": _floats(4, 5), "activation": "gelu"}
    backward = {"dh": _floats(4, 5), **forward}
    like_gate = [(4, 4), (3, 5), (5, 4), (0, 5), BFLOAT16, DOUBLE]
    wrong = {"up": like_gate, "activation": ["tanh"]}
    in_place = {name: [*like_gate, strided(backward[name])] for name in ("dh", "gate", "up")}
    return [
        Call("gated_activation_fwd", forward, wrong | {"gate": [DOUBLE]}),
        Call("gated_activation_bwd", backward, wrong | {"dh": like_gate}),
        Call("gated_activation_bwd_", backward, in_place),
    ]


def _norms() -> list[Call]:
    x, weight, rows = _floats(2, 3, 8), _floats(8), _floats(6)
    like_x = [(2, 3, 7), (1, 3, 8), (6, 8), (0,), BFLOAT16]
    of_weight, of_rows = [(7,), (9,), (), (8, 1), HALF, DOUBLE], [(5,), (7,), (2, 3), (), BFLOAT16, DOUBLE]
    forward = {"x": x, "residual": x, "weight": weight}
    wrong = {"x": [(), DOUBLE], "residual": like_x, "weight": of_weight}
    backward = {"dy": x, "dresidual_out": x, "h": x, "weight": weight}
    of_backward = {"dy": like_x, "dresidual_out": like_x, "h": [()], "weight": of_weight, "rstd": of_rows}
    of_bias = [(7,), (9,), (), BFLOAT16]
    rms, layer = {"weight_offset": 0.0}, {"weight_grad": True, "bias_grad": True}
    return [
        Call("rms_norm_fwd", {**forward, "eps": 1e-5, **rms}, wrong),
        Call("rms_norm_bwd", {**backward, "rstd": rows, **rms, "weight_grad": True}, of_backward),
        Call("layer_norm_fwd", {**forward, "bias": weight, "eps": 1e-5}, {**wrong, "bias": of_bias}),
        Call("layer_norm_bwd", {**backward, "mean": rows, "rstd": rows, **layer}, {**of_backward, "mean": of_rows}),
    ]


def _wide_norm() -> list[Call]:
    x, weight, rows = _floats(2, 3, 8), _floats(8), _floats(6)
    like_x = [(2, 3, 7), (1, 3, 8), (6, 8), (0,), BFLOAT16]
    of_weight, of_rows = [(7,), (9,), (), (8, 1), HALF, DOUBLE], [(5,), (7,), (2, 3), (), BFLOAT16, DOUBLE]
    of_size, of_teams = [(), (2, 3, 0), (1, 2**19 + 1), DOUBLE], [0, -1, BEYOND]
    forward = {"x": x, "residual": x, "weight": weight, "bias": weight, "eps": 1e-5, "weight_offset": 0.0}
    wrong = {"x": of_size, "residual": like_x, "weight": of_weight, "bias": [(7,), (9,), (), BFLOAT16]}
    backward = {"dy": x, "dresidual_out": x, "h": x, "weight": weight, "mean": rows, "rstd": rows, "weight_offset": 0.0}
    of_backward = {"dy": like_x, "dresidual_out": like_x, "h": of_size, "weight": of_weight}
    of_backward |= {"mean": [*of_rows, None], "rstd": of_rows, "teams": of_teams}
    wanted = {"weight_grad": True, "bias_grad": True, "teams": 2}
    return [
        Call(
            "wide_norm_fwd",
            {**forward, "centred": True, "teams": 2},
            {**wrong, "centred": [False], "teams": of_teams},
        ),
        Call("wide_norm_bwd", backward | wanted, of_backward),
    ]


def _rotary() -> list[Call]:
    calls = []
    for operator, q, k in (("rotary_fwd", "q", "k"), ("rotary_bwd", "dq", "dk")):
        right = {q: _floats(2, 5, 3, 8), k: _floats(2, 5, 1, 8), "cos": _floats(2, 5, 6), "sin": _floats(2, 5, 6)}
        tables = [(4, 6), (1, 4, 6), (3, 5, 6), (6,), (2, 5, 10), (2, 5, 5), (2, 5, 1, 6)]
        wrong = {
            q: [(5, 3, 8), (2, 5, 3), (2, 5, 3, 8, 1), DOUBLE],
            k: [(1, 5, 1, 8), (2, 4, 1, 8), (2, 5, 1, 7), (2, 5, 8), (0, 5, 1, 8), BFLOAT16],
            "cos": [*tables, HALF, DOUBLE],
            "sin": [*tables, (2, 5, 4), (1, 5, 6), (5, 6), BFLOAT16],
        }
        calls.append(Call(operator, right | {"interleaved": False}, wrong))
    return calls


def _attention() -> list[Call]:
    numbers = {"max_seqlen_q": 5, "max_seqlen_k": 6, "scale": 0.5, "window_left": -1, "window_right": -1}
    numbers |= {"softcap": 0.0, "dropout_p": 0.25}
    per_head = {"alibi_slopes": _floats(2, 4), "sinks": _floats(4), "seed": torch.tensor(3)}
    batch = {"q": _floats(2, 5, 4, 8), "k": _floats(2, 6, 2, 8), "v": _floats(2, 6, 2, 7)}
    batch |= {"cu_seqlens_q": None, "cu_seqlens_k": None, **per_head}
    starts = {"cu_seqlens_q": _ints(0, 3, 5), "cu_seqlens_k": _ints(0, 4, 6)}
    packed = {"q": _floats(5, 4, 8), "k": _floats(6, 2, 8), "v": _floats(6, 2, 7), **starts, **per_head}
    of_heads = {
        "alibi_slopes": [(3,), (5,), (1, 4), (3, 4), (4, 2), (), DOUBLE],
        "sinks": [(3,), (5,), (2, 4), (), DOUBLE],
        "seed": [(0,), (2,), INT32],
        "dropout_p": [-0.5, 1.0, float("nan")],
    }
    of_batch = of_heads | {
        "q": [(5, 4, 8), (2, 5, 3, 8), DOUBLE],
        "k": [(6, 2, 8), (1, 6, 2, 8), (2, 6, 0, 8), (2, 6, 3, 8), (2, 6, 2, 7), BFLOAT16],
        "v": [(6, 2, 7), (1, 6, 2, 7), (2, 5, 2, 7), (2, 6, 1, 7), (2, 6, 7), BFLOAT16],
        "cu_seqlens_k": [_ints(0, 4, 6)],
    }
    of_starts = [(0,), (), (1,), (2,), (3, 1), INT64]
    of_packed = of_heads | {
        "q": [(1, 5, 4, 8), (5, 3, 8), DOUBLE],
        "k": [(1, 6, 2, 8), (6, 0, 8), (6, 3, 8), (6, 2, 7), BFLOAT16],
        "v": [(1, 6, 2, 7), (5, 2, 7), (6, 1, 7), BFLOAT16],
        "cu_seqlens_q": [*of_starts, _ints(0, 3, 6), _ints(-1, 3, 5), _ints(0, 7, 5)],
        "cu_seqlens_k": [*of_starts, None, _ints(0, 4, 7), _ints(1, 4, 6), _ints(0, -4, 6)],
    }
    calls = []
    for forward, wrong, out, lse in (
        (batch, of_batch, _floats(2, 5, 4, 7), _floats(2, 4, 5)),
        (packed, of_packed, _floats(5, 4, 7), _floats(4, 5)),
    ):
        calls.append(Call("attention_fwd", forward | numbers, wrong))
        like_out = [tuple(out.shape[:-1]), (*out.shape[:-1], 8), (1, *out.shape[1:]), (0,), BFLOAT16]
        like_lse = [(*lse.shape[:-1], 4), (1, *lse.shape[1:]), (20,), (0,), BFLOAT16]
        results = {"dout": out, "dlse": lse, **forward, "out": out, "lse": lse, **numbers, "deterministic": True}
        of_results = {"dout": like_out, "out": like_out, "dlse": like_lse, "lse": like_lse}
        calls.append(Call("attention_bwd", results, wrong | of_results))
    return calls


def _cross_entropy() -> list[Call]:
    tile = {"logits": _floats(3, 7), "target": torch.tensor([0, 6, -100]), "vocab_start": 0, "vocab_size": 7}
    state = {name: _floats(3) for name in ("row_max", "row_sum", "target_logit", "logit_sum")}
    of_rows = [(2,), (4,), (), (0,), _floats(6)[::2], _floats(1).expand(3), BFLOAT16, DOUBLE]
    of_target = [(2,), (4,), (0,), INT32]
    of_tile = {"logits": [(7,), (3, 7, 1), _floats(3, 14)[:, ::2], DOUBLE], "target": of_target}
    gradient = {name: _floats(3) for name in ("row_max", "row_sum", "grad_loss")}
    of_gradient = of_tile | dict.fromkeys(gradient, of_rows)
    gradient |= {"ignore_index": -100, "softcap": 0.0, "label_smoothing": 0.1, "z_loss": 0.1}
    return [
        Call(
            "cross_entropy_stats",
            {**tile, "ignore_index": -100, "softcap": 2.0, **state},
            {**of_tile, **dict.fromkeys(state, of_rows)},
        ),
        Call(
            "cross_entropy_grad_",
            tile | gradient,
            of_gradient,
        ),
    ]


def _nf4() -> list[Call]:
    """Four rows of 64, the first half of each; blocks of 32, and of 256 of these one."""
    plain = {"out": _floats(4, 32), "packed": torch.zeros(128, dtype=torch.uint8), "absmax": _floats(8)}
    plain |= dict.fromkeys(("nested_absmax", "nested_code", "offset"))
    place = {"block_size": 32, "row_size": 64, "first_row": 0, "first_column": 0}
    nested = {**plain, "absmax": torch.zeros(8, dtype=torch.uint8), "nested_absmax": _floats(1)}
    nested |= {"nested_code": _floats(256), "offset": _floats(1).squeeze(0)}
    numbers = {"block_size": [0, -32, 48, 8192]}
    held = {"packed": [(111,), (0,), torch.int8], "absmax": [(6,), (0,), DOUBLE]}
    of_nested = {
        **held,
        "absmax": [(6,), (0,), torch.float32],
        "nested_absmax": [(0,), DOUBLE],
        "nested_code": [(255,), (257,), None, DOUBLE],
        "offset": [(0,), (2,), None, DOUBLE],
    }
    of_out = {"out": [(32,), (4, 32, 1), _floats(32, 4).t(), DOUBLE]}
    of_place = {
        "row_size": [31, 0, -64, BEYOND],
        "first_row": [1, -1, BEYOND, -BEYOND],
        "first_column": [33, -1, BEYOND, -BEYOND],
    }
    code = {"absmax": _floats(300), "offset": _floats(1), "code": _floats(256).sort().values}
    of_code = {"absmax": [DOUBLE], "offset": [(0,), (2,), DOUBLE], "code": [(255,), (257,), (0,), DOUBLE]}
    return [
        Call("nf4_quantize", {"values": _floats(300), "block_size": 64}, {"values": [DOUBLE], **numbers}),
        Call("nf4_quantize_absmax", code, of_code),
        Call("nf4_dequantize_", plain | place, numbers | held | of_out | of_place),
        Call("nf4_dequantize_", nested | place, numbers | of_nested | of_out | of_place),
    ]


def _fp8_blocks() -> list[Call]:
    right = {"values": _floats(300), "codes": torch.zeros(300, dtype=torch.uint8), "scales": _floats(3)}
    wrong = {
        "values": [(299,), (0,), strided(right["values"]), DOUBLE],
        "codes": [(299,), (301,), (0,), strided(right["codes"]), torch.int8],
        "scales": [(2,), (4,), (0,), strided(right["scales"]), DOUBLE],
    }
    return [Call("fp8_encode_", right, wrong), Call("fp8_decode_", right, wrong)]


def _row_words() -> list[Call]:
    mask = {"seed": torch.tensor(3), "dropout_p": 0.25, "first_row": 2}
    of_mask = {"seed": [(0,), (2,), INT32], "dropout_p": [-0.5, 1.0, float("nan")]}
    of_x = {"x": [(70,), (3, 70, 1), DOUBLE], "dtype": [BFLOAT16, DOUBLE]}
    noise = {"x": _floats(3, 70), "seed": mask["seed"], "width": 0.1, "first_row": 2}
    of_y = {"y": [(210,), (3, 70, 1), _floats(70, 3).t(), DOUBLE]}
    of_term = {"term": [(2, 70), (3, 69), (210,), (70, 3), (0, 70), BFLOAT16, DOUBLE]}
    return [
        Call("row_dropout", {"x": _floats(3, 70), **mask, "dtype": torch.float32}, of_mask | of_x),
        Call("row_noise", noise, {"x": of_x["x"], "seed": of_mask["seed"]}),
        Call("row_dropout_add_", {"y": _floats(3, 70), "term": _floats(3, 70), **mask}, of_mask | of_y | of_term),
    ]


def _huge_pages() -> list[Call]:
    return [Call("on_huge_pages_", {"fresh": _floats(3, 70)}, {"fresh": [_floats(70, 3).t()]})]


def _matmul() -> list[Call]:
    right = {"a": _floats(7, 70), "b": _floats(70, 5), "c": _floats(7, 5), "alpha": 0.5, "out": _floats(7, 5)}
    wrong = {
        "a": [(7,), (7, 69), (6, 70), (7, 70, 1), (7, 0), BFLOAT16, DOUBLE],
        "b": [(70,), (69, 5), (70, 6), BFLOAT16],
        "c": [(5,), (6, 5), (7, 1), BFLOAT16],
        "out": [(35,), (6, 5), (7, 6), BFLOAT16, DOUBLE, strided(right["out"])],
    }
    return [Call("matmul_into_", right, wrong)]


def strided(tensor: Tensor) -> Tensor:
    """The same elements, each beside another."""
    return torch.stack([tensor, tensor], -1)[..., 0]


def _spoilt(right: list[Tensor]) -> list[list[Tensor]]:
    """One too few, one too many, the last too short or of another dtype, and the first apart in memory."""
    *rest, last = right
    first, *others = right
    return [rest, [*right, last], [*rest, last[:-1].clone()], [*rest, last.double()], [strided(first), *others]]


def _optimizers() -> list[Call]:
    options = {
        "adamw_": {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1},
        "lion_": {"beta1": 0.9, "beta2": 0.99, "weight_decay": 0.1},
        "sgd_": {"momentum": 0.9, "dampening": 0.0, "weight_decay": 0.1, "nesterov": False},
    }
    numbers = {
        "steps": [[], [1], [1, 2, 3]],
        "indices": [[], [0], [0, 1, 2]],
        "origins": [[], [0], [0, -256]],
        "state_bits": [0, 2, 64],
        "grad_factor": [(2,), DOUBLE],
        "lr_factor": [(2,), DOUBLE],
    }
    calls = []
    for operator, moments, bits in [*(("adamw_", 2, bits) for bits in (32, 16, 8)), ("lion_", 1, 4), ("sgd_", 1, 8)]:
        narrow = bits == 16
        params = [_floats(300).to(BFLOAT16 if narrow else torch.float32), _floats(5)]
        state_dtype = {32: torch.float32, 16: BFLOAT16}.get(bits, torch.uint8)
        elements = [(size + 1) // 2 if bits == 4 else size for size in (300, 5)]
        blocks = {8: (2, 1), 4: (3, 1)}.get(bits, ())
        lists = {
            "params": params,
            "grads": [torch.ones_like(param) for param in params],
            "moments": [torch.zeros(size, dtype=state_dtype) for size in elements * moments],
            "absmax": [torch.zeros(size) for size in blocks * moments],
            "remainders": [torch.zeros(size, dtype=torch.int16) for size in (300, 0)] if narrow else [],
        }
        wrong = {name: _spoilt(lists[name]) for name in lists if lists[name] and name != "remainders"}
        if narrow:
            first, none = lists["remainders"]
            wrong["remainders"] = [[first], [first[:-1].clone(), none], [strided(first), none], [first, first]]
        scalars = {"steps": [1, 2], "indices": [0, 1], "origins": [0, 256], "seed": 3, "state_bits": bits}
        scales = {"grad_scale": 1.0, "grad_factor": torch.ones(()), "lr_factor": torch.ones(()), "lr": 0.1}
        right = lists | scalars | scales | options[operator]
        within_a_block = {"origins": [*numbers["origins"], [0, 1]]} if blocks else {}
        calls.append(Call(operator, right, wrong | numbers | within_a_block))
    tensors = [_floats(5), _floats(7).bfloat16()]
    calls += _adafactor(next(of for of in calls if of.operator == "sgd_"))
    return [*calls, Call("square_sum", {"tensors": tensors}, {"tensors": [[tensors[0], tensors[1].double()]]})]


def _adafactor(of_sgd: Call) -> list[Call]:
    """Of one parameter, with the moment of SGD's first."""
    factors = {"rows": _floats(2, 30, 1), "columns": _floats(2, 1, 5)}
    of_factors = {
        "rows": [(2, 29, 1), (59,), (0,), strided(factors["rows"]), DOUBLE],
        "columns": [(2, 1, 6), (7, 1, 5), (0,), strided(factors["columns"]), DOUBLE],
    }
    grad = {"grad": _floats(2, 30, 5)}
    first = {name: value[:1] if isinstance(value, list) else value for name, value in of_sgd.arguments.items()}
    step = first | {"absmax": [torch.zeros(2)], "beta1": 0.9, "most": 1e3} | factors
    scale, of_scale = {"grad_scale": 0.5, "grad_factor": torch.ones(())}, {"grad_factor": [(2,), DOUBLE]}
    for name in ("momentum", "dampening", "nesterov"):
        del step[name]
    wrong = {name: _spoilt(step[name]) for name in ("params", "grads", "moments", "absmax")}
    return [
        Call("factored_squares", grad | scale, {"grad": [(30, 5), DOUBLE]} | of_scale),
        Call("factored_square_sum", grad | factors | {"most": 1e3} | scale, {"grad": [DOUBLE]} | of_factors | of_scale),
        Call("adafactor_", step, wrong | of_factors | {"origins": [[], [1], [-256], [0, 256]], "steps": [[], [1, 2]]}),
    ]


def _muon_momentum() -> Call:
    """Of one matrix of two blocks."""
    lists = {"grads": [_floats(20, 15)], "moments": [torch.zeros(300, dtype=torch.uint8)], "absmax": [torch.zeros(2)]}
    places = {"steps": [1], "indices": [0], "origins": [256]}
    numbers = {"seed": 3, "state_bits": 8, "grad_scale": 0.1, "grad_factor": torch.ones(())}
    right = {"direction": torch.zeros(20, 15, dtype=BFLOAT16), **lists, **places, **numbers}
    wrong = {name: _spoilt(of) for name, of in lists.items()} | {name: [[], [1, 2]] for name in places}
    wrong["direction"] = [(20, 14), (300,), torch.zeros(15, 20, dtype=BFLOAT16).t(), torch.float32]
    wrong |= {"origins": [[1], [-256]], "state_bits": [0, 2], "grad_factor": [(2,), DOUBLE]}
    return Call("muon_momentum_", right | {"momentum": 0.9, "nesterov": True}, wrong)


CALLS = [
    *(*_moe(), *_expert_activation(), *_gated_activation(), *_norms(), *_rotary(), *_attention(), *_cross_entropy()),
    *(*_nf4(), *_fp8_blocks(), *_row_words(), *_huge_pages(), *_matmul(), *_optimizers()),
]
CUDA_CALLS = [*(call for call in CALLS if call.operator in CUDA_OPERATORS), *_wide_norm(), _muon_momentum()]
