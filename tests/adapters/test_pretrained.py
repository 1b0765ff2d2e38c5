"""load_base: what from_pretrained and lora(base="nf4") give, without the dense model; damaged and other files."""

import functools
import json

import pytest
import torch
import transformers
from adapter_files import change_tensors
from safetensors.torch import load_file, save_file

import memkernels
from memkernels import quant
from memkernels.testing import peak_bytes, run_in_child

IDS = torch.randint(3, 101, (2, 17), generator=torch.Generator().manual_seed(1))
SIZES = {
    "vocab_size": 101, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip


def config(kind="Llama", **sizes):
    return getattr(transformers, f"{kind}Config")(**SIZES | sizes)


def empty(kind="Llama", **sizes):
    with memkernels.parameters_on_meta():
        return getattr(transformers, f"{kind}ForCausalLM")(config(kind, **sizes)).eval()


def save(folder, kind="Llama", dtype=torch.bfloat16, shard="1GB", **sizes):
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config(kind, **sizes)).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard)


def loaded(folder, kind="Llama", dtype=torch.bfloat16, **sizes):
    """By way of the dense model."""
    return getattr(transformers, f"{kind}ForCausalLM").from_pretrained(folder, dtype=dtype, **sizes).eval()


def state(model):
    found = {}
    for name, tensor in model.state_dict().items():
        found |= quant.to_plain({name: tensor})
    return found | {name: buffer for name, buffer in model.named_buffers() if buffer is not None}


def assert_same(model, other):
    ours, theirs = state(model), state(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("shard", ["1GB", "50KB"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["Llama", "Phi3", "Qwen3"])
def test_it_is_the_model_that_lora_quantises(kind, tied, shard, tmp_path):
    save(tmp_path, kind, shard=shard, tie_word_embeddings=tied)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 or shard == "50KB"
    model = empty(kind, tie_word_embeddings=tied)
    assert all(parameter.is_meta for parameter in model.parameters())
    memkernels.load_base(model, tmp_path)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    assert not any(parameter.requires_grad for parameter in model.parameters())
    other = loaded(tmp_path, kind)
    for each in (model, other):
        torch.manual_seed(0)
        report = memkernels.lora(each, 3, base="nf4")
        assert report.quantized == report.adapted
    assert_same(model, other)
    assert torch.equal(model(input_ids=IDS).logits, other(input_ids=IDS).logits)


def test_conv1d_becomes_linear(tmp_path):
    """GPT-2's weights are (K, N)."""
    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    sizes = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=101, n_positions=64, **dropouts)
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(sizes).to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="50KB")
    with memkernels.parameters_on_meta():
        model = transformers.GPT2LMHeadModel(sizes).eval()
    memkernels.load_base(model, tmp_path)
    other = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    for each in (model, other):
        torch.manual_seed(0)
        report = memkernels.lora(each, 3, base="nf4")
        assert report.quantized == report.adapted and len(report.adapted) == 8
    assert_same(model, other)
    assert torch.equal(model(input_ids=IDS).logits, other(input_ids=IDS).logits)


def test_dtypes_targets_and_dense_bases(tmp_path):
    save(tmp_path, dtype=torch.float32)
    model = empty()
    memkernels.load_base(model, tmp_path, ["q_proj"], dtype=torch.float16)
    dense = load_file(tmp_path / "model.safetensors")
    quantized = [name for name, parameter in model.named_parameters() if isinstance(parameter, quant.NF4Tensor)]
    assert quantized == [f"model.layers.{index}.self_attn.q_proj.weight" for index in (0, 1)]
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float16
        if name in quantized:  # of the file's values, not of those rounded to float16
            assert torch.equal(parameter.packed, quant.quantize_nf4(dense[name]).packed)
    other = empty()
    memkernels.load_base(other, tmp_path, base=None, dtype=torch.float32)
    assert all(torch.equal(parameter, dense[name]) for name, parameter in other.named_parameters())


def test_buffers_are_real_and_those_of_files_are_filled(tmp_path):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(64, 2)
            self.register_buffer("count", torch.tensor(1))
            self.register_buffer("table", torch.arange(3), persistent=False)

    with memkernels.parameters_on_meta():
        model = Model()
    assert model.layer.weight.is_meta and torch.equal(model.table, torch.arange(3))
    assert not torch.nn.Linear(1, 1).weight.is_meta
    tensors = {"layer.weight": torch.ones(2, 64), "layer.bias": torch.ones(2), "count": torch.tensor(7)}
    save_file(tensors | {"unknown": torch.ones(1)}, tmp_path / "model.safetensors")
    memkernels.load_base(model, tmp_path)
    assert model.count == 7 and isinstance(model.layer.weight, quant.NF4Tensor)
    with torch.device("meta"):
        model = Model()
    with pytest.raises(ValueError, match=r"model: table: .* build the model within parameters_on_meta"):
        memkernels.load_base(model, tmp_path)


@pytest.mark.parametrize(
    ("quantize", "besides", "message"),
    [
        (quant.quantize_nf4, "weight.absmax", r"weight\.absmax: missing, though the weight is in NF4"),
        (quant.quantize_int8, "SCB", r"SCB: missing, though the weight is in int8"),
    ],
    ids=["nf4", "int8"],
)
def test_weights_that_the_files_have_quantised_stay_so(quantize, besides, message, tmp_path):
    """As bitsandbytes' checkpoints have them."""
    save(tmp_path)
    file, layer = tmp_path / "model.safetensors", "model.layers.1.mlp.down_proj"
    stored = {name: quantize(of) if "_proj" in name else of for name, of in load_file(file).items()}
    quant.save_file(stored, file)
    for base in ("nf4", None):
        model = empty()
        memkernels.load_base(model, tmp_path, base=base)
        for name, parameter in model.named_parameters():
            expected = stored[name]
            assert parameter.dtype == torch.bfloat16 and not parameter.requires_grad
            pairs = zip(parameter.parts, expected.parts, strict=True) if "_proj" in name else [(parameter, expected)]
            assert all(torch.equal(*pair) for pair in pairs), name
    report = memkernels.lora(model, 3)
    assert report.quantized == report.adapted and len(report.adapted) == 14
    assert model(input_ids=IDS).logits.isfinite().all()
    with pytest.raises(ValueError, match=r"gate_proj\.weight: expected shape \(80, 64\), got \(96, 64\)"):
        memkernels.load_base(empty(intermediate_size=80), tmp_path)
    for change, expected in (
        (lambda of: of.pop(f"{layer}.{besides}"), message),
        (lambda of: of.update({k.replace(layer, "x"): of.pop(k) for k in list(of) if layer in k}), "weight: missing"),
    ):
        plain = load_file(file)
        change(plain)
        save_file(plain, file)
        model = empty()
        with pytest.raises(ValueError, match=rf"model\.safetensors: {layer}\.{expected}"):
            memkernels.load_base(model, tmp_path)
        assert all(parameter.is_meta for parameter in model.parameters())


def load_peak(folder, layers, size):
    with memkernels.parameters_on_meta():
        model, first = (
            torch.nn.Sequential(*(torch.nn.Linear(size, size, bias=False) for _ in range(count)))
            for count in (layers, 1)
        )
    memkernels.load_base(first, folder)  # one-time costs
    return peak_bytes(lambda: memkernels.load_base(model, folder))


def test_pages_of_the_file_are_given_back(tmp_path):
    tensors = {f"{index}.weight": torch.randn(2048, 2048, dtype=torch.bfloat16) for index in range(8)}
    save_file(tensors, tmp_path / "model.safetensors")
    stored = sum(part.nbytes for part in quant.quantize_nf4(tensors["0.weight"]).parts)
    # All of them quantised, one in the file's pages, of 8 MiB, and as much to spare; the whole file is 64 MiB.
    assert run_in_child(load_peak, str(tmp_path), 8, 2048) <= 8 * stored + 2 * (8 << 20)


KEY = "model.layers.1.mlp.down_proj.weight"

change = functools.partial(change_tensors, name="model.safetensors")


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def spoil_header(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"dtype"', b'"dtyqe"', 1))


def set_nan(tensors):
    tensors[KEY][3, 5] = float("nan")


def rename(folder):
    (folder / "model.safetensors").rename(folder / "other.safetensors")


def index(weights):
    def of(folder):
        rename(folder)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))

    return of


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (truncate, ValueError, r"model\.safetensors: truncated, or no safetensors file"),
        (spoil_header, ValueError, r"model\.safetensors: truncated, or no safetensors file"),
        (rename, FileNotFoundError, r"it has neither model\.safetensors nor model\.safetensors\.index\.json"),
        (change(lambda of: of.pop(KEY)), ValueError, rf"model\.safetensors: {KEY}: missing"),
        (change(lambda of: of.update({KEY: of[KEY].t().contiguous()})), ValueError,
         rf"model\.safetensors: {KEY}: expected shape \(64, 96\), got \(96, 64\)"),
        (change(lambda of: of.update({KEY: of[KEY].to(torch.int8)})), ValueError,
         rf"model\.safetensors: {KEY}: expected float32, bfloat16 or float16, got I8"),
        (change(lambda of: of.update({KEY: of[KEY].to(torch.float8_e4m3fn)})), ValueError,
         rf"model\.safetensors: {KEY}: expected float32, bfloat16 or float16, got F8_E4M3"),
        (change(lambda of: of.update({KEY: of[KEY].double()})), ValueError,
         rf"model\.safetensors: {KEY}: expected float32, bfloat16 or float16, got F64"),
        (change(set_nan), ValueError, rf"model\.safetensors: {KEY}: expected finite values"),
        (change(lambda of: of["model.norm.weight"].fill_(float("inf"))), ValueError,
         r"model\.safetensors: model\.norm\.weight: expected finite values"),
        (index({KEY: "missing.safetensors"}), FileNotFoundError, r"missing\.safetensors: no such file, though"),
        (index({KEY: "other.safetensors", "x": "other.safetensors"}), ValueError,
         r"other\.safetensors: x: missing, though"),
        (index({KEY: "other.safetensors"}), ValueError, r"index\.json: model\.embed_tokens\.weight: missing"),
        (index({KEY: "../other.safetensors"}), ValueError, rf"index\.json: {KEY}: expected the name of a file"),
        (index([1]), ValueError, r"index\.json: weight_map: expected the name of a file"),
    ],
)  # fmt: skip
def test_damaged_files_leave_the_model_as_it_was(change, error, message, tmp_path):
    save(tmp_path)
    change(tmp_path)
    model = empty()
    before = dict(model.named_parameters())
    with pytest.raises(error, match=message):
        memkernels.load_base(model, tmp_path)
    after = dict(model.named_parameters())
    assert all(after[name] is parameter and parameter.requires_grad for name, parameter in before.items())


def test_bad_input(tmp_path):
    save(tmp_path)
    for arguments, options, error, message in (
        ((), {"base": "int3"}, ValueError, "base: expected one of 'nf4', None, got 'int3'"),
        ((["x_proj"],), {}, ValueError, "targets: LlamaForCausalLM has no linear layer or embedding 'x_proj'"),
        ((), {"dtype": torch.int8}, TypeError, r"dtype: expected float32, bfloat16 or float16, got torch\.int8"),
    ):
        with pytest.raises(error, match=message):
            memkernels.load_base(empty(), tmp_path, *arguments, **options)
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module"):
        memkernels.load_base({}, tmp_path)
    with pytest.raises(ValueError, match=r"model: .*: expected a parameter on the meta device, got one on cpu"):
        memkernels.load_base(loaded(tmp_path), tmp_path)
