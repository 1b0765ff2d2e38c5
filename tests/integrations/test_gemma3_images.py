"""Patched Gemma 3 models that read images, whose tokens see each other, compute what the unpatched ones do."""

import pytest
import torch
from padding import pad
from training_step import assert_same_step, exact_step, train_step

import memkernels

TEXT = {
    "hidden_size": 48, "intermediate_size": 104, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 20, "query_pre_attn_scalar": 20, "vocab_size": 101, "sliding_window": 16,
    "sliding_window_pattern": 2, "initializer_range": 0.2, "final_logit_softcapping": 3.0, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip
IMAGE = 90
TOKENS = {"mm_tokens_per_image": 4, "image_token_index": IMAGE, "boi_token_index": 91, "eoi_token_index": 92}


def make(**config):
    """A model in training mode, the same on every call."""
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed: pip install memkernels[hf]"
    )
    torch.manual_seed(0)
    config = transformers.Gemma3Config(text_config=TEXT, vision_config=VISION, **TOKENS, **config)
    model = transformers.Gemma3ForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if "norm" in name or "mm_input_projection" in name:  # which transformers fills with zeros
            torch.nn.init.normal_(parameter, mean=float("layer_norm" in name), std=0.3)
    return model.train()


def make_batch(images=True, padding=None):
    """Two sequences of up to 37 tokens, with two images and with one."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, IMAGE, (2, 37), generator=generator)
    batch = {"input_ids": ids, "labels": ids.clone()}
    if images:
        for row, begin in ((0, 2), (0, 30), (1, 11)):
            ids[row, begin : begin + TOKENS["mm_tokens_per_image"]] = IMAGE
        batch["labels"][ids == IMAGE] = -100
        batch |= {
            "token_type_ids": (ids == IMAGE).long(),
            "pixel_values": torch.randn(3, 3, 16, 16, generator=generator),
        }
    return pad(batch, padding, TEXT["pad_token_id"])


@pytest.mark.parametrize(
    ("images", "padding", "attention"),
    [(True, None, "sdpa"), (True, "right", "eager"), (True, "left", "sdpa"), (False, None, "sdpa"),
     (False, "right", "sdpa"), (False, "left", "sdpa")],
)  # fmt: skip
def test_loss_and_gradients(images, padding, attention):
    batch, make_it = make_batch(images, padding), lambda: make(attn_implementation=attention)
    model = make_it()
    plain, exact = train_step(model, batch), exact_step(make_it(), batch)
    if images:
        causal = batch | {"token_type_ids": torch.zeros_like(batch["input_ids"])}
        assert not torch.isclose(train_step(model, causal)["loss"], plain["loss"])
    for recompute in ("none", "sublayer", "layer"):
        memkernels.patch(model, recompute=recompute)
        assert_same_step(train_step(model, batch), exact, plain, labels=int((batch["labels"][:, 1:] != -100).sum()))
        outputs = model(**batch)
        assert outputs.logits is None
        assert (outputs.image_outputs is not None) == images
        memkernels.unpatch(model)


@pytest.mark.parametrize("types", [None, 0, 1], ids=["", "types of text", "types of images"])
@pytest.mark.parametrize("padding", [None, "right", "left"])
def test_of_text_alone_no_mask_is_built_and_no_padding_computed(types, padding):
    """But for padding on the left; types of images may show later tokens."""
    batch, model = make_batch(False, padding), make()
    if types is not None:
        batch["token_type_ids"] = torch.full((2, 37), types)
    memkernels.patch(model)
    seen = []
    model.model.language_model.layers[1].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args[0].shape, kwargs["attention_mask"])), with_kwargs=True
    )
    model(**batch)
    ((shape, mask),) = seen
    if padding == "left" or types == 1:
        assert shape == (2, 37, 48) and mask.shape == (2, 1, 37, 37)
    elif padding == "right":
        assert shape == (1, 65, 48) and mask.tolist()[0][0][0] == [0, 37, 65]
        assert mask.untyped_storage().nbytes() == 3 * 4
    else:
        assert shape == (2, 37, 48) and mask.shape == (1, 1, 0, 0)


@pytest.mark.parametrize("images", [False, True])
def test_packed_sequences_told_by_position_ids(images):
    """Three of 14, 23 and 37 tokens, of which no image is cut."""
    batch, model = make_batch(images), make()
    batch |= {"position_ids": torch.stack([torch.cat([torch.arange(14), torch.arange(23)]), torch.arange(37)])}
    batch["use_cache"], batch["labels"][batch["position_ids"] == 0] = False, -100
    plain, exact = train_step(model, batch), exact_step(make(), batch)
    labels = int((batch["labels"][:, 1:] != -100).sum())
    for recompute in ("none", "sublayer", "layer"):
        memkernels.patch(model, recompute=recompute)
        assert_same_step(train_step(model, batch), exact, plain, labels=labels)
        memkernels.unpatch(model)


@pytest.mark.parametrize("images", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_torch_compile(images):
    """In one graph, with images too."""
    batch, model = make_batch(images), make()
    plain, exact = train_step(model, batch), exact_step(make(), batch)
    memkernels.patch(model, recompute="layer")
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    labels = int((batch["labels"][:, 1:] != -100).sum())
    assert_same_step(train_step(model, batch, compiled), exact, plain, labels=labels)


def test_head_and_loss_are_replaced_or_left(monkeypatch):
    model = make()
    report = memkernels.patch(model)
    assert report.replaced[""] == "head and loss" and report.left == {}
    assert not any("vision_tower" in name for name in report.replaced)
    batch = make_batch()
    expected = make().eval()(**batch)
    outputs = model.eval()(**batch)
    torch.testing.assert_close(outputs.logits, expected.logits)
    torch.testing.assert_close(outputs.loss, expected.loss)
    memkernels.unpatch(model)
    model.loss_function = lambda **_: None
    assert memkernels.patch(model).left == {"": "the model has a loss function of its own"}


def test_generation_after_training():
    batch, model = make_batch(padding="left"), make()
    prompt = {name: value for name, value in batch.items() if name != "labels"}
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    expected = model.eval().generate(**prompt, **options)
    memkernels.patch(model, recompute="layer")
    train_step(model.train(), batch)
    assert torch.equal(model.eval().generate(**prompt, **options), expected)
