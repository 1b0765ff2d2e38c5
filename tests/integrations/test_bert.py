"""Patched BERT computes what the unpatched one does at visible tokens; what it keeps; where padding is packed away."""

import pytest
import torch
from training_step import train_step as step

import memkernels
from memkernels.testing import assert_within_factor_two, saved_bytes

SIZES = {
    "hidden_size": 48, "intermediate_size": 104, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 101,
    "max_position_embeddings": 64, "initializer_range": 0.2, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
RECOMPUTE = ("none", "sublayer", "layer")


def make(kind="ForMaskedLM", dtype=torch.float32, **config):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    model = getattr(transformers, f"Bert{kind}")(transformers.BertConfig(**(SIZES | config)))
    for name, parameter in model.named_parameters():
        if "LayerNorm" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter, mean=float(name.endswith("LayerNorm.weight")), std=0.3)
    return model.to(dtype).train()


def make_batch(padding=None, kind="ForMaskedLM"):
    ids = torch.randint(3, 101, (3, 37), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padding is not None:
        for row, hidden in ((1, 9), (2, 20)):
            mask[row, slice(0, hidden) if padding == "left" else slice(-hidden, None)] = 0
    labels = torch.where(mask == 1, ids, -100) if kind == "ForMaskedLM" else torch.tensor([0, 1, 1])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def assert_same_step(actual, exact, plain, dtype=torch.float32):
    """By the factor-two rule; the loss, one number, may besides be off by what the rule grants a mean.

    A bias of the keys moves all scores of a query alike, which softmax does not see: its gradient is zero, and what is
    computed is the rounding of terms that cancel, of the size of those of the keys' weight.
    """
    assert actual.keys() == plain.keys()
    for name, value in actual.items():
        eps, atol = torch.finfo(dtype).eps, {}
        if name == "loss":
            atol = {"atol": exact["loss"].item() * eps / 16}
        if name.endswith("key.bias"):
            weight_grad = exact[name.replace("bias", "weight")]
            atol = {"atol": 1e-6 + weight_grad.abs().max().item() * eps}
        assert_within_factor_two(name, value, exact[name], plain[name], **atol)


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["ForMaskedLM", "ForSequenceClassification"])
def test_loss_and_gradients(kind, dtype, padding):
    batch, model = make_batch(padding, kind), make(kind, dtype)
    plain, exact = step(model, batch), step(make(kind, dtype).double(), batch)
    for recompute in RECOMPUTE:
        assert memkernels.patch(model, recompute=recompute).left == {}
        assert_same_step(step(model, batch), exact, plain, dtype)
        memkernels.unpatch(model)
    assert all(torch.equal(value, plain[name]) for name, value in step(model, batch).items())


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("padding", [None, "right"])
def test_torch_compile(recompute, padding):
    batch, model = make_batch(padding), make()
    plain, exact = step(model, batch), step(make().double(), batch)
    memkernels.patch(model, recompute=recompute)
    torch.compiler.reset()
    assert_same_step(step(model, batch, torch.compile(model)), exact, plain)


@pytest.mark.parametrize(("recompute", "kept"), [("sublayer", 4), ("layer", 3)])
@pytest.mark.parametrize("padding", [None, "right"])
def test_saved_bytes(recompute, kept, padding):
    """By the difference between depths; hidden tokens keep nothing."""

    def saved(depth):
        model, batch = make(num_hidden_layers=depth), make_batch(padding)
        memkernels.patch(model, recompute=recompute)
        return saved_bytes(lambda: model(**batch).loss, exclude=tuple(model.parameters()))

    tokens = int(make_batch(padding)["attention_mask"].sum())
    statistics = 4 * 4 + (4 * 4 if recompute == "sublayer" else 0)  # lse of 4 heads; mean and rstd of two norms
    of_checkpoint = torch.get_rng_state().nbytes if recompute == "layer" else 0  # the generator's state
    assert saved(3) - saved(2) == tokens * (4 * kept * 48 + statistics) + of_checkpoint


@pytest.mark.parametrize("padding", ["left", "right"])
def test_hidden_positions_are_zero_and_the_others_as_before(padding):
    model, batch = make("Model").eval(), make_batch(padding)
    model.pooler = None
    del batch["labels"]
    hidden = batch["attention_mask"] == 0
    expected = model(**batch).last_hidden_state
    memkernels.patch(model)
    actual = model(**batch).last_hidden_state
    assert not actual[hidden].any() and expected[hidden].any()
    torch.testing.assert_close(actual[~hidden], expected[~hidden], rtol=1e-4, atol=1e-4)
    every = model(**batch, output_hidden_states=True)
    torch.testing.assert_close(every.last_hidden_state, expected, rtol=1e-4, atol=1e-4)


def test_hidden_positions_that_are_read_are_computed():
    batch = make_batch("right")
    batch["labels"] = batch["input_ids"]  # at hidden positions too
    model = make()
    expected = model(**batch).loss
    memkernels.patch(model)
    torch.testing.assert_close(model(**batch).loss, expected)
    spans = {"start_positions": torch.tensor([1, 2, 3]), "end_positions": torch.tensor([4, 5, 6])}
    model = make("ForQuestionAnswering")
    del batch["labels"]
    expected = model(**batch, **spans).loss
    memkernels.patch(model)
    torch.testing.assert_close(model(**batch, **spans).loss, expected)


@pytest.mark.parametrize("recompute", ["sublayer", "layer"])
def test_dropout_is_the_same_when_recomputed(recompute):
    """A directional derivative of the loss, with the seed held, against the gradient: the masks must agree."""
    batch, model = make_batch("right"), make(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.3)
    memkernels.patch(model, recompute=recompute)
    weight = model.bert.encoder.layer[0].attention.self.value.weight
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))

    def loss():
        torch.manual_seed(5)
        return model(**batch).loss

    loss().backward()
    with torch.no_grad():
        weight += 1e-3 * direction
    above = loss().item()
    with torch.no_grad():
        weight -= 2e-3 * direction
    numeric = (above - loss().item()) / 2e-3
    assert abs(numeric - (weight.grad * direction).sum().item()) < 0.02 * abs(numeric) + 1e-2


def test_a_decoder_is_left():
    with pytest.raises(ValueError, match="a BERT that decodes"):
        memkernels.patch(make("Model", is_decoder=True))
