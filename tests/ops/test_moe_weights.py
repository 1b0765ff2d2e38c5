"""Experts whose weights are quantised or adapted: against a loop over tokens with dense weights, and in memory."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from experts import SCALING, adapter_inputs, layer_inputs, loop_over_tokens, over_flat, random_ids
from torch.utils._python_dispatch import TorchDispatchMode

from memkernels import nn, ops, quant
from memkernels.ops.moe import reference
from memkernels.ops.quantized.encoding import _tile_size
from memkernels.testing import check_op, implementations, peak_bytes, random_tensor, run_in_child, saved_bytes

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
QUANTIZE = {"nf4": quant.quantize_nf4, "int8": quant.quantize_int8}
kinds = pytest.mark.parametrize("kind", QUANTIZE)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# On CPU the products are torch's with tiles that native code dequantises; on GPUs all of it is Triton's.
LAYERS = implementations("expert_activation_fwd")
on_cpu_and_gpu = pytest.mark.parametrize("implementation", LAYERS[-2:], ids=str)


def quantized_inputs(kind, *shape, **options):
    inputs = layer_inputs(*shape, **options)
    return inputs | {name: QUANTIZE[kind](inputs[name].detach()) for name in ("w_gate_up", "w_down")}


def sizes_of(kind, implementation, others):
    """Of NF4 those that Triton has a kernel for, where it runs, else others."""
    return (64, 64) if kind == "nf4" and "cpu-" not in implementation.name else others


def routed(routing):
    """Ids of 5 experts, one a token."""
    ids = random_ids({"one token": 1, "no token": 0}.get(routing, 45), 1, 5, nowhere=routing == "spread")
    return ids.fill_({"to one": 3, "nowhere": 5}[routing]) if routing in ("to one", "nowhere") else ids


def to(device, inputs):
    return {name: tensor.to(device) for name, tensor in inputs.items()}


@on_cpu_and_gpu
@kinds
@dtypes
@pytest.mark.parametrize("recompute", [True, False], ids=["recompute", "keep"])
def test_quantised_experts_are_the_loop_over_tokens(implementation, kind, dtype, recompute):
    with implementation.active() as device:
        d, n = sizes_of(kind, implementation, (19, 12))
        inputs = to(device, quantized_inputs(kind, 23, 2, 5, d, n, dtype=dtype, nowhere=True))
        check_op(
            lambda **tensors: ops.moe_mlp(**tensors, recompute=recompute, capacity=4),
            lambda **tensors: loop_over_tokens(**tensors, capacity=4),
            inputs, strided_grads=True,
        )  # fmt: skip


@on_cpu_and_gpu
@pytest.mark.parametrize("options", [{}, {"double_quant": False}, {"block_size": 32}, {"block_size": 256}, None])
@pytest.mark.parametrize(("size", "columns"), [(60, 37), (64, 48), (128, 64)])
def test_grouped_products_see_the_values_of_dequantize_to_the_bit(implementation, options, size, columns):
    """Products by unit matrices, one an expert; options of NF4, None: int8. Of 60 by 37 and 64 by 48 blocks are cut."""
    experts = 3
    dense = random_tensor(experts, columns, size, dtype=torch.float32, seed=1).detach()
    with implementation.active() as device:
        stored = quant.quantize_int8(dense) if options is None else quant.quantize_nf4(dense, **options)
        values = stored.dequantize().to(device)
        matrix, parts = stored.encoding.as_matrix(stored.to(device).parts)
        backend = "triton" if "cpu-" not in implementation.name else "loop"
        for by_rows, expected in ((True, values.mT), (False, values)):
            unit = torch.eye(expected.shape[1], device=device)
            rows = torch.arange(len(unit), dtype=torch.int32, device=device).repeat(experts)
            offsets = len(unit) * torch.arange(experts + 1, dtype=torch.int32, device=device)
            y = torch.ops.memkernels.grouped_quantized_product(
                unit, rows, list(parts), matrix.kind, matrix.sizes, offsets, len(rows), by_rows, backend
            )
            assert torch.equal(y.view(expected.shape), expected)


@on_cpu_and_gpu
@kinds
@pytest.mark.parametrize("routing", ["spread", "to one", "one token", "no token", "nowhere"])
def test_quantised_grouped_matmul_of_any_groups(implementation, kind, routing):
    with implementation.active() as device:
        plan = ops.moe_plan(routed(routing).to(device), 5)
        columns, size = sizes_of(kind, implementation, (37, 70))
        weights = QUANTIZE[kind](random_tensor(5, columns, size, dtype=torch.float32, seed=1).detach()).to(device)
        check_op(
            lambda x_grouped: ops.grouped_matmul(x_grouped, weights, plan),
            lambda x_grouped: reference.grouped_matmul(
                x_grouped, weights.dequantize(x_grouped.dtype), plan.offsets
            ),
            {"x_grouped": random_tensor(len(plan.pair_of_row), size, dtype=torch.float32, device=device)},
        )  # fmt: skip


def test_int8_experts_have_a_scale_for_each_row_of_each():
    dense = random_tensor(3, 5, 8, dtype=torch.float32, scale=0.1).detach() * torch.arange(1, 16).view(3, 5, 1)
    whole = quant.quantize_int8(dense)
    assert whole.absmax.shape == (3, 5) and torch.equal(whole.absmax, dense.abs().amax(2))
    each = [quant.quantize_int8(matrix) for matrix in dense]
    assert torch.equal(whole.dequantize(), torch.stack([matrix.dequantize() for matrix in each]))
    assert torch.equal(whole[1:].dequantize(), whole.dequantize()[1:])
    assert torch.equal(whole.view(15, 8).dequantize(), whole.dequantize().view(15, 8))


@kinds
def test_quantised_experts_keep_no_more_than_dense_ones(kind):
    tokens, choices, experts = 64, 2, 4
    inputs = quantized_inputs(kind, tokens, choices, experts, 16, 24, dtype=torch.bfloat16)
    parts = [part for name in ("w_gate_up", "w_down") for part in inputs[name].parts]
    others = [tensor for name, tensor in inputs.items() if name[:2] != "w_"]
    kept = saved_bytes(lambda: ops.moe_mlp(**inputs), exclude=(*others, *parts))
    assert kept == 2 * tokens * choices * 4 + 2 * (experts + 1) * 4


def step_peak(kind: str, experts: int, size: int, tokens: int, backward: bool) -> int:
    torch.set_num_threads(1)
    x = random_tensor(tokens, size, dtype=torch.bfloat16)
    dense = random_tensor(experts, size, size, dtype=torch.bfloat16, seed=1, scale=size**-0.5).detach()
    weights = QUANTIZE[kind](dense)
    del dense
    plan = ops.moe_plan(torch.arange(tokens)[:, None] % experts, experts)
    y = ops.grouped_matmul(x, weights, plan)
    dy = torch.ones_like(y)
    torch.autograd.grad(y, x, dy, retain_graph=True)
    if backward:
        return peak_bytes(lambda: torch.autograd.grad(y, x, dy, retain_graph=True))
    return peak_bytes(lambda: ops.grouped_matmul(x, weights, plan))


@kinds
@pytest.mark.parametrize("backward", [False, True])
def test_the_transient_is_a_tile_of_one_expert(kind, backward):
    experts, size, tokens = 4, 2048, 64
    result = tokens * size * 2
    tile = _tile_size(size, size * 2, torch.device("cpu")) * size * 2
    one_expert = size * size * 2
    assert tile <= one_expert // 2
    # The library's product copies it once more; int8 is multiplied by its scale in float32, a few tiles of torch's.
    allowed = result + tile * (2 if kind == "nf4" else 6) + (1 << 20)
    assert run_in_child(step_peak, kind, experts, size, tokens, backward) <= allowed < experts * one_expert


@kinds
def test_a_layer_holds_quantised_experts(kind):
    torch.manual_seed(0)
    layer, other = (nn.MoE(nn.TopKRouter(64, 4, 2), 64, 32) for _ in range(2))
    for name in ("gate_up_proj", "down_proj"):
        setattr(layer, name, torch.nn.Parameter(QUANTIZE[kind](getattr(layer, name).detach()), requires_grad=False))
        getattr(other, name).requires_grad_(False)  # which load_state_dict keeps
    other.load_state_dict(layer.state_dict(), assign=True)
    x = random_tensor(9, 64, dtype=torch.float32)
    y, _ = layer(x)
    assert type(other.gate_up_proj.data) is type(layer.gate_up_proj.data) and torch.equal(other(x)[0], y)
    dense = nn.MoE(nn.TopKRouter(64, 4, 2), 64, 32)
    dense.load_state_dict(
        {k: v.dequantize() if isinstance(v, quant.QuantizedTensor) else v for k, v in layer.state_dict().items()}
    )
    torch.testing.assert_close(y, dense(x)[0])
    for of in (layer, dense):
        of(x)[0].square().sum().backward()
    torch.testing.assert_close(layer.router.weight.grad, dense.router.weight.grad)


def test_quantised_experts_under_autocast():
    inputs = quantized_inputs("nf4", 23, 2, 5, 8, 12, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.moe_mlp(**inputs)
    narrow = {name: v.detach().to(torch.bfloat16) if name[0] in "xw" else v for name, v in inputs.items()}
    assert y.dtype == torch.bfloat16 and torch.equal(y, ops.moe_mlp(**narrow))


def test_quantised_experts_compile_whole_and_equal_eager():
    def step(x, expert_ids, expert_weights, w_gate_up, w_down):
        return ops.moe_mlp(x * 2, expert_ids, expert_weights, w_gate_up, w_down).square().sum()

    found = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        inputs = quantized_inputs("nf4", 23, 2, 5, 8, 12, dtype=torch.float32)
        loss = function(**inputs)
        loss.backward()
        found.append((loss, inputs["x"].grad, inputs["expert_weights"].grad))
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager)


@on_cpu_and_gpu
@kinds
def test_opcheck(implementation, kind):
    with implementation.active() as device:
        weights = QUANTIZE[kind](torch.randn(4, 64, 128)).to(device)
        matrix, parts = weights.encoding.as_matrix(weights.parts)
        plan = ops.moe_plan(random_ids(9, 2, 4).to(device), 4)
        for x, by_rows in ((torch.randn(9, 128, device=device), True), (torch.randn(9, 64, device=device), False)):
            torch.library.opcheck(
                torch.ops.memkernels.grouped_quantized_product.default,
                (x, plan.token_of_row, list(parts), kind, matrix.sizes, plan.offsets, 18, by_rows,
                 "loop" if "cpu-" in implementation.name else "triton"),
            )  # fmt: skip


# --- adapters ---


@on_cpu_and_gpu
@pytest.mark.parametrize(
    ("kind", "dtype", "adapter_dtype", "recompute"),
    [
        ("dense", torch.float32, torch.float32, True), ("dense", torch.bfloat16, torch.float32, False),
        ("nf4", torch.bfloat16, torch.bfloat16, True), ("nf4", torch.float16, torch.float32, True),
        ("int8", torch.float32, torch.float32, False),
    ],
)  # fmt: skip
def test_adapted_experts_are_the_loop_over_tokens(implementation, kind, dtype, adapter_dtype, recompute):
    with implementation.active() as device:
        make = layer_inputs if kind == "dense" else functools.partial(quantized_inputs, kind)
        inputs = adapter_inputs(make(23, 2, 5, 19, 12, dtype=dtype, nowhere=True), 3, adapter_dtype)
        check_op(
            over_flat(ops.moe_mlp, recompute=recompute, capacity=4),
            lambda **tensors: loop_over_tokens(**tensors, capacity=4),
            to(device, inputs), strided_grads=True,
        )  # fmt: skip


@on_cpu_and_gpu
@pytest.mark.parametrize(
    ("routing", "rank"),
    [("spread", 1), ("spread", 16), ("spread", 70), ("to one", 16), ("one token", 16), ("no token", 3), ("nowhere", 3)],
)
def test_adapted_grouped_matmul_of_any_groups(implementation, routing, rank):
    with implementation.active() as device:
        plan = ops.moe_plan(routed(routing).to(device), 5)
        shapes = {"weight": (5, 48, 64), "lora_a": (5, rank, 64), "lora_b": (5, 48, rank)}
        inputs = {"x_grouped": random_tensor(len(plan.pair_of_row), 64, dtype=torch.float32, device=device)}
        for seed, (name, shape) in enumerate(shapes.items()):
            scale = shape[2] ** -0.5
            inputs[name] = random_tensor(*shape, dtype=torch.float32, device=device, scale=scale, seed=seed)
        check_op(
            lambda x_grouped, **adapted: ops.grouped_matmul(
                x_grouped, ops.ExpertsLoRAWeight(**adapted, scaling=SCALING), plan
            ),
            lambda x_grouped, weight, lora_a, lora_b: reference.grouped_matmul(
                x_grouped, weight + SCALING * (lora_b @ lora_a), plan.offsets
            ),
            inputs,
        )


def test_adapters_keep_nothing_more():
    tokens, choices, experts = 64, 2, 4
    inputs = adapter_inputs(layer_inputs(tokens, choices, experts, 16, 24, torch.bfloat16), 3, torch.float32)
    kept = saved_bytes(lambda: over_flat(ops.moe_mlp)(**inputs), exclude=tuple(inputs.values()))
    assert kept == 2 * tokens * choices * 4 + 2 * (experts + 1) * 4


def adapted_peak(experts: int, size: int, tokens: int) -> int:
    torch.set_num_threads(1)
    x = random_tensor(tokens, size, dtype=torch.bfloat16)
    weights = quant.quantize_nf4(torch.ones(experts, size, size, dtype=torch.bfloat16))
    a, b = (torch.ones(shape).requires_grad_() for shape in ((experts, 8, size), (experts, size, 8)))
    plan = ops.moe_plan(torch.arange(tokens)[:, None] % experts, experts)

    def step():
        y = ops.grouped_matmul(x, ops.ExpertsLoRAWeight(weights, a, b), plan)
        torch.autograd.grad(y, (x, a, b), torch.ones_like(y))

    step()
    return peak_bytes(step)


def test_no_delta_of_an_adapter_is_ever_made():
    experts, size, tokens = 8, 2048, 64
    one_expert = size * size * 2
    rows, factors = 4 * tokens * size * 2, 4 * experts * 8 * size * 4
    tile = _tile_size(size, size * 2, torch.device("cpu")) * size * 2
    allowed = rows + factors + tile + (4 << 20)
    assert run_in_child(adapted_peak, experts, size, tokens) <= allowed < experts * one_expert / 4


def test_gradients_of_adapters_are_the_same_bits_again():
    gradients = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        inputs = adapter_inputs(quantized_inputs("nf4", 301, 2, 5, 16, 24, dtype=torch.bfloat16), 4, torch.float32)
        wanted = [tensor for tensor in inputs.values() if tensor.requires_grad]
        loss = over_flat(ops.moe_mlp)(**inputs).float().square().sum()
        gradients += [torch.autograd.grad(loss, wanted, retain_graph=True) for _ in range(2)]
    for others in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], others, strict=True))


def test_gradients_of_adapters_only_where_they_are_wanted():
    every = adapter_inputs(layer_inputs(23, 2, 5, 8, 12, torch.float32), 3, torch.float32)
    names = [name for name, tensor in every.items() if tensor.requires_grad]
    whole = torch.autograd.grad(over_flat(ops.moe_mlp)(**every).sum(), [every[name] for name in names])
    for name, expected in zip(names, whole, strict=True):
        inputs = {k: v.detach() for k, v in every.items()}
        inputs[name].requires_grad_()
        over_flat(ops.moe_mlp)(**inputs).sum().backward()
        assert torch.equal(inputs[name].grad, expected), name


class MultipliedBy(TorchDispatchMode):
    """Counts the grouped products by each of some weights."""

    def __init__(self, weights):
        super().__init__()
        self.counts = {weight.data_ptr(): 0 for weight in weights}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.memkernels.grouped_product.default and args[2].data_ptr() in self.counts:
            self.counts[args[2].data_ptr()] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_backward_multiplies_by_each_factor_b_once(dropout_p):
    """For both halves: the input's gradient and the other factor's."""
    inputs = adapter_inputs(layer_inputs(23, 2, 5, 8, 12, torch.float32), 3, torch.float32)
    y = over_flat(ops.moe_mlp, dropout_p=dropout_p, seed=1)(**inputs)
    with MultipliedBy([inputs["w_gate_up.b"], inputs["w_down.b"]]) as products:
        y.sum().backward()
    assert list(products.counts.values()) == [1, 1]


def test_a_layer_with_adapters_starts_as_it_was_and_learns_by_them_alone():
    torch.manual_seed(0)
    layer = nn.MoE(nn.TopKRouter(64, 4, 2), 64, 32, dtype=torch.bfloat16)
    for name in ("gate_up_proj", "down_proj"):
        setattr(layer, name, torch.nn.Parameter(quant.quantize_nf4(getattr(layer, name).detach()), requires_grad=False))
    x = random_tensor(9, 64, dtype=torch.bfloat16)
    before, _ = layer(x)
    with pytest.raises(ValueError, match=r"^r: expected"):
        layer.adapt(0)
    assert not layer.adapters
    layer.adapt(3, alpha=6.0)
    after, _ = layer(x)
    assert torch.equal(after, before)
    after.float().square().sum().backward()
    adapters = dict(layer.adapters.named_parameters())
    assert list(adapters) == [f"{of}_proj.lora_{factor}" for of in ("gate_up", "down") for factor in "AB"]
    assert all(adapters[name].dtype == torch.float32 for name in adapters)
    assert all(bool(adapters[name].grad.any()) == name.endswith("B") for name in adapters)
    assert {name for name, of in layer.named_parameters() if of.requires_grad} == {
        "router.weight", *(f"adapters.{name}" for name in adapters)
    }  # fmt: skip
    other = nn.MoE(nn.TopKRouter(64, 4, 2), 64, 32, dtype=torch.bfloat16)
    other.adapt(3, alpha=6.0)
    other.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(other(x)[0], after)
    with pytest.raises(ValueError, match="the experts have an adapter already"):
        layer.adapt()


def test_adapters_under_autocast_and_compiled_equal_eager():
    inputs = adapter_inputs(layer_inputs(23, 2, 5, 8, 12, torch.float32), 3, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = over_flat(ops.moe_mlp)(**inputs)
    narrow = {k: v.detach().to(torch.bfloat16) if k[0] in "xw" else v.detach() for k, v in inputs.items()}
    assert y.dtype == torch.bfloat16 and torch.equal(y, over_flat(ops.moe_mlp)(**narrow))
    found = []
    for compiled in (False, True):
        function = over_flat(ops.moe_mlp)
        function = torch.compile(function, fullgraph=True, backend="aot_eager") if compiled else function
        wanted = [tensor for tensor in inputs.values() if tensor.requires_grad]
        found.append(torch.autograd.grad(function(**inputs).square().sum(), wanted))
    for eager, other in zip(*found, strict=True):
        torch.testing.assert_close(other, eager)


@on_cpu_and_gpu
def test_opcheck_of_products_with_factors(implementation):
    backend = "loop" if "cpu-" in implementation.name else "triton"
    with implementation.active() as device:
        plan = ops.moe_plan(random_ids(9, 2, 4).to(device), 4)
        x = torch.randn(9, 64, device=device, dtype=torch.bfloat16)
        s, y = torch.randn(18, 3, device=device), torch.randn(18, 64, device=device, dtype=torch.bfloat16)
        a = torch.randn(4, 3, 64, device=device)
        memkernels, tokens, offsets = torch.ops.memkernels, plan.token_of_row, plan.offsets
        for operator, args in (
            (memkernels.grouped_product, (x, tokens, a.mT, offsets, 18, backend)),
            (memkernels.grouped_product_add_, (y, s, a, offsets, backend)),
            (memkernels.grouped_weight_grad, (s, None, x, tokens, offsets, backend)),
            (memkernels.grouped_weight_grad, (x, tokens, s, None, offsets, backend)),
        ):
            torch.library.opcheck(operator.default, args)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": torch.zeros(6, 8)}, ValueError, r"weight: expected shape \(E, out, in\), got \(6, 8\)"),
        ({"lora_a": torch.zeros(4, 3, 7)}, ValueError, r"lora_a: expected shape \(4, r, 8\)"),
        ({"lora_a": torch.zeros(4, 0, 8)}, ValueError, r"lora_a: expected shape \(4, r, 8\), r > 0"),
        ({"lora_b": torch.zeros(4, 6, 2)}, ValueError, r"lora_b: expected shape \(4, 6, 3\)"),
        ({"lora_a": torch.zeros(4, 3, 8).half()}, TypeError, "lora_a: expected torch.float32, as weight, or"),
        ({"lora_b": torch.zeros(4, 6, 3).half()}, TypeError, "lora_b: expected torch.float32, as lora_a"),
        ({"lora_b": [1.0]}, TypeError, "lora_b: expected a tensor"),
        *(
            ({"scaling": value}, TypeError, "scaling: expected a finite number")
            for value in ("1", None, True, torch.ones(()))
        ),
        *(({"scaling": value}, ValueError, "scaling: expected a finite number") for value in (math.nan, -math.inf)),
    ],
)  # fmt: skip
def test_a_bad_adapter_is_named(change, error, message):
    arguments = {"weight": torch.zeros(4, 6, 8), "lora_a": torch.zeros(4, 3, 8), "lora_b": torch.zeros(4, 6, 3)}
    with pytest.raises(error, match=message):
        ops.ExpertsLoRAWeight(**(arguments | change))


def test_bad_input_names_the_argument():
    inputs = quantized_inputs("nf4", 9, 2, 4, 8, 6, dtype=torch.float32)
    adapted = adapter_inputs(layer_inputs(9, 2, 4, 8, 6, torch.float32), 3, torch.float32)
    for of in (inputs, adapted):
        with pytest.raises(ValueError, match="backend: grouped_mm takes dense weights"):
            over_flat(ops.moe_mlp)(**of, backend="grouped_mm")
    with pytest.raises(TypeError, match=r"w_down: expected torch\.float32, as x, got torch\.float16"):
        ops.moe_mlp(**inputs | {"w_down": inputs["w_down"].half()})
    with pytest.raises(ValueError, match="a quantised weight has no gradient"):
        ops.moe_mlp(**inputs | {"w_down": torch.nn.Parameter(inputs["w_down"])})
