"""Adapters of embeddings, and of heads that are tied to them: PEFT's files there and back, and `lora`."""

import copy
import json

import peft
import pytest
import safetensors.torch
import torch
import transformers
from adapted_models import randomise
from adapter_files import change_tensors
from training_step import assert_same_step, exact_step, train_step

import memkernels
from memkernels import nn

SIZES = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 101,
}  # fmt: skip
IDS = torch.randint(0, 101, (2, 17), generator=torch.Generator().manual_seed(1))
BATCH = {"input_ids": IDS, "labels": IDS}
EMBEDDING = "model.embed_tokens"
# By option whether the head is tied to the embedding, and options of LoraConfig.
CASES = {
    "embedding": (False, {"target_modules": ["q_proj", "embed_tokens"]}),
    "dora": (False, {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}),
    "rank of its own": (False, {"target_modules": ["q_proj", "embed_tokens"], "rank_pattern": {"embed_tokens": 5}}),
    "embedding alone": (True, {"target_modules": ["embed_tokens"], "use_rslora": True}),
    "head alone": (True, {"target_modules": ["q_proj", "lm_head"]}),
    "tied": (True, {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}),
}
on_every_case = pytest.mark.parametrize(("tied", "options"), CASES.values(), ids=CASES)


def make_model(tied=False, **sizes):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES | sizes, tie_word_embeddings=tied, pad_token_id=2)
    return transformers.LlamaForCausalLM(config).eval()


def trained_by_peft(tied, options):
    torch.manual_seed(2)
    config = peft.LoraConfig(**{"r": 3, "lora_alpha": 5, "init_lora_weights": False} | options)
    return peft.get_peft_model(make_model(tied), config).eval()


def logits(model):
    return model.eval()(input_ids=IDS).logits


def files(directory):
    config = json.loads((directory / "adapter_config.json").read_text())
    return config, safetensors.torch.load_file(directory / "adapter_model.safetensors")


@on_every_case
def test_there_and_back(tied, options, tmp_path):
    theirs = trained_by_peft(tied, options)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = make_model(tied)
    memkernels.load_adapter(ours, tmp_path / "theirs")
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-5)
    memkernels.save_adapter(ours, tmp_path / "ours")
    (config, saved), (_, expected) = files(tmp_path / "ours"), files(tmp_path / "theirs")
    expected = {key: of for key, of in expected.items() if "base_layer" not in key}  # frozen, and as they were
    assert saved.keys() == expected.keys() and all(torch.equal(saved[key], expected[key]) for key in saved)
    assert config["ensure_weight_tying"] == ("ensure_weight_tying" in options)
    again = peft.PeftModel.from_pretrained(make_model(tied), tmp_path / "ours")
    torch.testing.assert_close(logits(again), logits(theirs))
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "lora_" in name:
                parameter.add_(1)
    memkernels.load_adapter(ours, tmp_path / "theirs")
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-5)


@on_every_case
@pytest.mark.parametrize("recompute", [None, "layer"])
def test_they_train_as_those_of_peft(tied, options, recompute, tmp_path):
    def step(of, model):  # by our names; what PEFT has twice, of one adapter, is summed
        found = {name.removeprefix("base_model.model."): value for name, value in of(model, BATCH).items()}
        if "ensure_weight_tying" in options:
            for one, other in (("A", "B"), ("B", "A")):
                gradient = found.pop(f"lm_head.lora_{other}.default.weight", None)
                if gradient is not None:
                    found[f"{EMBEDDING}.lora_embedding_{one}.default"] += gradient.t()
        return found

    theirs = trained_by_peft(tied, options)
    theirs.save_pretrained(tmp_path)
    plain, exact = step(train_step, theirs.train()), step(exact_step, trained_by_peft(tied, options).train())
    ours = make_model(tied)
    memkernels.load_adapter(ours, tmp_path)
    if recompute is not None:
        assert not memkernels.patch(ours, recompute=recompute).left
    assert_same_step(step(train_step, ours.train()), exact, plain)


def test_lora_of_embeddings_that_are_named():
    model = make_model()
    assert EMBEDDING not in memkernels.lora(copy.deepcopy(model)).adapted
    report = memkernels.lora(model, 3, targets=["q_proj", "embed_tokens"], base="nf4")
    assert set(report.adapted) == {"model.layers.0.self_attn.q_proj", EMBEDDING}
    assert report.quantized == ["model.layers.0.self_attn.q_proj"]
    assert type(model.model.embed_tokens) is nn.LoRAEmbedding
    assert {name for name, of in model.named_parameters() if of.requires_grad} == {
        *(f"{EMBEDDING}.lora_embedding_{of}.default" for of in "AB"),
        *(f"model.layers.0.self_attn.q_proj.lora_{of}.default.weight" for of in "AB"),
    }
    with pytest.raises(ValueError, match="has adapters already"):
        memkernels.lora(model)


def test_dropout_is_that_of_linear_layers(tmp_path):
    model = make_model()
    memkernels.lora(model, 3, dropout=0.25, targets=["embed_tokens", "q_proj"])
    memkernels.save_adapter(model, tmp_path)
    assert files(tmp_path)[0]["lora_dropout"] == 0.25
    again = make_model()
    memkernels.load_adapter(again, tmp_path)
    assert again.model.layers[0].self_attn.q_proj.dropout_p == 0.25


@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head", "q_proj"]], ids=str)
def test_one_adapter_of_a_tied_weight(targets, tmp_path):
    model = make_model(tied=True)
    report = memkernels.lora(model, 3, dropout=0.0, targets=targets, ensure_weight_tying=True)
    assert {EMBEDDING, "lm_head"} <= set(report.adapted) and model.lm_head.tied_to is model.model.embed_tokens
    assert report.trained == sum(of.numel() for of in model.parameters() if of.requires_grad)
    expected = logits(randomise(model, 0.3))
    memkernels.merge_adapter(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    memkernels.unmerge_adapter(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    memkernels.save_adapter(model, tmp_path)
    again = make_model(tied=True)
    memkernels.load_adapter(again, tmp_path)
    assert again.lm_head.tied_to is again.model.embed_tokens
    assert torch.equal(logits(again), expected)  # unmerge leaves the rounding of a merge


def test_an_adapter_of_the_embedding_alone_is_not_merged_into_the_head():
    model = make_model(tied=True)
    memkernels.lora(model, 3, targets=["embed_tokens"])
    with pytest.raises(ValueError, match=r"embed_tokens\.base_layer\.weight and lm_head\.weight: expected a weight of"):
        memkernels.merge_adapter(model)


def test_heads_that_the_file_has_another_adapter_of_are_not_tied(tmp_path):
    """PEFT's two become different where it casts them, one after the other."""
    theirs = trained_by_peft(*CASES["tied"])
    head = theirs.base_model.model.lm_head.lora_A["default"]
    head.weight = torch.nn.Parameter(head.weight.detach() + 1)
    theirs.save_pretrained(tmp_path)
    ours = make_model(tied=True)
    memkernels.load_adapter(ours, tmp_path)
    assert ours.lm_head.tied_to is None
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-5)
    tied = make_model(tied=True)
    memkernels.lora(tied, 3, targets=["embed_tokens", "q_proj"], ensure_weight_tying=True)
    before = {name: of.clone() for name, of in tied.state_dict().items()}
    with pytest.raises(ValueError, match=r"lm_head\.lora_A\.weight: expected that of model\.embed_tokens"):
        memkernels.load_adapter(tied, tmp_path)
    assert all(torch.equal(of, before[name]) for name, of in tied.state_dict().items())


def test_what_lora_refuses_leaves_the_model_as_it_was():
    class Odd(torch.nn.Embedding):
        """As that of another library."""

    plain, tied, odd, sparse = make_model(), make_model(tied=True), make_model(), make_model()
    odd.model.embed_tokens = Odd(101, 24)
    sparse.model.embed_tokens.sparse = True
    shared = make_model(tied=True)
    shared.other = torch.nn.Embedding(101, 24)
    shared.other.weight = shared.lm_head.weight
    for model, options, error, message in (
        (
            plain,
            {"ensure_weight_tying": True},
            ValueError,
            "LlamaForCausalLM has no linear layer of model.embed_tokens",
        ),
        (
            tied,
            {"targets": "q_proj", "ensure_weight_tying": True},
            ValueError,
            "model.embed_tokens or lm_head among tar",
        ),
        (tied, {"use_dora": True, "ensure_weight_tying": True}, ValueError, "use_dora: expected none beside ensure_we"),
        (shared, {"ensure_weight_tying": True}, ValueError, "other has model.embed_tokens's weight, and is no torch"),
        (odd, {}, TypeError, r"model\.embed_tokens: expected a torch\.nn\.Embedding, got Odd"),
        (sparse, {}, ValueError, r"model\.embed_tokens: sparse: expected none under an adapter, got True"),
    ):
        before = dict(model.state_dict(keep_vars=True))
        with pytest.raises(error, match=message):
            memkernels.lora(model, **{"targets": ["embed_tokens", "q_proj"]} | options)
        after = model.state_dict(keep_vars=True)
        assert after.keys() == before.keys() and all(of is before[name] for name, of in after.items())
        assert all(of.requires_grad for of in model.parameters())


@pytest.mark.parametrize("adapted", [False, True], ids=["plain model", "adapted model"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda of: [of.pop(key) for key in list(of) if "embed" in key],
         r"embed_tokens\.lora_embedding_A: missing"),
        (lambda of: of.pop(f"base_model.model.{EMBEDDING}.lora_embedding_B"), r"lora_embedding_B: missing"),
        (lambda of: of.update({f"base_model.model.{EMBEDDING}.lora_embedding_A": torch.zeros(3, 100)}),
         r"embed_tokens\.lora_embedding_A: expected shape \(3, 101\), got \(3, 100\)"),
        (lambda of: of.update({f"base_model.model.{EMBEDDING}.lora_A.weight": torch.zeros(3, 101)}),
         r"embed_tokens\.lora_A\.weight: its layer is of another kind"),
        (lambda of: of[f"base_model.model.{EMBEDDING}.lora_embedding_A"].fill_(float("nan")), "expected finite values"),
    ],
)  # fmt: skip
def test_files_that_do_not_fit_leave_the_model_as_it_was(change, message, adapted, tmp_path):
    trained_by_peft(*CASES["embedding"]).save_pretrained(tmp_path)
    model = make_model()
    if adapted:
        memkernels.load_adapter(model, tmp_path)
    change_tensors(change)(tmp_path)
    before = dict(model.state_dict(keep_vars=True))
    with pytest.raises(ValueError, match=message):
        memkernels.load_adapter(model, tmp_path)
    after = model.state_dict(keep_vars=True)
    assert after.keys() == before.keys() and all(after[name] is of for name, of in before.items())
