"""The products of the ops: torch's, those of csrc/cpu/matmul.cpp, and by float32 blocks where torch multiplies 16-bit
elements without vectors."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from memkernels.ops import matmul
from memkernels.testing import assert_within_factor_two, peak_bytes, poisoned_memory, random_tensor, run_in_child

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
LAYOUTS = {
    "rows": lambda t: t,
    "columns": lambda t: t.t().contiguous().t(),
    "slice": lambda t: torch.cat((t, t), 1)[:, : t.shape[1]],
    "slice of columns": lambda t: torch.cat((t, t), 0).t().contiguous()[:, : t.shape[0]].t(),
}


def has_work_for_native(a, b, out):
    return a.numel() > 0 and b.numel() > 0 and 1 in out.stride()


@pytest.fixture(params=["torch", "native", "blocks"], autouse=True)
def by(request, monkeypatch):
    """Whose products."""
    monkeypatch.setattr(matmul, "NATIVE_DTYPES", frozenset(DTYPES if request.param == "native" else ()))
    monkeypatch.setattr(matmul, "SLOW_DTYPES", frozenset(DTYPES[:2] if request.param == "blocks" else ()))
    monkeypatch.setattr(matmul, "_takes_native", lambda *args: request.param == "native" and has_work_for_native(*args))
    monkeypatch.setattr(matmul, "_BLOCK", 16)
    return request.param


def operands(m, k, n, dtype):
    return tuple(random_tensor(*size, dtype=dtype, seed=i).detach() for i, size in enumerate([(m, k), (k, n), (m, n)]))


def check(name, actual, function, *tensors):
    exact, plain = function(*(t.double() for t in tensors)), function(*tensors)
    assert_within_factor_two(name, actual, exact, plain)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sizes", [(33, 47, 17), (16, 32, 16), (1, 5, 1), (40, 1, 3)], ids=str)
def test_products(sizes, layout, dtype):
    a, b, c = operands(*sizes, dtype)
    a, b, c = (LAYOUTS[layout](t) for t in (a, b, c))
    with poisoned_memory():
        check("mm", matmul.mm(a, b), torch.mm, a, b)
        check("addmm", matmul.addmm(c, a, b, alpha=0.5), lambda c, a, b: torch.addmm(c, a, b, alpha=0.5), c, a, b)
        out = torch.empty(a.shape[0], 2 * b.shape[1], dtype=dtype)[:, ::2]
        assert matmul.mm(a, b, out=out) is out
        check("mm into a slice", out, torch.mm, a, b)
        total = LAYOUTS[layout](c.clone())
        assert matmul.addmm(total, a, b, out=total) is total
        check("addmm in place", total, torch.addmm, c, a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sums_of_float32(layout, dtype):
    a, b, c = (LAYOUTS[layout](t) for t in operands(33, 47, 70, dtype))
    total, memory = c.to(torch.float32, copy=True), torch.empty_like(c)
    with poisoned_memory():
        assert matmul.add_product(total, a, b, torch.float32) is total
        assert matmul.add_product(total, a, b, torch.float32, memory) is total
        check("alone", matmul.add_product(None, a, b, torch.float32), lambda a, b: (a @ b).to(total.dtype), a, b)
    exact, plain = c.double() + 2 * a.double() @ b.double(), c.float() + (a @ b).float() + (a @ b).float()
    assert_within_factor_two("total", total, exact, plain)


def test_sums_of_float32_keep_what_a_narrow_term_would_lose(by):
    ones = torch.ones(40, 257, dtype=torch.bfloat16)  # 257 is no bfloat16
    for total in (None, torch.zeros(40, 40)):
        found = matmul.add_product(total, ones, ones.t(), torch.float32)
        assert found.dtype == torch.float32 and found[0, 0].item() == (256 if by == "torch" else 257)


# Sums over several parts of k, and more of a than is packed at a time.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sizes", [(70, 5001, 70), (1100, 4300, 20)], ids=str)
@pytest.mark.parametrize("by", ["native"], indirect=True)
def test_native_products_of_many_parts(sizes, layout, dtype):
    a, b, c = operands(*sizes, dtype)
    a, b = LAYOUTS[layout](a), LAYOUTS[layout](b)
    with poisoned_memory():
        check("mm", matmul.mm(a, b), torch.mm, a, b)
        check("addmm", matmul.addmm(c, a, b), torch.addmm, c, a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear(dtype):
    x, weight, _ = operands(33, 47, 17, dtype)
    weight, bias = weight.t().contiguous(), random_tensor(17, dtype=dtype, seed=7).detach()
    check("without bias", matmul.linear(x, weight), torch.nn.functional.linear, x, weight)
    check("with bias", matmul.linear(x, weight, bias), torch.nn.functional.linear, x, weight, bias)


@pytest.mark.parametrize("sizes", [(0, 3, 4), (3, 0, 4), (3, 4, 0)], ids=str)
def test_of_nothing(sizes):
    a, b, c = operands(*sizes, torch.bfloat16)
    with poisoned_memory():
        assert torch.equal(matmul.mm(a, b), torch.zeros(sizes[0], sizes[2], dtype=torch.bfloat16))
        assert torch.equal(matmul.addmm(c, a, b), c if sizes[1] == 0 else torch.addmm(c, a, b))


def test_sums_keep_what_bfloat16_would_lose():
    ones = torch.ones(1, 1000, dtype=torch.bfloat16)
    assert matmul.mm(ones, ones.t()).item() == 1000


@pytest.mark.parametrize("by", ["torch", "blocks"], indirect=True)
def test_multiplies_once():
    a, b, _ = operands(200, 300, 400, torch.bfloat16)
    with FlopCounterMode(display=False) as counter:
        matmul.mm(a, b)
    assert counter.get_total_flops() == 2 * 200 * 300 * 400


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compiles_to_the_same(dtype):
    def products(a, b, c):
        return matmul.mm(a, b), matmul.addmm(c, a, b, alpha=0.5), matmul.linear(a, b.t(), c[0])

    torch.compiler.reset()
    tensors = operands(33, 47, 17, dtype)
    compiled = torch.compile(products, fullgraph=True)(*tensors)
    for actual, expected in zip(compiled, products(*tensors), strict=True):
        assert torch.equal(actual, expected)


def test_the_operator_of_compiled_code():
    a, b, c = operands(33, 47, 17, torch.bfloat16)
    for added in (None, c):
        torch.library.opcheck(torch.ops.memkernels.matmul, (a, b, added, 0.5))


def peak_of_a_wide_operand():
    matmul.NATIVE_DTYPES, matmul.SLOW_DTYPES = frozenset(), frozenset({torch.bfloat16})
    a, b = (torch.ones(*size, dtype=torch.bfloat16) for size in ((64, 4096), (4096, 8192)))
    matmul.mm(a, b)
    return peak_bytes(lambda: matmul.mm(a, b))


@pytest.mark.parametrize("by", ["blocks"], indirect=True)
def test_holds_a_few_blocks_and_no_widened_operand():
    blocks, widened = 3 * 4 << 20, 4096 * 8192 * 4
    assert run_in_child(peak_of_a_wide_operand) <= 64 * 8192 * 2 + 2 * blocks < widened / 4


def peak_of_a_transposed_operand():
    matmul.NATIVE_DTYPES = frozenset({torch.bfloat16})
    a, b = (torch.ones(*size, dtype=torch.bfloat16) for size in ((2048, 16384), (2048, 64)))
    matmul.mm(a.t(), b)
    return peak_bytes(lambda: matmul.mm(a.t(), b))


@pytest.mark.parametrize("by", ["native"], indirect=True)
def test_packs_a_part_of_an_operand():
    packed, of_a_thread = 2 << 20, (2048 * 64 + 4096 * 64) * 4  # a panel, and the sums of a task's rows
    bound = 16384 * 64 * 2 + packed + torch.get_num_threads() * of_a_thread + (2 << 20)
    assert run_in_child(peak_of_a_transposed_operand) <= bound < 2048 * 16384 * 2 / 4


def test_what_does_not_fit_is_refused(monkeypatch):
    monkeypatch.setattr(matmul, "SLOW_DTYPES", frozenset({torch.bfloat16}))
    a, b, c = operands(3, 5, 6, torch.bfloat16)
    for arguments, out in (((a, b[:4]), None), ((a, b.half()), None), ((a, b), c[:2])):
        with pytest.raises(RuntimeError, match="a, b, out: expected"):
            matmul.mm(*arguments, out=out)


def test_where_new_tensors_go_by_default_does_not_matter():
    a, b, _ = operands(20, 30, 40, torch.bfloat16)
    with torch.device("meta"):
        assert matmul.mm(a, b).device.type == "cpu"


def test_slow_dtypes_are_those_without_onednn(monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: True)
    assert matmul._slow_dtypes() == {torch.bfloat16}
