"""Weights in int8 in checkpoints: round trips, with bitsandbytes and transformers too, and damaged files."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from memkernels import quant

HEADER = "memkernels.int8_dtypes"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def assert_same(actual, expected):
    assert type(actual) is type(expected) and actual.encoding == expected.encoding
    assert all(torch.equal(*pair) for pair in zip(actual.parts, expected.parts, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_round_trip(tmp_path, dtype):
    """Of a layer, of experts and of a vector, beside NF4 and a plain tensor."""
    weights = {"0.weight": (70, 96), "experts.gate_up_proj": (3, 8, 10), "weight": (5,), "empty.weight": (4, 0)}
    state = {
        name: quant.quantize_int8(torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype))
        for name, shape in weights.items()
    }
    state |= {"1.weight": quant.quantize_nf4(torch.ones(4, 64)), "0.bias": torch.zeros(70)}
    path = tmp_path / "model.safetensors"
    quant.save_file(state, path)
    loaded = quant.load_file(path)
    assert loaded.keys() == state.keys() and torch.equal(loaded.pop("0.bias"), state["0.bias"])
    for name, weight in loaded.items():
        assert_same(weight, state[name])
    for name, weight in quant.from_plain(quant.to_plain(state), int8_dtypes=dict.fromkeys(weights, dtype)).items():
        if name in weights:
            assert_same(weight, state[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_state_dict_of_a_model(tmp_path, dtype):
    make = lambda: torch.nn.Sequential(torch.nn.Linear(96, 70), torch.nn.Linear(70, 4)).to(dtype)  # noqa: E731
    torch.manual_seed(0)
    model, other, x = make(), make(), torch.randn(5, 96, dtype=dtype)
    for layer in model:
        layer.weight = torch.nn.Parameter(quant.quantize_int8(layer.weight.detach()), requires_grad=False)
    quant.save_file(model.state_dict(), tmp_path / "model.safetensors")
    other.requires_grad_(False).load_state_dict(quant.load_file(tmp_path / "model.safetensors"), assign=True)
    assert torch.equal(other(x), model(x))


def bitsandbytes_layer(bias=True):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    layer = bitsandbytes.nn.Linear8bitLt(96, 70, bias=bias, has_fp16_weights=False)
    return layer.to("cpu")


def test_reads_what_bitsandbytes_wrote(tmp_path):
    layer = torch.nn.Sequential(bitsandbytes_layer())
    save_file({name: tensor.contiguous() for name, tensor in layer.state_dict().items()}, tmp_path / "theirs")
    state = quant.load_file(tmp_path / "theirs")
    assert set(state) == {"0.weight", "0.bias"} and state["0.weight"].dtype == torch.float16
    values = layer[0].weight.CB.float() * (layer[0].weight.SCB[:, None] / 127)
    assert torch.equal(state["0.weight"].dequantize(torch.float32), values)


def test_bitsandbytes_reads_what_was_written(tmp_path):
    weight = quant.quantize_int8(torch.randn(70, 96, generator=torch.Generator().manual_seed(1)))
    quant.save_file({"weight": weight, "bias": torch.ones(70)}, tmp_path / "ours")
    layer = bitsandbytes_layer()
    layer.load_state_dict(load_file(tmp_path / "ours"))
    assert torch.equal(layer.weight.data, weight.codes) and torch.equal(layer.weight.SCB, weight.absmax)


def test_transformers_reads_what_was_written(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
             "num_key_value_heads": 2, "vocab_size": 50}  # fmt: skip
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    state = {
        name: quant.quantize_int8(tensor) if "_proj" in name else tensor for name, tensor in model.state_dict().items()
    }
    quant.save_file(state, tmp_path / "model.safetensors")
    config = model.config.to_dict() | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"]}))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for name, tensor in state.items():
        layer = loaded.get_submodule(name.rpartition(".")[0])
        if "_proj" in name:
            assert torch.equal(layer.weight.data, tensor.codes) and torch.equal(layer.weight.SCB, tensor.absmax), name
        else:
            assert torch.equal(layer.weight, tensor), name


@pytest.fixture
def stored(tmp_path):
    """A good file's tensors and header."""
    weight = quant.quantize_int8(torch.randn(70, 96, generator=torch.Generator().manual_seed(0)))
    quant.save_file({"0.weight": weight, "0.bias": torch.zeros(70)}, tmp_path / "good")
    with safe_open(tmp_path / "good", framework="pt") as file:
        return load_file(tmp_path / "good"), file.metadata()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("0.SCB", None, "0.SCB: missing, though the weight is in int8"),
        ("0.weight", None, "0.weight: missing, though the weight is in int8"),
        ("0.weight", torch.zeros(70, 96), r"0.weight: expected torch.int8, got torch.float32"),
        ("0.weight", torch.zeros(69, 96, dtype=torch.int8), "0.SCB: expected 69 elements"),
        ("0.weight", torch.tensor(1, dtype=torch.int8), "0.weight: expected at least one dimension"),
        ("0.SCB", torch.zeros(71), "0.SCB: expected 70 elements"),
        ("0.SCB", torch.zeros(70, dtype=torch.float16), r"0.SCB: expected torch.float32"),
        ("0.SCB", torch.full((70,), torch.inf), "0.SCB: expected finite"),
        ("0.weight_format", torch.tensor(1, dtype=torch.uint8), "0.weight_format: expected 0"),
        ("0.weight_format", torch.zeros(2, dtype=torch.uint8), "0.weight_format: expected 0"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named(stored, load_stored, key, value, message):
    tensors, header = stored
    load_stored(tensors, 96, header)
    changed = {name: tensor for name, tensor in (tensors | {key: value}).items() if tensor is not None}
    with pytest.raises(ValueError, match=message):
        load_stored(changed, 96, header)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("{", "expected JSON"),
        ("[]", "expected a JSON object"),
        ('{"1.weight": "float32"}', "it names 1.weight, which is not stored in int8"),
        ('{"0.weight": "int8"}', "expected a dtype of float32, bfloat16, float16, got 'int8'"),
        ('{"0.weight": ["float32"]}', "expected a dtype"),
    ],
)
def test_a_header_that_does_not_fit_is_named(stored, load_stored, said, message):
    with pytest.raises(ValueError, match=f"{HEADER}: {message}"):
        load_stored(stored[0], 96, {"format": "pt", HEADER: said})


def test_without_the_format_codes_are_by_rows(stored, load_stored, tmp_path):
    """As in files of old releases of bitsandbytes."""
    tensors, _ = stored
    del tensors["0.weight_format"]
    load_stored(tensors, 96, {"format": "pt"})
    assert quant.load_file(tmp_path / "model.safetensors")["0.weight"].dtype == torch.float16
