"""What patch replaces, leaves and reports; the loss it puts in; copies, hooks, adapters; refusals; unpatch."""

import copy
import inspect
import pickle

import pytest
import torch

import memkernels
from memkernels.integrations import patching
from memkernels.testing import saved_bytes


def own_forwards(model):
    return [name for name, module in model.named_modules() if {"forward", "_old_forward"} & module.__dict__.keys()]


def gradients(model, batch):
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return [loss.detach()] + [p.grad for p in model.parameters() if p.grad is not None]


def test_report(make_model):
    report = memkernels.patch(make_model())
    assert report.left == {} and len(report.replaced) == 5 + 2 + 2 + 2 + 1 + 1
    assert report.replaced["model.layers.1.mlp"] == "MLP" and report.replaced[""] == "head and loss"
    printed = str(report)
    assert "LlamaForCausalLM, recompute='sublayer': 13 modules replaced" in printed
    assert "    5  RMS norm" in printed


def test_other_instances_classes_keys_and_parameters_stay(make_model, make_batch):
    model, other = make_model(), make_model()
    keys, parameters, forward = list(model.state_dict()), list(model.parameters()), type(model).forward
    memkernels.patch(model)
    assert own_forwards(other) == [] and type(model).forward is forward
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert other(**make_batch()).logits is not None


def test_unpatch_restores_exactly(make_model, make_batch):
    model, batch = make_model(), make_batch()
    before = gradients(model, batch)
    for recompute in patching.RECOMPUTE:
        memkernels.patch(model, recompute=recompute)
        memkernels.unpatch(model)
        assert own_forwards(model) == []
    assert all(torch.equal(a, b) for a, b in zip(gradients(model, batch), before, strict=True))


def test_loss_is_optional(make_model, make_batch):
    model = make_model()
    memkernels.patch(model, loss=False)
    assert model(**make_batch()).logits is not None


@pytest.mark.parametrize("recompute", patching.RECOMPUTE)
def test_saved_bytes(make_model, make_batch, recompute):
    """By differences between depths and widths, since embeddings, mask and loss keep something too."""

    def saved(padding=None, **config):
        model = make_model(mlp_bias=False, attention_bias=False, **config)
        memkernels.patch(model, recompute=recompute)
        return saved_bytes(lambda: model(**make_batch(padding)).loss, exclude=tuple(model.parameters()))

    d, f, kv, tokens = 48, 104, 24, 2 * 37
    statistics = 4 + 4 * 4 + 4  # rstd, lse of 4 heads, rstd
    layer = {
        "none": 4 * ((2 * d + d + 2 * kv + d) + (2 * d + 3 * f)) + statistics,  # x to out; h to the product
        "sublayer": 4 * 3 * d + 4 * 4,
        "layer": 4 * 2 * d + 4 * 4,
    }
    assert saved(num_hidden_layers=3) - saved() == tokens * layer[recompute]
    if recompute == "layer":
        of_checkpoint = torch.get_rng_state().nbytes  # torch.utils.checkpoint keeps the generator's state
        assert saved("left", num_hidden_layers=3) - saved("left") == tokens * 4 * 2 * d + of_checkpoint
        assert saved("right", num_hidden_layers=3) - saved("right") == (tokens - 9) * layer[recompute]
    assert saved(vocab_size=301) == saved()


def test_experts_of_gpt_oss_are_left_and_recomputed(make_model, make_batch):
    """By the difference between depths: the inputs of both sublayers, attention's output and lse, cos and sin."""
    saved = {}
    for depth in (2, 3):
        model = make_model("GptOss", num_hidden_layers=depth)
        report = memkernels.patch(model, recompute="layer")
        assert report.left == {
            f"model.layers.{i}.mlp.experts": "their gate is clamped, and they have biases" for i in range(depth)
        }
        saved[depth] = saved_bytes(lambda: model(**make_batch()).loss, exclude=tuple(model.parameters()))  # noqa: B023
    d, heads, size, length = 48, 4, 20, 37
    kept = 2 * length * (4 * (2 * d + heads * size) + 4 * heads) + 2 * 4 * length * size
    assert saved[3] - saved[2] == kept + torch.get_rng_state().nbytes  # kept by torch.utils.checkpoint


def test_logits_where_they_are_asked_for(make_model, make_batch):
    model, batch = make_model(), make_batch("right")
    ids, labels = batch["input_ids"], batch["labels"]
    expected = model.eval()(**batch)
    memkernels.patch(model)
    torch.testing.assert_close(model.eval()(**batch).logits, expected.logits)
    torch.testing.assert_close(model(**batch).loss, expected.loss)
    model.train()
    assert list(model(**batch)) == ["loss"]  # neither logits nor cache
    assert {"cache", "past_key_values"} & model(**batch, use_cache=True).keys()
    assert model(input_ids=ids).logits.shape == (2, 37, 101)
    kept = model(input_ids=ids, labels=labels[:, :2], logits_to_keep=torch.tensor([3, 4]))
    assert kept.logits.shape == (2, 2, 101)
    torch.testing.assert_close(model(**batch, return_dict=False)[0], expected.loss)


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_items_in_batch": 11},
        {"num_items_in_batch": torch.tensor(11)},
        {"ignore_index": 7},
        {"shift_labels": torch.randint(101, (2, 37), generator=torch.Generator().manual_seed(2))},
        {"output_hidden_states": True},
    ],
    ids=["num_items", "num_items_tensor", "ignore_index", "shift_labels", "output_hidden_states"],
)
def test_loss_arguments(make_model, make_batch, arguments):
    model, batch = make_model(), make_batch()
    batch["labels"][0, :5] = arguments.get("ignore_index", -100)
    expected = model(**batch, **arguments)
    memkernels.patch(model)
    actual = model(**batch, **arguments)
    torch.testing.assert_close(actual.loss, expected.loss)
    assert actual.logits is None
    for ours, theirs in zip(actual.hidden_states or (), expected.hidden_states or (), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_loss_of_the_last_positions(make_model, make_batch):
    model, batch = make_model(), make_batch()
    batch["labels"] = batch["labels"][:, -10:].contiguous()
    expected = model(**batch, logits_to_keep=10).loss
    memkernels.patch(model)
    torch.testing.assert_close(model(**batch, logits_to_keep=10).loss, expected)
    with pytest.raises(ValueError, match="target: expected shape"):
        model(**batch)


def test_positional_arguments(make_model, make_batch):
    model, batch = make_model(), make_batch("right")
    arguments = (batch["input_ids"], batch["attention_mask"], None, None, None, batch["labels"])
    expected = model(*arguments).loss
    memkernels.patch(model)
    torch.testing.assert_close(model(*arguments).loss, expected)
    torch.testing.assert_close(model(*arguments[:2], labels=batch["labels"]).loss, expected)


def test_a_loss_function_of_the_user_is_used(make_model, make_batch):
    model = make_model()
    memkernels.patch(model)
    model.loss_function = lambda logits, labels, **kwargs: logits.sum() * 0 + 3
    assert model(**make_batch()).loss == 3
    memkernels.unpatch(model)
    assert memkernels.patch(model).left == {"": "the model has a loss function of its own"}


def test_signature_is_that_of_transformers(make_model):
    model = make_model()
    names = inspect.signature(model.forward).parameters.keys()
    memkernels.patch(model)
    assert names - inspect.signature(model.forward).parameters.keys() == set()


def test_deepcopy_and_pickle_are_patched_and_independent(make_model, make_batch):
    model, batch = make_model(), make_batch()
    memkernels.patch(model, recompute="layer")
    expected = model(**batch).loss
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert own_forwards(other) == own_forwards(model)
        torch.testing.assert_close(other(**batch).loss, expected, rtol=0, atol=0)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        torch.testing.assert_close(other(**batch).loss, torch.tensor(101.0).log())
        torch.testing.assert_close(model(**batch).loss, expected, rtol=0, atol=0)
        memkernels.unpatch(other)
        assert own_forwards(other) == []


def test_save_pretrained(make_model, make_batch, tmp_path):
    model, batch = make_model(), make_batch()
    memkernels.patch(model)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).train()
    assert own_forwards(again) == []
    torch.testing.assert_close(again(**batch).loss, model(**batch).loss)


@pytest.mark.parametrize("first", ["hook", "patch"])
@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.input_layernorm",
        "model.layers.0.self_attn",
        "model.layers.0.self_attn.k_proj",
        "model.layers.0.post_attention_layernorm",
        "model.layers.0.mlp",
        "model.layers.0.mlp.up_proj",
        "model.layers.0.mlp.act_fn",
        "lm_head",
    ],
)
def test_a_hook_fires(make_model, make_batch, name, first):
    model, batch = make_model(), make_batch()
    expected = gradients(model, batch)
    fired = []
    if first == "patch":
        memkernels.patch(model)
    model.get_submodule(name).register_forward_hook(lambda *_: fired.append(name))
    if first == "hook":
        layer = "" if name == "lm_head" else "model.layers.0"
        assert list(memkernels.patch(model).left) == [layer]
    torch.testing.assert_close(gradients(model, batch), expected)
    assert fired == [name]


@pytest.mark.parametrize("order", ["dispatch first", "patch first"])
def test_execution_hooks_of_accelerate(make_model, make_batch, order):
    hooks = pytest.importorskip("accelerate.hooks")
    model, batch = make_model(), make_batch()
    expected = gradients(model, batch)
    if order == "patch first":
        memkernels.patch(model)
    hooks.attach_execution_device_hook(model, "cpu")
    if order == "dispatch first":
        assert memkernels.patch(model).left == {}
    torch.testing.assert_close(gradients(model, batch), expected)
    memkernels.unpatch(model)
    assert model(**batch).logits is not None
    hooks.remove_hook_from_submodules(model)
    assert model(**batch).logits is not None
    assert memkernels.patch(model).left == {}


def test_unpatch_behind_mixed_precision_of_accelerate(make_model, make_batch):
    """Which holds the forward that it was given for good, as under transformers' Trainer with bf16=True."""
    accelerate = pytest.importorskip("accelerate")
    batch, losses = make_batch("right"), []
    for patched in (False, True):
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        model = make_model()
        if patched:
            memkernels.patch(model)
        model = accelerate.Accelerator(mixed_precision="bf16", cpu=True).prepare(model)
        model(**batch).loss.backward()
        if patched:
            with pytest.raises(ValueError, match="model: it is patched already"):
                memkernels.patch(model)
            memkernels.unpatch(model)
            with pytest.raises(ValueError, match="nothing in this LlamaForCausalLM is patched"):
                memkernels.unpatch(model)
        outputs = model(**batch)
        assert outputs.logits.dtype == torch.float32
        losses.append(outputs.loss)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    assert torch.equal(*losses)


def test_unwrapped_by_accelerate_from_mixed_precision(make_model, make_batch):
    """Which takes the forward that it kept out of its wrapper, and binds it to the model once more."""
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    model, batch = make_model(), make_batch("right")
    unpatched = gradients(model, batch)
    memkernels.patch(model)
    expected = gradients(model, batch)
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    model = accelerator.unwrap_model(accelerator.prepare(model), keep_fp32_wrapper=False)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    for of in (model, copy.deepcopy(model)):
        assert all(torch.equal(a, b) for a, b in zip(gradients(of, batch), expected, strict=True))
        assert of(**batch).logits is None and of(batch["input_ids"]).logits is not None
        memkernels.unpatch(of)
        assert own_forwards(of) == []
        assert all(torch.equal(a, b) for a, b in zip(gradients(of, batch), unpatched, strict=True))


def test_weights_that_accelerate_offloads(make_model, make_batch):
    accelerate = pytest.importorskip("accelerate")
    model, batch = make_model(), make_batch()
    expected = model(**batch).loss
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    report = memkernels.patch(model)
    assert report.left.keys() == {"", "model.layers.0", "model.layers.1"}
    torch.testing.assert_close(model(**batch).loss, expected)


def test_a_forward_of_someone_else_is_left(make_model):
    model = make_model()
    model.model.norm.forward = lambda x: x
    theirs = model.model.norm.forward
    assert "replaced by someone else" in memkernels.patch(model).left["model.norm"]
    memkernels.unpatch(model)
    assert model.model.norm.forward is theirs


def test_an_unknown_activation_is_left(make_model, make_batch):
    model, batch = make_model(hidden_act="mish"), make_batch()
    expected = gradients(model, batch)
    assert "no activation Mish" in memkernels.patch(model).left["model.layers.0.mlp"]
    torch.testing.assert_close(gradients(model, batch), expected)


def test_a_model_inside_another(make_model, make_batch):
    transformers = pytest.importorskip("transformers")
    config = make_model().config
    config.num_labels = 3
    model = transformers.LlamaForSequenceClassification(config)
    batch = {"input_ids": make_batch()["input_ids"], "labels": torch.tensor([0, 2])}
    expected = gradients(model, batch)
    report = memkernels.patch(model)
    assert "" not in report.replaced and "model.norm" in report.replaced
    torch.testing.assert_close(gradients(model, batch), expected)


def test_bad_input(make_model):
    model = make_model()
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got dict"):
        memkernels.patch({})
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got type"):
        memkernels.unpatch(type(model))
    with pytest.raises(ValueError, match="recompute: expected one of none, sublayer, layer, got 'all'"):
        memkernels.patch(model, recompute="all")
    with pytest.raises(TypeError, match="loss: expected True or False, got 'no'"):
        memkernels.patch(model, loss="no")
    with pytest.raises(ValueError, match="model: found nothing to replace in Sequential"):
        memkernels.patch(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="model: nothing in this LlamaForCausalLM is patched"):
        memkernels.unpatch(model)
    assert own_forwards(model) == []
    memkernels.patch(model)
    before = own_forwards(model)
    with pytest.raises(ValueError, match="model: it is patched already"):
        memkernels.patch(model, recompute="layer")
    assert own_forwards(model) == before


def test_nothing_is_half_patched_when_planning_fails(make_model, monkeypatch):
    model = make_model()
    planned = []

    def fail(norm, family):
        planned.append(norm)
        raise RuntimeError("the last norm")

    plan_norm = patching.plan_norm
    monkeypatch.setattr(patching, "plan_norm", lambda n, f: fail(n, f) if n is model.model.norm else plan_norm(n, f))
    with pytest.raises(RuntimeError, match="the last norm"):
        memkernels.patch(model)
    assert planned and own_forwards(model) == []


def test_a_release_of_transformers_too_old_for_the_family_is_refused(make_model, monkeypatch):
    transformers = pytest.importorskip("transformers")
    model = make_model("Gemma2")
    monkeypatch.setattr(transformers, "__version__", "5.9.1")
    with pytest.raises(ValueError, match=r"model: gemma2 needs transformers 5\.24 or newer, found 5\.9\.1"):
        memkernels.patch(model)
    assert own_forwards(model) == []
    monkeypatch.setattr(transformers, "__version__", "6.0.0.dev0")
    memkernels.patch(model)
