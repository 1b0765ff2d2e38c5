"""Patched PEFT models compute what the unpatched ones do, in every state of their adapters; what is left, and said."""

import itertools

import pytest
import torch
from adapted_models import adapted
from compilers import on_every_compiler
from training_step import assert_same_step, exact_step
from training_step import train_step as step

import memkernels
from memkernels.integrations import peft_lora
from memkernels.ops.lora_linear import reference as lora_reference
from memkernels.ops.lora_linear import weight as lora_weight
from memkernels.testing import assert_within_factor_two, saved_bytes

peft = pytest.importorskip("peft", reason="peft is not installed: pip install memkernels[hf]")

RECOMPUTE = ("none", "sublayer", "layer")
SEED = torch.tensor(1234567890123456789)


class SeededDropout(torch.nn.Module):
    """PEFT's dropout with our mask of SEED, so that the two see the same."""

    def __init__(self, dropout_p):
        super().__init__()
        self.dropout_p = dropout_p

    def forward(self, x):
        return lora_reference.row_dropout(x.flatten(0, -2), SEED, self.dropout_p, 0, x.dtype).view(x.shape)


@pytest.fixture
def one_seed(monkeypatch):
    monkeypatch.setattr(lora_weight, "seed_tensor", lambda seed, device: SEED)


@pytest.fixture
def make_adapted(make_model):
    """make_adapted(family, dtype, config=..., **options of LoraConfig): the same on every call, no adapter zero."""

    def make(family="Llama", dtype=torch.float32, *, config=None, autocast=False, **options):
        return adapted(make_model(family, dtype, **(config or {})), autocast=autocast, **options)

    return make


OPTIONS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "bias": {"lora_bias": True},
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "ranks": {"rank_pattern": {"q_proj": 1, "down_proj": 7}, "alpha_pattern": {"down_proj": 20}},
    "head": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)],
    ids=["float32", "bfloat16", "float32 adapter of bfloat16"],
)
def test_loss_and_gradients(make_adapted, make_batch, dtype, autocast, options):
    batch = make_batch("right")
    make = lambda: make_adapted("Llama", dtype, autocast=autocast, **options)  # noqa: E731
    model = make()
    plain, exact = step(model, batch), exact_step(make(), batch)
    for recompute in RECOMPUTE:
        assert memkernels.patch(model, recompute=recompute).left == {}
        assert_same_step(step(model, batch), exact, plain, dtype)
        memkernels.unpatch(model)
    assert all(torch.equal(value, plain[name]) for name, value in step(model, batch).items())


# By option what is left to PEFT or transformers, and whether the head is tied to the embedding.
BESIDE = {
    "embedding": (False, {"target_modules": ["q_proj", "embed_tokens"]}, {"lora.layer.Embedding"}),
    "embedding and head": (
        True,
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "ensure_weight_tying": True},
        {"lora.layer.Embedding"},
    ),
    "modules": (True, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, set()),
    "tokens": (True, {"trainable_token_indices": [5, 6]}, {"TrainableTokensLayer", "lm_head has"}),
}


@pytest.mark.parametrize(("tied", "options", "left"), BESIDE.values(), ids=BESIDE)
def test_what_is_trained_beside_or_on_embeddings(make_adapted, make_batch, tied, options, left):
    make = lambda: make_adapted(config={"tie_word_embeddings": tied}, lora_alpha=0.1, **options)  # noqa: E731
    batch, model = make_batch("right"), make()
    plain, exact = step(model, batch), exact_step(make(), batch)
    reasons = set(memkernels.patch(model).left.values())
    assert len(reasons) == len(left) and all(any(of in reason for reason in reasons) for of in left)
    assert_same_step(step(model, batch), exact, plain)


LAYERS = {
    "excluded": {"exclude_modules": ["layers.0.self_attn.q_proj", "down_proj"]},
    "some layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "replicated": {"layer_replication": [[0, 2], [1, 2]]},
    "replicated in part": {"layer_replication": [[0, 1], [0, 2]], "target_modules": ["v_proj"], "use_dora": True},
}


@pytest.mark.parametrize("first", ["adapters", "patch"])
@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
def test_adapters_on_some_layers_and_on_layers_that_share_weights(make_model, make_adapted, make_batch, options, first):
    batch = make_batch("right")
    plain, exact = step(make_adapted(**options), batch), exact_step(make_adapted(**options), batch)
    if first == "adapters":
        model = make_adapted(**options)
        assert not memkernels.patch(model).left
    else:
        model = make_model()
        memkernels.patch(model)
        model = adapted(model, **options)
    assert_same_step(step(model, batch), exact, plain)


@pytest.mark.parametrize("family", ["Mistral", "Qwen2", "Qwen3", "Phi3", "Gemma2", "Gemma3", "GptOss", "GPT2"])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_families(make_adapted, make_batch, family, options):
    targets = {"GPT2": ["c_attn", "c_proj", "c_fc"], "GptOss": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    options = options | {"target_modules": targets.get(family, "all-linear"), "fan_in_fan_out": family == "GPT2"}
    batch, model = make_batch(), make_adapted(family, **options)
    plain, exact = step(model, batch), exact_step(make_adapted(family, **options), batch)
    for recompute in RECOMPUTE:
        left = memkernels.patch(model, recompute=recompute).left
        assert set(left.values()) == ({"their gate is clamped, and they have biases"} if family == "GptOss" else set())
        assert_same_step(step(model, batch), exact, plain)
        memkernels.unpatch(model)


@pytest.mark.usefixtures("one_seed")
@pytest.mark.parametrize("family", ["Llama", "Phi3", "GPT2"])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_dropout(make_adapted, make_batch, family, options):
    options = options | {"lora_dropout": 0.3, "fan_in_fan_out": family == "GPT2"}
    options |= {"target_modules": ["c_attn", "c_proj", "c_fc"]} if family == "GPT2" else {}

    def with_our_mask():
        model = make_adapted(family, **options)
        for module in model.modules():
            if hasattr(module, "lora_dropout"):
                module.lora_dropout["default"] = SeededDropout(0.3)
        return model

    batch, model = make_batch(), make_adapted(family, **options)
    plain, exact = step(with_our_mask(), batch), exact_step(with_our_mask(), batch)
    for recompute in RECOMPUTE:
        memkernels.patch(model, recompute=recompute)
        assert_same_step(step(model, batch), exact, plain)
        memkernels.unpatch(model)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("recompute", ["sublayer", "layer"])
def test_dropout_is_the_same_when_recomputed_and_off_in_evaluation(make_adapted, make_batch, recompute, checkpointing):
    batch, model = make_batch(), make_adapted(lora_dropout=0.3)
    undropped = model.eval()(**batch).loss
    steps = []
    for level, checkpointed in (("none", False), (recompute, checkpointing)):
        memkernels.patch(model.train(), recompute=level)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)
        steps.append(step(model, batch))
        torch.testing.assert_close(model.eval()(**batch).loss, undropped)
        memkernels.unpatch(model)
    for name, value in steps[1].items():
        torch.testing.assert_close(value, steps[0][name], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(steps[0]["loss"], undropped, rtol=1e-3)


def in_state(model, state):
    """The model after what users do to its two adapters, and whether gradients of adapters are left."""
    if state == "other":
        model.set_adapter("other")
    elif state == "back":
        model.set_adapter("other")
        model.set_adapter("default")
    elif state == "both":
        model.base_model.set_adapter(["default", "other"])
    elif state == "merged":
        model.merge_adapter()
    elif state == "unmerged":
        model.merge_adapter()
        model.unmerge_adapter()
    elif state == "scaled":
        for module in model.modules():
            if hasattr(module, "scale_layer"):
                module.scale_layer(3.0)
    elif state == "deleted":
        model.delete_adapter("default")
        model.set_adapter("other")
    return model


@pytest.mark.parametrize("first", ["state", "patch"])
@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("state", ["other", "back", "both", "merged", "unmerged", "scaled", "deleted"])
def test_states_of_adapters(make_adapted, make_batch, state, recompute, first):
    def make():
        model = make_adapted()
        config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=2, use_rslora=True, init_lora_weights=False)
        model.add_adapter("other", config)
        model.base_model.model.model.embed_tokens.requires_grad_()  # so that there is a gradient in every state
        return model

    batch = make_batch()
    plain, exact = step(in_state(make(), state), batch), exact_step(in_state(make(), state), batch)
    model = make() if first == "patch" else in_state(make(), state)
    report = memkernels.patch(model, recompute=recompute)
    assert_same_step(step(model if first == "state" else in_state(model, state), batch), exact, plain)
    if first == "state":
        reasons = {"several active adapters"} if state == "both" else set()
        assert reasons == {report.left[name] for name in report.left if name.endswith("q_proj")}


@pytest.mark.parametrize("merged", [False, True])
def test_disabled_adapters(make_adapted, make_batch, merged):
    ids, model = make_batch()["input_ids"], make_adapted()
    results = []
    for patched in (False, True):
        if patched:
            memkernels.patch(model, recompute="layer")
        if merged:
            model.merge_adapter()
        with model.disable_adapter():
            results.append(model(input_ids=ids).logits)
        results.append(model(input_ids=ids).logits)
    for ours, plain in zip(results[2:], results[:2], strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(results[0], results[1], atol=1e-2)


@pytest.mark.parametrize("names", [["other", "__base__"], ["default", "other"], ["__base__", "__base__"]], ids=str)
def test_batches_with_adapter_names(make_adapted, make_batch, names, monkeypatch):
    """Each sample with its own adapter, of which one has other modules and another rank."""
    ids, model = make_batch()["input_ids"], make_adapted()
    model.add_adapter("other", peft.LoraConfig(target_modules=["q_proj", "up_proj"], r=2, init_lora_weights=False))
    model.eval()
    plain, alone = (model(input_ids=ids, **options).logits for options in ({"adapter_names": names}, {}))
    exact = model.double()(input_ids=ids, adapter_names=names).logits
    model.float()
    assert not memkernels.patch(model).left
    with monkeypatch.context() as patched:
        patched.delattr(peft.tuners.lora.layer.LoraLayer, "_mixed_batch_forward")
        ours = model(input_ids=ids, adapter_names=names).logits
    assert_within_factor_two("logits", ours, exact, plain)
    torch.testing.assert_close(model(input_ids=ids).logits, alone, rtol=1e-4, atol=1e-4)


def test_adapter_names_that_peft_refuses(make_adapted, make_batch):
    ids, model = make_batch()["input_ids"], make_adapted(use_dora=True).eval()
    memkernels.patch(model)
    with pytest.raises(ValueError, match="DoRA"):
        model(input_ids=ids, adapter_names=["default", "__base__"])


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}], ids=str)
@pytest.mark.parametrize("recompute", ["sublayer", "layer"])
def test_wrapped_after_patch(make_model, make_adapted, make_batch, options, recompute):
    batch, config = make_batch("right"), {"target_modules": "all-linear", "r": 4, "lora_alpha": 6}
    plain, exact = step(make_adapted(**options), batch), exact_step(make_adapted(**options), batch)
    model = make_model()
    memkernels.patch(model, recompute=recompute)
    torch.manual_seed(0)
    model = peft.get_peft_model(
        model, peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **config, **options)
    )
    assert_same_step(step(model, batch), exact, plain)
    model = model.merge_and_unload()
    assert {"forward"} & model.model.layers[0].__dict__.keys()
    memkernels.unpatch(model)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("recompute", ["sublayer", "layer"])
def test_saves_what_the_plain_model_does_a_few_columns_and_seeds(make_adapted, make_batch, recompute, dropout_p):
    """By the difference between depths."""

    def saved(depth):
        plain = {"num_hidden_layers": depth, "mlp_bias": False, "attention_bias": False}
        model = make_adapted(config=plain, lora_dropout=dropout_p)
        model.base_model.model.model.embed_tokens.requires_grad_()
        memkernels.patch(model, recompute=recompute)
        return saved_bytes(lambda: model(**make_batch()).loss, exclude=tuple(model.parameters()))

    of_a_token = {"sublayer": 4 * 3 * 48 + 4 * 4, "layer": 4 * 2 * 48 + 4 * 4}[recompute]
    of_down = 4 * 4  # what its factor B multiplies, of rank 4
    assert saved(3) - saved(2) == 2 * 37 * (of_a_token + of_down) + (7 * 8 if dropout_p else 0)


@pytest.mark.parametrize("recompute", [*(pytest.param(r, marks=pytest.mark.slow) for r in RECOMPUTE[:2]), "layer"])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
@on_every_compiler
def test_torch_compile(make_adapted, make_batch, recompute, options, backend):
    batch, model = make_batch(), make_adapted(**options)
    plain, exact = step(model, batch), exact_step(make_adapted(**options), batch)
    memkernels.patch(model, recompute=recompute)
    torch.compiler.reset()
    compiled = torch.compile(model.base_model.model, fullgraph=True, backend=backend)
    assert_same_step(step(model, batch, compiled), exact, plain)


@pytest.mark.parametrize("recompute", ["sublayer", "layer"])
def test_gradient_checkpointing_of_the_user(make_adapted, make_batch, recompute):
    batch, model = make_batch(), make_adapted()
    plain, exact = step(model, batch), exact_step(make_adapted(), batch)
    memkernels.patch(model, recompute=recompute)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same_step(step(model, batch), exact, plain)


def network(**options):
    """A PEFT model of no family that memkernels knows."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.GELU(), torch.nn.Linear(30, 7, bias=False))
    return peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["0", "2"], r=3, init_lora_weights=False, **options)
    )


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_a_model_of_no_known_family(options):
    model, x = network(**options), torch.randn(5, 6, 20, generator=torch.Generator().manual_seed(1))
    trained = [p for p in model.parameters() if p.requires_grad]

    def gradients(model, x):
        return torch.autograd.grad(model(x).square().sum(), [p for p in model.parameters() if p.requires_grad])

    plain, exact = gradients(model, x), gradients(network(**options).double(), x.double())
    report = memkernels.patch(model)
    assert report.replaced == {f"base_model.model.{i}": "LoRA adapter" for i in "02"} and not report.left
    assert "2  LoRA adapter" in str(report)
    for index, values in enumerate(zip(gradients(model, x), exact, plain, strict=True)):
        assert_within_factor_two(str(trained[index].shape), *values)
    saved = saved_bytes(lambda: model(x.clone().requires_grad_()), exclude=tuple(model.parameters()))
    columns = 20 + 3 + 30 + 30 + 3  # x, s, GELU's input, x, s
    assert saved == 30 * 4 * columns + (0 if not options else 2 * 4 * (30 + 7))  # DoRA: scale and norms of the rows


def test_norms_of_frozen_rows_are_computed_once(monkeypatch):
    model, x, squares = network(use_dora=True), torch.randn(5, 20), []
    memkernels.patch(model)

    def watched(*arguments):
        squares.append(arguments[-1])
        return lora_weight.LoRAWeight(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(peft_lora, "LoRAWeight", watched)
        model(x), model(x)
    assert isinstance(squares[0], torch.Tensor) and squares[0] is squares[2] and squares[1] is squares[3]
    with torch.no_grad():
        for index in (0, 2):
            model.base_model.model[index].base_layer.weight.mul_(2)
    found = model(x)
    memkernels.unpatch(model)
    torch.testing.assert_close(found, model(x))


def test_what_is_left_is_said():
    narrow = network()
    narrow.base_model.model[0].lora_A.default.bfloat16()
    narrow.base_model.model[0].lora_B.default.bfloat16()
    other = network()
    other.base_model.model[2].lora_dropout["default"] = torch.nn.AlphaDropout(0.1)
    hooked = network()
    hooked.base_model.model[0].base_layer.register_forward_hook(lambda *_: None)
    for model, place, reason in (
        (narrow, 0, "in a dtype that is neither its base's nor float32"),
        (other, 2, "with dropout of another kind"),
        (hooked, 0, "of a base with hooks"),
        (network(lora_bias=False, use_dora=True), 1, ""),
    ):
        x = torch.randn(5, 20)
        torch.manual_seed(0)
        expected = model(x)
        left = memkernels.patch(model).left
        assert reason in left.get(f"base_model.model.{place}", "")
        torch.manual_seed(0)
        torch.testing.assert_close(model(x), expected)
    config = peft.IA3Config(target_modules=["0"], feedforward_modules=[])
    ia3 = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), config)
    with pytest.raises(ValueError, match=r"found nothing to replace.*fuses no adapter of peft\.tuners\.ia3"):
        memkernels.patch(ia3)


def test_report_counts_every_adapter(make_adapted):
    model = make_adapted()
    report = memkernels.patch(model, recompute="layer")
    names = [f"layers.{i}.{name}" for i, name in itertools.product((0, 1), ("self_attn.q_proj", "mlp.down_proj"))]
    assert all(report.replaced[f"base_model.model.model.{name}"] == "LoRA adapter" for name in names)
    assert " 14  LoRA adapter" in str(report)
