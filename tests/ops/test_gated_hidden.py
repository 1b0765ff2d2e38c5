"""The gated MLP's hidden-layer operators: the Triton GEMMs against a float64 oracle, tile choice, and bad layouts."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from memkernels.ops.gated_activation.reference import ACTIVATIONS
from memkernels.ops.gated_mlp import hidden  # noqa: F401  (defines the operators)
from memkernels.ops.gated_mlp.tiles import INTERPRETER_TILE, SMALL_TILE, TF32_TILE, TILES, architecture, select_tile
from memkernels.testing import assert_within_factor_two, implementations, poisoned_memory, random_tensor

OPERATORS = torch.ops.memkernels
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The first has rows at multiples of 16 elements, so descriptors; the others are loaded by pointers.
SHAPES = [(64, 64, 96), (63, 60, 100), (70, 33, 35), (1, 1, 1)]
IMPLEMENTATIONS = implementations("gated_hidden_fwd")
on_every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=str)


def make_inputs(shape, dtype, device, *, gated=True, bias=False):
    """dy, w_down, x, w_gate, w_up, b_gate, b_up; weights scaled so that gate and up are of order one."""
    tokens, size, width = shape
    shapes = {"dy": (tokens, size), "w_down": (size, width), "x": (tokens, size), "w_gate": (width, size),
              "w_up": (width, size), "b_gate": (width,), "b_up": (width,)}  # fmt: skip
    absent = ((), ("w_gate", "b_gate"))[not gated] + ((), ("b_gate", "b_up"))[not bias]
    inputs = {}
    for seed, (name, dims) in enumerate(shapes.items()):
        scale = max(size, 1) ** -0.5 if name.startswith("w_") else 1.0
        value = random_tensor(*dims, dtype=dtype, device=device, seed=seed, scale=scale).detach()
        inputs[name] = None if name in absent else value
    return inputs


def forward(inputs, activation):
    x, *rest = (inputs[name] for name in ("x", "w_gate", "w_up", "b_gate", "b_up"))
    return OPERATORS.gated_hidden_fwd(x, *rest, activation)


def backward(inputs, activation):
    return OPERATORS.gated_hidden_bwd(*inputs.values(), activation)


def plain(inputs, activation, dtype=None):
    """h, dgate, dup by plain PyTorch and autograd, at the inputs' dtype or a given one."""
    dy, w_down, x, w_gate, w_up, b_gate, b_up = (
        t if t is None or dtype is None else t.to(dtype) for t in inputs.values()
    )
    up = F.linear(x, w_up, b_up).requires_grad_()
    if w_gate is None:
        h = ACTIVATIONS[activation](up)
        return h.detach(), x.new_empty(0), *torch.autograd.grad(h, up, dy @ w_down)
    gate = F.linear(x, w_gate, b_gate).requires_grad_()
    h = ACTIVATIONS[activation](gate) * up
    return h.detach(), *torch.autograd.grad(h, (gate, up), dy @ w_down)


def check(inputs, activation):
    exact, allowed = plain(inputs, activation, torch.float64), plain(inputs, activation)
    with poisoned_memory():
        h, results = forward(inputs, activation), backward(inputs, activation)
    assert_within_factor_two("h of forward", h, exact[0], allowed[0])
    for name, *values in zip(("h", "dgate", "dup"), results, exact, allowed, strict=True):
        assert_within_factor_two(name, *values)


@on_every_implementation
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
def test_matches_reference(implementation, shape, dtype, gated):
    with implementation.active() as device:
        check(make_inputs(shape, dtype, device, gated=gated), "silu")


@on_every_implementation
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
def test_every_activation_with_biases(implementation, activation, gated):
    with implementation.active() as device:
        for dtype in DTYPES:
            check(make_inputs((40, 48, 56), dtype, device, gated=gated, bias=True), activation)


@on_every_implementation
@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_layouts(implementation, shape):
    """Rows apart, columns apart and a broadcast row; what lies between the rows is NaN and must not be used."""
    with implementation.active() as device:
        inputs = make_inputs(shape, torch.float16, device, bias=True)
        inputs["b_up"] = inputs["b_up"].repeat_interleave(2)[::2]
        inputs["b_gate"] = inputs["b_gate"][:1].expand(shape[2])
        for name in ("x", "dy", "w_up", "w_down"):
            rows, columns = inputs[name].shape
            around = torch.full((rows + 3, columns + 16), float("nan"), dtype=torch.float16, device=device)
            around[:rows, :columns] = inputs[name]
            inputs[name] = around[:rows, :columns]
        inputs["w_gate"] = inputs["w_gate"].t().contiguous().t()
        check(inputs, "silu")
        inputs["dy"] = inputs["dy"][:1].expand(shape[0], -1)
        check(inputs, "silu")
        inputs["dy"] = torch.ones((), dtype=torch.float16, device=device).expand(shape[0], shape[1])
        check(inputs, "silu")


@on_every_implementation
@pytest.mark.parametrize("size", [16, 15], ids=["descriptors", "pointers"])
def test_offsets_beyond_32_bits(implementation, size):
    with implementation.active() as device:
        inputs = make_inputs((3, size, 32), torch.float16, device)
        for name in ("x", "dy"):
            # Four gigabytes of addresses, of which three rows are ever touched.
            sparse = torch.empty_strided((3, size), (2**30, 1), dtype=torch.float16, device=device)
            inputs[name] = sparse.copy_(inputs[name])
        h, results = forward(inputs, "silu"), backward(inputs, "silu")
        near = {name: value if value is None else value.contiguous() for name, value in inputs.items()}
        assert torch.equal(h, forward(near, "silu"))
        assert all(map(torch.equal, results, backward(near, "silu")))


@on_every_implementation
def test_descriptors_and_pointers_give_the_same_bits(implementation):
    from memkernels.ops.gated_mlp.triton import gated_hidden_bwd, gated_hidden_fwd

    with implementation.active() as device:
        for dtype in DTYPES:
            inputs = make_inputs((70, 72, 104), dtype, device)
            x, weights = inputs["x"], [inputs[name] for name in ("w_gate", "w_up", "b_gate", "b_up")]
            results = []
            for tma in (False, True):
                tile = replace(INTERPRETER_TILE, TMA=tma)
                with poisoned_memory():
                    h = gated_hidden_fwd(x, *weights, "gelu", tile)
                    results.append([h, *gated_hidden_bwd(*inputs.values(), "gelu", tile)])
            assert all(map(torch.equal, *results))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the choice on this GPU is another")
def test_descriptors_where_every_matrix_is_aligned(monkeypatch):
    from memkernels.ops.gated_mlp import triton

    chosen = []
    monkeypatch.setattr(
        triton, "select_tile", lambda *args, **kw: chosen.append(kw["aligned"]) or select_tile(*args, **kw)
    )
    aligned = make_inputs((8, 16, 48), torch.float16, "cpu")
    shifted = torch.empty(8 * 16 + 1, dtype=torch.float16)[1:].view(8, 16)
    cases = [(aligned, True), (make_inputs((8, 24, 48), torch.float16, "cpu"), False),
             (make_inputs((8, 16, 40), torch.float16, "cpu"), False), (aligned | {"x": shifted}, False),
             (aligned | {"x": aligned["x"][:1].expand(8, 16)}, False)]  # fmt: skip
    for inputs, is_aligned in cases:
        chosen.clear()
        triton.gated_hidden_fwd(*(inputs[name] for name in ("x", "w_gate", "w_up", "b_gate", "b_up")), "silu")
        triton.gated_hidden_bwd(*inputs.values(), "silu")
        assert chosen == [is_aligned, is_aligned]


@on_every_implementation
def test_empty_sizes(implementation):
    with implementation.active() as device:
        for shape in ((0, 16, 24), (5, 16, 0)):
            inputs = make_inputs(shape, torch.float32, device)
            for output in (forward(inputs, "silu"), *backward(inputs, "silu")):
                assert output.shape == (shape[0], shape[2])
        check(make_inputs((5, 0, 24), torch.float32, device, bias=True), "silu")


@on_every_implementation
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
def test_opcheck(implementation, gated):
    with implementation.active() as device:
        inputs = make_inputs((6, 16, 24), torch.float16, device, gated=gated, bias=gated)
        dy, w_down, *rest = inputs.values()
        torch.library.opcheck(OPERATORS.gated_hidden_fwd.default, (*rest, "silu"))
        torch.library.opcheck(OPERATORS.gated_hidden_bwd.default, (dy, w_down, *rest, "silu"))


@pytest.mark.parametrize(
    ("capability", "name"),
    [((8, 0), "sm_80"), ((8, 6), "sm_86"), ((8, 9), "sm_86"), ((9, 0), "sm_90"), ((10, 0), "sm_100"),
     ((10, 3), "sm_100"), ((12, 0), "sm_120"), ((12, 1), "sm_120"), ((7, 5), "sm_86")],
)  # fmt: skip
def test_tiles_by_capability(monkeypatch, capability, name):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    device = torch.device("cuda", 0)
    assert architecture(device) == name
    for backward_pass in (False, True):
        assert select_tile(backward_pass, torch.bfloat16, device, aligned=True) is TILES[name][backward_pass]
        assert select_tile(backward_pass, torch.float16, device, aligned=False) is SMALL_TILE


def test_torchs_setting_decides_on_tf32(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    device = torch.device("cuda", 0)
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for setting, tile in (("ieee", SMALL_TILE), ("tf32", TF32_TILE)):
            torch.backends.cuda.matmul.fp32_precision = setting
            assert select_tile(False, torch.float32, device, aligned=True) == tile
            assert select_tile(False, torch.float32, device, aligned=False) == replace(SMALL_TILE, PRECISION=setting)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
