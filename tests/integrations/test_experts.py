"""Mixtures of experts, patched: what the unpatched models compute, the routers' loss included."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from compilers import on_every_compiler
from training_step import exact_step, train_step

import memkernels
from memkernels.testing import assert_within_factor_two, random_tensor, saved_bytes

FAMILIES = {
    "Mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2},
    "Qwen2Moe": {
        "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40,
        "mlp_only_layers": [1],
    },
    "Qwen3Moe": {
        "num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "norm_topk_prob": True, "head_dim": 20,
    },
    "Olmoe": {"num_experts": 5, "num_experts_per_tok": 2},
    "DeepseekV3": {
        "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
        "moe_intermediate_size": 24, "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 12,
        "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 12, "num_key_value_heads": 4,
    },
}  # fmt: skip
SIZES = {
    "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 101, "max_position_embeddings": 64, "initializer_range": 0.2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "experts_implementation": "eager",
}  # fmt: skip
WITH_ROUTER_LOSS = [family for family in FAMILIES if family != "DeepseekV3"]
every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture
def make():
    """make(family, **config): a model in training mode, the same on every call."""
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed: pip install memkernels[hf]"
    )

    def make(family, **config):
        torch.manual_seed(0)
        config = getattr(transformers, f"{family}Config")(**(SIZES | FAMILIES[family] | config))
        model = getattr(transformers, f"{family}ForCausalLM")(config)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
        return model.train()

    return make


def assert_same(actual, exact, plain):
    assert actual.keys() == plain.keys()
    for name, value in actual.items():
        assert_within_factor_two(name, value, exact[name], plain[name])


@pytest.mark.parametrize("padding", [None, "left", "right"])
@every_family
def test_loss_and_gradients(make, make_batch, family, padding):
    batch, model = make_batch(padding), make(family)
    plain, exact = train_step(model, batch), exact_step(make(family), batch)
    for recompute in ("none", "sublayer", "layer"):
        report = memkernels.patch(model, recompute=recompute)
        assert "experts" in report.replaced.values()
        assert_same(train_step(model, batch), exact, plain)
        memkernels.unpatch(model)


def packed(batch):
    """The batch as four sequences in two rows."""
    positions = torch.cat([torch.arange(20), torch.arange(17)]).expand(2, -1)
    labels = batch["labels"].masked_fill(positions == 0, -100)
    return batch | {"position_ids": positions, "use_cache": False, "labels": labels}


@every_family
def test_packed_sequences_told_by_position_ids(make, make_batch, family):
    batch, model = packed(make_batch()), make(family)
    plain, exact = train_step(model, batch), exact_step(make(family), batch)
    memkernels.patch(model, recompute="layer")
    assert_same(train_step(model, batch), exact, plain)


@pytest.mark.parametrize("padding", [None, "right"])
@pytest.mark.parametrize("family", WITH_ROUTER_LOSS)
def test_the_routers_loss_is_added_without_logits(make, make_batch, family, padding):
    batch = make_batch(padding) | {"output_router_logits": True}
    model = make(family, router_aux_loss_coef=0.5)
    expected = model(**batch)
    plain = train_step(model, batch)
    exact = exact_step(make(family, router_aux_loss_coef=0.5), batch)
    memkernels.patch(model)
    outputs = model(**batch)
    assert outputs.logits is None
    torch.testing.assert_close(outputs.aux_loss, expected.aux_loss)
    assert_same(train_step(model, batch), exact, plain)


@pytest.fixture
def implementation():
    pytest.importorskip("transformers", reason="transformers is not installed: pip install memkernels[hf]")
    from memkernels.integrations import experts

    return experts


def test_the_experts_implementation_of_transformers(implementation, make, make_batch):
    batch, model = make_batch(), make("Mixtral", experts_implementation="memkernels")
    plain, exact = train_step(make("Mixtral"), batch), exact_step(make("Mixtral"), batch)
    with mock.patch.object(memkernels.ops, "moe_mlp", wraps=memkernels.ops.moe_mlp) as called:
        actual = train_step(model, batch)
        assert called.called
    assert_same(actual, exact, plain)
    model.set_experts_implementation("eager")
    assert torch.equal(train_step(model, batch)["loss"], plain["loss"])


def step_of_experts(experts, implementation, ids, dtype=torch.float32):
    """y and gradients of x, the choices' weights and the experts' parameters."""
    experts.to(dtype).config._experts_implementation = implementation
    x = random_tensor(11, 16, dtype=torch.float32, seed=1).to(dtype)
    weights = random_tensor(*ids.shape, dtype=torch.float32, seed=2).to(dtype).masked_fill(ids == 4, 0.0)
    y = experts(x, ids, weights)
    leaves = x, weights, *experts.parameters()
    return [y, *torch.autograd.grad(y, leaves, torch.cos(torch.arange(y.numel(), dtype=dtype)).view_as(y))]


def make_experts(kind, gate_up):
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

    config = SimpleNamespace(
        hidden_size=16, num_local_experts=4, intermediate_size=12, hidden_act="silu", n_routed_experts=4,
        moe_intermediate_size=12, moe_latent_size=None, mlp_hidden_act="relu2",
    )  # fmt: skip
    experts = {"gated": MixtralExperts, "ungated": NemotronHExperts}[kind](config)
    for seed, parameter in enumerate(experts.parameters()):
        parameter.data.copy_(random_tensor(*parameter.shape, dtype=torch.float32, seed=seed, scale=0.3).detach())
    assert hasattr(experts, gate_up)
    return experts


@pytest.mark.parametrize(("kind", "gate_up"), [("gated", "gate_up_proj"), ("ungated", "up_proj")])
def test_choices_of_experts_that_are_elsewhere(implementation, kind, gate_up):
    """Under expert parallelism a rank has a part of the experts; choices of others are marked by their number."""
    ids = torch.rand(11, 16, generator=torch.Generator().manual_seed(0)).argsort(1)
    # Gated: eight choices, more than experts are here. The ungated ones' own forward knows no such mark.
    ids = ids[:, :8].clamp(max=4) if kind == "gated" else (ids[:, :1] + torch.arange(3)) % 4
    experts = make_experts(kind, gate_up)
    exact = step_of_experts(experts, "eager", ids, torch.float64)
    experts = make_experts(kind, gate_up)
    plain, actual = (step_of_experts(experts, name, ids) for name in ("eager", "memkernels"))
    names = ("y", "x", "weights", gate_up, "down_proj")
    for name, *values in zip(names, actual, exact, plain, strict=True):
        assert_within_factor_two(name, *values)


def test_experts_that_the_implementation_cannot_compute_are_named(implementation, make_model, make_batch):
    model = make_model("GptOss", experts_implementation="memkernels")
    with pytest.raises(ValueError, match="experts_implementation: memkernels does not compute GptOssExperts: experts"):
        model(**make_batch())


@every_family
def test_experts_keep_their_input_and_the_routing(make, make_batch, family):
    batch, model = make_batch(), make(family)
    kept = {}
    for recompute in ("none", "sublayer", "layer"):
        memkernels.patch(model, recompute=recompute)
        kept[recompute] = saved_bytes(lambda: model(**batch), exclude=tuple(model.parameters()))
        memkernels.unpatch(model)
    assert kept["none"] > kept["sublayer"] >= kept["layer"]
    assert kept["sublayer"] < saved_bytes(lambda: model(**batch), exclude=tuple(model.parameters()))


@every_family
def test_generation_after_training(make, make_batch, family):
    batch, model = make_batch("left"), make(family)
    prompt = {name: batch[name] for name in ("input_ids", "attention_mask")}
    expected = model.eval().generate(**prompt, max_new_tokens=6, do_sample=False)
    memkernels.patch(model.train())
    model(**batch).loss.backward()
    assert torch.equal(model.eval().generate(**prompt, max_new_tokens=6, do_sample=False), expected)


# Beside Mixtral the gate compiles none: the others are like it, but for routers and attention that are transformers'.
OTHERS = [pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES if family != "Mixtral"]


@pytest.mark.parametrize("recompute", ["sublayer", "layer"])
@pytest.mark.parametrize("family", ["Mixtral", *OTHERS])
@on_every_compiler
def test_torch_compile_in_one_graph(make, make_batch, family, recompute, backend):
    batch, model = make_batch(), make(family)
    memkernels.patch(model, recompute=recompute)
    expected = train_step(model, batch)
    torch._dynamo.reset()
    actual = train_step(model, batch, torch.compile(model, fullgraph=True, backend=backend))
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("rows", ["left", "right", "packed"])
@every_family
def test_torch_compile_of_padded_and_packed_rows(make, make_batch, family, rows):
    """With the mask of transformers, and what is hidden computed, as in test_patched_models.py."""
    batch, model = packed(make_batch()) if rows == "packed" else make_batch(rows), make(family)
    plain, exact = train_step(model, batch), exact_step(make(family), batch)
    memkernels.patch(model, recompute="layer")
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same(train_step(model, batch, compiled), exact, plain)


def test_what_is_left_says_why(make):
    report = memkernels.patch(make("Olmoe"))
    assert "its norms of q and k span all heads" in report.left.values()
    report = memkernels.patch(make("DeepseekV3"))
    assert "it is latent attention" in report.left.values()


def test_experts_with_another_activation_are_left(make, make_batch):
    model = make("Mixtral", hidden_act="tanh")
    report = memkernels.patch(model)
    assert any("no activation" in why for why in report.left.values())
    model(**make_batch()).loss.backward()


PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]


@pytest.mark.parametrize("targets", [PARAMETERS, PARAMETERS[1:]], ids=["both", "one"])
def test_adapters_on_parameters_are_never_multiplied_out(make, make_batch, targets):
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install memkernels[hf]")

    def adapted():
        model = make("Mixtral")
        options = {"target_modules": [], "target_parameters": targets, "init_lora_weights": False}
        return peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=6, **options)).train()

    batch, model = make_batch(), adapted()
    plain, exact = train_step(model, batch), exact_step(adapted(), batch)
    experts = next(of for name, of in model.named_parameters() if name.endswith("gate_up_proj"))
    memkernels.patch(model)
    assert_same(train_step(model, batch), exact, plain)
    layer = next(module for name, module in model.named_modules() if name.endswith("mlp.experts"))
    routed = torch.ones(7, SIZES["hidden_size"], requires_grad=True), torch.tensor([[0, 3]] * 7), torch.ones(7, 2)
    assert saved_bytes(lambda: layer(*routed), exclude=tuple(model.parameters())) < experts.nbytes / 5
    with model.disable_adapter():
        assert not torch.equal(model(**batch).loss, plain["loss"])


@pytest.mark.parametrize(("family", "widths"), [("Mixtral", 4), ("Qwen3Moe", 4), ("Qwen2Moe", 5)])
def test_what_a_layer_keeps_is_what_the_readme_says(make, make_batch, family, widths):
    """By the difference between depths, of attention's heads with d elements together."""
    d, heads, tokens, experts = SIZES["hidden_size"], SIZES["num_attention_heads"], 2 * 37, 5
    kept = {}
    for recompute in ("sublayer", "layer"):
        for depth in (3, 4):
            model = make(family, num_hidden_layers=depth, head_dim=d // heads)
            memkernels.patch(model, recompute=recompute)
            kept[recompute, depth] = saved_bytes(lambda: model(**make_batch()), exclude=tuple(model.parameters()))  # noqa: B023
    of_lse, of_checkpoint = 4 * heads, torch.get_rng_state().nbytes
    assert kept["layer", 4] - kept["layer", 3] == tokens * (4 * 3 * d + of_lse) + of_checkpoint
    # Of each choice 12 bytes in `ops.moe_mlp` and 12 of the router's choice; its scores, and two sums.
    routing = tokens * (24 * FAMILIES[family]["num_experts_per_tok"] + 4 * experts + 8) + 8 * (experts + 1)
    assert 0 < kept["sublayer", 4] - kept["sublayer", 3] - tokens * (4 * widths * d + of_lse) <= routing
