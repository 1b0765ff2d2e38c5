"""Patched models over bitsandbytes' layers, with PEFT's adapters and without, compute what unpatched ones do."""

import copy

import pytest
import torch
from adapted_models import adapted
from bitsandbytes_models import WIDTH, dequantized, in_4bit, in_8bit
from calls import Calls
from training_step import assert_same_step, exact_step, train_step

import memkernels
from memkernels.integrations import bitsandbytes as integration
from memkernels.testing import assert_within_factor_two, saved_bytes

bitsandbytes = pytest.importorskip("bitsandbytes")
peft = pytest.importorskip("peft", reason="peft is not installed: pip install memkernels[hf]")

RECOMPUTE = ("none", "sublayer", "layer")


@pytest.fixture
def make_adapted(make_model):
    """make_adapted(family, dtype, bits=..., of_4bit=..., **options of LoraConfig): the same on every call."""

    def make(family="Llama", dtype=torch.float32, *, autocast=False, of_4bit=None, bits=4, **options):
        model = make_model(family, dtype, **WIDTH)
        model = in_8bit(model) if bits == 8 else in_4bit(model, **(of_4bit or {}))
        return adapted(model, autocast=autocast, **options)

    return make


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize(
    ("dtype", "autocast", "nested"),
    [(torch.float32, False, False), (torch.bfloat16, False, True), (torch.bfloat16, True, True)],
    ids=["float32", "bfloat16", "float32 adapter of bfloat16"],
)
def test_loss_and_gradients(make_adapted, make_batch, dtype, autocast, options, nested):
    batch = make_batch("right")
    make = lambda: make_adapted("Llama", dtype, autocast=autocast, of_4bit={"nested": nested}, **options)  # noqa: E731
    model = make()
    plain, exact = train_step(model, batch), exact_step(dequantized(make()), batch)
    for recompute in RECOMPUTE:
        report = memkernels.patch(model, recompute=recompute)
        assert report.left == {}
        assert "LoRA adapter" in report.replaced.values()
        with Calls() as calls:
            assert_same_step(train_step(model, batch), exact, plain, dtype)
        assert any("lora" in name for name in calls.names)
        memkernels.unpatch(model)
    assert all(torch.equal(value, plain[name]) for name, value in train_step(model, batch).items())


def test_one_projection_of_several(make_adapted, make_batch):
    batch, make = make_batch(), lambda: make_adapted("Phi3")
    model = make()
    plain, exact = train_step(model, batch), exact_step(dequantized(make()), batch)
    for recompute in RECOMPUTE:
        assert memkernels.patch(model, recompute=recompute).left == {}
        assert_same_step(train_step(model, batch), exact, plain)
        memkernels.unpatch(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("quantize", [in_4bit, in_8bit])
def test_without_adapters(make_model, make_batch, quantize, dtype):
    """What is trained are embeddings, norms and the head."""
    batch, make = make_batch("right"), lambda: quantize(make_model("Llama", dtype, **WIDTH))
    model = make()
    plain, exact = train_step(model, batch), exact_step(dequantized(make()), batch)
    for recompute in RECOMPUTE:
        assert memkernels.patch(model, recompute=recompute).left == {}
        assert_same_step(train_step(model, batch), exact, plain, dtype)
        memkernels.unpatch(model)


@pytest.mark.parametrize(("bits", "kind"), [(4, "Linear4bit"), (8, "Linear8bitLt")])
@pytest.mark.parametrize("recompute", ["sublayer", "layer"])
def test_blocks_call_no_layer(make_adapted, make_batch, monkeypatch, recompute, bits, kind):
    model, batch, called = make_adapted(bits=bits), make_batch(), []
    for place in (peft.tuners.lora.bnb, bitsandbytes.nn):
        forward = getattr(place, kind).forward
        monkeypatch.setattr(
            getattr(place, kind), "forward", lambda layer, x, forward=forward: called.append(layer) or forward(layer, x)
        )
    model(**batch)
    assert len(called) == 2 * 14
    called.clear()
    memkernels.patch(model, recompute=recompute)
    model(**batch).loss.backward()
    assert not called


def attributes(model):
    """Of each module and parameter, and of bitsandbytes' state, by name, and which object each is."""
    found = {}
    for name, of in [*model.named_modules(), *model.named_parameters()]:
        for part, held in (("", of), ("state.", getattr(of, "state", None))):
            found |= {f"{name}.{part}{key}": id(value) for key, value in getattr(held, "__dict__", {}).items()}
    return found | {name: (id(of), of.data_ptr(), of._version) for name, of in model.named_parameters()}


@pytest.mark.parametrize("bits", [4, 8])
def test_unpatch_leaves_what_was_there(make_adapted, make_batch, bits):
    model, batch = make_adapted(bits=bits), make_batch()
    model(**batch)  # in which bitsandbytes settles its state
    before = attributes(model)
    for recompute in RECOMPUTE:
        memkernels.patch(model, recompute=recompute)
        model(**batch).loss.backward()
        memkernels.unpatch(model)
    assert attributes(model) == before


def test_norms_of_rows_are_computed_again_where_the_weight_was_written():
    """As by load_state_dict, which writes codes in place."""
    model = in_4bit(torch.nn.Sequential(torch.nn.Linear(64, 30)), nested=False)
    config = peft.LoraConfig(target_modules=["0"], r=3, use_dora=True, init_lora_weights=False)
    model, x = peft.get_peft_model(model, config), torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    memkernels.patch(model)
    before, weight = model(x), model.base_model.model[0].base_layer.weight
    with torch.no_grad():
        weight.copy_(weight.roll(1, 0) // 2)
    found = model(x)
    memkernels.unpatch(model)
    torch.testing.assert_close(found, model(x))
    assert not torch.allclose(found, before)


@pytest.mark.parametrize("nested", [False, True])
def test_a_weight_is_read_where_it_is(nested):
    layer = in_4bit(torch.nn.Sequential(torch.nn.Linear(70, 10)), nested=nested)[0]
    weight, bias = integration.weight_and_bias(layer, torch.zeros(1))
    state = layer.weight.quant_state
    own = (layer.weight.data, state.absmax, *((state.state2.absmax, state.state2.code, state.offset) if nested else ()))
    assert [part.data_ptr() for part in weight.parts] == [part.data_ptr() for part in own]
    assert bias.data_ptr() == layer.bias.data_ptr()
    assert torch.equal(weight.dequantize(), bitsandbytes.functional.dequantize_4bit(layer.weight.data, state))


def test_saves_the_input_once_and_the_low_rank_of_it(make_adapted):
    torch.manual_seed(0)
    model = in_4bit(torch.nn.Sequential(torch.nn.Linear(20, 30)))
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"], r=3, init_lora_weights=False))
    memkernels.patch(model)
    state = model.base_model.model[0].base_layer.weight.quant_state
    x = torch.randn(5, 20, requires_grad=True)
    of_weight = (state.absmax, state.state2.absmax, state.state2.code, state.offset)
    saved = saved_bytes(lambda: model(x), exclude=(*model.parameters(), *of_weight))
    assert saved == 5 * 4 * (20 + 3)


def test_fp4_is_left_and_said(make_adapted, make_batch):
    model, batch = make_adapted(of_4bit={"quant_type": "fp4"}), make_batch()
    plain = train_step(model, batch)
    left = memkernels.patch(model, recompute="none").left
    assert set(left.values()) == {"an adapter of a base with a weight in FP4"} and len(left) == 14
    for name, value in train_step(model, batch).items():
        torch.testing.assert_close(value, plain[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "dtype", "options"),
    [("Llama", torch.float32, {"use_dora": True}), ("Llama", torch.bfloat16, {}), ("Phi3", torch.bfloat16, {})],
    ids=str,
)
def test_8_bits(make_adapted, make_batch, family, dtype, options):
    batch, make = make_batch("right"), lambda: make_adapted(family, dtype, bits=8, **options)
    plain, exact, model = train_step(make(), batch), exact_step(dequantized(make()), batch), make()
    if not options:  # PEFT's DoRA fails in its second call
        train_step(model, batch)  # in which bitsandbytes moves the scales
    for recompute in RECOMPUTE:
        assert memkernels.patch(model, recompute=recompute).left == {}
        assert_same_step(train_step(model, batch), exact, plain, dtype)
        memkernels.unpatch(model)


def test_8_bits_in_evaluation_are_left_and_said(make_adapted, make_batch, monkeypatch):
    """There bitsandbytes rounds their input to 8 bits too."""
    model, called, forward = make_adapted(bits=8), [], bitsandbytes.nn.Linear8bitLt.forward
    memkernels.patch(model, recompute="layer")
    monkeypatch.setattr(
        bitsandbytes.nn.Linear8bitLt, "forward", lambda layer, x: called.append(layer) or forward(layer, x)
    )
    model(**make_batch())
    assert not called
    model.eval()(**make_batch())
    assert len(called) == 14
    memkernels.unpatch(model)
    reasons = list(memkernels.patch(model, recompute="none").left.values())
    assert reasons == ["an adapter of a base with an 8-bit weight in evaluation"] * 14


def test_before_it_is_quantised_it_is_left_and_said():
    layer = bitsandbytes.nn.Linear4bit(20, 30, quant_type="nf4")
    model = torch.nn.Sequential(layer)
    model.is_loaded_in_4bit = True
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"]))
    (left,) = memkernels.patch(model).left.values()
    assert left == "an adapter of a base with a 4-bit weight that bitsandbytes has yet to quantise"


def test_another_compute_dtype_is_left_and_said(make_adapted, make_batch):
    """As by BitsAndBytesConfig's own: products in float32 in a model of bfloat16."""
    batch = make_batch()
    make = lambda: make_adapted("Llama", torch.bfloat16, of_4bit={"compute_dtype": torch.float32})  # noqa: E731
    model = make()
    plain, exact = train_step(model, batch), exact_step(dequantized(make()), batch)
    report = memkernels.patch(model, recompute="layer")
    expected = "a compute_dtype of torch.float32 for an input of torch.bfloat16"
    assert sum(expected in reason for reason in report.left.values()) == 14
    with Calls() as calls:
        assert_same_step(train_step(model, batch), exact, plain, torch.bfloat16)
    assert not any("lora" in name for name in calls.names)


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_autocast_to_the_compute_dtype(make_adapted, make_batch, recompute):
    """The common recipe: a model in float32 around layers that compute in bfloat16, under autocast."""
    batch, make = make_batch("right"), lambda: make_adapted(of_4bit={"compute_dtype": torch.bfloat16})
    model = make()
    exact = exact_step(dequantized(make()), batch)
    with torch.autocast("cpu", torch.bfloat16):
        plain = train_step(model, batch)
        memkernels.patch(model, recompute=recompute)
        with Calls() as calls:
            ours = train_step(model, batch)
    assert "lora_quantized_up" in calls.names
    assert_same_step(ours, exact, plain, torch.bfloat16)


def test_merged_and_disabled(make_adapted, make_batch):
    batch, model = make_batch(), make_adapted()
    model.base_model.model.model.embed_tokens.requires_grad_()
    memkernels.patch(model, recompute="layer")
    for change in (model.merge_adapter, model.unmerge_adapter):
        change()
        ours = train_step(model, batch)
        memkernels.unpatch(model)
        plain, exact = train_step(model, batch), exact_step(dequantized(copy.deepcopy(model)), batch)
        assert_same_step(ours, exact, plain)
        memkernels.patch(model, recompute="layer")
    ids = batch["input_ids"]
    with model.disable_adapter():
        ours = model(input_ids=ids).logits
        memkernels.unpatch(model)
        plain, exact = model(input_ids=ids).logits, dequantized(model).double()(input_ids=ids).logits
    assert_within_factor_two("logits", ours, exact, plain)


@torch.no_grad()
def test_each_sample_with_its_own_adapter(make_adapted, make_batch, monkeypatch):
    ids, model, names = make_batch()["input_ids"], make_adapted(), ["other", "__base__"]
    model.add_adapter("other", peft.LoraConfig(target_modules=["q_proj", "up_proj"], r=2, init_lora_weights=False))
    for layer in filter(integration.is_layer, model.eval().modules()):
        layer.support_avx512bf16_for_cpu = False  # or it packs weights where no gradient is wanted, in another layout
    plain = model(input_ids=ids, adapter_names=names).logits
    exact = dequantized(copy.deepcopy(model)).double()(input_ids=ids, adapter_names=names).logits
    memkernels.patch(model)
    monkeypatch.delattr(peft.tuners.lora.bnb.Linear4bit, "_mixed_batch_forward")
    assert_within_factor_two("logits", model(input_ids=ids, adapter_names=names).logits, exact, plain)


def test_loaded_by_transformers(make_model, make_batch, tmp_path):
    transformers, dtype = pytest.importorskip("transformers"), torch.bfloat16
    make_model("Llama", dtype, **WIDTH).save_pretrained(tmp_path)
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )

    def make():
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype=dtype)
        torch.manual_seed(0)
        adapters = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4, init_lora_weights=False)
        return peft.get_peft_model(model, adapters).train()

    batch, model = make_batch("right"), make()
    plain, exact = train_step(model, batch), exact_step(dequantized(make()), batch)
    report = memkernels.patch(model)
    assert report.left == {} and list(report.replaced.values()).count("LoRA adapter") == 14
    assert_same_step(train_step(model, batch), exact, plain, dtype)
