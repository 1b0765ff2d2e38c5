"""What is GPT-2's own: transposed weights, dropout of the residual, cross attention; and what its blocks keep."""

import pytest
import torch

import memkernels
from memkernels.testing import saved_bytes


@pytest.mark.parametrize(("recompute", "kept"), [("sublayer", 3), ("layer", 2)])
def test_saved_bytes(make_model, make_batch, recompute, kept):
    """By the difference between depths, since embeddings and loss keep something too."""

    def saved(depth):
        model = make_model("GPT2", num_hidden_layers=depth)
        assert memkernels.patch(model, recompute=recompute).left == {}
        return saved_bytes(lambda: model(**make_batch()).loss, exclude=tuple(model.parameters()))

    assert saved(3) - saved(2) == 2 * 37 * (4 * kept * 48 + 4 * 4)


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


def test_cross_attention_is_left(make_model, make_batch):
    model, batch = make_model("GPT2", add_cross_attention=True), make_batch("right")
    batch["encoder_hidden_states"] = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(2))
    expected = model(**batch).loss
    report = memkernels.patch(model)
    assert {"", "transformer.h.0", "transformer.h.0.crossattention"} <= report.left.keys()
    torch.testing.assert_close(model(**batch).loss, expected)
