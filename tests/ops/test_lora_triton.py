"""The adapter's operators on GPUs, one by one: masks, layouts, addresses, and when they are taken."""

import importlib
import types
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from memkernels import _library
from memkernels.ops.lora_linear import operators, products, reference  # noqa: F401  (defines the operators)
from memkernels.ops.lora_linear.tiles import NARROW_TILES, UP_GRAD_TILES, select_narrow
from memkernels.ops.product_tiles import EXACT_QUANTIZED_TILE, QUANTIZED_TILES, SMALL_TILES, TILES, select_tile
from memkernels.testing import assert_within_factor_two, implementations, poisoned_memory, random_tensor

OPERATORS = torch.ops.memkernels
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEED, DROPOUT_P, FIRST_ROW = torch.tensor(-1234567890123456789), 0.3, 5
on_every_implementation = pytest.mark.parametrize("implementation", implementations("lora_down"), ids=str)


def tensors(rows, k, n, rank, dtype, device):
    """x, dy, weight, lora_a, lora_b, p (s too)."""
    shapes = ((rows, k), (rows, n), (n, k), (rank, k), (n, rank), (rows, rank))
    return [random_tensor(*shape, dtype=dtype, device=device, seed=i).detach() for i, shape in enumerate(shapes)]


def every_operator(x, dy, weight, a, b, p, *, by=OPERATORS):
    mask = (SEED.to(x.device), DROPOUT_P, FIRST_ROW)
    y, dx = dy.clone(), x.clone()
    by.lora_up_add_(y, p, b, 0.7, None, None)
    by.lora_input_add_(dx, p, a, *mask)
    return [
        by.lora_down(x, a, *mask), by.lora_up(x, weight, None, p, b, 0.7, None), y,
        *by.lora_up_grad(dy, p, b, 0.7, True), by.lora_input_grad(dy, weight, p, a, *mask), dx,
        by.lora_down_grad(p, x, *mask),
    ]  # fmt: skip


@on_every_implementation
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 15, 64, 65, 130])
def test_every_product_has_the_mask_of_the_reference(implementation, dtype, columns):
    """Products by unit matrices, of which the other factor comes out with dropout."""
    rows, mask = 37, (SEED, DROPOUT_P, FIRST_ROW)
    x = random_tensor(rows, columns, dtype=dtype).detach()
    expected = reference.row_dropout(x, *mask, torch.float32).to(dtype)
    of_rows, of_columns = torch.eye(rows, dtype=dtype), torch.eye(columns, dtype=dtype)
    with implementation.active() as device:
        mask = (SEED.to(device), *mask[1:])
        x, of_rows, of_columns = (tensor.to(device) for tensor in (x, of_rows, of_columns))
        dx = torch.zeros_like(x)
        OPERATORS.lora_input_add_(dx, of_rows, x, *mask)
        no_dy, no_weight = x.new_zeros(rows, 3), x.new_zeros(3, columns)
        results = [
            OPERATORS.lora_down(x, of_columns, *mask), OPERATORS.lora_down_grad(of_rows, x, *mask), dx,
            OPERATORS.lora_input_grad(no_dy, no_weight, of_rows, x, *mask),
        ]  # fmt: skip
    for result in results:
        torch.testing.assert_close(result.cpu(), expected)
        assert torch.equal(result.cpu() == 0, expected == 0)


@on_every_implementation
@pytest.mark.parametrize("size", [64, 15], ids=["descriptors", "pointers"])
def test_offsets_beyond_32_bits(implementation, size):
    with implementation.active() as device:
        near = tensors(3, size, 32, 2, torch.float16, device)
        far = list(near)
        for index in (0, 1):
            # Four gigabytes of addresses, of which three rows are ever touched.
            sparse = torch.empty_strided(near[index].shape, (2**30, 1), dtype=torch.float16, device=device)
            far[index] = sparse.copy_(near[index])
        results = [every_operator(*of)[:1] + every_operator(*of)[3:] for of in (near, far)]
        assert all(map(torch.equal, *results))


@on_every_implementation
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(implementation, dtype):
    """Rows apart with NaN between them, columns apart, a broadcast row: the same bits as contiguous tensors."""
    with implementation.active() as device:
        plain = tensors(35, 64, 48, 5, dtype, device)
        laid_out = []
        for tensor in plain:
            around = torch.full((tensor.shape[0] + 3, tensor.shape[1] + 16), float("nan"), dtype=dtype, device=device)
            around[: tensor.shape[0], : tensor.shape[1]] = tensor
            laid_out.append(around[: tensor.shape[0], : tensor.shape[1]])
        transposed = [tensor.t().contiguous().t() for tensor in plain]
        with poisoned_memory():
            results = [every_operator(*of) for of in (plain, laid_out, transposed)]
        for other in results[1:]:
            assert all(map(torch.equal, results[0], other))
        plain[1] = plain[1][:1].expand_as(plain[1])
        repeated = [*plain[:1], plain[1].contiguous(), *plain[2:]]
        assert torch.equal(OPERATORS.lora_up_grad(plain[1], plain[5], plain[4], 0.7, True)[1],
                           OPERATORS.lora_up_grad(repeated[1], plain[5], plain[4], 0.7, True)[1])  # fmt: skip


@on_every_implementation
def test_empty_sizes(implementation):
    with implementation.active() as device:
        for shape in ((0, 16, 24, 3), (5, 0, 24, 3), (5, 16, 0, 3)):
            of = tensors(*shape, torch.float32, device)
            for result, expected in zip(every_operator(*of), every_operator(*of, by=products), strict=True):
                torch.testing.assert_close(result, expected)


@on_every_implementation
def test_equal_inputs_give_equal_bits(implementation):
    with implementation.active() as device:
        of = tensors(200, 130, 70, 3, torch.float32, device)
        assert all(map(torch.equal, every_operator(*of), every_operator(*of)))


@pytest.mark.parametrize("implementation", implementations("lora_up")[-1:], ids=str)
@pytest.mark.parametrize(
    ("dtype", "adapter", "rank"),
    [
        (torch.float32, torch.float32, 1),
        (torch.bfloat16, torch.bfloat16, 15),
        (torch.bfloat16, torch.float32, 15),
        (torch.float16, torch.float16, 7),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("rows", "columns", "rows_at_once"), [(300, 64, None), (300, 130, None), (300, 130, 128), (5, 200, 128)]
)
def test_p_and_the_gradient_of_b_from_one_read(
    monkeypatch, implementation, rows, columns, rows_at_once, dtype, adapter, rank
):
    """Of one tile of columns in parts of rows, of several tiles, and in stretches of rows."""
    of_one_read = pytest.importorskip("memkernels.ops.lora_linear.triton_up_grad")
    kernels = importlib.import_module("memkernels.ops.lora_linear.triton")
    for name in ("_lora_narrow_kernel", "_lora_factor_grad_kernel"):
        monkeypatch.setattr(kernels, name, None)
    if rows_at_once is not None:
        monkeypatch.setattr(of_one_read, "_TERMS_BYTES", rows_at_once * 4 * rank * -(-columns // 64))
    dy = random_tensor(rows, columns, dtype=dtype).detach()
    s, b = (random_tensor(size, rank, dtype=adapter, seed=size).detach() for size in (rows, columns))

    def computed(dtype):
        wide_dy, wide_s, wide_b = (of.to(dtype) for of in (dy, s, b))
        return 0.7 * (wide_dy @ wide_b), 0.7 * (wide_dy.t() @ wide_s)

    with implementation.active() as device, poisoned_memory():
        ours = OPERATORS.lora_up_grad(dy.to(device), s.to(device), b.to(device), 0.7, True)
    for name, actual, exact, plain in zip(("p", "db"), ours, computed(torch.float64), computed(adapter), strict=True):
        assert_within_factor_two(name, actual.cpu(), exact, plain)


@pytest.mark.parametrize(
    ("dtype", "adapter", "rank", "columns", "expected"),
    [
        (torch.bfloat16, torch.bfloat16, 32, 4096, True),
        (torch.bfloat16, torch.bfloat16, 33, 4096, False),
        (torch.bfloat16, torch.float32, 16, 4096, True),
        (torch.bfloat16, torch.float32, 32, 4096, False),
        (torch.bfloat16, torch.float32, 16, 64, True),
        (torch.bfloat16, torch.float32, 17, 64, False),
        (torch.float32, torch.float32, 16, 4096, True),
        (torch.float32, torch.float32, 17, 4096, False),
    ],
    ids=str,
)
def test_one_read_is_taken_where_it_moves_less(dtype, adapter, rank, columns, expected):
    """Than the terms of p that it leaves, written and read once in float32."""
    of_one_read = pytest.importorskip("memkernels.ops.lora_linear.triton_up_grad")
    for vendor in ("nvidia", "amd"):
        tile = UP_GRAD_TILES[vendor][adapter.itemsize]
        dy, b = (torch.empty(512, columns, dtype=dtype, device="meta"), torch.empty(columns, rank, dtype=adapter))
        assert of_one_read.reads_once(dy, b, tile) == expected


class Allocations(TorchDispatchMode):
    """The bytes of the results of every operator called inside it, but for views and what is written in place."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view and not function._schema.is_mutable:
            self.sizes.append(result.nbytes)
        return result


@pytest.fixture
def as_on_an_h100(monkeypatch):
    """Launchers run but for the kernels' work, with as many programs as there: on meta tensors, whose bytes count."""
    pytest.importorskip("triton")
    modules = {
        name: importlib.import_module(f"memkernels.ops.lora_linear.{name}")
        for name in ("parts", "triton", "triton_up_grad")
    }
    launch = {"__getitem__": lambda self, grid: lambda *_, **__: None}
    for kernel in ("_lora_narrow_kernel", "_lora_factor_grad_kernel", "_lora_up_grad_kernel"):
        for module in modules.values():
            if hasattr(module, kernel):
                monkeypatch.setattr(module, kernel, type("NotLaunched", (), launch)())
    monkeypatch.setattr(
        modules["parts"],
        "num_programs",
        lambda x, size, block, *, per_multiprocessor: min(132 * per_multiprocessor, -(-size // block)),
    )
    return modules["triton"]


def test_programs_of_an_h100(monkeypatch):
    """That `as_on_an_h100` counts as the launchers' function does."""
    launch = pytest.importorskip("memkernels.ops.launch")
    properties = types.SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    on_gpu = types.SimpleNamespace(is_cuda=True, device=torch.device("cuda"))
    assert [launch.num_programs(on_gpu, 1 << 20, 1, per_multiprocessor=of) for of in (1, 2)] == [132, 264]


SIZES = [(2**14, 14336), (2**20, 14336), (64, 14336), (2**20, 256), (512, 512), (2**14, 128256)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("tokens", "columns"), SIZES)
def test_terms_of_sums_are_of_one_size_whatever_the_tokens(as_on_an_h100, tokens, columns, dtype):
    kernels, rank, tile = as_on_an_h100, 64, NARROW_TILES["nvidia"][dtype.itemsize]
    dy = torch.empty(tokens, columns, dtype=torch.bfloat16, device="meta")
    p, b = (torch.empty(size, rank, dtype=dtype, device="meta") for size in (tokens, columns))
    for function, results in (
        (lambda: kernels.lora_down(dy, b.view(rank, columns), None, 0.0, 0, tile), [p]),
        (lambda: kernels.lora_up_grad(dy, p, b, 0.7, True, tile), [p, b]),
        (lambda: kernels.lora_down_grad(p, dy, None, 0.0, 0, tile), [b]),
    ):
        with Allocations() as memory:
            function()
        terms = len(results) * 2 * 132 * 64 * rank * 4
        # Of a result in parts also their sum in float32, half of the terms or less.
        assert sum(memory.sizes) - sum(result.nbytes for result in results) <= 1.5 * terms


@pytest.mark.parametrize(("dtype", "rank"), [(torch.bfloat16, 1), (torch.bfloat16, 32), (torch.float32, 16)], ids=str)
@pytest.mark.parametrize(("tokens", "columns"), SIZES)
def test_terms_of_one_read_are_of_one_size_whatever_the_tokens(as_on_an_h100, tokens, columns, dtype, rank):
    tile = UP_GRAD_TILES["nvidia"][dtype.itemsize]
    dy = torch.empty(tokens, columns, dtype=torch.bfloat16, device="meta")
    p, b = (torch.empty(size, rank, dtype=dtype, device="meta") for size in (tokens, columns))
    with Allocations() as memory:
        as_on_an_h100.lora_up_grad(dy, p, b, 0.7, True, tile)
    of_gradient = max(132 * tile.BLOCK_N, columns) * rank * 4
    others = sorted(memory.sizes)
    others.remove(p.nbytes)
    assert max(others) <= max(16 << 20, of_gradient)


F32, BF16, F64 = (torch.zeros(1, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.float64))


@pytest.mark.parametrize(
    ("setting", "tensors", "expected"),
    [
        ("auto", (BF16, BF16), True),
        ("auto", (F32, BF16), True),
        ("auto", (F32, torch.zeros(1, dtype=torch.int64), None, 0.5), False),
        ("auto", (F64,), False),
        ("triton", (F32,), True),
        ("triton", (F64,), False),
        ("matmul", (BF16,), False),
    ],
)
def test_when_triton_is_taken(monkeypatch, setting, tensors, expected):
    monkeypatch.setattr(_library, "_products", setting)
    monkeypatch.setattr(_library, "_triton_missing", None)
    assert _library._takes_triton(tensors) == expected
    monkeypatch.setattr(_library, "_triton_missing", "Triton is not installed")
    assert not _library._takes_triton(tensors)


@pytest.mark.parametrize(
    ("capability", "name"), [((8, 0), "sm_80"), ((8, 9), "sm_86"), ((9, 0), "sm_90"), ((10, 3), "sm_100")]
)
def test_tiles_by_capability_and_dtype(monkeypatch, capability, name):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    device, bf16, f32 = torch.device("cuda", 0), torch.bfloat16, torch.float32
    assert select_tile(bf16, bf16, device, aligned=True) == TILES[name]
    assert select_tile(bf16, bf16, device, aligned=True, tiles=QUANTIZED_TILES) == QUANTIZED_TILES[name]
    assert select_tile(bf16, bf16, device, aligned=False) == SMALL_TILES["nvidia"]
    assert select_narrow(bf16, device) == NARROW_TILES["nvidia"][2]
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for setting, exact, narrow in (("ieee", "ieee", "tf32x3"), ("tf32", "tf32", "tf32")):
            torch.backends.cuda.matmul.fp32_precision = setting
            assert select_tile(bf16, f32, device, aligned=True) == replace(TILES[name], LOW_RANK_PRECISION=narrow)
            small = replace(SMALL_TILES["nvidia"], PRECISION=exact, LOW_RANK_PRECISION=exact)
            assert select_tile(f32, f32, device, aligned=False) == small
            stored = select_tile(f32, f32, device, aligned=False, tiles=QUANTIZED_TILES)
            assert stored == (EXACT_QUANTIZED_TILE if exact == "ieee" else small)
            assert select_narrow(f32, device) == replace(NARROW_TILES["nvidia"][4], PRECISION=narrow)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert select_tile(bf16, f32, device, aligned=True) == TILES["gfx942"]
    assert select_narrow(f32, device) == NARROW_TILES["amd"][4]
