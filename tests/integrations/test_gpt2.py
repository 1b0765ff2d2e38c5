"""What is GPT-2's own: dropout of the residual, scores in float32, types of tokens, cross attention."""

import pytest
import torch
from training_step import assert_same_step, exact_step, train_step

import memkernels
from memkernels.testing import saved_bytes


@pytest.mark.parametrize(("recompute", "kept"), [("sublayer", 3), ("layer", 2)])
@pytest.mark.parametrize("padding", [None, "right"])
def test_saved_bytes(make_model, make_batch, recompute, kept, padding):
    """By the difference between depths, since embeddings and loss keep something too; padding keeps nothing."""

    def saved(depth):
        model = make_model("GPT2", num_hidden_layers=depth)
        assert memkernels.patch(model, recompute=recompute).left == {}
        return saved_bytes(lambda: model(**make_batch(padding)).loss, exclude=tuple(model.parameters()))

    tokens = 2 * 37 - (9 if padding else 0)
    assert saved(3) - saved(2) == tokens * (4 * kept * 48 + 4 * 4)


def test_dropout_of_the_residual_is_kept(make_model, make_batch):
    """Dropped with the same seed by the module itself, after the same op as without dropout."""
    batch = make_batch()
    losses = []
    for recompute in (None, "sublayer", "layer"):
        model = make_model("GPT2", resid_pdrop=0.5)
        if recompute is not None:
            left = memkernels.patch(model, recompute=recompute).left
            assert len(left) == (2 if recompute == "layer" else 0) and all("dropout" in why for why in left.values())
        torch.manual_seed(3)
        losses.append(model(**batch).loss)
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(losses[2], losses[0])
    assert not torch.isclose(losses[0], make_model("GPT2")(**batch).loss)


@pytest.mark.parametrize("padding", [None, "left"])
def test_scores_reordered_and_upcast(monkeypatch, make_model, make_batch, padding):
    options = {"attn_implementation": "eager", "scale_attn_by_inverse_layer_idx": True}
    batch, model = make_batch(padding), make_model("GPT2", reorder_and_upcast_attn=True, **options)
    plain, exact = train_step(model, batch), exact_step(make_model("GPT2", **options), batch)
    calls, method = [], type(model.transformer.h[0].attn)._upcast_and_reordered_attn
    monkeypatch.setattr(
        type(model.transformer.h[0].attn), method.__name__, lambda *args: calls.append(1) or method(*args)
    )
    for recompute in ("none", "sublayer", "layer"):
        memkernels.patch(model, recompute=recompute)
        assert_same_step(train_step(model, batch), exact, plain)
        memkernels.unpatch(model)
    assert len(calls) == (0 if padding is None else 2 + 2 + 4)  # of two layers, with "layer" again in backward


@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_types_of_tokens_are_packed_with_them(make_model, make_batch, padding):
    batch, model = {name: rows.flip(0) for name, rows in make_batch(padding).items()}, make_model("GPT2")
    batch["token_type_ids"] = torch.randint(101, (2, 37), generator=torch.Generator().manual_seed(2))
    plain, exact = train_step(model, batch), exact_step(make_model("GPT2"), batch)
    memkernels.patch(model)
    assert_same_step(train_step(model, batch), exact, plain)


def test_positional_arguments(make_model, make_batch):
    """The cache comes second."""
    model, batch = make_model("GPT2"), make_batch("right")
    arguments = (batch["input_ids"], None, batch["attention_mask"], *[None] * 5, batch["labels"])
    expected = model(*arguments).loss
    memkernels.patch(model)
    torch.testing.assert_close(model(*arguments).loss, expected)
    with pytest.raises(TypeError, match="takes 11 arguments by position, got 12"):
        model(*arguments, *[None] * 3)


def test_cross_attention_is_left(make_model, make_batch):
    batch = make_batch("right")
    batch["encoder_hidden_states"] = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(2))
    make = lambda: make_model("GPT2", add_cross_attention=True)  # noqa: E731
    model = make()
    plain = train_step(model, batch)
    exact = exact_step(make(), batch | {"encoder_hidden_states": batch["encoder_hidden_states"].double()})
    report = memkernels.patch(model)
    assert report.left == {
        f"transformer.h.{i}{of}": "cross attention" for i in (0, 1) for of in ("", ".crossattention")
    }
    assert_same_step(train_step(model, batch), exact, plain)
    del batch["encoder_hidden_states"]
    assert_same_step(train_step(model, batch), exact_step(make(), batch), train_step(make(), batch))
    memkernels.unpatch(model)
    plain_model = make_model("GPT2")
    memkernels.patch(plain_model)
    with pytest.raises(ValueError, match="cross-attention"):
        plain_model(**batch, encoder_hidden_states=torch.randn(2, 5, 48))
