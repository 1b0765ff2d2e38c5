"""lora, load_adapter and nn.LoRALinear over bitsandbytes' layers, whose weights they read; against PEFT over them."""

import copy

import pytest
import torch
from adapted_models import adapted_layers, randomise
from bitsandbytes_models import WIDTH, bitsandbytes, dequantized, in_4bit, in_8bit
from training_step import assert_same_step, exact_step, train_step

import memkernels
from memkernels import quant
from memkernels.integrations import bitsandbytes as integration
from memkernels.nn import LoRALinear

peft = pytest.importorskip("peft", reason="peft is not installed: pip install memkernels[hf]")

PREFIX = "base_model.model."
QUANTIZE = {4: in_4bit, 8: in_8bit}


@pytest.fixture
def make_quantized(make_model):
    """make_quantized(dtype, bits, **options of in_4bit): the same on every call."""
    return lambda dtype=torch.float32, bits=4, **options: QUANTIZE[bits](make_model("Llama", dtype, **WIDTH), **options)


def adapted(model, **options):
    memkernels.lora(model, 4, 6.0, **{"dropout": 0.0} | options)
    return randomise(model)


@pytest.mark.parametrize(
    ("dtype", "bits", "options"),
    [
        (torch.float32, 4, {"use_dora": True}),
        (torch.bfloat16, 4, {}),
        (torch.float32, 8, {}),
    ],
    ids=["float32 4 bits dora", "bfloat16 4 bits", "float32 8 bits"],
)
def test_loss_and_gradients_are_those_of_peft(make_quantized, make_batch, tmp_path, dtype, bits, options):
    batch, model = make_batch("right"), adapted(make_quantized(dtype, bits), **options)
    memkernels.save_adapter(model, tmp_path)

    def theirs():
        return peft.PeftModel.from_pretrained(make_quantized(dtype, bits), tmp_path, is_trainable=True).train()

    plain, exact = train_step(theirs(), batch), exact_step(dequantized(theirs()), batch)
    plain, exact = ({name.removeprefix(PREFIX): value for name, value in of.items()} for of in (plain, exact))
    for recompute in (None, "sublayer", "layer"):
        if recompute is not None:
            assert memkernels.patch(model, recompute=recompute).left == {}
        assert_same_step(train_step(model, batch), exact, plain, dtype)
        if recompute is not None:
            memkernels.unpatch(model)


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_stay_where_they_are(make_quantized, bits):
    model = make_quantized(bits=bits)
    stored = {name: module for name, module in model.named_modules() if integration.is_layer(module)}
    memory = {name: module.weight.data_ptr() for name, module in stored.items()}
    report = memkernels.lora(model, 3, base="nf4")
    assert report.adapted == report.quantized == list(memory) and not report.left
    for name, layer in adapted_layers(model).items():
        assert type(layer.base_layer) is torch.nn.Linear and layer.weight.parts[0].data_ptr() == memory[name]


def test_dense_layers_beside_them_are_quantised(make_quantized):
    model = make_quantized()
    model.model.layers[0].mlp.up_proj = torch.nn.Linear(64, 104)
    report = memkernels.lora(model, 3, base="nf4")
    assert len(report.quantized) == 14
    assert all(type(layer.weight) is quant.NF4Tensor for layer in adapted_layers(model).values())


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_come_in_the_dtype_of_the_model(make_model, make_batch, dtype, compute_dtype):
    """Whatever they were quantised from, and compute_dtype is; no bias tells."""
    model = make_model("Llama", attention_bias=False, mlp_bias=False, **WIDTH)
    model = in_4bit(model, compute_dtype=compute_dtype).to(dtype)
    memkernels.lora(model, 3)
    assert {layer.weight.dtype for layer in adapted_layers(model).values()} == {dtype}
    model(**make_batch()).loss.backward()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_begins_as_that_of_bitsandbytes(bits, bias):
    base = QUANTIZE[bits](torch.nn.Sequential(torch.nn.Linear(64, 10, bias=bias)))[0]
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(2))
    layer = LoRALinear(base, 3)
    if bits == 8 and not bias:
        assert layer.weight.dtype == torch.float16  # in which bitsandbytes quantises
        layer.base_layer.float()
    torch.testing.assert_close(layer(x), base(x), rtol=1e-4, atol=1e-4)
    assert not any(parameter.requires_grad for parameter in layer.base_layer.parameters())


def test_files_of_peft_are_loaded(make_quantized, make_batch, tmp_path):
    model = adapted(make_quantized())
    memkernels.save_adapter(model, tmp_path)
    again = make_quantized()
    assert set(memkernels.load_adapter(again, tmp_path)) == adapted_layers(model).keys()
    with torch.no_grad():
        expected, found = (of.eval()(input_ids=make_batch()["input_ids"]).logits for of in (model, again))
    assert torch.equal(found, expected)


def test_merge_and_unmerge(make_quantized, make_batch):
    model, ids = adapted(make_quantized()).eval(), make_batch()["input_ids"]
    before = {name: [part.clone() for part in layer.weight.parts] for name, layer in adapted_layers(model).items()}
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        memkernels.merge_adapter(model)
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    memkernels.unmerge_adapter(model)
    for name, layer in adapted_layers(model).items():
        assert all(map(torch.equal, layer.weight.parts, before[name]))


def not_quantised(model):
    linear = bitsandbytes.nn.Linear4bit(64, 104, quant_type="nf4")
    model.model.layers[1].mlp.up_proj = linear


def in_fp4(model):
    layer = in_4bit(torch.nn.Sequential(torch.nn.Linear(64, 104)), quant_type="fp4")[0]
    model.model.layers[1].mlp.up_proj = layer


def packed(model):
    """As bitsandbytes packs weights to infer on CPUs with bfloat16 instructions."""
    model.model.layers[1].mlp.up_proj.weight.quant_state.packing_format_for_cpu = True


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (in_fp4, "a weight in FP4"),
        (not_quantised, "a 4-bit weight that bitsandbytes has yet to quantise"),
        (packed, "a 4-bit weight in another layout"),
    ],
)
def test_what_cannot_be_read_is_refused(make_quantized, tmp_path, change, reason):
    memkernels.save_adapter(adapted(make_quantized()), tmp_path)
    model = make_quantized()
    change(model)
    before = dict(model.named_modules())
    trained = [parameter.requires_grad for parameter in model.parameters()]
    message = rf"model\.layers\.1\.mlp\.up_proj: expected a weight that can be read where it is, got {reason}: quantise"
    for call in (lambda: memkernels.lora(model), lambda: memkernels.load_adapter(model, tmp_path)):
        with pytest.raises(TypeError, match=message):
            call()
    with pytest.raises(TypeError, match=rf"base_layer: expected .*{reason}"):
        LoRALinear(model.model.layers[1].mlp.up_proj)
    assert dict(model.named_modules()) == before
    assert [parameter.requires_grad for parameter in model.parameters()] == trained
    memkernels.lora(copy.copy(model), targets=["q_proj"])
