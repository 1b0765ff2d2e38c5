"""Adapters of experts' weights: PEFT's files of target_parameters there and back, training, merging, refusals."""

import copy
import json

import peft
import pytest
import safetensors.torch
import torch
import transformers
from adapted_models import randomise
from adapter_files import change_config, change_tensors
from training_step import assert_same_step, exact_step, train_step

import memkernels
from memkernels import nn
from memkernels.adapters.experts import adapted_experts, to_peft
from memkernels.testing import assert_within_factor_two

SIZES = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 101,
    "num_key_value_heads": 2, "num_experts_per_tok": 2, "experts_implementation": "eager",
}  # fmt: skip
FAMILIES = {
    "Mixtral": {"num_local_experts": 3},
    "Qwen3Moe": {"num_experts": 3, "moe_intermediate_size": 20, "head_dim": 8},
}
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
IDS = torch.randint(3, 101, (2, 17), generator=torch.Generator().manual_seed(1))
BATCH = {"input_ids": IDS, "labels": IDS}


def make_model(family="Mixtral", **sizes):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES | FAMILIES[family] | sizes)
    return getattr(transformers, f"{family}ForCausalLM")(config)


class Block(torch.nn.Module):
    """Experts of this package in a model of the user's."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.into = torch.nn.Linear(24, 24)
        self.moe = nn.MoE(nn.TopKRouter(24, 3, 2), 24, 20)

    def forward(self, x):
        return self.moe(self.into(x))[0]


def adapted_by_peft(model, targets=BOTH, modules=(), **options):
    torch.manual_seed(2)
    options = {"r": 3, "lora_alpha": 5, "init_lora_weights": False} | options
    config = peft.LoraConfig(target_modules=list(modules), target_parameters=targets, **options)
    return peft.get_peft_model(model, config)


def logits(model):
    return model.eval()(input_ids=IDS).logits


def files(directory):
    config = json.loads((directory / "adapter_config.json").read_text())
    return config, safetensors.torch.load_file(directory / "adapter_model.safetensors")


OPTIONS = {
    "lora": {},
    "rslora": {"use_rslora": True, "r": 1},
    "one weight": {"targets": BOTH[1:]},
    "with layers": {"modules": ["q_proj"]},
    "ranks": {"rank_pattern": {"layers.1.mlp.experts.down_proj": 2}, "alpha_pattern": {"experts.gate_up_proj": 9}},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_writes_what_is_read_and_reads_what_is_saved(family, options, tmp_path):
    theirs = adapted_by_peft(make_model(family), **options)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = make_model(family)
    names = memkernels.load_adapter(ours, tmp_path / "theirs")
    assert {"model.layers.0.mlp.experts.down_proj", "model.layers.1.mlp.experts.down_proj"} <= set(names)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(ours), logits(make_model(family)), atol=1e-2)
    assert all(parameter.requires_grad == ("lora_" in name) for name, parameter in ours.named_parameters())
    assert make_model(family).state_dict().keys() - ours.state_dict().keys() == {
        f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1) if "modules" in options
    }
    memkernels.save_adapter(ours, tmp_path / "ours")
    (_, saved), (_, expected) = files(tmp_path / "ours"), files(tmp_path / "theirs")
    assert saved.keys() == expected.keys() and all(torch.equal(saved[key], expected[key]) for key in saved)
    again = peft.PeftModel.from_pretrained(make_model(family), tmp_path / "ours")
    assert torch.equal(logits(again), logits(theirs))
    memkernels.load_adapter(randomise(ours, 0.5), tmp_path / "theirs")
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-5)


def test_experts_of_this_package(tmp_path):
    x = torch.randn(7, 24, generator=torch.Generator().manual_seed(1))
    theirs = adapted_by_peft(Block(), ["gate_up_proj", "moe.down_proj"], ["into"])
    theirs.save_pretrained(tmp_path / "theirs")
    ours = Block()
    assert memkernels.load_adapter(ours, tmp_path / "theirs") == ["into", "moe.gate_up_proj", "moe.down_proj"]
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    memkernels.save_adapter(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(Block(), tmp_path / "ours")
    torch.testing.assert_close(again(x), theirs(x))
    own = Block().requires_grad_(False)
    own.moe.adapt(2, alpha=3.0, use_rslora=True)
    randomise(own, 0.3)
    memkernels.save_adapter(own, tmp_path / "own")
    theirs = peft.PeftModel.from_pretrained(Block(), tmp_path / "own")
    torch.testing.assert_close(theirs(x), own(x), rtol=1e-4, atol=1e-5)


def step_by_peft_names(model):
    """The loss and the gradients of the adapters."""
    found = {"loss": train_step(model, BATCH)["loss"]}
    for place, adapter in adapted_experts(model).items():
        of_grad = copy.deepcopy(adapter)
        for factor, parameter in adapter.named_parameters():
            getattr(of_grad, factor).data = parameter.grad
        for factor, grad in to_peft(of_grad).items():
            found[f"base_model.model.{place.layer}.{factor}.default.weight"] = grad
    return found


@pytest.mark.parametrize("recompute", [None, "none", "sublayer", "layer"])
@pytest.mark.parametrize("family", FAMILIES)
def test_they_train_as_those_of_peft(family, recompute, tmp_path):
    theirs = adapted_by_peft(make_model(family)).train()
    theirs.save_pretrained(tmp_path)
    plain, exact = train_step(theirs, BATCH), exact_step(adapted_by_peft(make_model(family)).train(), BATCH)
    ours = make_model(family)
    memkernels.load_adapter(ours, tmp_path)
    if recompute is not None:
        report = memkernels.patch(ours, recompute=recompute)
        assert [name for name, what in report.replaced.items() if what == "experts"] == [
            f"model.layers.{i}.mlp.experts" for i in (0, 1)
        ]
    assert_same_step(step_by_peft_names(ours.train()), exact, plain)


def test_patched_before_they_are_loaded(tmp_path):
    adapted_by_peft(make_model()).save_pretrained(tmp_path)
    ours, other = make_model(), make_model()
    memkernels.patch(ours)
    for model in (ours, other):
        memkernels.load_adapter(model, tmp_path)
    copied = copy.deepcopy(ours)
    memkernels.unpatch(ours)
    for model in (ours, copied):
        torch.testing.assert_close(logits(model), logits(other), rtol=1e-4, atol=1e-5)
    assert not set(map(id, adapted_experts(copied).values())) & set(map(id, adapted_experts(ours).values()))


@pytest.mark.parametrize("base", [None, "nf4"])
def test_lora_puts_them_on_the_parameters_it_is_told(base, tmp_path):
    model = make_model(hidden_size=64, intermediate_size=64)
    plain = copy.deepcopy(model)
    report = memkernels.lora(
        model, 2, 3.0, 0.0, ["q_proj"], base, target_parameters=["experts.gate_up_proj", "1.mlp.experts.down_proj"]
    )
    experts = [f"model.layers.{i}.mlp.experts" for i in (0, 1)]
    adapted = [f"{experts[0]}.gate_up_proj", f"{experts[1]}.gate_up_proj", f"{experts[1]}.down_proj"]
    assert report.adapted == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)] + adapted
    assert report.left == [f"{experts[0]}.down_proj"]
    assert report.trained == sum(of.numel() for of in model.parameters() if of.requires_grad)
    assert report.quantized == ([] if base is None else report.adapted)
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-4, atol=1e-5 if base is None else 0.2)
    loss = randomise(model).train()(**BATCH).loss
    loss.backward()
    assert all((of.grad is not None) == of.requires_grad for of in model.parameters())
    if base is None:
        memkernels.save_adapter(model, tmp_path)
        torch.testing.assert_close(
            logits(peft.PeftModel.from_pretrained(plain, tmp_path)), logits(model), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_parameters": BOTH, "dropout": 0.1}, "dropout: expected none beside target_parameters"),
        ({"target_parameters": BOTH, "use_dora": True}, "use_dora: expected none beside target_parameters"),
        ({"target_parameters": ["experts.x"]}, "target_parameters: MixtralForCausalLM has no parameter 'experts.x'"),
        ({"target_parameters": ["gate.weight"]}, r"target_parameters: .*gate\.weight carries no adapter: it is no"),
    ],
)
def test_parameters_that_lora_refuses(options, message):
    model = make_model()
    trained, kinds = [of.requires_grad for of in model.parameters()], [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        memkernels.lora(model, base="nf4", **{"dropout": 0.0} | options)
    assert [of.requires_grad for of in model.parameters()] == trained
    assert [type(module) for module in model.modules()] == kinds


def test_merge_and_unmerge(tmp_path):
    adapted_by_peft(make_model(), modules=["q_proj"]).save_pretrained(tmp_path)
    model = make_model()
    memkernels.load_adapter(model, tmp_path)
    expected, before = logits(model), {name: value.clone() for name, value in model.state_dict().items()}
    memkernels.merge_adapter(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    assert not torch.equal(model.model.layers[0].mlp.experts.down_proj, before["model.layers.0.mlp.experts.down_proj"])
    with pytest.raises(ValueError, match="expected an adapter that is not merged"):
        memkernels.load_adapter(model, tmp_path)
    memkernels.unmerge_adapter(model)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name])
    with torch.no_grad():
        model.model.layers[1].mlp.experts.adapters["down_proj"].lora_A[0, 0] = float("inf")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts\.down_proj: lora_A: expected finite"):
        memkernels.merge_adapter(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="is not merged"):
        memkernels.unmerge_adapter(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantize", [memkernels.quant.quantize_nf4, memkernels.quant.quantize_int8])
def test_merged_quantised_experts_are_dense_and_unmerged_exact(quantize, dtype):
    """Of sizes at which an expert does not begin with a block of NF4."""
    model, x = make_quantized(quantize, dtype), torch.randn(7, 24).to(dtype)
    expected, weights = model(x), {name: getattr(model.moe, name) for name in ("gate_up_proj", "down_proj")}
    memkernels.merge_adapter(model)
    for name, of in weights.items():
        merged, adapter = getattr(model.moe, name), model.moe.adapters[name]
        exact = of.dequantize(torch.float64) + adapter.scaling * adapter.lora_B.double() @ adapter.lora_A.double()
        assert type(merged) is torch.nn.Parameter and merged.dtype == dtype and not merged.requires_grad
        assert_within_factor_two(name, merged, exact, exact.to(dtype))
    if dtype == torch.float32:
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="merged already"):
        memkernels.merge_adapter(model)
    model = copy.deepcopy(model).to("cpu")
    memkernels.unmerge_adapter(model)
    for name, of in weights.items():
        weight = getattr(model.moe, name)
        assert all(torch.equal(*parts) for parts in zip(weight.parts, of.parts, strict=True))
        assert not weight.requires_grad
    assert torch.equal(model(x), expected)


def make_quantized(quantize, dtype):
    model = Block().to(dtype)
    for name in ("gate_up_proj", "down_proj"):
        weight = quantize(getattr(model.moe, name).detach())
        setattr(model.moe, name, torch.nn.Parameter(weight, requires_grad=False))
    model.moe.adapt(2)
    return randomise(model, 0.3)


KEY = "base_model.model.model.layers.1.mlp.experts"


@pytest.mark.parametrize("adapted", [False, True], ids=["plain model", "adapted model"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_config(target_parameters="experts.down_proj"), r"config\.json: target_parameters: expected a list"),
        (change_config(lora_dropout=0.1), r"config\.json: lora_dropout: expected none beside target_parameters"),
        (change_config(use_dora=True), r"config\.json: use_dora: expected none beside target_parameters"),
        (change_config(target_parameters=["gate.weight"]), r"gate\.lora_A\.weight: .*gate\.weight carries no adapter"),
        (change_config(r=2), r"lora_A\.weight: expected shape \(6, 24\), got \(9, 24\)"),
        (change_config(target_parameters=BOTH[:1]), r"lora_A\.weight: expected shape \(9, 24\), got \(9, 40\)"),
        (change_tensors(lambda of: of.pop(f"{KEY}.base_layer.lora_B.weight")),
         rf"safetensors: {KEY}\.base_layer\.lora_B\.weight: missing"),
        (change_tensors(lambda of: [of.pop(f"{KEY}.lora_{each}.weight") for each in "AB"]),
         rf"{KEY}\.lora_A\.weight: missing, though target_parameters has model\.layers\.1\.mlp\.experts\.down_proj"),
        (change_tensors(lambda of: of.update({f"{KEY}.lora_B.weight": torch.zeros(24, 8)})),
         rf"{KEY}\.lora_B\.weight: expected shape \(24, 9\), got \(24, 8\)"),
    ],
)  # fmt: skip
def test_files_that_do_not_fit_leave_the_model_as_it_was(change, message, adapted, tmp_path):
    adapted_by_peft(make_model()).save_pretrained(tmp_path)
    model = make_model()
    if adapted:
        memkernels.load_adapter(model, tmp_path)
    change(tmp_path)
    before, kinds = dict(model.state_dict(keep_vars=True)), [type(module) for module in model.modules()]
    trained = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(ValueError, match=message):
        memkernels.load_adapter(model, tmp_path)
    after = model.state_dict(keep_vars=True)
    assert after.keys() == before.keys() and all(after[name] is of for name, of in before.items())
    assert [type(module) for module in model.modules()] == kinds
    assert [parameter.requires_grad for parameter in model.parameters()] == trained


def test_models_that_the_file_does_not_fit(tmp_path):
    adapted_by_peft(make_model()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lora_A\.weight: expected shape \(12, 24\), got \(9, 24\)"):
        memkernels.load_adapter(make_model(num_local_experts=4), tmp_path)
    with pytest.raises(ValueError, match=r"gate_up_proj carries no adapter: .*no activation"):
        memkernels.load_adapter(make_model(hidden_act="tanh"), tmp_path)
    hooked = make_model()
    hooked.model.layers[1].mlp.experts.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts\.\w+ carries no adapter: .* has hooks"):
        memkernels.load_adapter(hooked, tmp_path)
    linear = make_model()
    memkernels.lora(linear, 3, targets=["q_proj"])
    with pytest.raises(ValueError, match=r"the model has no adapter of model\.layers\.0\.mlp\.experts"):
        memkernels.load_adapter(linear, tmp_path)
    model = make_model()
    memkernels.load_adapter(model, tmp_path)
    memkernels.save_adapter(linear, tmp_path)
    with pytest.raises(ValueError, match=r"expected an adapter of model\.layers\.0\.mlp\.experts\.gate_up_proj, as"):
        memkernels.load_adapter(model, tmp_path)


def test_what_one_configuration_cannot_tell_is_not_saved(tmp_path):
    model = Block()
    memkernels.lora(model, 2, dropout=0.1, targets=["into"])
    model.moe.adapt(2)
    with pytest.raises(ValueError, match=r"moe\.gate_up_proj: dropout_p: expected that of into"):
        memkernels.save_adapter(model, tmp_path / "out")
    alone = Block().moe
    alone.adapt(2)
    with pytest.raises(ValueError, match=r"down_proj: expected experts within a model"):
        memkernels.save_adapter(alone, tmp_path / "out")
    twice = torch.nn.ModuleDict({"moe": Block().moe, "block": Block()}).requires_grad_(False)
    with pytest.raises(ValueError, match=r"moe\.router: it has trained parameters beside adapters"):
        adapted = Block()
        adapted.moe.adapt(2)
        memkernels.save_adapter(adapted, tmp_path / "out")
    twice["moe"].adapt(2)
    with pytest.raises(ValueError, match=r"moe\.down_proj: expected a name that is no other's end"):
        memkernels.save_adapter(twice, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_patch_says_which_adapters_of_parameters_are_multiplied_out():
    model = adapted_by_peft(make_model())
    assert not memkernels.patch(model).left
    memkernels.unpatch(model)
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=[], target_parameters=BOTH))
    model.base_model.set_adapter(["default", "other"])
    left = memkernels.patch(model).left
    assert set(left.values()) == {"several active adapters"} and len(left) == 4
    router = adapted_by_peft(make_model(), ["gate.weight"])
    assert set(memkernels.patch(router).left.values()) == {
        "an adapter of a parameter that is no weight of experts that memkernels computes"
    }
