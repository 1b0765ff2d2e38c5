"""Mixtures of experts, patched: what the unpatched models compute, the routers' loss included."""

import pytest
import torch
from training_step import exact_step, train_step

import memkernels
from memkernels.testing import assert_within_factor_two, saved_bytes

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


@pytest.mark.parametrize("recompute", ["sublayer", "layer"])
def test_torch_compile_in_one_graph(make, make_batch, recompute):
    batch, model = make_batch(), make("Mixtral")
    memkernels.patch(model, recompute=recompute)
    expected = train_step(model, batch)
    torch._dynamo.reset()
    actual = train_step(model, batch, torch.compile(model, fullgraph=True))
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)


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
