"""Experts on several ranks, 2 and 4 gloo processes, against one process that has all experts and all tokens."""

import time
from datetime import timedelta
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from experts import adapter_inputs, over_flat
from ranks import run_ranks
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from memkernels import nn, ops, quant
from memkernels.ops.moe import parallel
from memkernels.ops.moe.journey import Journey
from memkernels.ops.moe.parallel import start_moe_mlp
from memkernels.ops.moe.projection import DenseExpertsProjection
from memkernels.testing import assert_within_factor_two, poisoned_memory, random_tensor, saved_bytes

D, N, E, K = 16, 12, 8, 3
TOKENS = (13, 0, 7, 22)  # of each rank


def draw(name, *shape, dtype=torch.float32):
    """The same on every rank; without gradient."""
    return random_tensor(*shape, dtype=dtype, seed=sum(map(ord, name))).detach()


def part(mesh, tensor, sizes):
    return tensor.split(sizes)[mesh.get_local_rank()]


def gradients_of(y, dy, inputs):
    leaves = {name: tensor for name, tensor in inputs.items() if tensor.requires_grad}
    grads = torch.autograd.grad(y, leaves.values(), dy, retain_graph=True)
    again = torch.autograd.grad(y, leaves.values(), dy)
    assert all(torch.equal(one, other) for one, other in zip(grads, again, strict=True))
    return dict(zip(leaves, grads, strict=True))


def choices(tokens, experts, nowhere=E):
    """(T, K), or of all experts where these are fewer; some go nowhere."""
    ids = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(experts)).argsort(1)[:, :K]
    ids[::5, 1] = nowhere
    return ids


def as_leaf(tensor):
    return tensor if isinstance(tensor, quant.QuantizedTensor) else tensor.clone().requires_grad_()


def bit_for_bit(
    mesh, dtype, gated, recompute, experts, capacity, autocast=False, num_experts=E, adapted=False, nf4=False
):  # fmt: skip
    """With one process's choices, of so many experts: those of some ranks receive nothing."""
    sizes = TOKENS[: mesh.size()]
    ids = choices(sum(sizes), experts, num_experts)
    plan = ops.moe_plan(part(mesh, ids, sizes), num_experts, capacity=capacity)
    rows = [ops.moe_plan(own, num_experts, capacity=capacity).row_of_pair for own in ids.split(sizes)]
    kept = ids.masked_fill(torch.cat(rows) < 0, num_experts)
    drawn = {
        "x": draw("x", sum(sizes), D, dtype=dtype), "expert_weights": draw("weights", *ids.shape),
        "w_gate_up": draw("gate_up", num_experts, 2 * N if gated else N, D, dtype=dtype),
        "w_down": draw("down", num_experts, D, N, dtype=dtype),
    }  # fmt: skip
    if adapted:
        drawn = adapter_inputs(drawn, 2, torch.float32)
    if nf4:
        drawn |= {name: quant.quantize_nf4(drawn[name]) for name in ("w_gate_up", "w_down")}
    of_rank = {name: sizes if name in ("x", "expert_weights") else num_experts // mesh.size() for name in drawn}
    whole = {name: as_leaf(tensor.detach()) for name, tensor in drawn.items()}
    own = {name: as_leaf(part(mesh, tensor.detach(), of_rank[name])) for name, tensor in drawn.items()}
    dy = draw("dy", sum(sizes), D, dtype=torch.bfloat16 if autocast else dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = over_flat(ops.moe_mlp, expert_ids=kept, recompute=recompute)(**whole)
    with poisoned_memory():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            start = over_flat(start_moe_mlp, plan=plan, group=mesh.get_group(), recompute=recompute)
            y = start(**own).finish()
        actual = gradients_of(y, part(mesh, dy, sizes), own)
    assert y.dtype == (torch.bfloat16 if autocast else dtype) and torch.equal(y, part(mesh, expected, sizes))
    for name, grad in gradients_of(expected, dy, whole).items():
        assert torch.equal(actual[name], part(mesh, grad, of_rank[name])), name


def make_layer(router, mesh=None, adapted=False):
    torch.manual_seed(3)
    if router is nn.SwitchRouter:
        layer = nn.SwitchFFN(D, N, E, jitter=0.0, capacity_factor=0.8, expert_mesh=mesh)
    else:
        made = router(D, E) if router is nn.ExpertChoiceRouter else router(D, E, K)
        layer = nn.MoE(made, D, N, shared=nn.GatedMLP(D, N), expert_mesh=mesh)
    if adapted:
        adapt(layer)
    return layer


def adapt(layer):
    torch.manual_seed(4)
    layer.adapt(2, alpha=3.0)
    factors = {f"adapters.{of}.lora_B": draw(of, *own.lora_B.shape) for of, own in layer.adapters.items()}
    layer.load_state_dict(factors, strict=False)


def step(layer, x, dy):
    x = x.clone().requires_grad_()
    y, routing = layer(x)
    ((y * dy).sum() + routing.load_balance_loss + routing.z_loss).backward()
    return {"y": y.detach(), "x": x.grad, "dropped": routing.plan.dropped}


def gradients(layer):
    return {name: parameter.grad for name, parameter in layer.named_parameters() if parameter.requires_grad}


def alone(router, adapted, mesh, x, dy, sizes, dtype):
    """One process's layer on each rank's tokens in turn: this rank's results, and the parameters' gradients."""
    layer = make_layer(router, adapted=adapted).to(dtype)
    steps = [step(layer, *pair) for pair in zip(x.to(dtype).split(sizes), dy.to(dtype).split(sizes), strict=True)]
    return steps[mesh.get_local_rank()] | gradients(layer)


def layer_equals_one_process(mesh, router, adapted):
    sizes = TOKENS[: mesh.size()]
    x, dy = (draw(name, sum(sizes), D) for name in ("x", "dy"))
    layer = make_layer(router, mesh, adapted)
    actual = step(layer, part(mesh, x, sizes), part(mesh, dy, sizes))
    for name, grad in gradients(layer).items():
        if isinstance(grad, DTensor):
            actual[name] = grad.full_tensor()
        else:
            dist.all_reduce(grad, group=mesh.get_group())
            actual[name] = grad
    exact, plain = (alone(router, adapted, mesh, x, dy, sizes, dtype) for dtype in (torch.float64, torch.float32))
    dropped = [result.pop("dropped") for result in (actual, exact, plain)]
    assert torch.equal(dropped[0], dropped[1])
    assert actual.keys() == exact.keys()
    for name, value in actual.items():
        assert_within_factor_two(name, value, exact[name], plain[name])


def quantized_experts_take_adapters(mesh):
    layers = [make_layer(nn.TopKRouter, of) for of in (mesh, None)]
    for name in ("gate_up_proj", "down_proj"):
        whole = quant.quantize_nf4(getattr(layers[1], name).detach())
        for layer, weight in zip(layers, (part(mesh, whole, E // mesh.size()), whole), strict=True):
            setattr(layer, name, torch.nn.Parameter(weight, requires_grad=False))
    x = draw("x", 9, D)
    for layer in layers:
        adapt(layer)
    torch.testing.assert_close(*(layer(x)[0] for layer in layers))


class Model(torch.nn.Module):
    def __init__(self, mesh=None):
        super().__init__()
        torch.manual_seed(5)
        self.embedding = torch.nn.Linear(D, D)
        self.moe = make_layer(nn.TopKRouter, mesh)

    def forward(self, x):
        return self.moe(self.embedding(x))[0].square().sum()


def train(model, batches, world, wrapped=None):
    """Two steps of clipped AdamW on the mean of the ranks' losses."""
    experts = [p for name, p in model.named_parameters() if name in ("moe.gate_up_proj", "moe.down_proj")]
    others = [p for p in model.parameters() if all(p is not expert for expert in experts)]
    optimizer = torch.optim.AdamW([{"params": experts}, {"params": others}], lr=1e-2, foreach=True)
    for batch in batches:
        optimizer.zero_grad()
        (wrapped or model)(batch).backward()
        for parameter in model.parameters() if wrapped is None else experts:
            parameter.grad.div_(world)
        norms = [torch.nn.utils.get_total_norm([p.grad for p in group]) for group in (experts, others)]
        total = torch.stack([norm.full_tensor() if hasattr(norm, "full_tensor") else norm for norm in norms]).norm()
        for group in (experts, others):
            torch.nn.utils.clip_grads_with_norm_(group, 0.1, total)
        optimizer.step()
    return whole_state(model)


def training_equals_one_process(mesh):
    """Under DistributedDataParallel: the loss curves' end, the parameters, are the same up to rounding."""
    sizes = TOKENS[: mesh.size()]
    batches = [draw(name, sum(sizes), D) for name in ("first", "second")]
    model = Model(mesh)
    data_parallel = torch.nn.parallel.DistributedDataParallel
    data_parallel._set_params_and_buffers_to_ignore_for_model(model, ["moe.gate_up_proj", "moe.down_proj"])
    actual = train(model, [part(mesh, x, sizes) for x in batches], mesh.size(), data_parallel(model))
    expected = train(Model(), batches, mesh.size())
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-6)


def checkpointing_sends_again(mesh):
    layer, x = make_layer(nn.TopKRouter, mesh), draw("x", 9, D).requires_grad_()
    parameters = (x, *layer.parameters())
    expected = torch.autograd.grad(layer(x)[0].square().sum(), parameters)
    y = torch.utils.checkpoint.checkpoint(lambda x: layer(x)[0], x, use_reentrant=False)
    for grad, other in zip(torch.autograd.grad(y.square().sum(), parameters), expected, strict=True):
        assert torch.equal(grad, other)


def padding_and_inference(mesh):
    x, rank = draw("x", 3, 7, D), mesh.get_local_rank()
    padding = torch.arange(21).view(3, 7) % (3 + rank) == 0
    for router in (nn.TopKRouter, nn.SwitchRouter, nn.ExpertChoiceRouter):
        layer, single = make_layer(router, mesh).eval(), make_layer(router).eval()
        with torch.inference_mode():
            torch.testing.assert_close(layer(x, padding)[0], single(x, padding)[0])
            alone = torch.zeros_like(x) if layer.shared is None else layer.shared(x)
            torch.testing.assert_close(layer(x, torch.ones_like(padding))[0], alone)


def tokens_without_a_gradient(mesh):
    """What is not wanted is not sent either."""
    for recompute in (True, False):
        layer, x = make_layer(nn.TopKRouter, mesh), draw("x", 9, D)
        layer.recompute = recompute
        expected = torch.autograd.grad(layer(x.clone().requires_grad_())[0].square().sum(), layer.parameters())
        with mock.patch.object(Journey, "send_back", autospec=True, side_effect=Journey.send_back) as sent_back:
            actual = torch.autograd.grad(layer(x)[0].square().sum(), layer.parameters())
        assert [call.args[1] for call in sent_back.call_args_list] == ["y", "y", "dweights", "dweights"]
        assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


def dropout_is_the_same_in_backward(mesh):
    """y is linear in down_proj: <dy, y> of all ranks is <down_proj, its gradient>, if the masks are the same."""
    torch.manual_seed(mesh.get_local_rank())
    x, dy = (draw(name, 40, D) for name in ("x", "dy"))
    for recompute in (True, False):
        layer = nn.SwitchFFN(D, N, E, jitter=0.0, expert_dropout=0.5, recompute=recompute, expert_mesh=mesh)
        first, second = (layer(x)[0] for _ in range(2))
        assert not torch.equal(first, second)
        (second * dy).sum().backward()
        sums = torch.stack([(second * dy).sum(), (layer.down_proj * layer.down_proj.grad).to_local().sum()]).detach()
        dist.all_reduce(sums, group=mesh.get_group())
        torch.testing.assert_close(sums[0], sums[1], rtol=1e-4, atol=1e-4)


def state_dict_loads_on_any_number_of_ranks(mesh, folder):
    layer, single = (make_layer(nn.TopKRouter, of, adapted=True) for of in (mesh, None))
    same_state(get_model_state_dict(layer, options=StateDictOptions(full_state_dict=True)), single.state_dict())
    checkpoint.save(layer.state_dict(), checkpoint_id=folder)
    zero(layer)
    layer.load_state_dict(single.state_dict())
    same_state(whole_state(layer), single.state_dict())
    fewer = init_device_mesh("cpu", (2, mesh.size() // 2), mesh_dim_names=("copies", "experts"))["experts"]
    other = make_layer(nn.TopKRouter, fewer, adapted=True)
    zero(other)
    state = other.state_dict()
    checkpoint.load(state, checkpoint_id=folder)
    other.load_state_dict(state)
    same_state(whole_state(other), single.state_dict())
    with pytest.raises(RuntimeError, match="size mismatch for gate_up_proj"):
        layer.load_state_dict(single.state_dict() | {"gate_up_proj": single.gate_up_proj[1:]})


def zero(layer):
    for parameter in layer.parameters():
        parameter.data.zero_()


def whole_state(layer):
    return {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in layer.state_dict().items()}


def same_state(actual, expected):
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def ranks_that_differ_are_told_all(mesh):
    rank = mesh.get_local_rank()
    router = nn.TopKRouter(D, E * (1 + rank % 2), K)
    with pytest.raises(ValueError, match="num_experts: the ranks of expert_mesh differ: 8, 16"):
        nn.MoE(router, D, N, expert_mesh=mesh)
    with pytest.raises(ValueError, match="activation: the ranks of expert_mesh differ: silu, nothing"):
        nn.MoE(nn.TopKRouter(D, E, K), D, N, ("silu", "nothing")[rank % 2], expert_mesh=mesh)
    with pytest.raises(ValueError, match="alpha: the ranks of expert_mesh differ: 8, None"):
        make_layer(nn.TopKRouter, mesh).adapt(2, **{"alpha": 8} if rank % 2 == 0 else {})
    with pytest.raises(ValueError, match=r"num_experts: expected a multiple of the \d ranks of expert_mesh, got 7"):
        nn.SwitchFFN(D, N, 7, expert_mesh=mesh)
    layer, x = make_layer(nn.TopKRouter, mesh), draw("x", 4, D)
    with pytest.raises(ValueError, match="differ in whether it needs a gradient: True, False"):
        layer(x.requires_grad_(rank % 2 == 0))
    x.requires_grad_()
    differing = torch.autocast("cpu", torch.bfloat16, enabled=rank % 2 == 0)
    with differing, pytest.raises(ValueError, match=r"differ in its dtype: torch.bfloat16, torch.float32"):
        layer(x)
    for wrong, error in (
        (torch.full_like(x, torch.nan), "logits: expected finite numbers, got NaN"),
        (x[:, :5], r"x: expected shape \(..., 16\)"),
        (x.double(), "w_gate_up: expected torch.float64"),
    ):
        told = error if rank == 1 else "expert_mesh: rank 1 failed before the exchange"
        with pytest.raises((ValueError, TypeError, RuntimeError) if rank == 1 else RuntimeError, match=told):
            layer(wrong if rank == 1 else x)
    layer(x)[0].sum().backward()  # nothing is left over of what failed
    layer.recompute = rank % 2 == 0
    with pytest.raises(ValueError, match="recompute: the ranks of expert_mesh differ in its value: True, False"):
        layer(x)


def what_fails_after_the_exchange_fails_on_all(mesh):
    """In the shared experts, or in one half of the rank's own: then the others get what they wait for first."""
    layer, x = make_layer(nn.TopKRouter, mesh), draw("x", 4, D).requires_grad_()
    fails = mock.Mock(side_effect=MemoryError("no memory for it"))
    second_fails = mock.Mock(side_effect=lambda x, *_, **__: x * 1.0 if second_fails.call_count == 1 else fails())
    for broken in (
        mock.patch.object(layer.shared, "forward", fails), mock.patch.object(parallel, "moe_mlp", fails),
        mock.patch.object(parallel, "moe_mlp", second_fails),
    ):  # fmt: skip
        if mesh.get_local_rank() == 1:
            with broken, pytest.raises(MemoryError, match="no memory for it"):
                layer(x)
        else:
            with pytest.raises(RuntimeError, match="expert_mesh: another rank failed beside the exchange"):
                layer(x)
    layer(x)[0].sum().backward()


# What rank 1 sends to or from the experts' first half, 0, or their second, and what the other ranks have done by then.
HELD_UNTIL = {
    ("x", 1): "experts 0", ("y", 0): "experts 1", ("y", 1): "shared", ("dy", 1): "shared backward",
    ("dy", 0): "experts 1 backward", ("dx", 1): "experts 0 backward",
}  # fmt: skip


def work_is_done_beside_the_exchange(mesh, folder):
    """Rank 1 sends nothing before the others did what needs nothing of it: ranks that waited for it would wait on."""
    rank, store = mesh.get_local_rank(), dist.FileStore(f"{folder}-events")
    layer, x = make_layer(nn.TopKRouter, mesh), draw("x", 20, D).requires_grad_()
    leaves, moe_mlp, shared = (x, *layer.parameters()), parallel.moe_mlp, layer.shared.forward
    expected = layer(x)[0]
    expected = expected, *torch.autograd.grad(expected.sum(), leaves)
    returned, gradients = Journey.take_back, DenseExpertsProjection.add_gradients
    calls, products = [], []

    def done(event):
        store.set(f"{event} {rank}", "done")

    def experts(received, *args, **kwargs):
        event = f"experts {len(calls)}"
        calls.append(event)
        received.register_hook(lambda _: done(f"{event} backward"))
        y = moe_mlp(received, *args, **kwargs)
        done(event)
        return y

    def shared_experts(x):
        y = shared(x)
        done("shared")
        return y

    def take_back(journey, name):
        rows = returned(journey, name)
        done(f"{name} here")
        return rows

    def add_gradients(*args):
        """Of the second half's down and gate_up and the first half's: in front of the last product dx is sent."""
        products.append(args)
        if rank == 1 and len(products) == 4:
            store.wait([f"dx here {other}" for other in range(mesh.size()) if other != 1], timedelta(seconds=120))
        gradients(*args)

    def held(send):
        def call(journey, name, part, rows):
            if rank == 1 and (name, part) in HELD_UNTIL:
                events = [f"{HELD_UNTIL[name, part]} {other}" for other in range(mesh.size()) if other != 1]
                store.wait(events, timedelta(seconds=120))
            send(journey, name, part, rows)

        return call

    with (
        mock.patch.object(Journey, "send", held(Journey.send)),
        mock.patch.object(Journey, "send_back", held(Journey.send_back)),
        mock.patch.object(Journey, "take_back", take_back),
        mock.patch.object(DenseExpertsProjection, "add_gradients", add_gradients),
        mock.patch.object(parallel, "moe_mlp", experts), mock.patch.object(layer.shared, "forward", shared_experts),
    ):  # fmt: skip
        layer.shared.register_full_backward_hook(lambda *_: done("shared backward"))
        y = layer(x)[0]
        actual = y, *torch.autograd.grad(y.sum(), leaves)
    assert calls == ["experts 0", "experts 1"] and len(products) == 4
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


def what_is_kept(mesh):
    """With recompute, of tokens, x alone: the rows that a rank received, as many from each here, are sent again."""
    plan, experts = ops.moe_plan(choices(50, E), E), E // mesh.size()
    x, weights = draw("x", 50, D).requires_grad_(), draw("weights", 50, K)
    w_gate_up, w_down = (draw("w", experts, *shape).requires_grad_() for shape in ((2 * N, D), (D, N)))
    kept = {}
    time.sleep(0.2)
    for recompute in (True, False):

        def forward(recompute=recompute):
            y = start_moe_mlp(x, plan, weights, w_gate_up, w_down, mesh.get_group(), recompute=recompute).finish()
            time.sleep(0.2)  # gloo's threads let go of what they sent a moment after it arrived
            return y

        kept[recompute] = saved_bytes(forward, exclude=(x, weights, *plan[:4], w_gate_up, w_down))
    received = plan.offsets[::experts].diff()[mesh.get_local_rank()].item() * mesh.size()
    offsets = 4 * 2 * (experts + 2)  # two halves, each with an end
    assert kept[True] == 12 * received + offsets
    assert kept[False] == kept[True] + 4 * received * (D + 2 * N)


def all_cases(folder):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for case in (
        (torch.float32, True, True, E, None), (torch.float32, True, False, E, None), (torch.bfloat16, True, True, E, 2),
        (torch.float32, True, True, E, 2, True), (torch.float32, False, True, E, 2),
        (torch.bfloat16, False, False, 3, None), (torch.float32, True, True, 3, 1),
    ):  # fmt: skip
        bit_for_bit(mesh, *case)
    for own_experts in (1, 3):
        experts = own_experts * mesh.size()
        bit_for_bit(mesh, torch.float32, True, True, experts, None, num_experts=experts)
    for adapted in (
        {"recompute": True}, {"recompute": False, "dtype": torch.bfloat16}, {"recompute": True, "nf4": True},
        {"recompute": True, "autocast": True, "experts": 3},
    ):  # fmt: skip
        options = {"dtype": torch.float32, "gated": True, "experts": E, "capacity": None} | adapted
        bit_for_bit(mesh, **options, adapted=True)
    for router in (nn.TopKRouter, nn.SwitchRouter, nn.ExpertChoiceRouter):
        for adapted in (False, True):
            layer_equals_one_process(mesh, router, adapted)
    quantized_experts_take_adapters(mesh)
    training_equals_one_process(mesh)
    checkpointing_sends_again(mesh)
    padding_and_inference(mesh)
    tokens_without_a_gradient(mesh)
    dropout_is_the_same_in_backward(mesh)
    state_dict_loads_on_any_number_of_ranks(mesh, folder)
    ranks_that_differ_are_told_all(mesh)
    what_fails_after_the_exchange_fails_on_all(mesh)
    work_is_done_beside_the_exchange(mesh, folder)
    what_is_kept(mesh)


@pytest.mark.parametrize("world", [2, 4])
def test_experts_on_several_ranks(world, tmp_path):
    run_ranks(all_cases, world, tmp_path, tmp_path / "checkpoint")


def test_a_mesh_of_another_kind_is_refused():
    with pytest.raises(TypeError, match=r"expert_mesh: expected a torch.distributed.device_mesh.DeviceMesh, got int"):
        nn.SwitchFFN(D, N, E, expert_mesh=2)
