"""load_base of files that transformers does not load as they are: a matrix an expert, other names; damaged ones."""

import functools

import pytest
import torch
import transformers
from adapter_files import change_tensors
from safetensors.torch import load_file
from transformers import conversion_mapping
from transformers.core_model_loading import Transpose, WeightConverter

import memkernels
from memkernels import quant
from memkernels.quant.nf4 import quantize_nf4_pieces
from memkernels.testing import peak_bytes, run_in_child

SIZES = {
    "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 101,
    "num_key_value_heads": 2, "num_experts_per_tok": 2, "experts_implementation": "eager", "pad_token_id": 0,
}  # fmt: skip
FAMILIES = {
    "Mixtral": {"num_local_experts": 3},
    "Qwen3Moe": {"num_experts": 3, "moe_intermediate_size": 20, "head_dim": 8},
    "Olmoe": {"num_experts": 3},
}
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
IDS = torch.randint(3, 101, (2, 17), generator=torch.Generator().manual_seed(1))


def make(family="Mixtral", **sizes):
    config = getattr(transformers, f"{family}Config")(**SIZES | FAMILIES[family] | sizes)
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


def empty(family="Mixtral", **sizes):
    with memkernels.parameters_on_meta():
        return make(family, **sizes)


def save(folder, family="Mixtral", shard="1GB", **sizes):
    torch.manual_seed(0)
    make(family, **sizes).to(torch.bfloat16).save_pretrained(folder, max_shard_size=shard)


def dense(folder, family="Mixtral"):
    return getattr(transformers, f"{family}ForCausalLM").from_pretrained(
        folder, dtype=torch.bfloat16, experts_implementation="eager"
    )


def assert_same(model, other):
    ours, theirs = (quant.to_plain(of.state_dict()) for of in (model, other))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("shard", ["1GB", "10KB"])
@pytest.mark.parametrize("family", FAMILIES)
def test_experts_of_files_become_one_tensor(family, shard, tmp_path):
    save(tmp_path, family, shard)
    stored = {key for file in tmp_path.glob("*.safetensors") for key in load_file(file)}
    assert sum(".experts.2." in key for key in stored) == 2 * 3
    model = empty(family)
    memkernels.load_base(model, tmp_path, base=None)
    assert_same(model, dense(tmp_path, family))
    model, other = empty(family), dense(tmp_path, family).eval()
    memkernels.load_base(model, tmp_path, target_parameters=BOTH)
    for each in (model, other):
        torch.manual_seed(0)
        report = memkernels.lora(each, 3, dropout=0.0, base="nf4", target_parameters=BOTH)
        assert report.quantized == report.adapted and len(report.adapted) == 2 * (4 + 2) and not report.left
    assert_same(model, other)
    assert torch.equal(model(input_ids=IDS).logits, other(input_ids=IDS).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_transformers_keeps_in_float32_stays_so(dtype, tmp_path):
    """DeepSeek-V3's router and the bias of its scores, which the files have in float32."""
    sizes = {
        "n_routed_experts": 4, "moe_intermediate_size": 20, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1,
        "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
        "num_key_value_heads": 4,
    }  # fmt: skip
    config = transformers.DeepseekV3Config(**SIZES | sizes)
    written = transformers.DeepseekV3ForCausalLM(config)
    torch.nn.init.normal_(written.model.layers[1].mlp.gate.e_score_correction_bias)
    written.save_pretrained(tmp_path)
    with memkernels.parameters_on_meta():
        model = transformers.DeepseekV3ForCausalLM(config)
    memkernels.load_base(model, tmp_path, base=None, dtype=dtype)
    assert_same(model, transformers.DeepseekV3ForCausalLM.from_pretrained(tmp_path, dtype=dtype))


def test_quantised_experts_without_adapters_are_computed_by_patch(tmp_path):
    save(tmp_path)
    model, other = empty(), dense(tmp_path).eval()
    memkernels.load_base(model, tmp_path, ["q_proj"], target_parameters=BOTH[1:])
    quantized = [name for name, of in model.named_parameters() if isinstance(of, quant.NF4Tensor)]
    assert quantized == [
        f"model.layers.{i}.{of}" for i in (0, 1) for of in ("self_attn.q_proj.weight", "mlp." + BOTH[1])
    ]
    for name in quantized:
        parent, _, weight = name.rpartition(".")
        values = quant.dequantize(model.get_parameter(name))
        setattr(other.get_submodule(parent), weight, torch.nn.Parameter(values))
    for each in (model, other):
        memkernels.patch(each)
    assert torch.equal(model(input_ids=IDS).logits, other(input_ids=IDS).logits)


@pytest.mark.parametrize("prefixed", [False, True])
def test_names_of_another_class_of_the_family(prefixed, tmp_path):
    """As GPT-2's own files have them: those of the model without a head."""
    sizes = transformers.GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=101, n_positions=64)
    torch.manual_seed(0)
    of = (transformers.GPT2LMHeadModel if prefixed else transformers.GPT2Model)(sizes)
    of.save_pretrained(tmp_path)
    for kind in (transformers.GPT2LMHeadModel, transformers.GPT2Model):
        with memkernels.parameters_on_meta():
            model = kind(sizes)
        memkernels.load_base(model, tmp_path, base=None, dtype=torch.float32)
        assert_same(model, kind.from_pretrained(tmp_path))


@pytest.mark.parametrize("sizes", [(960, 960), (480, 1, 127, 352), (7, 9, 4), (0, 3), (64,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_are_quantised_as_the_whole(sizes, dtype):
    whole = torch.randn(1, sum(sizes), generator=torch.Generator().manual_seed(0)).to(dtype)
    pieces = quantize_nf4_pieces(iter(whole[0].split(list(sizes))), whole.shape, torch.float16)
    expected = quant.quantize_nf4(whole).to(torch.float16)
    assert pieces.encoding == expected.encoding
    assert all(torch.equal(*parts) for parts in zip(pieces.parts, expected.parts, strict=True))


def load_peak(folder, small):
    model, first = empty(num_hidden_layers=1, **PEAK_SIZES), empty()
    memkernels.load_base(first, small, target_parameters=BOTH)  # one-time costs
    return peak_bytes(lambda: memkernels.load_base(model, folder, target_parameters=BOTH))


PEAK_SIZES = {"hidden_size": 512, "intermediate_size": 2048, "num_local_experts": 16}


def test_memory_holds_a_matrix_beside_the_quantised_model(tmp_path):
    save(tmp_path / "small")
    save(tmp_path / "large", num_hidden_layers=1, **PEAK_SIZES)
    matrix = 512 * 2048 * 2  # 2 MiB, of which the experts have 48
    stored = sum(part.nbytes for part in quant.quantize_nf4(torch.ones(48, matrix // 2)).parts)
    assert run_in_child(load_peak, str(tmp_path / "large"), str(tmp_path / "small")) <= stored + 5 * matrix


change = functools.partial(change_tensors, name="model.safetensors")
MOE = "model.layers.1.block_sparse_moe.experts"
KEY = f"{MOE}.1.w3.weight"


@pytest.mark.parametrize("base", ["nf4", None])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change(lambda of: of.pop(KEY)),
         r"model\.safetensors: model\.layers\.1\.mlp\.experts\.gate_up_proj: \.experts\.1\.w3\.weight: missing"),
        (change(lambda of: [of.pop(f"{MOE}.{i}.w{part}.weight") for i in range(3) for part in (1, 3)]),
         r"model\.safetensors: model\.layers\.1\.mlp\.experts\.gate_up_proj: missing"),
        (change(lambda of: of.update({KEY.replace("1.w3", "3.w3"): of[KEY].clone()})),
         rf"model\.safetensors: {MOE}\.3\.w3\.weight: model\.layers\.1\.mlp\.experts\.gate_up_proj has 3 experts"),
        (change(lambda of: of.update({KEY: of[KEY].t().contiguous()})),
         rf"model\.safetensors: {KEY}: expected shape \(20, 24\), got \(24, 20\)"),
        (change(lambda of: of.update({KEY: of[KEY].to(torch.int8)})),
         rf"model\.safetensors: {KEY}: expected float32, bfloat16 or float16, got I8"),
        (change(lambda of: of[KEY][3].fill_(float("nan"))), rf"model\.safetensors: {KEY}: expected finite values"),
        (change(lambda of: of.update(quant.to_plain({KEY: quant.quantize_nf4(of.pop(KEY))}))),
         rf"model\.safetensors: {KEY}: expected a dense matrix, got a quantised one of an expert"),
    ],
)  # fmt: skip
def test_damaged_experts_leave_the_model_as_it_was(change, message, base, tmp_path):
    save(tmp_path)
    change(tmp_path)
    model = empty()
    before = dict(model.named_parameters())
    with pytest.raises(ValueError, match=message):
        memkernels.load_base(model, tmp_path, base=base, target_parameters=BOTH)
    assert all(before[name] is parameter and parameter.is_meta for name, parameter in model.named_parameters())


def test_what_transformers_computes_of_the_files_otherwise_is_refused(tmp_path, monkeypatch):
    save(tmp_path)
    transposed = WeightConverter("q_proj.weight", "q_proj.weight", operations=[Transpose()])
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda model: [transposed])
    message = r"model\.safetensors: (.*q_proj\.weight): load_base does not make \1 of it, by Transpose"
    with pytest.raises(ValueError, match=message):
        memkernels.load_base(empty(), tmp_path)


def test_bad_input(tmp_path):
    save(tmp_path)
    for targets, error, message in (
        (["experts.x"], ValueError, "target_parameters: MixtralForCausalLM has no parameter 'experts.x'"),
        (["gate.weight"], ValueError, r"target_parameters: .*gate\.weight carries no adapter: it is no weight of exp"),
        (2, TypeError, "target_parameters: expected names, got 2"),
    ):
        with pytest.raises(error, match=message):
            memkernels.load_base(empty(), tmp_path, target_parameters=targets)
