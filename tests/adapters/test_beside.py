"""What PEFT's files have beside adapters, modules_to_save and biases, there and back; what of it is refused."""

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
from memkernels import nn, quant

SIZES = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 101,
    "num_key_value_heads": 2,
}  # fmt: skip
IDS = torch.randint(3, 101, (2, 17), generator=torch.Generator().manual_seed(1))
BATCH = {"input_ids": IDS, "labels": IDS}
OPTIONS = {
    "modules": {"modules_to_save": ["lm_head", "norm", "nothing"]},
    "biases": {"bias": "lora_only"},
    "all biases": {"bias": "all"},
    "both": {"modules_to_save": ["embed_tokens", "lm_head"], "bias": "lora_only"},
    "modules with all biases": {"modules_to_save": ["v_proj"], "bias": "all"},
    "tied modules": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
}


def make_model(tied=False):
    """With biases of q, k and v."""
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES, tie_word_embeddings=tied)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model


def extended(folder, tied, seed):
    """With six tokens more than the model that it is read from, in a folder; the seed is that of their embeddings."""
    make_model(tied).save_pretrained(folder)
    model = transformers.Qwen2ForCausalLM.from_pretrained(folder)
    torch.manual_seed(seed)
    model.resize_token_embeddings(107, mean_resizing=False)
    return model.eval()


def trained_by_peft(tied=False, targets=("q_proj", "up_proj"), model=None, **options):
    torch.manual_seed(2)
    options = {"r": 3, "lora_alpha": 5, "init_lora_weights": False} | options
    model = make_model(tied) if model is None else model
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=list(targets), **options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape), alpha=0.3)
    return model


def logits(model, ids=IDS):
    return model.eval()(input_ids=ids).logits


def files(directory):
    config = json.loads((directory / "adapter_config.json").read_text())
    return config, safetensors.torch.load_file(directory / "adapter_model.safetensors")


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_there_and_back(options, tied, tmp_path):
    theirs = trained_by_peft(tied, **options)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = make_model(tied)
    memkernels.load_adapter(ours, tmp_path / "theirs")
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-5)
    count = lambda model: sum(of.numel() for of in model.parameters() if of.requires_grad)  # noqa: E731
    assert count(ours) == count(theirs)
    memkernels.save_adapter(ours, tmp_path / "ours")
    (config, saved), (_, expected) = files(tmp_path / "ours"), files(tmp_path / "theirs")
    expected = {key: of for key, of in expected.items() if "original_module" not in key and "to_save" not in key}
    assert saved.keys() == expected.keys() and all(torch.equal(saved[key], expected[key]) for key in saved)
    assert config["bias"] == options.get("bias", "none") and ("modules_to_save" in options) == bool(
        config["modules_to_save"]
    )
    assert config["ensure_weight_tying"] == (tied and "ensure_weight_tying" in options)
    again = peft.PeftModel.from_pretrained(make_model(tied), tmp_path / "ours")
    torch.testing.assert_close(logits(again), logits(theirs))
    with torch.no_grad():
        for parameter in ours.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    before = {name: parameter for name, parameter in ours.named_parameters() if parameter.requires_grad}
    memkernels.load_adapter(ours, tmp_path / "theirs")
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-5)
    assert all(parameter is before[name] for name, parameter in ours.named_parameters() if parameter.requires_grad)


TRAINED = {
    "modules and biases": (False, {"modules_to_save": ["lm_head", "norm"], "bias": "lora_only"}),
    "all biases": (False, {"bias": "all"}),
    "tied modules": (True, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "untied modules": (True, {"modules_to_save": ["embed_tokens", "lm_head"]}),
}


@pytest.mark.parametrize("recompute", [None, "sublayer", "layer"])
@pytest.mark.parametrize(("tied", "options"), TRAINED.values(), ids=TRAINED)
def test_they_train_as_those_of_peft(tied, options, recompute, tmp_path):
    def step(of, model):  # by our names, without the biases of keys, whose gradient is zero
        found = {
            name.removeprefix("base_model.model.").replace("modules_to_save.default.", ""): value
            for name, value in of(model, BATCH).items()
        }
        return {name: value for name, value in found.items() if not name.endswith("k_proj.bias")}

    theirs = trained_by_peft(tied, **options).train()
    theirs.save_pretrained(tmp_path)
    plain, exact = step(train_step, theirs), step(exact_step, trained_by_peft(tied, **options))
    ours = make_model(tied)
    memkernels.load_adapter(ours, tmp_path)
    if recompute is not None:
        assert not memkernels.patch(ours, recompute=recompute).left
    assert_same_step(step(train_step, ours.train()), exact, plain)


EXTENDED = {
    "adapters alone": {},
    "adapter of the head": {"targets": ["q_proj", "lm_head"]},
    "both trained": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "one trained": {"modules_to_save": ["embed_tokens"]},
    "one trained with what is tied to it": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
}


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("options", EXTENDED.values(), ids=EXTENDED)
def test_an_extended_vocabulary_there_and_back(options, tied, tmp_path):
    ids = torch.cat([IDS, IDS % 6 + 101], 1)
    if options.get("targets"):  # of a head with an adapter PEFT writes not the embedding
        ids = IDS
    theirs = trained_by_peft(model=extended(tmp_path / "base", tied, 4), **options)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = extended(tmp_path / "base", tied, 5)
    memkernels.load_adapter(ours, tmp_path / "theirs")
    expected = logits(theirs, ids)
    torch.testing.assert_close(logits(ours, ids), expected, rtol=1e-4, atol=1e-5)
    memkernels.save_adapter(ours, tmp_path / "ours")
    again, back = (extended(tmp_path / "base", tied, seed) for seed in (6, 7))
    memkernels.load_adapter(back, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(again, tmp_path / "ours")
    for model in (again, back):
        torch.testing.assert_close(logits(model, ids), expected, rtol=1e-4, atol=1e-5)
    assert [p.requires_grad for p in back.parameters()] == [p.requires_grad for p in ours.parameters()]
    if options.get("targets") and not tied:
        memkernels.merge_adapter(ours)
        with pytest.raises(ValueError, match=r"^lm_head: expected an adapter that is not merged"):
            memkernels.save_adapter(ours, tmp_path / "ours")


def test_a_head_with_an_adapter_of_peft(tmp_path):
    """Its file has the head's weight too."""
    theirs = trained_by_peft(targets=["q_proj", "lm_head"])
    theirs.save_pretrained(tmp_path)
    ours = make_model()
    with torch.no_grad():
        ours.lm_head.weight.zero_()
    memkernels.load_adapter(ours, tmp_path)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-5)
    assert not ours.lm_head.base_layer.weight.requires_grad
    quantised = make_model().requires_grad_(False)
    weight = quant.quantize_int8(quantised.lm_head.weight)
    quantised.lm_head.weight = torch.nn.Parameter(weight, requires_grad=False)
    with pytest.raises(ValueError, match=r"safetensors: .*lm_head\.base_layer\.weight: .* no plain tensor, but Int8Te"):
        memkernels.load_adapter(quantised, tmp_path)
    assert type(quantised.lm_head) is torch.nn.Linear


def test_all_biases_that_the_user_trains_are_saved(tmp_path):
    model = make_model()
    memkernels.lora(model, 3, dropout=0.0, targets=["q_proj", "o_proj"])
    with torch.no_grad():
        for name, parameter in randomise(model).named_parameters():
            if name.endswith("bias"):
                parameter.requires_grad_(True).add_(1)
    memkernels.save_adapter(model, tmp_path)
    config, tensors = files(tmp_path)
    assert config["bias"] == "all" and not config["modules_to_save"]
    assert sum(key.endswith("bias") for key in tensors) == 2 * 3
    again, ours = peft.PeftModel.from_pretrained(make_model(), tmp_path), make_model()
    memkernels.load_adapter(ours, tmp_path)
    for other in (again, ours):
        torch.testing.assert_close(logits(other), logits(model), rtol=1e-4, atol=1e-5)
    model.model.layers[0].self_attn.v_proj.bias.requires_grad_(False)  # one is frozen: the others' modules are whole
    memkernels.save_adapter(model, tmp_path)
    config, _ = files(tmp_path)
    assert config["bias"] == "lora_only" and "model.layers.1.self_attn.v_proj" in config["modules_to_save"]


def test_classifiers_of_peft(tmp_path):
    """PEFT trains the head of every SEQ_CLS task, under either name that it may have."""
    sizes = transformers.BertConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=1, num_attention_heads=4, vocab_size=101
    )

    def make():
        torch.manual_seed(0)
        return transformers.BertForSequenceClassification(sizes).eval()

    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"], r=2, init_lora_weights=False)
    theirs = peft.get_peft_model(make(), config).eval()
    torch.nn.init.normal_(theirs.base_model.model.classifier.modules_to_save["default"].weight)
    theirs.save_pretrained(tmp_path)
    ours = make()
    memkernels.load_adapter(ours, tmp_path)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-5)
    assert ours.classifier.weight.requires_grad and not ours.bert.pooler.dense.weight.requires_grad


def test_what_the_user_trains_beside_is_saved(tmp_path):
    model = make_model()
    memkernels.lora(model, 3, dropout=0.0, targets=["q_proj", "o_proj"])
    model.lm_head.requires_grad_(True)
    model.model.layers[1].self_attn.q_proj.base_layer.bias.requires_grad_(True)
    with torch.no_grad():
        for parameter in randomise(model).parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    memkernels.save_adapter(model, tmp_path)
    config, tensors = files(tmp_path)
    assert config["modules_to_save"] == ["lm_head"] and "base_model.model.lm_head.weight" in tensors
    theirs, ours = peft.PeftModel.from_pretrained(make_model(), tmp_path), make_model()
    memkernels.load_adapter(ours, tmp_path)
    for other in (theirs, ours):
        torch.testing.assert_close(logits(other), logits(model), rtol=1e-4, atol=1e-5)


def train_root(model):
    model.register_parameter("scale", torch.nn.Parameter(torch.ones(1)))


def train_base(model):
    model.into.base_layer.weight.requires_grad_(True)


def train_experts(model):
    model.moe.down_proj.requires_grad_(True)


def train_quantised(model):
    model.out.weight = torch.nn.Parameter(quant.quantize_nf4(model.out.weight.detach()), requires_grad=False)
    model.out.bias.requires_grad_(True)


def train_end(model):
    model.layout = torch.nn.Linear(24, 24).requires_grad_(False)
    model.out.requires_grad_(True)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (train_root, r"^Block: .* of a module with adapters: freeze"),
        (train_base, r"^into\.base_layer: .* of a module with adapters: freeze"),
        (train_experts, r"^moe: .* of a module with adapters: freeze"),
        (train_quantised, r"^out: .* of a module whose tensors are not all plain ones: freeze"),
        (train_end, r"^out: .* of a module in whose name that of layout ends: freeze"),
    ],
)
def test_what_peft_does_not_save_is_refused(train, message, tmp_path):
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.into, self.out = torch.nn.Linear(24, 24), torch.nn.Linear(24, 24)
            self.moe = nn.MoE(nn.TopKRouter(24, 3, 2), 24, 20)

    model = Block()
    memkernels.lora(model, 2, dropout=0.0, targets=["into"], target_parameters=["gate_up_proj"])
    train(model)
    with pytest.raises(ValueError, match=message):
        memkernels.save_adapter(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


HEAD, NORM, EMBEDDING, BIAS = (
    f"base_model.model.{of}"
    for of in (
        "lm_head.weight", "model.norm.weight", "model.embed_tokens.weight",
        "model.layers.1.self_attn.q_proj.base_layer.bias",
    )
)  # fmt: skip


@pytest.mark.parametrize("adapted", [False, True], ids=["plain model", "adapted model"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_config(modules_to_save="lm_head"), r"config\.json: modules_to_save: expected a list, got 'lm_head'"),
        (change_config(modules_to_save=[1]), r"config\.json: modules_to_save: expected texts"),
        (change_config(bias="lora"), r"config\.json: bias: expected 'none' or 'lora_only' or 'all' or None, got"),
        (change_config(bias="all"), r"safetensors: .*0\.self_attn\.k_proj\.bias: missing, though the configuration"),
        (change_tensors(lambda of: of.update({NORM: of[BIAS].clone()})),
         rf"safetensors: {NORM}: not a key of a linear layer's or embedding's LoRA adapter"),
        (change_tensors(lambda of: of.update({EMBEDDING: of[HEAD][1:].clone()})),
         rf"safetensors: {EMBEDDING}: expected shape \(101, 24\) and a dtype as torch\.float32, got \(100, 24\)"),
        (change_config(bias="none"), r"safetensors: .*q_proj\.base_layer\.bias: not a key of a linear layer's or emb"),
        (change_config(modules_to_save=["lm_head", "self_attn"]), r"q_proj.*: expected no adapter of what modules_to"),
        (change_tensors(lambda of: of.pop(HEAD)), rf"safetensors: {HEAD}: missing, though the configuration"),
        (change_tensors(lambda of: of.pop(BIAS)), rf"safetensors: {BIAS}: missing, though the configuration"),
        (change_tensors(lambda of: of.update({HEAD: of[HEAD][1:].clone()})),
         rf"safetensors: {HEAD}: expected shape \(101, 24\) and a dtype as torch\.float32, got \(100, 24\)"),
        (change_tensors(lambda of: of.update({HEAD: of[HEAD].long()})),
         rf"safetensors: {HEAD}: expected shape .* and a dtype as torch\.float32, got .*torch\.int64"),
        (change_tensors(lambda of: of[BIAS].fill_(float("nan"))), rf"safetensors: {BIAS}: expected finite values"),
        (change_tensors(lambda of: of.update({"base_model.model.embed_tokens.lora_embedding_A": of[HEAD].clone()})),
         r"embed_tokens\.lora_embedding_A: Qwen2ForCausalLM has no .* 'embed_tokens'"),
    ],
)  # fmt: skip
def test_files_that_do_not_fit_leave_the_model_as_it_was(change, message, adapted, tmp_path):
    trained_by_peft(modules_to_save=["lm_head"], bias="lora_only").save_pretrained(tmp_path)
    model = make_model()
    if adapted:
        memkernels.load_adapter(model, tmp_path)
    change(tmp_path)
    before = dict(model.state_dict(keep_vars=True))
    trained = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(ValueError, match=message):
        memkernels.load_adapter(model, tmp_path)
    after = model.state_dict(keep_vars=True)
    assert after.keys() == before.keys() and all(after[name] is of for name, of in before.items())
    assert [parameter.requires_grad for parameter in model.parameters()] == trained
