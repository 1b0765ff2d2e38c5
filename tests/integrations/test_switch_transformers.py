"""SwitchTransformers, patched: what the unpatched model computes, the routers' losses included."""

import pytest
import torch
from training_step import train_step

import memkernels
from memkernels.ops.rms_norm import reference
from memkernels.testing import assert_within_factor_two, saved_bytes

SIZES = {
    "d_model": 48, "d_kv": 12, "d_ff": 56, "num_layers": 2, "num_sparse_encoder_layers": 1, "num_decoder_layers": 2,
    "num_sparse_decoder_layers": 1, "num_heads": 4, "num_experts": 5, "expert_capacity": 9, "router_bias": True,
    "router_jitter_noise": 0.0, "dropout_rate": 0.0, "vocab_size": 101, "pad_token_id": 0, "eos_token_id": 1,
    "decoder_start_token_id": 0,
}  # fmt: skip
RECOMPUTE = ("none", "sublayer", "layer")


@pytest.fixture
def make():
    """make(dtype, **config): a model in training mode, the same on every call; no token goes to its first experts."""
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed: pip install memkernels[hf]"
    )

    def make(dtype=torch.float32, **config):
        torch.manual_seed(0)
        model = transformers.SwitchTransformersForConditionalGeneration(
            transformers.SwitchTransformersConfig(**(SIZES | config))
        )
        for name, parameter in model.named_parameters():
            if "layer_norm" in name:
                torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
            if name.endswith("classifier.bias"):
                parameter.data[0] = -1e4
        return model.to(dtype).train()

    return make


def make_batch(**arguments):
    """Two texts of up to 37 tokens, and labels of up to 23."""
    generator = torch.Generator().manual_seed(1)
    ids, labels = (torch.randint(3, 101, (2, length), generator=generator) for length in (37, 23))
    mask = torch.ones_like(ids)
    mask[1, -9:] = 0
    labels[1, -5:] = -100
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask, "labels": labels} | arguments


def exact_step(model, batch):
    """In float64, where transformers' norms and routers round to float32."""
    model = model.double()
    for module in model.modules():
        if type(module).__name__ == "SwitchTransformersLayerNorm":
            module.forward = lambda x, norm=module: reference.rms_norm(x, norm.weight, norm.variance_epsilon)
        if type(module).__name__ == "SwitchTransformersTop1Router":
            module.dtype = torch.float64
    return train_step(model, batch)


def assert_same(actual, exact, plain):
    assert actual.keys() == plain.keys()
    for name, value in actual.items():
        assert_within_factor_two(name, value, exact[name], plain[name])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("routed", [True, False])
def test_loss_and_gradients(make, tied, routed):
    config = {"tie_word_embeddings": tied, "router_z_loss_coef": 0.2, "router_aux_loss_coef": 0.5}
    batch, model = make_batch(output_router_logits=routed), make(**config)
    expected = model(**batch)
    plain, exact = train_step(model, batch), exact_step(make(**config), batch)
    assert not any("expert_0." in name for name in plain) and any("expert_1." in name for name in plain)
    for recompute in RECOMPUTE:
        report = memkernels.patch(model, recompute=recompute)
        assert {"RMS norm", "experts", "MLP", "head and loss"} <= set(report.replaced.values())
        assert_same(train_step(model, batch), exact, plain)
        outputs = model(**batch)
        assert outputs.logits is None and outputs.cache is None
        for name in ("encoder_z_loss", "encoder_aux_loss", "decoder_z_loss", "decoder_aux_loss"):
            torch.testing.assert_close(getattr(outputs, name), getattr(expected, name))
        memkernels.unpatch(model)
    assert all(torch.equal(value, plain[name]) for name, value in train_step(model, batch).items())


def test_jitter_is_transformers(make):
    model, batch = make(router_jitter_noise=0.3), make_batch()
    torch.manual_seed(1)
    expected = train_step(model, batch)
    memkernels.patch(model)
    torch.manual_seed(1)
    for name, value in train_step(model, batch).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)


def test_what_is_kept(make):
    batch, model = make_batch(), make()
    parameters = tuple(model.parameters())
    kept = {None: saved_bytes(lambda: model(**batch), exclude=parameters)}
    for recompute in RECOMPUTE:
        memkernels.patch(model, recompute=recompute)
        kept[recompute] = saved_bytes(lambda: model(**batch), exclude=parameters)
        memkernels.unpatch(model)
    assert kept[None] > kept["none"] > kept["sublayer"] > 2 * kept["layer"]


def test_gradient_checkpointing_takes_the_place_of_layer(make):
    model, batch = make(dropout_rate=0.1), make_batch()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    memkernels.patch(model, recompute="layer")
    layer, calls = model.decoder.block[1].layer[0], []
    layer.SelfAttention.register_forward_hook(lambda *_: calls.append(1))
    model(**batch).loss.backward()
    assert len(calls) == 2
    model.gradient_checkpointing_disable()
    model(**batch).loss.backward()
    assert len(calls) == 4


def test_dropout_within_feed_forward_layers_keeps_a_seed(make):
    model = make(dropout_rate=0.4)
    memkernels.patch(model)
    experts = next(module for module in model.modules() if type(module).__name__ == "SwitchTransformersExperts")
    x = torch.randn(30, 48, generator=torch.Generator().manual_seed(2)).requires_grad_()
    selected = torch.eye(5, dtype=torch.int64)[torch.arange(30) % 4][:, None]
    arguments = (x, selected, torch.ones(30, 1))
    drops = saved_bytes(lambda: experts(*arguments), exclude=tuple(experts.parameters()))
    mean = torch.stack([experts(*arguments).detach() for _ in range(400)]).mean(0)
    experts.eval()
    assert drops == 8 + saved_bytes(lambda: experts(*arguments), exclude=tuple(experts.parameters()))
    quiet = experts(*arguments)
    assert (mean - quiet).norm() < 0.15 * quiet.norm()
    dense = model.decoder.block[0].layer[-1]
    x = torch.randn(2, 9, 48, generator=torch.Generator().manual_seed(3)).requires_grad_()
    expected = type(dense).forward(dense.eval(), x)
    assert torch.allclose(dense(x), expected, rtol=1e-4, atol=1e-5)
    dense.train().dropout.eval()
    drops = saved_bytes(lambda: dense(x), exclude=(x, *dense.parameters()))
    assert drops == 8
    mean = torch.stack([dense(x).detach() for _ in range(400)]).mean(0)
    assert (mean - expected).norm() < 0.15 * (expected - x).norm()
    model.train()
    model(**make_batch()).loss.backward()
    assert all(not parameter.grad.isnan().any() for parameter in model.parameters() if parameter.grad is not None)


def test_generation_after_training(make):
    batch, model = make_batch(), make()
    prompt = {name: batch[name] for name in ("input_ids", "attention_mask")}
    expected = model.eval().generate(**prompt, max_new_tokens=6, do_sample=False)
    memkernels.patch(model.train())
    model(**batch).loss.backward()
    assert torch.equal(model.eval().generate(**prompt, max_new_tokens=6, do_sample=False), expected)
    assert model(**batch).logits is not None


def test_what_others_put_in_front_of_a_replacement_is_called(make):
    model, seen = make(), []
    layer = model.decoder.block[0].layer[-1]
    for module in (layer.mlp, layer.layer_norm):
        own = module.forward
        module.forward = lambda x, own=own: seen.append(1) or own(x)
    memkernels.patch(model)
    model(**make_batch())
    assert len(seen) == 2


def test_a_wide_output_projection_is_left(make):
    """As transformers keeps T5's in float32."""

    def wide():
        model = make(torch.bfloat16)
        for block in (*model.encoder.block, *model.decoder.block):
            if type(block.layer[-1].mlp).__name__ == "SwitchTransformersDenseActDense":
                block.layer[-1].mlp.wo.float()
        return model

    model, batch = wide(), make_batch()
    plain, exact = train_step(model, batch), exact_step(wide(), batch)
    memkernels.patch(model, recompute="none")
    for name, value in train_step(model, batch).items():
        assert_within_factor_two(name, value.to(plain[name].dtype), exact[name], plain[name])


def test_what_cannot_be_replaced_is_left(make):
    model = make(dense_act_fn="tanh")
    report = memkernels.patch(model)
    assert "its scores have a learned bias of relative positions" in report.left.values()
    assert "memkernels has no activation Tanh" in report.left.values()
    model = make()
    batch = make_batch()
    expected = train_step(model, batch)
    memkernels.patch(model)
    seen = []
    for module in model.modules():
        if type(module).__name__ == "SwitchTransformersDenseActDense":
            module.register_forward_hook(lambda *_: seen.append(1))
    for name, value in train_step(model, batch).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)
    assert len(seen) > 4
