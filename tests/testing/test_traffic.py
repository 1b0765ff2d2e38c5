"""memkernels.testing.traffic: what it counts of kernels whose traffic is known beforehand."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton
import triton.language as tl

from memkernels.testing.cases import KernelCase
from memkernels.testing.traffic import count_case, count_traffic

pytestmark = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="counts under Triton's interpreter: set TRITON_INTERPRET=1"
)


@triton.jit
def _copy_kernel(x_ptr, y_ptr, size, BLOCK_N: tl.constexpr):
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tl.store(y_ptr + columns, tl.load(x_ptr + columns, mask=columns < size), mask=columns < size)


@triton.jit
def _unmasked_sum_kernel(x_ptr, y_ptr, BLOCK_N: tl.constexpr):
    tl.store(y_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, BLOCK_N))))


@triton.jit
def _row_mask_kernel(x_ptr, y_ptr, size):
    rows, columns = tl.arange(0, 8), tl.arange(0, 16)
    x = tl.load(x_ptr + rows[:, None] * 16 + columns[None, :], mask=rows[:, None] < size, other=0.0)
    tl.store(y_ptr + rows, tl.sum(x, axis=1), mask=rows < size)


@triton.jit
def _descriptor_kernel(x_ptr, y_ptr, rows, size):
    x = tl.make_tensor_descriptor(x_ptr, [rows, size], [size, 1], [8, 16])
    y = tl.make_tensor_descriptor(y_ptr, [rows, size], [size, 1], [8, 16])
    y.store([0, 0], x.load([0, 0]))


@triton.jit
def _block_pointer_kernel(x_ptr, y_ptr, size):
    x = tl.make_block_ptr(x_ptr, (size,), (1,), (0,), (16,), (0,))
    y = tl.make_block_ptr(y_ptr, (size,), (1,), (0,), (16,), (0,))
    tl.store(y, tl.load(x, boundary_check=(0,)), boundary_check=(0,))


@triton.jit
def _atomic_kernel(x_ptr, lock_ptr, size):
    columns = tl.arange(0, 16)
    tl.atomic_add(x_ptr + columns, 1.0, mask=columns < size)
    tl.atomic_cas(lock_ptr, 0, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.int64, torch.bool], ids=str)
def test_masked_lanes_do_not_count(dtype):
    x, y = torch.ones(100, dtype=dtype), torch.zeros(100, dtype=dtype)
    with count_traffic() as traffic:
        _copy_kernel[(4,)](x, y, 100, BLOCK_N=32)
    assert torch.equal(x, y)
    assert traffic.read_bytes == traffic.written_bytes == 100 * dtype.itemsize


def test_unmasked_and_scalar():
    x, y = torch.ones(64, dtype=torch.float16), torch.zeros(1)
    with count_traffic() as traffic:
        _unmasked_sum_kernel[(1,)](x, y, BLOCK_N=64)
    assert y.item() == 64
    assert (traffic.read_bytes, traffic.written_bytes) == (128, 4)


def test_a_broadcast_mask_counts_every_lane():
    with count_traffic() as traffic:
        _row_mask_kernel[(1,)](torch.ones(8, 16), torch.zeros(8), 5)
    assert (traffic.read_bytes, traffic.written_bytes) == (5 * 16 * 4, 5 * 4)


def test_tensor_descriptors_stop_at_the_edge():
    with count_traffic() as traffic:
        _descriptor_kernel[(1,)](torch.ones(5, 12), torch.zeros(5, 12), 5, 12)
    assert traffic.read_bytes == traffic.written_bytes == 5 * 12 * 4


@pytest.mark.filterwarnings("ignore:tl.make_block_ptr is deprecated")
def test_block_pointers_stop_at_the_edge():
    with count_traffic() as traffic:
        _block_pointer_kernel[(1,)](torch.ones(11), torch.zeros(11), 11)
    assert traffic.read_bytes == traffic.written_bytes == 11 * 4


def test_an_atomic_reads_and_writes():
    x, lock = torch.zeros(16), torch.zeros(1, dtype=torch.int32)
    with count_traffic() as traffic:
        _atomic_kernel[(1,)](x, lock, 10)
    assert x.sum() == 10 and lock.item() == 1
    assert traffic.read_bytes == traffic.written_bytes == 10 * 4 + 4


def test_every_program_and_launch_counts_until_the_end():
    x, y = torch.ones(16), torch.zeros(16)
    with count_traffic() as traffic:
        _copy_kernel[(3,)](x, y, 16, BLOCK_N=16)
        _copy_kernel[(1,)](x, y, 16, BLOCK_N=16)
    _copy_kernel[(1,)](x, y, 16, BLOCK_N=16)
    assert traffic.read_bytes == 2 * 64


def test_the_ratio_of_a_case():
    def launch_twice(device):
        x, y = torch.ones(16, device=device), torch.zeros(16, device=device)
        for _ in range(2):
            _copy_kernel[(1,)](x, y, 16, BLOCK_N=16)
        return x, y

    traffic = count_case(KernelCase("copied twice", launch_twice))
    assert traffic.least_bytes == 128 and traffic.ratio == 2.0


def test_a_case_without_a_launch_is_refused():
    with pytest.raises(RuntimeError, match="no interpreted kernel"):
        count_case(KernelCase("idle", lambda device: (torch.ones(1),)))
