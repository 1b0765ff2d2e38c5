"""Checkpoints: round trips with bitsandbytes, and damaged ones."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from memkernels import quant
from memkernels.quant import checkpoint

STATE = "0.weight.quant_state.bitsandbytes__nf4"


def bitsandbytes_layers(dtype, nested):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    dense = torch.nn.Sequential(torch.nn.Linear(640, 70), torch.nn.Linear(70, 64, bias=False)).to(dtype)
    layers = torch.nn.Sequential(
        bitsandbytes.nn.Linear4bit(640, 70, compute_dtype=dtype, compress_statistics=nested, quant_type="nf4"),
        bitsandbytes.nn.Linear4bit(
            70, 64, bias=False, compute_dtype=dtype, compress_statistics=nested, quant_type="nf4"
        ),
    )
    layers.load_state_dict(dense.state_dict())
    return layers.to(dtype).to("cpu")


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_round_trip_with_bitsandbytes(tmp_path, dtype, nested):
    layers = bitsandbytes_layers(dtype, nested)
    theirs = layers.state_dict()
    save_file({name: tensor.contiguous() for name, tensor in theirs.items()}, tmp_path / "theirs.safetensors")
    state = quant.load_file(tmp_path / "theirs.safetensors")
    assert set(state) == {"0.weight", "0.bias", "1.weight"}
    import bitsandbytes.functional as functional

    for index in (0, 1):
        weight = layers[index].weight
        assert state[f"{index}.weight"].dtype == dtype
        whole = functional.dequantize_4bit(weight.data, weight.quant_state)
        assert torch.equal(state[f"{index}.weight"].dequantize(), whole)

    model = torch.nn.Sequential(torch.nn.Linear(640, 70), torch.nn.Linear(70, 64, bias=False))
    model.load_state_dict(state, assign=True)
    quant.save_file(model.state_dict(), tmp_path / "ours.safetensors")
    ours = load_file(tmp_path / "ours.safetensors")
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        if "quant_state" in name:
            assert json.loads(bytes(ours[name].tolist())) == json.loads(bytes(tensor.tolist()))
        else:
            assert torch.equal(ours[name], tensor), name
    again = functional.QuantState.from_dict(
        {name.removeprefix("0."): tensor for name, tensor in ours.items() if name.startswith("0.weight.")}, "cpu"
    )
    assert again == layers[0].weight.quant_state


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    quant.save_file({"weight": torch.zeros(3)}, path)
    before = path.read_bytes()

    def fail(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "save_plain_file", fail)
    with pytest.raises(OSError, match="disk full"):
        quant.save_file({"weight": torch.ones(3)}, path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name] and path.read_bytes() == before


@pytest.mark.parametrize("quantize", [quant.quantize_nf4, quant.quantize_int8])
def test_safetensors_alone_writes_no_empty_weight(quantize, tmp_path):
    state = {"weight": quantize(torch.ones(4, 64)), "other": quantize(torch.ones(4, 64))}
    with pytest.raises(TypeError, match=r"has no memory of its own: memkernels\.quant\.save_file writes it"):
        save_file(state, tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def stored():
    """A good file's tensors."""
    weight = quant.quantize_nf4(torch.randn(70, 640, generator=torch.Generator().manual_seed(0)))
    return quant.to_plain({"0.weight": weight, "0.bias": torch.zeros(70)})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("0.weight.absmax", None, "0.weight.absmax: missing"),
        ("0.weight", None, "0.weight: missing"),
        ("0.weight.nested_quant_map", None, "0.weight.nested_quant_map: missing"),
        ("0.weight", torch.zeros(22399, 1, dtype=torch.uint8), "0.weight: expected 22400 elements"),
        ("0.weight.absmax", torch.zeros(700), r"0.weight.absmax: expected torch.uint8"),
        ("0.weight.absmax", torch.zeros(699, dtype=torch.uint8), "0.weight.absmax: expected 700 elements"),
        ("0.weight.nested_absmax", torch.zeros(2), "0.weight.nested_absmax: expected 3 elements"),
        ("0.weight.nested_absmax", torch.full((3,), torch.nan), "0.weight.nested_absmax: expected finite"),
        ("0.weight.quant_map", torch.zeros(16), "0.weight.quant_map: expected the values of NF4"),
        (STATE, torch.tensor([123, 34], dtype=torch.uint8), f"{STATE}: expected JSON"),
        (STATE, {"quant_type": "fp4"}, "expected quant_type nf4"),
        (STATE, {"blocksize": 63}, "expected a blocksize"),
        (STATE, {"blocksize": 128}, "0.weight.absmax: expected 350 elements"),
        (STATE, {"dtype": "int8"}, "expected a dtype"),
        (STATE, {"dtype": ["float32"]}, "expected a dtype"),
        (STATE, {"shape": [70, "640"]}, "expected a shape"),
        (STATE, {"shape": [70, 641]}, "0.weight: expected 22435 elements"),
        (STATE, {"nested_blocksize": 128}, "expected nested_blocksize 256"),
        (STATE, {"nested_offset": None}, "expected a finite nested_offset"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named(stored, load_stored, key, value, message):
    load_stored(stored, 640)
    changed = dict(stored)
    if value is None:
        del changed[key]
    elif isinstance(value, dict):
        state = json.loads(bytes(changed[key].tolist())) | value
        changed[key] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    else:
        changed[key] = value
    with pytest.raises(ValueError, match=message):
        load_stored(changed, 640)


@pytest.mark.parametrize("kept", [4, 100, 20000])
def test_a_truncated_file_is_named(stored, tmp_path, kept):
    path = tmp_path / "model.safetensors"
    save_file(stored, path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"model\.safetensors: not a whole safetensors file"):
        quant.load_file(path)


def test_fp4_is_refused():
    with pytest.raises(ValueError, match=r"file: w\.quant_state\.bitsandbytes__fp4: the weight is in FP4"):
        quant.from_plain({"w.quant_state.bitsandbytes__fp4": torch.zeros(1)}, "file")
