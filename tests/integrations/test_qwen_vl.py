"""Patched Qwen-VL models compute what the unpatched ones do, with images: loss, every gradient, generation."""

from unittest import mock

import pytest
import torch
import training_step
from compilers import on_every_compiler
from padding import pad
from training_step import train_step as step

import memkernels
from memkernels.testing import saved_bytes

TEXT = {
    "hidden_size": 48, "intermediate_size": 104, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 101, "max_position_embeddings": 16, "initializer_range": 0.2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VISION = {"depth": 3, "num_heads": 2, "patch_size": 4, "initializer_range": 0.2}
TOKENS = {"image_token_id": 3, "video_token_id": 4, "vision_start_token_id": 5, "vision_end_token_id": 6}
WINDOW = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
# What a family has beside these, of the text and of the vision tower. Windows are shorter than what they see.
OWN = {
    "Qwen2VL": (
        WINDOW | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 2, 3]}},
        {"hidden_size": 48, "embed_dim": 40, "mlp_ratio": 2},
    ),
    "Qwen2_5_VL": (
        WINDOW | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 2, 3]}},
        {"hidden_size": 40, "intermediate_size": 72, "out_hidden_size": 48, "window_size": 16,
         "fullatt_block_indexes": [1]},
    ),
    "Qwen3VL": (
        {"head_dim": 20, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 3, 3]}},
        {"hidden_size": 40, "intermediate_size": 72, "out_hidden_size": 48, "num_position_embeddings": 16,
         "deepstack_visual_indexes": [0, 2]},
    ),
}  # fmt: skip
FAMILIES = tuple(OWN)
RECOMPUTE = ("none", "sublayer", "layer")


def make(family, dtype=torch.float32, attn_implementation="sdpa", rope=None, **vision):
    """A model in training mode, the same on every call; `rope` and `vision` are of its configuration."""
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed: pip install memkernels[hf]"
    )
    torch.manual_seed(0)
    text, own = OWN[family]
    text = text | {"rope_parameters": text["rope_parameters"] | (rope or {})}
    config = getattr(transformers, f"{family}Config")(
        text_config=TEXT | text, vision_config=VISION | own | vision, attn_implementation=attn_implementation, **TOKENS
    )
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config)
    for name, parameter in model.named_parameters():
        is_norm = "norm" in name or ".ln_q." in name
        if is_norm or "bias" in name:
            torch.nn.init.normal_(parameter, mean=float(is_norm and not name.endswith("bias")), std=0.3)
    return model.to(dtype).train()


def make_batch(padding=None):
    """Two sequences of up to 37 tokens, with two images and with one; padding is None, "left" or "right"."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(7, TEXT["vocab_size"], (2, 37), generator=generator)
    grids = torch.tensor([[1, 4, 6], [1, 6, 4], [1, 8, 4]])
    types = torch.zeros_like(ids)
    for row, begin, tokens in zip((0, 0, 1), (2, 15, 11), grids.prod(1) // 4, strict=True):
        types[row, begin : begin + tokens] = 1
    ids[types == 1] = TOKENS["image_token_id"]
    pixels = torch.randn(int(grids.prod(1).sum()), 3 * 2 * 4 * 4, generator=generator)
    batch = pad({"input_ids": ids, "labels": ids.masked_fill(types == 1, -100)}, padding, TEXT["pad_token_id"])
    return batch | {"mm_token_type_ids": types, "pixel_values": pixels, "image_grid_thw": grids}


def exact_step(model, batch):
    """Exactly in the rotation of images too."""
    rotary = {"apply_rotary_pos_emb_vision": lambda q, k, cos, sin: (_rotated(q, cos, sin), _rotated(k, cos, sin))}
    with mock.patch.multiple(type(model).__module__, **rotary):
        return training_step.exact_step(model, batch)


def _rotated(x, cos, sin):
    a, b = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat((-b, a), -1) * sin[:, None]


def assert_same_step(actual, exact, plain, batch, dtype=torch.float32):
    labels = int((batch["labels"][:, 1:] != -100).sum())
    training_step.assert_same_step(actual, exact, plain, dtype, labels=labels)


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients(family, dtype, padding):
    batch, model = make_batch(padding), make(family, dtype)
    plain, exact = step(model, batch), exact_step(make(family, dtype), batch)
    for recompute in RECOMPUTE:
        memkernels.patch(model, recompute=recompute)
        assert_same_step(step(model, batch), exact, plain, batch, dtype)
        assert model(**batch).logits is None
        memkernels.unpatch(model)


@pytest.mark.parametrize("rope_type", ["yarn", "dynamic"])
@pytest.mark.parametrize("family", FAMILIES)
def test_stretched_rotations(family, rope_type):
    rope = {"rope_type": rope_type, "factor": 4.0, "original_max_position_embeddings": 16}
    batch, model = make_batch("right"), make(family, rope=rope)
    plain, exact = step(model, batch), exact_step(make(family, rope=rope), batch)
    assert not torch.isclose(step(make(family), batch)["loss"], plain["loss"])
    for recompute in RECOMPUTE:
        memkernels.patch(model, recompute=recompute)
        assert_same_step(step(model, batch), exact, plain, batch)
        memkernels.unpatch(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_without_images(family):
    batch, model = make_batch("right"), make(family)
    batch = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    batch["input_ids"][batch["input_ids"] == TOKENS["image_token_id"]] = 50
    plain, exact = step(model, batch), exact_step(make(family), batch)
    memkernels.patch(model, recompute="layer")
    assert_same_step(step(model, batch), exact, plain, batch)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_mask_is_built_and_no_padding_computed(family):
    batch, model = make_batch("right"), make(family)
    memkernels.patch(model)
    seen = []
    model.model.language_model.layers[1].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args[0].shape, kwargs["attention_mask"])), with_kwargs=True
    )
    model(**batch)
    visible = int(batch["attention_mask"].sum())
    ((shape, mask),) = seen
    assert shape == (1, visible, 48)
    assert mask.tolist()[0][0][0] == [0, 37, visible]
    assert mask.untyped_storage().nbytes() == 3 * 4


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_sequences_told_by_positions_in_the_text(family):
    """The first of four axes tells them; three axes tell none, nor do two dimensions, but to Qwen3-VL."""
    batch, model = make_batch(), make(family)
    text = torch.cat([torch.arange(14), torch.arange(37 - 14)]).expand(1, 2, -1)
    axes = torch.stack([text[0], text[0] // 2, text[0] // 3])
    for positions in (torch.cat((text, axes)), axes, text[0]):
        call = batch | {"position_ids": positions, "use_cache": False}
        plain, exact = step(model, call), exact_step(make(family), call)
        for recompute in RECOMPUTE:
            memkernels.patch(model, recompute=recompute)
            assert_same_step(step(model, call), exact, plain, call)
            memkernels.unpatch(model)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", FAMILIES)
def test_cached_generation_after_training(family, cache):
    batch, model = make_batch("left"), make(family)
    prompt = {name: value for name, value in batch.items() if name != "labels"}
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "cache_implementation": cache}
    expected = model.eval().generate(**prompt, **options)
    memkernels.patch(model, recompute="layer")
    step(model.train(), make_batch("right"))
    assert torch.equal(model.eval().generate(**prompt, **options), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_stay_and_unpatch_restores_exactly(family):
    batch, model = make_batch(), make(family)
    keys, before = list(model.state_dict()), step(model, batch)
    memkernels.patch(model, recompute="layer")
    assert list(model.state_dict()) == keys
    memkernels.unpatch(model)
    after = step(model, batch)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_video(family):
    """Two frames, which Qwen3-VL has apart from each other in the text."""
    model, batch = make(family), make_batch("right")
    batch["video_grid_thw"], pixels = torch.tensor([[2, 4, 4]]), batch.pop("pixel_values")
    batch["pixel_values_videos"] = pixels[: batch["video_grid_thw"].prod()]
    del batch["image_grid_thw"]
    ids, types = batch["input_ids"], batch["mm_token_type_ids"].zero_()
    ids[ids == TOKENS["image_token_id"]] = 50
    for begin in (3, 8 if family == "Qwen3VL" else 7):
        types[0, begin : begin + 4] = 2
    ids[types == 2] = TOKENS["video_token_id"]
    if family == "Qwen2_5_VL":
        batch["second_per_grid_ts"] = torch.tensor([1.0])
    plain, exact = step(model, batch), exact_step(make(family), batch)
    memkernels.patch(model, recompute="layer")
    assert_same_step(step(model, batch), exact, plain, batch)


@pytest.mark.parametrize("family", FAMILIES)
def test_report_of_the_vision_tower(family):
    report = memkernels.patch(make(family))
    vision = {name.removeprefix("model.visual."): what for name, what in report.replaced.items() if "visual" in name}
    for block in ("blocks.0", "blocks.1", "blocks.2"):
        assert vision[block] == "vision block" and vision[f"{block}.attn"] == "attention of images"
    if family == "Qwen2VL":  # its default activation is none of ours
        assert report.left["model.visual.blocks.0.mlp"] == "memkernels has no activation QuickGELUActivation"
        assert report.left["model.visual.blocks.0"].startswith("MLP with")
    else:
        assert vision["blocks.0.mlp"] == "MLP" and report.left == {}


@pytest.mark.parametrize("recompute", ["sublayer", "layer"])
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_bytes_of_a_vision_block(family, recompute):
    """By the difference between depths: 3 d or 2 d elements a token, and lse of 2 heads."""

    def saved(depth):
        model = make(family, depth=depth, hidden_act="gelu_pytorch_tanh")
        assert memkernels.patch(model, recompute=recompute).left == {}
        return saved_bytes(lambda: model(**make_batch()).loss, exclude=tuple(model.parameters()))

    tokens, d = len(make_batch()["pixel_values"]), 40
    kept = tokens * (4 * (3 if recompute == "sublayer" else 2) * d + 4 * 2)
    assert saved(5) - saved(4) == kept


@pytest.mark.parametrize("family", FAMILIES)
def test_eager_attention_and_a_hook_in_the_vision_tower(family):
    batch, model = make_batch(), make(family, attn_implementation="eager")
    plain, exact = step(model, batch), exact_step(make(family), batch)
    fired = []
    model.model.visual.blocks[0].attn.qkv.register_forward_hook(lambda *_: fired.append(1))
    report = memkernels.patch(model, recompute="layer")
    assert "attention" in report.left["model.visual.blocks.0"]
    assert_same_step(step(model, batch), exact, plain, batch)
    assert len(fired) == 2  # forward and one recomputation


def test_gradient_checkpointing_of_the_user():
    batch, model = make_batch(), make("Qwen3VL")
    plain, exact = step(model, batch), exact_step(make("Qwen3VL"), batch)
    memkernels.patch(model, recompute="layer")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same_step(step(model, batch), exact, plain, batch)


@pytest.mark.parametrize(
    ("images", "recompute"),
    [(False, "layer")]
    + [pytest.param(False, recompute, marks=pytest.mark.slow) for recompute in RECOMPUTE[:2]]
    + [pytest.param(True, recompute, marks=pytest.mark.slow) for recompute in RECOMPUTE],
)
@pytest.mark.parametrize("family", ["Qwen2_5_VL", "Qwen3VL"])
@on_every_compiler
def test_torch_compile(family, images, recompute, backend):
    """In one graph without images; transformers reads their sizes, which breaks the graph."""
    batch, model = make_batch(), make(family)
    batch = batch if images else {name: batch[name] for name in ("input_ids", "labels")}
    plain, exact = step(model, batch), exact_step(make(family), batch)
    memkernels.patch(model, recompute=recompute)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=not images, backend=backend)
    assert_same_step(step(model, batch, compiled), exact, plain, batch)


@pytest.mark.parametrize("rows", ["padded", "packed"])
def test_torch_compile_of_padded_and_packed_rows(rows):
    """Of text, as in test_patched_models.py."""
    whole, model = make_batch("right" if rows == "padded" else None), make("Qwen2_5_VL", depth=1)
    batch = {name: whole[name] for name in ("input_ids", "labels", "attention_mask") if name in whole}
    batch["input_ids"][batch["input_ids"] == TOKENS["image_token_id"]] = 50
    if rows == "packed":
        text = torch.cat([torch.arange(14), torch.arange(37 - 14)]).expand(1, 2, -1)
        batch |= {"position_ids": text.expand(4, 2, -1), "use_cache": False}
    plain, exact = step(model, batch), exact_step(make("Qwen2_5_VL", depth=1), batch)
    memkernels.patch(model, recompute="layer")
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same_step(step(model, batch, compiled), exact, plain, batch)


@pytest.mark.parametrize("images", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_qwen2_vl_is_traced_and_derived(images):
    """As the other two are, but that no code is generated; one graph but where sizes of images are read."""
    batch, model = make_batch(), make("Qwen2VL")
    batch = batch if images else {name: batch[name] for name in ("input_ids", "labels")}
    plain, exact = step(model, batch), exact_step(make("Qwen2VL"), batch)
    memkernels.patch(model, recompute="layer")
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=not images, backend="aot_eager")
    assert_same_step(step(model, batch, compiled), exact, plain, batch)
