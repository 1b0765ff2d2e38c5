"""The optimizers on DTensors by themselves, however they are divided, against one process."""

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

from memkernels import optim
from memkernels.optim.codes import BLOCK_SIZE


def normal(shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def elements_of(parameter):
    """The indices, among all elements, of those that this rank has."""
    every = torch.arange(parameter.numel()).view(parameter.shape)
    return distribute_tensor(every, parameter.device_mesh, parameter.placements).to_local().reshape(-1)


def codes_of(state, key, bits):
    codes = state[key]
    return codes if bits == 8 else torch.stack([codes >> 4, codes & 15], dim=1).view(-1)


def assert_states_of_one_process(divided, whole, parameters, wholes, bits):
    for parameter, of_whole in zip(parameters, wholes, strict=True):
        here, own, expected = elements_of(parameter), divided.state[parameter], whole.state[of_whole]
        for key in (key for key in expected if f"{key}_absmax" in expected):
            codes = codes_of(own, key, bits)[: len(here)]
            assert torch.equal(codes, codes_of(expected, key, bits)[here]), (tuple(parameter.shape), key)
            blocks = here[:: BLOCK_SIZE[bits]] // BLOCK_SIZE[bits]
            assert torch.equal(own[f"{key}_absmax"], expected[f"{key}_absmax"][blocks])
        assert torch.equal(parameter.detach().to_local().reshape(-1), of_whole.detach().reshape(-1)[here])


STEPS = [
    (optim.AdamW, {"lr": 1e-2}),
    (optim.Lion, {"lr": 1e-2}),
    (optim.SGD, {"lr": 1e-2, "momentum": 0.9}),
]


def blocks_of_one_process():
    """Rows that fall to the ranks evenly and not, one dimension, fewer rows than ranks, columns, and copies."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    cases = [
        ((6, 256), Shard(0)), ((7, 512), Shard(0)), ((11, 3, 256), Shard(0)), ((24, 64), Shard(0)), ((1536,), Shard(0)),
        ((1535,), Shard(0)), ((2, 768), Shard(0)), ((1, 300), Shard(0)), ((5, 1536), Shard(1)), ((3, 77), Replicate()),
    ]  # fmt: skip
    for cls, options in STEPS:
        for bits in (8, 4):
            wholes = [torch.nn.Parameter(normal(shape, i)) for i, (shape, _) in enumerate(cases)]
            parameters = [
                torch.nn.Parameter(distribute_tensor(whole.detach(), mesh, [placement]))
                for whole, (_, placement) in zip(wholes, cases, strict=True)
            ]
            step_alike(parameters, wholes, cls, state_bits=bits, **options)


def step_alike(parameters, wholes, cls, **options):
    """Steps with the same gradients, after which states and values are the same."""
    divided, whole = cls(parameters, **options), cls(wholes, **options)
    for step in range(3):
        for i, (parameter, of_whole) in enumerate(zip(parameters, wholes, strict=True)):
            of_whole.grad = normal(of_whole.shape, 100 * step + i, of_whole.dtype)
            parameter.grad = distribute_tensor(of_whole.grad, parameter.device_mesh, parameter.placements)
        divided.step()
        whole.step()
    assert_states_of_one_process(divided, whole, parameters, wholes, options["state_bits"])


def fully_sharded_blocks():
    """FSDP2's rows of bfloat16, random bits and master weights too."""
    for rounding in ("stochastic", "remainder"):
        models = [torch.nn.Sequential(torch.nn.Linear(256, 9), torch.nn.Linear(512, 1)).bfloat16() for _ in range(2)]
        for model in models:
            model[0].bias = model[1].bias = None
            for i, parameter in enumerate(model.parameters()):
                parameter.data = normal(parameter.shape, i, torch.bfloat16)
        fully_shard(models[0])
        lists = [list(model.parameters()) for model in models]
        step_alike(*lists, optim.AdamW, lr=1e-2, state_bits=8, rounding=rounding)


def within_blocks():
    """Every rank refuses what one would cut within a block, by name, and before it has stepped anything."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def parameter(shape, placement, trained=True):
        tensor = distribute_tensor(normal(shape, 0), mesh, [placement])
        return torch.nn.Parameter(tensor, requires_grad=trained)

    fits = parameter((6, 256), Shard(0))
    for shape, placement in (
        ((6, 100), Shard(0)), ((500,), Shard(0)), ((1, 3, 100), Shard(2)), ((2, 100), Shard(0)), ((4, 300), Shard(1)),
        ((4, 3 * 256 * 2 + 1), Shard(1)),
    ):  # fmt: skip
        for bits in (8, 4):
            named = [("fits", fits), ("cut", parameter(shape, placement))]
            with pytest.raises(
                ValueError, match="state_bits: expected 32 or 16 for cut, of which the ranks' parts begin"
            ):
                optim.AdamW(named, state_bits=bits)
        optim.AdamW(named, state_bits=16)
        optim.SGD(named, lr=0.1, state_bits=8)  # without a moment
        optim.AdamW([{"params": [fits], "state_bits": 4}, {"params": [named[1][1]]}])
    frozen = parameter((6, 100), Shard(0), trained=False)
    optimizer = optim.AdamW([frozen, fits], state_bits=8)
    frozen.requires_grad_(True)
    frozen.grad = torch.ones_like(frozen)
    with pytest.raises(ValueError, match=r"state_bits: expected 32 or 16 for params\[0\]"):
        optimizer.step()
    assert torch.equal(frozen.full_tensor(), normal((6, 100), 0))
    sums = torch.nn.Parameter(DTensor.from_local(torch.ones(4, 256), mesh, [Partial()]))
    with pytest.raises(
        TypeError, match=r"params\[0\]: expected a DTensor of values, got one of which ranks have partial"
    ):
        optim.AdamW([sums])


def columns_first():
    """Random bits are those of elements in the order of dimensions, whatever the strides."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = torch.nn.Parameter(normal((30, 70), 0, torch.bfloat16).t())
    divided = torch.nn.Parameter(distribute_tensor(whole.detach(), mesh, [Shard(0)]))
    assert divided.stride() == (1, 70)
    step_alike([divided], [whole], optim.AdamW, lr=1e-2, state_bits=16)


def every_division():
    blocks_of_one_process()
    fully_sharded_blocks()
    within_blocks()
    columns_first()


@pytest.mark.parametrize("ranks", [2, 3])
def test_divided_parameters_have_the_blocks_and_random_bits_of_one_process(ranks, tmp_path):
    run_ranks(every_division, ranks, tmp_path, seconds=120)


def tensor_parallel():
    """Partial sums of gradients, and FSDP2 within tensor parallelism: values and norm are those of one process."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
    tensor_mesh, rank = mesh["model"], mesh.get_local_rank("model")
    ids = normal((2, 4, 16), 5)
    for sharded, in_backward in ((False, False), (False, True), (True, False)):
        models = [parallel_model(), parallel_model()]
        plan = {
            "0": SequenceParallel(),
            "1": ColwiseParallel(input_layouts=Shard(1)),
            "2": RowwiseParallel(output_layouts=Shard(1)),
        }
        parallelize_module(models[0], tensor_mesh, plan)
        if sharded:
            fully_shard(models[0], mesh=mesh["data"])
        inputs = (ids.chunk(2, 1)[rank], ids)
        norms = []
        for model, x in zip(models, inputs, strict=True):
            options = {"lr": 1e-2, "eps": 1e-4}
            if in_backward:
                stepper = optim.step_in_backward(model, optim.AdamW, max_norm=1.0, **options)
            else:
                stepper = optim.AdamW(model.parameters(), **options)
            for _ in range(3):
                loss = model(x).square().sum()
                if in_backward:
                    stepper.backward(loss)
                else:
                    loss.backward()
                    stepper.step(max_norm=1.0)
                    stepper.zero_grad()
            norms.append(stepper.grad_norm.item())
        assert norms[0] == pytest.approx(norms[1], rel=1e-6)
        for (name, own), value in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
            difference = (own.full_tensor() - value).norm() / value.norm()
            assert difference <= 1e-6, (name, difference)


def parallel_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.LayerNorm(16), torch.nn.Linear(16, 32), torch.nn.Linear(32, 16))


def test_tensor_parallel_gradients_and_their_norm_are_those_of_one_process(tmp_path):
    run_ranks(tensor_parallel, 4, tmp_path, seconds=120)
