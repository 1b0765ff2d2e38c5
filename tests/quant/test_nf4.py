"""NF4 and int8 storage: bit for bit against bitsandbytes, every instruction set, and what a quantised tensor can do."""

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memkernels import quant
from memkernels.quant import operators, reference
from memkernels.testing import implementations, poisoned_memory

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
on_every_implementation = pytest.mark.parametrize("implementation", implementations("nf4_quantize"), ids=str)


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def edges():
    """Every midpoint between two codes, with its neighbours, in blocks whose absmax is 1."""
    code = torch.tensor(reference.NF4_VALUES)
    middle = (code[:-1] + code[1:]) / 2
    near = [middle, torch.nextafter(middle, torch.tensor(2.0)), torch.nextafter(middle, torch.tensor(-2.0))]
    return torch.nn.functional.pad(torch.cat([*near, code]), (0, 3), value=1.0)


@on_every_implementation
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("size", "block_size"), [(1 << 18, 64), (100003, 128), (33, 32), (12289, 4096), (1, 64)])
def test_codes_and_absmax_are_those_of_bitsandbytes(implementation, dtype, size, block_size):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    values = normal(size, dtype=dtype)
    values[: min(size, block_size)] = 0
    packed, state = bitsandbytes.functional.quantize_4bit(values, blocksize=block_size, quant_type="nf4")
    with implementation.active() as device, poisoned_memory():
        ours = operators.nf4_quantize(values.to(device), block_size)
        out = torch.empty(1, size, dtype=dtype, device=device)
        operators.nf4_dequantize_(out, ours, block_size, size, 0, 0)
    assert torch.equal(ours[0].cpu(), packed.view(-1)) and torch.equal(ours[1].cpu(), state.absmax)
    whole = bitsandbytes.functional.dequantize_4bit(packed, state).view(-1)
    assert torch.equal(out.view(-1).cpu(), whole)


@on_every_implementation
def test_ties_go_to_the_lower_code(implementation):
    with implementation.active() as device:
        packed, absmax = operators.nf4_quantize(edges().to(device), 64)
    expected = reference.nf4_quantize(edges(), 64)
    assert torch.equal(packed.cpu(), expected[0]) and torch.equal(absmax.cpu(), torch.ones(1))


@on_every_implementation
@pytest.mark.parametrize("size", [1, 255, 256, 700, 5000])
def test_nested_codes_are_those_of_the_reference(implementation, size):
    code = reference.nested_code()
    middle = (code[:-1] + code[1:]) / 2
    # Ties too, in the first block, whose absmax is 1.
    absmax = torch.cat([middle, torch.ones(1), 3 * normal(size)])[:size]
    for offset in (torch.zeros(()), absmax.mean()):
        with implementation.active() as device, poisoned_memory():
            ours = operators.nf4_quantize_absmax(absmax.to(device), offset.to(device), code.to(device))
        expected = reference.quantize_blocks(absmax - offset, code, 256)
        assert torch.equal(ours[0].cpu(), expected[0]) and torch.equal(ours[1].cpu(), expected[1])


def test_finite_values_whose_mean_overflows_are_taken():
    values = torch.full((4, 64), 3e38)
    assert torch.equal(quant.quantize_nf4(values, double_quant=False).dequantize(), values)


def test_nested_absmax_is_that_of_bitsandbytes():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    values = normal(1000, 640)
    tensor, absmax = quant.quantize_nf4(values), reference.nf4_quantize(values, 64)[1]
    assert torch.equal(tensor.nested_code, bitsandbytes.functional.create_dynamic_map())
    assert torch.equal(tensor.offset, absmax.mean())
    # Its CPU kernel looks up v / absmax rounded to 65,536 steps; its implementation for any device takes the nearest.
    quantize = torch.ops.bitsandbytes.quantize_blockwise.default
    any_device = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)
    codes, nested = quantize.redispatch(any_device, absmax - absmax.mean(), tensor.nested_code, 256)
    assert torch.equal(tensor.absmax, codes) and torch.equal(tensor.nested_absmax, nested)
    _, state = bitsandbytes.functional.quantize_4bit(values, quant_type="nf4", compress_statistics=True)
    assert torch.equal(tensor.nested_absmax, state.state2.absmax)
    assert (tensor.absmax != state.absmax).double().mean() < 0.01


@on_every_implementation
@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 9), row_size=st.integers(1, 200), block_size=st.sampled_from([32, 64, 128]),
       nested=st.booleans(), dtype=st.sampled_from(DTYPES), data=st.data())  # fmt: skip
def test_any_rectangle(implementation, rows, row_size, block_size, nested, dtype, data):
    first_row, first_column = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, row_size - 1))
    tensor = quant.quantize_nf4(normal(rows, row_size, dtype=dtype), block_size, nested)
    whole = torch.empty(rows, row_size, dtype=dtype)
    reference.nf4_dequantize_(whole, *tensor.parts, *[None] * (5 - len(tensor.parts)), block_size, row_size, 0, 0)
    with implementation.active() as device:
        out = torch.full((rows - first_row, row_size - first_column), torch.nan, dtype=dtype, device=device)
        tensor.to(device).encoding.decode_(out, tensor.to(device).parts, first_row, first_column)
    assert torch.equal(out.cpu(), whole[first_row:, first_column:])


@on_every_implementation
def test_rows_of_several_nested_blocks(implementation):
    tensor = quant.quantize_nf4(normal(300, 64), 32)
    whole, out = torch.empty(300, 64), torch.empty(120, 64)
    reference.nf4_dequantize_(whole, *tensor.parts, 32, 64, 0, 0)
    with implementation.active() as device:
        out = out.to(device)
        tensor.encoding.decode_(out, tensor.to(device).parts, 180, 0)
    assert torch.equal(out.cpu(), whole[180:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8_is_that_of_bitsandbytes(dtype):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    values = normal(70, 60, dtype=torch.float16).to(dtype)
    codes, absmax, _ = bitsandbytes.functional.int8_vectorwise_quant(values.half())
    tensor = quant.quantize_int8(values)
    assert torch.equal(tensor.absmax, absmax)
    # It rounds the scale's product to float16 first, which moves what lies near a tie.
    assert (tensor.codes.int() - codes.int()).abs().max() <= 1
    step = (absmax / 127)[:, None]
    # Half a step, and the float32 roundings of up to 127 of them.
    assert ((tensor.dequantize(torch.float64) - values.double()).abs() <= step * (0.5 + 127 * 2**-22)).all()
    assert torch.equal(quant.quantize_int8(torch.zeros(3, 4)).dequantize(), torch.zeros(3, 4))


@pytest.fixture(params=["nf4", "nf4-float-absmax", "int8"])
def quantize(request):
    return {
        "nf4": quant.quantize_nf4,
        "nf4-float-absmax": lambda values: quant.quantize_nf4(values, double_quant=False),
        "int8": quant.quantize_int8,
    }[request.param]


def layer(quantize, rows=96, columns=128):
    linear = torch.nn.Linear(columns, rows)
    linear.weight = torch.nn.Parameter(quantize(normal(rows, columns)), requires_grad=False)
    return linear


def test_to_changes_the_dtype_of_values_and_no_storage(quantize):
    linear = layer(quantize)
    before = linear.weight.dequantize()
    parts = linear.weight.parts
    linear.to(torch.bfloat16)
    assert linear.weight.dtype == torch.bfloat16 and linear.weight.dequantize().dtype == torch.bfloat16
    assert all(a is b or a.data_ptr() == b.data_ptr() for a, b in zip(parts, linear.weight.parts, strict=True))
    assert torch.equal(linear.weight.dequantize(), before.bfloat16())
    assert isinstance(linear.weight, torch.nn.Parameter)
    assert linear.to("meta").weight.parts[0].is_meta


def test_state_dict_pickle_and_copies(quantize):
    linear, other = layer(quantize), torch.nn.Linear(128, 96)
    stream = io.BytesIO()
    torch.save(linear.state_dict(), stream)
    stream.seek(0)
    other.load_state_dict(torch.load(stream), assign=True)
    for again in (other, copy.deepcopy(linear)):
        assert type(again.weight) is type(linear.weight) and torch.equal(
            again.weight.dequantize(), linear.weight.dequantize()
        )
        assert again.weight.parts[0].data_ptr() != linear.weight.parts[0].data_ptr()
    linear.load_state_dict({"weight": torch.ones(96, 128), "bias": torch.zeros(96)})
    assert torch.equal(linear.weight.dequantize(), torch.ones(96, 128))
    linear.load_state_dict(other.state_dict())
    assert torch.equal(linear.weight.dequantize(), other.weight.dequantize())


def test_slices_of_rows_have_the_same_values(quantize):
    tensor = quantize(normal(96, 128))
    whole = tensor.dequantize()
    assert torch.equal(tensor[8:72].dequantize(), whole[8:72])
    assert torch.equal(torch.cat([part.dequantize() for part in tensor.split(24)]), whole)
    wide = quantize(normal(64, 4096))
    assert torch.equal(wide[16:].dequantize(), wide.dequantize()[16:])
    assert wide[16:].parts[0].untyped_storage().data_ptr() == wide.parts[0].untyped_storage().data_ptr()
    with pytest.raises(NotImplementedError, match="a number of ranks that divides"):
        tensor.chunk(5)
    with pytest.raises(NotImplementedError, match="dequantize"):
        tensor + 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.ones(4, 64).double(),), TypeError, "weight: expected float32"),
        ((torch.ones(4, 64).int(),), TypeError, "weight: expected float32"),
        (([1.0],), TypeError, "weight: expected a tensor"),
        ((torch.ones(()),), ValueError, "weight: expected at least one dimension"),
        ((torch.full((4, 64), torch.nan),), ValueError, "weight: expected finite"),
        ((torch.full((4, 64), torch.inf),), ValueError, "weight: expected finite"),
        ((torch.ones(4, 64), 48), ValueError, "block_size: expected one of"),
    ],
)
def test_bad_input_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        quant.quantize_nf4(*arguments)
    if len(arguments) == 1:
        with pytest.raises(error, match=message):
            quant.quantize_int8(*arguments)


@on_every_implementation
def test_operators_pass_opcheck(implementation):
    tensor = quant.quantize_nf4(normal(8, 64))
    with implementation.active() as device:
        torch.library.opcheck(torch.ops.memkernels.nf4_quantize.default, (normal(8, 64).to(device), 64))
        parts = tensor.to(device).parts
        absmax = (torch.ones(5, device=device), torch.zeros((), device=device), parts[3])
        torch.library.opcheck(torch.ops.memkernels.nf4_quantize_absmax.default, absmax)
        out = torch.empty(8, 64, device=device)
        torch.library.opcheck(torch.ops.memkernels.nf4_dequantize_.default, (out, *parts, 64, 64, 0, 0))
        with pytest.raises(RuntimeError, match="outside of what packed and absmax hold"):
            torch.ops.memkernels.nf4_dequantize_(out, *parts, 64, 64, 1, 0)
