"""optim.AdamW: options, parameters, gradients and lists of its operator that are refused, and named."""

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

from memkernels import optim, quant
from memkernels.optim import codes

every_width = pytest.mark.parametrize("bits", [32, 16, 8, 4])
BAD = [
    ({"state_bits": 7}, ValueError, r"state_bits: expected one of \(32, 16, 8, 4\), got 7"),
    ({"rounding": "nearest"}, ValueError, "rounding: expected one of"),
    ({"seed": 1.5}, ValueError, "seed: expected an integer of 64 bits"),
    ({"lr": -1.0}, ValueError, "lr: expected a number from 0"),
    ({"lr": "big"}, TypeError, "lr: expected a number, got str"),
    ({"lr": torch.ones(2)}, ValueError, "lr: expected a number or a tensor of one element"),
    ({"betas": (0.9, 1.0)}, ValueError, "betas: expected a number from 0.0 to 1.0 exclusively"),
    ({"betas": 0.9}, ValueError, "betas: expected two numbers"),
    ({"eps": -1e-8}, ValueError, "eps: expected"),
    ({"maximize": 2}, TypeError, "maximize: expected True or False, got 2"),
    ({"weight_decay": float("nan")}, ValueError, "weight_decay: expected"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD)
def test_bad_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        optim.AdamW([torch.nn.Parameter(torch.ones(3))], **options)
    optimizer = optim.AdamW([torch.nn.Parameter(torch.ones(3))])
    with pytest.raises(error, match=message):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))], **options})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.ones(3, dtype=torch.complex64), r"weight: expected real numbers, got torch.complex64"),
        (torch.ones(3, dtype=torch.float16), "weight: expected float32 or bfloat16, got torch.float16"),
        (torch.ones(3).to_sparse(), "weight: expected a dense tensor, got torch.sparse_coo"),
    ],
)
def test_bad_parameters_are_named(values, message):
    with pytest.raises(TypeError, match=message):
        optim.AdamW([("bias", torch.nn.Parameter(torch.ones(2))), ("weight", torch.nn.Parameter(values))])
    frozen = torch.nn.Parameter(values, requires_grad=False)
    optim.AdamW([torch.nn.Parameter(torch.ones(2)), frozen])


def test_tensor_subclasses_are_refused_where_they_are_trained():
    quantised = torch.nn.Parameter(quant.quantize_nf4(torch.ones(4, 64)), requires_grad=False)
    optim.AdamW([torch.nn.Parameter(torch.ones(2)), quantised])
    wrapped = TwoTensor(torch.ones(2), torch.ones(2)).requires_grad_()
    with pytest.raises(TypeError, match=r"params\[0\]: expected a plain tensor, got TwoTensor"):
        optim.AdamW([wrapped])


def test_parameters_on_several_devices_are_refused():
    with pytest.raises(ValueError, match=r"params\[1\]: expected device cpu, that of params\[0\], got meta"):
        optim.AdamW([torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2, device="meta"))])


def test_bad_gradients_and_arguments_of_a_step_change_nothing():
    embedding, other = torch.nn.Embedding(5, 3, sparse=True), torch.nn.Parameter(torch.ones(2))
    optimizer = optim.AdamW([other, *embedding.parameters()])
    embedding(torch.tensor([1])).sum().backward()
    other.grad = torch.ones(2)
    with pytest.raises(TypeError, match=r"the gradient of params\[1\]: expected a dense tensor, got torch.sparse_coo"):
        optimizer.step()
    with pytest.raises(ValueError, match="max_norm: expected"):
        optimizer.step(max_norm=0.0)
    with pytest.raises(ValueError, match="loss_scale: expected"):
        optimizer.step(loss_scale=-1.0)
    assert torch.equal(other, torch.ones(2)) and not optimizer.state


@every_width
def test_operator_passes_opcheck_and_refuses_what_does_not_fit(bits):
    param = torch.ones(300)
    moments, absmax = zip(*(codes.new_moment(param, bits) for _ in range(2)), strict=True)
    absmax = [a for a in absmax if a is not None]
    arguments = [
        [param],
        [torch.ones(300)],
        list(moments),
        absmax,
        [],
        [1],
        [0],
        [0],
        0,
        bits,
        1.0,
        torch.ones(()),
        torch.ones(()),
        0.1,
        0.9,
        0.99,
        1e-8,
        0.0,
    ]
    torch.library.opcheck(torch.ops.memkernels.adamw_.default, tuple(arguments))
    for at, wrong, message in (
        (0, [torch.ones(300).double()], r"params\[0\]: expected float32 or bfloat16"),
        (1, [torch.ones(299)], r"grads\[0\]: expected 300 contiguous elements"),
        (1, [torch.ones(600)[::2]], r"grads\[0\]: expected 300 contiguous elements"),
        (2, [moments[0], moments[1][:-1]], r"moments\[1\]: expected"),
        (2, moments[:1], "moments: expected 2 for 1 parameters, got 1"),
        (4, [torch.ones(300, dtype=torch.int16)], r"remainders\[0\]: a float32 parameter has none"),
        (7, [-256], r"origins\[0\]: expected a multiple of (256|1) from 0 on, got -256"),
        (9, 5, "state_bits: expected 32, 16, 8 or 4, got 5"),
        (11, torch.ones(2), "grad_factor: expected one element, got 2"),
        (11, torch.ones((), dtype=torch.float64), "grad_factor: expected dtype Float, got Double"),
        (12, torch.ones(2), "lr_factor: expected one element, got 2"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.memkernels.adamw_(*arguments[:at], wrong, *arguments[at + 1 :])
