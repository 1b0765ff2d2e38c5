"""Adapters of experts on several ranks in PEFT's files: those of one process, and the part of each rank."""

import pytest
import torch
import torch.distributed as dist
from adapted_models import randomise
from ranks import run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import memkernels
from memkernels import nn, quant
from memkernels.nn.expert_mesh import held

D, N, E = 24, 20, 6
WEIGHTS = ("gate_up_proj", "down_proj")


class Block(torch.nn.Module):
    def __init__(self, mesh=None, quantize=None):
        super().__init__()
        torch.manual_seed(0)
        self.into = torch.nn.Linear(D, D)
        self.moe = nn.MoE(nn.TopKRouter(D, E, 2), D, N, expert_mesh=mesh)
        if quantize is not None:
            for name in WEIGHTS:
                weight = quantize(held(getattr(self.moe, name), mesh).detach())
                setattr(self.moe, name, torch.nn.Parameter(weight, requires_grad=False))

    def forward(self, x):
        return self.moe(self.into(x))[0]


def adapted():
    model = Block()
    memkernels.lora(model, 3, 5.0, 0.0, ["into"])
    model.moe.adapt(3, alpha=7.0)
    return randomise(model, 0.3)


def files(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def there_and_back(folder):
    mesh, x = init_device_mesh("cpu", (2,)), torch.randn(9, D, generator=torch.Generator().manual_seed(1))
    whole, model = adapted(), Block(mesh)
    if dist.get_rank() == 0:
        memkernels.save_adapter(whole, folder / "whole")
    dist.barrier()
    names = memkernels.load_adapter(model, folder / "whole")
    assert names == ["into", "moe.gate_up_proj", "moe.down_proj"]
    assert all(of.requires_grad == ("lora_" in name) for name, of in model.named_parameters())
    torch.testing.assert_close(model(x), whole(x))
    memkernels.save_adapter(model, folder / "ranks")
    assert files(folder / "ranks") == files(folder / "whole")
    with torch.no_grad():
        for factor in model.moe.adapters.parameters():
            factor.zero_()
    memkernels.load_adapter(model, folder / "ranks")
    torch.testing.assert_close(model(x), whole(x))
    for quantize in (quant.quantize_nf4, quant.quantize_int8):
        model, single = Block(mesh, quantize), Block(None, quantize)
        for each in (model, single):
            memkernels.load_adapter(each, folder / "ranks")
        if quantize is quant.quantize_int8:  # NF4's nested absolute maxima are those of a rank
            torch.testing.assert_close(model(x), single(x))
        memkernels.save_adapter(model, folder / "quantised")
        assert files(folder / "quantised") == files(folder / "whole")
        merge_and_unmerge(model, single, x)
    model, single = Block(mesh), Block()
    for each in (model, single):
        memkernels.load_adapter(each, folder / "ranks")
    merge_and_unmerge(model, single, x)
    refusals(mesh, model, folder)


def merge_and_unmerge(model, single, x):
    """Of experts on several ranks: the weights of one process, and what was there before."""
    expected, before = model(x), {name: getattr(model.moe, name).detach().clone() for name in WEIGHTS}
    for each in (model, single):
        memkernels.merge_adapter(each)
    torch.testing.assert_close(model(x), expected)
    for name in WEIGHTS:
        merged = getattr(model.moe, name)
        assert isinstance(merged, DTensor) and merged.shape[0] == E and not merged.requires_grad
        if not isinstance(before[name], quant.NF4Tensor):  # whose nested absolute maxima are those of a rank
            assert torch.equal(merged.full_tensor(), getattr(single.moe, name))
    with pytest.raises(ValueError, match=r"into: LoRALinear: it is merged already"):
        memkernels.merge_adapter(model)
    memkernels.unmerge_adapter(model)
    for name, weight in before.items():
        after = getattr(model.moe, name)
        if isinstance(weight, quant.QuantizedTensor):
            assert all(torch.equal(*parts) for parts in zip(after.parts, weight.parts, strict=True))
        else:
            torch.testing.assert_close(after, weight)
    torch.testing.assert_close(model(x), expected)


def refusals(mesh, model, folder):
    (folder / "file").touch()
    first = dist.get_rank() == 0
    error, message = (NotADirectoryError, "file") if first else (ValueError, "rank 0: NotADirectoryError: .*file")
    with pytest.raises(error, match=message):
        memkernels.save_adapter(model, folder / "file" / "within")
    before = {name: held(of, mesh).clone() for name, of in model.state_dict().items()}
    factor = held(model.moe.adapters["down_proj"].lora_B.detach(), mesh)
    kept = factor.clone()
    message = r"moe\.down_proj: lora_B: expected finite numbers"
    if not first:
        factor[0] = torch.inf
    with pytest.raises(ValueError, match=f"^{message}" if not first else f"^rank 1: ValueError: {message}"):
        memkernels.merge_adapter(model)
    factor.copy_(kept)
    assert all(torch.equal(held(of, mesh), before[name]) for name, of in model.state_dict().items())
    with pytest.raises(ValueError, match=r"into: its adapter is not merged"):
        memkernels.unmerge_adapter(model)
    other = Block(mesh)
    with pytest.raises(ValueError, match=r"moe\.down_proj carries no adapter: .* which nn\.MoE\.adapt gives adapters"):
        memkernels.lora(other, targets=["into"], dropout=0.0, target_parameters=["down_proj"])
    assert not hasattr(other.into, "lora_A")


def test_adapters_of_experts_on_several_ranks(tmp_path):
    run_ranks(there_and_back, 2, tmp_path, tmp_path)
