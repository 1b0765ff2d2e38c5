"""lora, save_adapter, load_adapter, merge_adapter: with PEFT there and back; damaged files; memory of a merge."""

import copy
import types

import peft
import pytest
import safetensors.torch
import torch
import transformers
from adapted_models import randomise
from adapter_files import change_config, change_tensors
from peft.tuners.tuners_utils import check_target_module_exists

import memkernels
from memkernels import atomic
from memkernels.adapters.targets import Targets
from memkernels.testing import assert_within_factor_two, peak_bytes, run_in_child

OPTIONS = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}
IDS = torch.randint(3, 101, (2, 17), generator=torch.Generator().manual_seed(1))


def make_model(kind="Llama", **sizes):
    torch.manual_seed(0)
    if kind == "GPT2":
        dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        config = transformers.GPT2Config(n_embd=24, n_layer=2, n_head=4, vocab_size=101, n_positions=64, **dropouts)
        return transformers.GPT2LMHeadModel(config)
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4} | sizes
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=101, **sizes))


def make_adapted(kind="Llama", **options):
    model = make_model(kind)
    memkernels.lora(model, 3, 5.0, **{"dropout": 0.0} | options)
    return randomise(model, 0.3).eval()


def logits(model):
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", ["Llama", "GPT2"])
def test_peft_reads_what_is_saved_and_is_read(kind, options, tmp_path):
    model = make_adapted(kind, **options)
    memkernels.save_adapter(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(make_model(kind), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(make_model(kind).eval()), logits(model), atol=1e-2)
    theirs.save_pretrained(tmp_path / "theirs")
    again = make_model(kind).eval()
    names = memkernels.load_adapter(again, tmp_path / "theirs")
    assert torch.equal(logits(again), logits(model))
    assert len(names) == (8 if kind == "GPT2" else 14)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    over = make_adapted(kind, **options)
    with torch.no_grad():
        for name, parameter in over.named_parameters():
            if "lora_" in name:
                parameter.fill_(0.5)
    memkernels.load_adapter(over, tmp_path / "theirs")
    assert torch.equal(logits(over), logits(model))


def test_patterns_of_ranks_and_alphas(tmp_path):
    config = peft.LoraConfig(
        target_modules="all-linear", r=4, init_lora_weights=False, use_rslora=True,
        rank_pattern={"q_proj": 2, "layers.1.mlp.up_proj": 7}, alpha_pattern={"up_proj": 3},
    )  # fmt: skip
    theirs = peft.get_peft_model(make_model(), config).eval()
    theirs.save_pretrained(tmp_path)
    ours = make_model().eval()
    memkernels.load_adapter(ours, tmp_path)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-5)
    memkernels.save_adapter(ours, tmp_path / "again")
    again = peft.PeftModel.from_pretrained(make_model(), tmp_path / "again").eval()
    torch.testing.assert_close(logits(again), logits(theirs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("inner", [torch.nn.Linear(4, 4), torch.nn.GELU()], ids=["Linear", "GELU"])
def test_names_that_end_others(inner, tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Sequential(inner))
    plain = copy.deepcopy(model)
    model[0] = memkernels.nn.LoRALinear(model[0], 2)
    memkernels.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)
    assert hasattr(theirs.base_model.model[0], "lora_A") and not hasattr(theirs.base_model.model[1][0], "lora_A")
    assert memkernels.load_adapter(plain, tmp_path) == ["0"]


def test_ranks_and_alphas_of_names_that_end_others(tmp_path):
    def make():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Sequential(torch.nn.GELU(), torch.nn.Linear(4, 4)), torch.nn.Linear(4, 4))

    model = make()
    model[0][1] = memkernels.nn.LoRALinear(model[0][1], 2, alpha=3.0)
    model[1] = memkernels.nn.LoRALinear(model[1], 3, alpha=5.0)
    randomise(model, 0.3)
    x = torch.randn(5, 4)
    memkernels.save_adapter(model, tmp_path)
    theirs, again = peft.PeftModel.from_pretrained(make(), tmp_path), make()
    memkernels.load_adapter(again, tmp_path)
    torch.testing.assert_close(theirs(x), model(x))
    assert torch.equal(again(x), model(x))


def test_targets_and_what_is_trained():
    model = make_model()
    report = memkernels.lora(model, 2, targets=["q_proj", "layers.1.mlp.up_proj"])
    assert report.adapted == [
        "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj",
    ]  # fmt: skip
    assert report.trained == 2 * (2 * 48 + 64) and not report.quantized
    assert str(report) == "LlamaForCausalLM: 3 layers with adapters, 0.00032 million parameters"
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 6 and all("lora_" in name for name in trained)
    assert type(model.lm_head) is torch.nn.Linear
    assert "lm_head" not in memkernels.lora(make_model()).adapted


def test_experts_that_are_one_tensor_are_reported():
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(vocab_size=101, num_local_experts=2, **sizes))
    report = memkernels.lora(model, base="nf4")
    assert report.left == [f"model.layers.{i}.mlp.experts.{of}" for i in (0, 1) for of in ("gate_up_proj", "down_proj")]
    assert "left as they are: 4 layers or parameters of other kinds, model.layers.0.mlp" in str(report)


def test_layers_of_other_classes_are_reported():
    class Linear(torch.nn.Linear):
        """As that of another library."""

    model = make_model()
    name = "model.layers.0.self_attn.q_proj"
    model.set_submodule(name, Linear(24, 24))
    for targets in ("all-linear", iter(["q_proj"])):
        report = memkernels.lora(copy.deepcopy(model), targets=targets)
        assert report.left == [name] and name not in report.adapted
    assert not memkernels.lora(model, targets=["k_proj"]).left


@pytest.mark.parametrize("kind", ["Llama", "GPT2"])
@pytest.mark.parametrize("recompute", ["none", "sublayer", "layer"])
@pytest.mark.parametrize("first", ["lora", "patch"])
def test_patched_models_take_the_adapters_into_their_ops(kind, recompute, first, monkeypatch):
    def step(model):
        loss = model.train()(input_ids=IDS, labels=IDS).loss  # in evaluation the model fills a cache
        return [loss, *torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])]

    expected = step(make_adapted(kind, use_dora=True))
    if first == "lora":
        model = make_adapted(kind, use_dora=True)
        assert memkernels.patch(model, recompute=recompute).left == {}
    else:
        model = make_model(kind)
        memkernels.patch(model, recompute=recompute)
        memkernels.lora(model, 3, 5.0, dropout=0.0, use_dora=True)
        randomise(model, 0.3)
    if recompute != "none":  # a block op takes the layer's tensors and never calls it
        monkeypatch.delattr(memkernels.nn.LoRALinear, "forward")
    for ours, of in zip(step(model), expected, strict=True):
        assert_within_factor_two("step", ours, of.double(), of, roundings=16)


def test_merge_and_unmerge():
    model = make_adapted(use_dora=True)
    expected, before = logits(model), {name: value.clone() for name, value in model.state_dict().items()}
    memkernels.merge_adapter(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj: LoRALinear: it is merged already"):
        memkernels.merge_adapter(model)
    memkernels.unmerge_adapter(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name])
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.adapter["lora_A"][0, 0] = float("inf")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj: lora_A: expected finite"):
        memkernels.merge_adapter(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="is not merged"):
        memkernels.unmerge_adapter(model)


def test_a_shared_weight_is_not_merged_into():
    head = make_model(tie_word_embeddings=True).eval()
    memkernels.lora(head, 3, targets=["lm_head"])
    randomise(head, 0.3)
    twins = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    twins[1].weight = torch.nn.Parameter(twins[0].weight.data)  # one memory in two parameters
    memkernels.lora(twins, 2)
    for model, keys in (
        (head, r"model\.embed_tokens\.weight and lm_head\.base_layer\.weight"),
        (twins, r"0\.base_layer\.weight and 1\.base_layer\.weight"),
    ):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(ValueError, match=rf"^{keys}: expected a weight of each layer's own"):
            memkernels.merge_adapter(model)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    embedding, expected = head.model.embed_tokens.weight.clone(), logits(head)
    head.lm_head.base_layer.weight = torch.nn.Parameter(embedding.clone(), requires_grad=False)
    memkernels.merge_adapter(head)
    torch.testing.assert_close(logits(head), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(head.model.embed_tokens.weight, embedding)


def merge_peaks(layers, size):
    model = torch.nn.Sequential(*(torch.nn.Linear(size, size, dtype=torch.bfloat16) for _ in range(layers)))
    memkernels.lora(model, 8, use_dora=True)
    of_merge = peak_bytes(lambda: memkernels.merge_adapter(model))
    return of_merge, peak_bytes(lambda: memkernels.unmerge_adapter(model))


def test_a_merge_needs_a_tile_of_one_layer():
    """And so does taking it out again."""
    assert max(run_in_child(merge_peaks, 4, 2048)) <= 16 << 20  # one weight in float32 is 16 MiB, four are 64


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    model = make_adapted()
    memkernels.save_adapter(model, tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def fail(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        memkernels.save_adapter(model, tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_an_end_between_the_two_files_is_seen(tmp_path, monkeypatch):
    memkernels.save_adapter(make_adapted(), tmp_path)
    replace, moved = atomic.os.replace, []

    def end_at_the_second(source, place):
        if moved:
            raise KeyboardInterrupt
        moved.append(place.name)
        replace(source, place)

    monkeypatch.setattr(atomic.os, "replace", end_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        memkernels.save_adapter(make_adapted(use_rslora=True), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == moved == ["adapter_model.safetensors"]
    with pytest.raises(FileNotFoundError, match="adapter_config"):
        memkernels.load_adapter(make_model(), tmp_path)


def truncate(path):
    file = path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


KEY = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("adapted", [False, True], ids=["plain model", "adapted model"])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (truncate, ValueError, r"adapter_model\.safetensors: truncated"),
        (lambda path: (path / "adapter_model.safetensors").unlink(), FileNotFoundError, "adapter_model"),
        (lambda path: (path / "adapter_config.json").unlink(), FileNotFoundError, "adapter_config"),
        (lambda path: (path / "adapter_config.json").write_text("{"), ValueError, r"adapter_config\.json: not JSON"),
        (change_config(peft_type="IA3"), ValueError, "peft_type: expected 'LORA'"),
        (change_config(lora_bias=True), ValueError, "lora_bias: memkernels has no adapter"),
        (change_config(layer_replication=[[0, 2], [1, 2]]), ValueError,
         r"config\.json: layer_replication: memkernels has no adapter with this option, got \[\[0, 2\], \[1, 2\]\]"),
        (change_config(trainable_token_indices=[1]), ValueError, "trainable_token_indices: memkernels has no adapter"),
        (change_config(init_lora_weights="pissa"), ValueError, "init_lora_weights: expected"),
        (change_config(r="four"), ValueError, "r: expected a whole number"),
        (change_config(r=3.0), ValueError, "r: expected a whole number"),
        (change_config(lora_alpha=float("nan")), ValueError, "lora_alpha: expected a number"),
        (change_config(lora_dropout=1.0), ValueError, "lora_dropout: expected"),
        (change_config(rank_pattern={"q_proj": 3.0}), ValueError,
         r"config\.json: rank_pattern: q_proj: expected a whole number from 1 up, got 3\.0"),
        (change_config(alpha_pattern={"q_proj": "4"}), ValueError, "alpha_pattern: q_proj: expected a number, got '4'"),
        (change_config(alpha_pattern={"q_proj[": 4}), ValueError,
         r"config\.json: alpha_pattern: expected a regular expression, got 'q_proj\['"),
        (change_config(target_modules="(q_proj"), ValueError, "target_modules: expected a regular expression"),
        (change_config(target_modules=["q_proj", 1]), ValueError, "target_modules: expected texts"),
        (change_config(layers_to_transform="0"), ValueError, "layers_to_transform: expected whole numbers"),
        (change_tensors(lambda of: [of.pop(f"{KEY}.lora_{each}.weight") for each in "AB"]), ValueError,
         rf"safetensors: {KEY}\.lora_A\.weight: missing"),
        (change_config(r=5), ValueError, r"lora_[AB]\.weight: expected shape .*5.*, got .*3"),
        (change_config(use_dora=True), ValueError, r"lora_magnitude_vector: missing"),
        (change_tensors(lambda of: of.pop(f"{KEY}.lora_B.weight")), ValueError, rf"{KEY}\.lora_B\.weight: missing"),
        (change_tensors(lambda of: of.update({f"{KEY}.lora_B.weight": torch.zeros(23, 3)})), ValueError,
         rf"{KEY}\.lora_B\.weight: expected shape \(24, 3\)"),
        (change_tensors(lambda of: of.update({f"{KEY}s.lora_B.weight": torch.zeros(24, 3)})), ValueError,
         rf"{KEY}s\.lora_B\.weight: LlamaForCausalLM has no"),
        (change_tensors(lambda of: of.update({f"{KEY}.lora_B.weight": torch.zeros(24, 3).long()})), ValueError,
         rf"{KEY}\.lora_B\.weight: expected a floating dtype"),
        (change_tensors(lambda of: of[f"{KEY}.lora_B.weight"][3].fill_(float("nan"))), ValueError,
         rf"adapter_model\.safetensors: {KEY}\.lora_B\.weight: expected finite values"),
        (change_tensors(lambda of: of.update({"head": torch.zeros(1)})), ValueError, "head: not a key"),
        (change_tensors(lambda of: of.clear()), ValueError, "holds no adapter"),
    ],
)  # fmt: skip
def test_damaged_files_leave_the_model_as_it_was(change, error, message, adapted, tmp_path):
    memkernels.save_adapter(make_adapted(), tmp_path)
    change(tmp_path)
    model = make_model()
    if adapted:
        memkernels.lora(model, 3, 5.0)
    before = {name: (value.clone(), value.dtype) for name, value in model.state_dict().items()}
    trained = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(error, match=message):
        memkernels.load_adapter(model, tmp_path)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], of) for name, (of, _) in before.items())
    assert [parameter.requires_grad for parameter in model.parameters()] == trained


def test_an_adapter_of_another_model(tmp_path):
    memkernels.save_adapter(make_adapted(), tmp_path)
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors: base_model\.model\..*: GPT2LMHeadModel has no"):
        memkernels.load_adapter(make_model("GPT2"), tmp_path)
    with pytest.raises(ValueError, match=r"weight: expected shape \(.*32.*\), got \(.*24.*\)"):
        memkernels.load_adapter(make_model(hidden_size=32), tmp_path)
    more = make_model(num_hidden_layers=3)
    memkernels.lora(more, 3)
    with pytest.raises(ValueError, match=r"layers\.2\.self_attn\.q_proj\.lora_A\.weight: missing"):
        memkernels.load_adapter(more, tmp_path)
    change_config(target_modules=["q_proj", "up_proj"])(tmp_path)
    with pytest.raises(ValueError, match=r"layers\.2\.self_attn\.q_proj\.lora_A\.weight: missing, though target_mod"):
        memkernels.load_adapter(make_model(num_hidden_layers=3), tmp_path)
    other = make_model()
    memkernels.lora(other, 4)
    with pytest.raises(ValueError, match="expected an adapter of rank 3, as the file's, got 4"):
        memkernels.load_adapter(other, tmp_path)


@pytest.mark.parametrize("targets", [["q_proj", "layers.1.mlp.up_proj"], r".*\.[01]\.self_attn\.[qk]_proj", "q_proj"])
@pytest.mark.parametrize("excluded", [None, ["layers.0.self_attn.q_proj"], r".*layers\.0.*"])
@pytest.mark.parametrize("numbers", [None, [], 1, [0, 2]], ids=str)
@pytest.mark.parametrize("pattern", [None, "", "layers", "layers|blocks", ["blocks", "experts", "layers"]], ids=str)
def test_targets_are_those_of_peft(targets, excluded, numbers, pattern):
    options = dict(
        zip(
            ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
            (targets, excluded, numbers, pattern),
            strict=True,
        )
    )
    theirs = types.SimpleNamespace(**options)
    for name in (
        "q_proj", "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "layers.2.self_attn.q_proj",
        "model.layers.1.mlp.up_proj", "model.layers.0.mlp.experts.2.q_proj", "model.layers.1.xq_proj", "tower.q_proj",
    ):  # fmt: skip
        expected = check_target_module_exists(theirs, name)
        assert Targets(**options).have(name) == (bool(expected) and type(expected).__name__ != "_ExcludedModule"), name


def test_peft_adapters_of_some_layers(tmp_path):
    config = peft.LoraConfig(
        target_modules=["q_proj", "up_proj"], layers_to_transform=[1], layers_pattern="layers",
        exclude_modules=["up_proj"], init_lora_weights=False,
    )  # fmt: skip
    theirs = peft.get_peft_model(make_model(), config).eval()
    theirs.save_pretrained(tmp_path)
    ours = make_model().eval()
    assert memkernels.load_adapter(ours, tmp_path) == ["model.layers.1.self_attn.q_proj"]
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-5)


def hook(layer):
    layer.register_forward_hook(lambda *_: None)


def replace_forward(layer):
    layer.forward = lambda x: x


@pytest.mark.parametrize("change", [hook, replace_forward])
def test_a_layer_that_does_more_than_its_class_is_refused(change, tmp_path):
    memkernels.save_adapter(make_adapted(), tmp_path)
    model = make_model()
    change(model.model.layers[1].mlp.up_proj)
    before = list(model.named_parameters())
    for call in (
        lambda: memkernels.lora(model, base="nf4"),
        lambda: memkernels.load_adapter(model, tmp_path),
    ):
        with pytest.raises(ValueError, match=r"^model\.layers\.1\.mlp\.up_proj: expected a layer without hooks"):
            call()
        for (name, parameter), (other, of) in zip(model.named_parameters(), before, strict=True):
            assert name == other and parameter is of and parameter.requires_grad
    memkernels.lora(model, targets=["q_proj"])


def test_bad_input(tmp_path):
    model = make_model()
    trained = [parameter.requires_grad for parameter in model.parameters()]
    for options, error, message in (
        ({"r": 0}, ValueError, "r: expected"),
        ({"r": 16.0}, TypeError, r"r: expected an int, got 16\.0"),
        ({"r": True}, TypeError, "r: expected an int, got True"),
        ({"alpha": "32"}, TypeError, "alpha: expected a number, got '32'"),
        ({"alpha": float("nan")}, ValueError, "alpha: expected a finite number"),
        ({"dropout": 1.0}, ValueError, "dropout: expected"),
        ({"dropout": None}, TypeError, "dropout: expected a number, got None"),
        ({"targets": []}, ValueError, "targets: expected at least one name, got none"),
        ({"targets": None}, TypeError, "targets: expected names, got None"),
        ({"targets": [2]}, TypeError, "targets: expected names, got 2"),
        ({"target_parameters": 2}, TypeError, "target_parameters: expected names, got 2"),
        (
            {"targets": ["q_proj", "x_proj"]},
            ValueError,
            "targets: LlamaForCausalLM has no linear layer or embedding 'x_proj'",
        ),
    ):
        with pytest.raises(error, match=message):
            memkernels.lora(model, base="nf4", **options)
    assert all(type(parameter) is torch.nn.Parameter for parameter in model.parameters())
    for function in (memkernels.load_adapter, memkernels.load_base, memkernels.save_adapter):
        with pytest.raises(TypeError, match="directory: expected a folder's path, got None"):
            function(model, None)
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module"):
        memkernels.lora({})
    with pytest.raises(ValueError, match="targets: Sequential has no linear layer"):
        memkernels.lora(torch.nn.Sequential(torch.nn.GELU()))
    for function in (memkernels.merge_adapter, lambda model: memkernels.save_adapter(model, tmp_path / "x")):
        with pytest.raises(ValueError, match="model: found no LoRALinear or LoRAEmbedding in LlamaForCausalLM"):
            function(model)
    assert [parameter.requires_grad for parameter in model.parameters()] == trained and not (tmp_path / "x").exists()
    memkernels.lora(model)
    with pytest.raises(ValueError, match="has adapters already"):
        memkernels.lora(model)
