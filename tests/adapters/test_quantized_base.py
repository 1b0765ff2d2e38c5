"""lora(base="nf4"): against dense weights of the same values in float64, fused by patch, saved, merged, in memory."""

import copy
import functools

import peft
import pytest
import torch
import transformers
from adapted_models import adapted_layers, randomise
from training_step import exact_step, train_step

import memkernels
from memkernels import quant
from memkernels.nn import LoRALinear
from memkernels.testing import assert_within_factor_two, peak_bytes, run_in_child

# In bfloat16 one of a model's 28 gradients may be off by 4 times what plain PyTorch's is, though the median of the
# ratios is 1.0 in 16 draws: its steps are compared over several batches.
BATCHES = [torch.randint(3, 101, (2, 17), generator=torch.Generator().manual_seed(seed)) for seed in range(6)]
IDS = BATCHES[1]
LAYERS = {"Llama": 14, "Phi3": 8, "GPT2": 8}


def make_model(kind="Llama", width=64):
    torch.manual_seed(0)
    if kind == "GPT2":
        dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        config = transformers.GPT2Config(n_embd=width, n_layer=2, n_head=4, vocab_size=101, n_positions=64, **dropouts)
        return transformers.GPT2LMHeadModel(config)
    config, model = getattr(transformers, f"{kind}Config"), getattr(transformers, f"{kind}ForCausalLM")
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 4}
    return model(config(vocab_size=101, pad_token_id=0, num_key_value_heads=2, **sizes))


def make_adapted(kind="Llama", width=64, dtype=torch.float32, dropout=0.0, **options):
    model = make_model(kind, width).to(dtype)
    memkernels.lora(model, 3, 5.0, dropout=dropout, base="nf4", **options)
    return randomise(model)


def dense(model):
    """The same model over dense weights of the same values."""
    model = copy.deepcopy(model)
    for layer in adapted_layers(model).values():
        layer.base_layer.weight = torch.nn.Parameter(layer.weight.dequantize(), requires_grad=False)
    return model


def step(model, of=train_step):
    """Losses and gradients of the batches, those of the adapters alone; dropout's seeds are the same at each call."""
    found = []
    for ids in BATCHES if model.dtype == torch.bfloat16 else [IDS]:
        torch.manual_seed(3)
        model.zero_grad()
        found.append(of(model, {"input_ids": ids, "labels": ids, "use_cache": False}))
    assert all("lora_" in name for name in found[0].keys() - {"loss"})
    return {name: torch.stack([of[name] for of in found]) for name in found[0]}


def exact(model):
    return step(copy.deepcopy(model), exact_step)


@pytest.fixture(scope="module")
def of_dense():
    """of_dense(dtype, dropout, use_dora): exact and plain steps over dense weights, computed once."""

    @functools.cache
    def steps(dtype, dropout, use_dora):
        model = dense(make_adapted(dtype=dtype, dropout=dropout, use_dora=use_dora))
        return exact(model), step(model)

    return steps


def assert_same_step(actual, exact, plain, dtype=torch.float32):
    """By the factor-two rule; the loss, one number, may besides be off by what the rule grants a mean.

    The gradient of a float32 adapter has the roundings of the activations that it was computed from. Of the draws in
    bfloat16 the typical errors are compared: one rounding of an activation may treble those of a draw, ours or plain's,
    where over five sets of six draws the largest errors had a median ratio of 0.97 to 1.03.
    """
    assert actual.keys() == plain.keys()
    for name, value in actual.items():
        atol = {"atol": exact["loss"].max().item() * torch.finfo(dtype).eps / 16} if name == "loss" else {}
        roundings = torch.finfo(dtype).eps / torch.finfo(value.dtype).eps
        assert_within_factor_two(name, value, exact[name], plain[name], roundings=roundings, draws=True, **atol)


def logits(model):
    return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("recompute", [None, "sublayer", "layer"])
def test_steps_are_those_of_dense_weights_of_the_same_values(recompute, dtype, dropout, use_dora, of_dense):
    model = make_adapted(dtype=dtype, dropout=dropout, use_dora=use_dora)
    if recompute is not None:
        memkernels.patch(model, recompute=recompute)
    assert_same_step(step(model), *of_dense(dtype, dropout, use_dora), dtype)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("recompute", ["sublayer", "layer"])
@pytest.mark.parametrize("first", ["lora", "patch"])
def test_patch_takes_quantised_weights_into_its_blocks(kind, recompute, first, monkeypatch):
    model = make_adapted(kind)
    plain = dense(model)
    if first == "lora":
        assert memkernels.patch(model, recompute=recompute).left == {}
    else:
        adapted, model = model, make_model(kind)
        memkernels.patch(model, recompute=recompute)
        memkernels.lora(model, 3, 5.0, dropout=0.0, base="nf4")
        model.load_state_dict(adapted.state_dict())
    expected = exact(plain), step(plain)
    monkeypatch.delattr(LoRALinear, "forward")  # a block op takes the layer's tensors and never calls it
    assert_same_step(step(model), *expected)


@pytest.mark.parametrize("kind", ["Phi3", "GPT2"])
def test_projections_that_cannot_be_split_into_blocks_are_called(kind):
    model = make_adapted(kind, width=24)
    plain = dense(model)
    report = memkernels.patch(model, recompute="layer")
    assert all("adapter, weight" in why or "an adapter" in why for why in report.left.values()) and report.left
    assert_same_step(step(model), exact(plain), step(plain))


def test_plain_linears_with_quantised_weights_are_fused(monkeypatch):
    model = make_model()
    for layer in model.model.layers:
        for linear in (module for module in layer.modules() if type(module) is torch.nn.Linear):
            linear.weight = torch.nn.Parameter(quant.quantize_nf4(linear.weight.detach()), requires_grad=False)
    ids = model.get_input_embeddings().weight
    expected = torch.autograd.grad(model(input_ids=IDS, labels=IDS).loss, ids)[0]
    assert memkernels.patch(model, recompute="layer").left == {}
    head = torch.nn.Linear.forward
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda self, x: head(self, x) if self is model.lm_head else None)
    found = torch.autograd.grad(model(input_ids=IDS, labels=IDS).loss, ids)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", LAYERS)
def test_the_report_and_what_is_quantised(kind):
    model = make_model(kind)
    report = memkernels.lora(model, 3, base="nf4")
    layers = adapted_layers(model)
    assert report.adapted == report.quantized == list(layers) and len(layers) == LAYERS[kind]
    assert all(isinstance(layer.weight, quant.NF4Tensor) for layer in layers.values())
    assert report.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert report.dense_bytes == 4 * sum(layer.weight.numel() for layer in layers.values())
    assert report.stored_bytes == sum(part.nbytes for layer in layers.values() for part in layer.weight.parts)
    assert "over quantised weights: " in str(report) and type(model.get_output_embeddings()) is torch.nn.Linear


def test_a_quantised_weight_stays_as_it_is():
    model = make_model()
    weight = quant.quantize_int8(model.model.layers[0].mlp.up_proj.weight.detach())
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(weight, requires_grad=False)
    report = memkernels.lora(model, targets=iter(["up_proj"]), base="nf4")
    kinds = {name: type(model.get_submodule(name).weight) for name in report.quantized}
    assert list(kinds.values()) == [quant.Int8Tensor, quant.NF4Tensor]
    assert model.model.layers[0].mlp.up_proj.weight.codes.data_ptr() == weight.codes.data_ptr()


def quantization_peak(layers, size):
    first, model = (
        torch.nn.Sequential(*(torch.nn.Linear(size, size, dtype=torch.bfloat16) for _ in range(count)))
        for count in (1, layers)
    )
    memkernels.lora(first, 1, base="nf4")  # one-time costs
    return peak_bytes(lambda: memkernels.lora(model, 1, base="nf4"))


def test_a_dense_weight_is_freed_before_the_next_is_quantised():
    # 12 weights of 8 MiB that become 2 MiB each: without freeing, these add up to 25 MiB.
    assert run_in_child(quantization_peak, 12, 2048) <= 8 << 20


@pytest.mark.parametrize("way", ["state_dict", "torch.save", "safetensors"])
@pytest.mark.parametrize("kind", ["Llama", "GPT2"])
def test_state_dict_round_trip(kind, way, tmp_path):
    model = make_adapted(kind, use_dora=True)
    expected, state = logits(model), model.state_dict()
    if way == "torch.save":
        torch.save(state, tmp_path / "state.pt")
        state = torch.load(tmp_path / "state.pt", weights_only=True)
    elif way == "safetensors":
        tied = {name: tensor for name, tensor in state.items() if name != "lm_head.weight"}
        quant.save_file(tied, tmp_path / "state.safetensors")
        state = quant.load_file(tmp_path / "state.safetensors") | {"lm_head.weight": state["lm_head.weight"]}
        # Products over memory aligned as a file is differ in their last bits.
        state = {name: tensor.clone() for name, tensor in state.items()}
    other = make_model(kind)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    memkernels.lora(other, 3, 5.0, base="nf4", use_dora=True)
    logits(other)  # DoRA remembers norms of the weights that are now replaced
    other.load_state_dict(state, assign=way == "safetensors")
    assert torch.equal(logits(other), expected)


@pytest.mark.parametrize("width", [16, 64])
def test_save_pretrained_writes_no_empty_weight(width, tmp_path):
    with pytest.raises(TypeError, match=r"NF4Tensor has no memory of its own: memkernels\.quant\.save_file writes it"):
        make_adapted(width=width).save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("kind", ["Llama", "GPT2"])
def test_peft_reads_what_is_saved(kind, tmp_path):
    model = make_adapted(kind, use_rslora=True)
    memkernels.save_adapter(model, tmp_path)
    base = make_model(kind)
    for name, layer in adapted_layers(model).items():
        weight = base.get_submodule(name).weight
        with torch.no_grad():
            weight.copy_(layer.weight.dequantize().t() if kind == "GPT2" else layer.weight.dequantize())
    theirs = peft.PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-4, atol=1e-5)
    again = make_model(kind)
    memkernels.lora(again, 3, base="nf4", use_rslora=True)
    memkernels.load_adapter(again, tmp_path)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merge_is_dense_and_unmerge_exact(dtype, options):
    model = make_adapted(dtype=dtype, **options)
    expected, before = logits(model), model.state_dict()
    layers = adapted_layers(model)
    merged = {}
    for name, layer in layers.items():
        a, b, *magnitude = (parameter.double() for parameter in layer.adapter.values())
        merged[name] = layer.weight.dequantize(torch.float64) + layer.scaling * b @ a
        if magnitude:
            merged[name] *= (magnitude[0] / merged[name].norm(dim=1))[:, None]
    memkernels.merge_adapter(model)
    for name, layer in layers.items():
        plain = merged[name].to(dtype)
        assert type(layer.weight) is torch.nn.Parameter and not layer.weight.requires_grad
        assert_within_factor_two(name, layer.weight, merged[name], plain)
    if dtype == torch.float32:
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    memkernels.unmerge_adapter(model)
    for name, value in model.state_dict().items():
        parts = (
            zip(value.parts, before[name].parts, strict=True) if hasattr(value, "parts") else [(value, before[name])]
        )
        assert all(torch.equal(ours, of) for ours, of in parts)
    assert torch.equal(logits(model), expected)


def test_a_merged_model_moves_and_unmerges():
    model = make_adapted()
    memkernels.merge_adapter(model)
    model = copy.deepcopy(model).to(torch.bfloat16)
    memkernels.unmerge_adapter(model)
    expected = make_adapted().to(torch.bfloat16)
    assert torch.equal(logits(model), logits(expected))


def test_an_adapter_that_is_not_finite_is_not_merged():
    model = make_adapted()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.adapter["lora_A"][0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj: lora_A: expected finite"):
        memkernels.merge_adapter(model)
    assert all(isinstance(layer.weight, quant.NF4Tensor) for layer in adapted_layers(model).values())


def spoil(model):
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[-1, -1] = float("nan")


def make_double(model):
    model.model.layers[1].mlp.down_proj.double()


def put_on_meta(model):
    model.model.layers[1].mlp.down_proj.to("meta")


@pytest.mark.parametrize(
    ("change", "base", "error", "message"),
    [
        (None, "int3", ValueError, "base: expected one of 'nf4', None, got 'int3'"),
        (spoil, "nf4", ValueError, r"base: model\.layers\.1\.mlp\.down_proj\.weight: expected finite values"),
        (make_double, "nf4", TypeError, r"base: .*down_proj\.weight: expected float32, bfloat16 or float16, got"),
        (
            put_on_meta,
            "nf4",
            ValueError,
            r"base: .*down_proj\.weight: expected values, got a tensor on the meta device",
        ),
    ],
)
def test_bad_input_leaves_the_model_as_it_was(change, base, error, message):
    model = make_model()
    if change is not None:
        change(model)
    before = dict(model.named_parameters())
    versions = {name: parameter._version for name, parameter in before.items()}
    with pytest.raises(error, match=message):
        memkernels.lora(model, base=base)
    after = dict(model.named_parameters())
    assert all(after[name] is parameter and parameter.requires_grad for name, parameter in before.items())
    assert {name: parameter._version for name, parameter in after.items()} == versions
