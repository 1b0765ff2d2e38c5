"""Patched models compute what the unpatched ones do: loss, every gradient, generation, in every mode of training."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from training_step import assert_same_step, exact_step, train_step

import memkernels
from memkernels.testing import saved_bytes

CACHES = ("cache", "past_key_values")  # transformers' names of it, now and before
FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Phi3", "Gemma2", "Gemma3", "GptOss", "GPT2")
ONLY_EAGER = ("Gemma2", "GptOss")  # since "sdpa" has neither a soft cap nor sinks


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients(make_model, make_batch, family, dtype, padding):
    batch, model = make_batch(padding), make_model(family, dtype)
    plain, exact = train_step(model, batch), exact_step(make_model(family, dtype), batch)
    labels = int((batch["labels"][:, 1:] != -100).sum())
    for recompute in ("none", "sublayer", "layer"):
        memkernels.patch(model, recompute=recompute)
        assert_same_step(train_step(model, batch), exact, plain, dtype, labels=labels)
        memkernels.unpatch(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_mask_is_built_and_no_padding_computed(make_model, make_batch, family):
    batch, model = make_batch("right"), make_model(family)
    memkernels.patch(model)
    seen = []
    first, second = model.transformer.h if family == "GPT2" else model.model.layers
    norm = first.ln_1 if family == "GPT2" else first.input_layernorm
    norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    second.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(args[2] if family == "GPT2" else kwargs["attention_mask"]), with_kwargs=True
    )
    model(**batch).loss.backward()
    visible = int(batch["attention_mask"].sum())
    assert seen[0] == (1, visible, 48)
    assert seen[1].tolist()[0][0][0] == [0, 37, visible]
    assert seen[1].untyped_storage().nbytes() == 3 * 4
    del seen[:]
    model(**batch | {"labels": batch["input_ids"]})  # padding that has labels is computed
    assert seen[0] == (2, 37, 48)
    assert seen[1].shape == (2, 1, 37, 37)


@pytest.mark.parametrize(
    ("family", "window"),
    [(family, "masked") for family in ("Qwen2", "Qwen3", "Gemma2", "Gemma3", "GptOss")]
    + [(family, "none") for family in ("Qwen2", "Gemma3")],
)
def test_masks_by_type_of_layer(make_model, make_batch, family, window):
    """Each layer has its own, in which some tokens see later ones, or "sdpa" has none: causal, without a window."""
    batch, model = make_batch(), make_model(family)
    causal = torch.ones(37, 37, dtype=torch.bool).tril()
    both_ways = causal.clone()
    both_ways[4:9, 4:9] = True
    masks = {
        "full_attention": both_ways,
        "sliding_attention": None if window == "none" else both_ways & ~causal.tril(-9),
    }
    if family in ONLY_EAGER:
        masks = {name: torch.zeros(37, 37).masked_fill(~mask, torch.finfo().min) for name, mask in masks.items()}
    batch["attention_mask"] = {
        name: None if mask is None else mask.expand(2, 1, -1, -1) for name, mask in masks.items()
    }
    plain = train_step(model, batch)
    exact = exact_step(make_model(family), batch)
    for recompute in ("none", "sublayer", "layer"):
        memkernels.patch(model, recompute=recompute)
        assert_same_step(train_step(model, batch), exact, plain)
        memkernels.unpatch(model)


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ONLY_EAGER])
def test_eager_attention(make_model, make_batch, family, padding):
    """Where a mask hides tokens, by the family's own function; the default is "sdpa" wherever there is one."""
    make = lambda: make_model(family, attn_implementation="eager")  # noqa: E731
    batch, model = make_batch(padding), make()
    assert make_model(family).config._attn_implementation == "sdpa"
    # What a hidden position sees, which predicts the first visible token, differs between implementations.
    plain, exact = train_step(model, batch), exact_step(make(), batch)
    memkernels.patch(model)
    assert_same_step(train_step(model, batch), exact, plain)


@pytest.mark.parametrize("family", ["Qwen3", "GPT2"])
def test_autocast(make_model, make_batch, family):
    batch, model = make_batch("right"), make_model(family)
    exact = exact_step(make_model(family), batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = train_step(model, batch)
        memkernels.patch(model)
        actual = train_step(model, batch)
    assert_same_step(actual, exact, plain, torch.bfloat16)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_sequences_told_by_position_ids(make_model, make_batch, family):
    batch, model = make_batch(), make_model(family)
    first, second = (torch.cat([torch.arange(n), torch.arange(37 - n)]) for n in (20, 1))
    batch["position_ids"] = torch.stack([first, second])
    batch["labels"][batch["position_ids"] == 0] = -100
    batch["use_cache"] = False  # with a cache transformers does not look for packed sequences
    # In gpt-oss transformers does not look for them at all; patched, it has them.
    unpatched = in_rows_of_their_own(batch) if family == "GptOss" else batch
    plain, exact = train_step(model, unpatched), exact_step(make_model(family), unpatched)
    for recompute in ("none", "sublayer", "layer"):
        memkernels.patch(model, recompute=recompute)
        assert_same_step(train_step(model, batch), exact, plain)
        memkernels.unpatch(model)


def test_packed_sequences_of_gpt_oss_where_transformers_computes_attention(make_model, make_batch):
    batch, model = make_batch(), make_model("GptOss")
    batch["position_ids"] = torch.cat([torch.arange(20), torch.arange(17)]).expand(2, -1)
    batch["labels"][:, 20], batch["use_cache"] = -100, False
    unpatched = in_rows_of_their_own(batch)
    plain, exact = train_step(model, unpatched), exact_step(make_model("GptOss"), unpatched)
    memkernels.patch(model)
    batch["position_ids"] = batch["position_ids"][:1]
    assert_same_step(train_step(model, batch, output_attentions=True), exact, plain)


@pytest.mark.parametrize("family", ["Qwen2", "GptOss"])
def test_a_batch_of_padding_alone(make_model, make_batch, family):
    """As where one of several ranks has no more data: its share of the loss and of the gradients is zero."""
    batch, model = make_batch("right") | {"num_items_in_batch": 11}, make_model(family)
    batch["attention_mask"].zero_()
    batch["labels"].fill_(-100)
    expected = train_step(model, batch)
    for recompute in ("none", "sublayer", "layer"):
        memkernels.patch(model, recompute=recompute)
        actual = train_step(model, batch)
        assert actual.keys() == expected.keys()
        assert not any(value.any() for value in actual.values())
        memkernels.unpatch(model)


def in_rows_of_their_own(batch):
    """Packed sequences as rows that are padded on the right."""
    starts = (batch["position_ids"].flatten() == 0).nonzero().flatten().tolist()
    ids, labels = (
        [batch[name].flatten()[i:j] for i, j in zip(starts, [*starts[1:], None], strict=True)]
        for name in ("input_ids", "labels")
    )
    pad = torch.nn.utils.rnn.pad_sequence
    masks = pad([torch.ones_like(of) for of in ids], batch_first=True)
    return {"input_ids": pad(ids, True), "labels": pad(labels, True, -100), "attention_mask": masks, "use_cache": False}


# Family, rope_parameters, and others of the configuration; sequences are longer than what was pre-trained.
ROTATIONS = {
    "linear": ("Llama", {"factor": 4.0}, {}),
    "dynamic": ("Llama", {"factor": 4.0}, {"max_position_embeddings": 16}),
    "llama3": ("Llama", {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 16}, {}),
    "yarn": ("Qwen3", {"factor": 4.0, "original_max_position_embeddings": 16}, {}),
    "longrope": ("Phi3", {"short_factor": [1.0, 1.2, 2.0], "long_factor": [1.0, 3.0, 8.0],
                          "original_max_position_embeddings": 34, "partial_rotary_factor": 0.5}, {}),
    "default": ("Phi3", {"partial_rotary_factor": 0.5}, {}),
}  # fmt: skip


@pytest.mark.parametrize("padding", [None, "right", "all right"])
@pytest.mark.parametrize("rope_type", ROTATIONS)
def test_stretched_and_partial_rotations(make_model, make_batch, rope_type, padding):
    """Those of three axes are in test_qwen_vl.py. With all rows padded the longest position may be a padded one."""
    family, parameters, config = ROTATIONS[rope_type]
    config = config | {"rope_parameters": {"rope_type": rope_type, "rope_theta": 1e4} | parameters}
    batch = make_batch("right" if padding else None)
    if padding == "all right":
        batch["attention_mask"][:, -5:], batch["labels"][:, -5:] = 0, -100
    plain, exact = (run(make_model(family, **config), batch) for run in (train_step, exact_step))
    without = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}}
    assert not torch.isclose(train_step(make_model(family, **without), batch)["loss"], plain["loss"])
    for recompute in ("none", "sublayer", "layer"):
        model = make_model(family, **config)  # a dynamic rotation remembers the longest that it saw
        memkernels.patch(model, recompute=recompute)
        assert_same_step(train_step(model, batch), exact, plain)


def test_residual_dropout_is_the_modules(make_model, make_batch):
    batch, model = make_batch(), make_model("Phi3", resid_pdrop=0.5)
    memkernels.patch(model, recompute="layer")
    torch.manual_seed(0)
    first = train_step(model, batch)
    torch.manual_seed(0)
    again = train_step(model, batch)
    assert all(torch.equal(first[name], again[name]) for name in first)
    model.eval()
    memkernels.unpatch(model)
    expected = model(**batch).loss
    memkernels.patch(model)
    torch.testing.assert_close(model(**batch).loss, expected)
    assert not torch.equal(first["loss"], expected)


# Beside Qwen3 the gate compiles these, which differ most; the others are like Llama but for what these have.
TRACED = ("Gemma2", "GPT2", "Phi3")
OTHERS = tuple(family for family in FAMILIES if family not in ("Qwen3", "GptOss"))
COMPILED = (
    [("Qwen3", "aot_eager", recompute) for recompute in ("none", "sublayer")]
    + [("Qwen3", "inductor", "layer")]
    + [(family, "aot_eager", "layer") for family in TRACED]
    + [pytest.param(f, "aot_eager", "layer", marks=pytest.mark.slow) for f in (*OTHERS, "GptOss") if f not in TRACED]
    + [pytest.param("Qwen3", "inductor", recompute, marks=pytest.mark.slow) for recompute in ("none", "sublayer")]
    + [pytest.param(family, "inductor", "layer", marks=pytest.mark.slow) for family in (*OTHERS, "GptOss")]
)


# The gate compiles Mistral's.
ROWS = [
    pytest.param(family, rows, marks=() if family == "Mistral" and rows != "left" else pytest.mark.slow)
    for family in FAMILIES
    for rows in ("left", "right", "packed")
]


@pytest.mark.parametrize(("family", "rows"), ROWS)
def test_torch_compile_of_padded_and_packed_rows(make_model, make_batch, family, rows):
    """With the mask of transformers, and what is hidden computed: a graph does not know what the arguments say."""
    batch, model = make_batch(None if rows == "packed" else rows), make_model(family)
    if rows == "packed":
        batch |= {"position_ids": torch.cat([torch.arange(20), torch.arange(17)]).expand(2, -1), "use_cache": False}
        batch["labels"][batch["position_ids"] == 0] = -100
    unpatched = in_rows_of_their_own(batch) if (family, rows) == ("GptOss", "packed") else batch
    plain, exact = train_step(model, unpatched), exact_step(make_model(family), unpatched)
    memkernels.patch(model, recompute="layer")
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=family != "GptOss", backend="aot_eager")
    assert_same_step(train_step(model, batch, compiled), exact, plain)


def test_torch_compile_of_gpt_oss_in_one_graph(make_model, make_batch):
    """With experts chosen by tensors, as transformers has them too."""
    batch, config = make_batch(), {"experts_implementation": "batched_mm"}
    model = make_model("GptOss", **config)
    plain, exact = train_step(model, batch), exact_step(make_model("GptOss"), batch)
    memkernels.patch(model, recompute="layer")
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same_step(train_step(model, batch, compiled), exact, plain)


@pytest.mark.parametrize(("family", "backend", "recompute"), COMPILED)
def test_torch_compile_in_one_graph(make_model, make_batch, family, backend, recompute):
    """But for gpt-oss, where transformers chooses experts in Python. "aot_eager" traces and derives, and generates no
    code. Hooks that transformers left when it was asked for outputs of layers change nothing."""
    batch, model = make_batch(), make_model(family)
    plain, exact = train_step(model, batch), exact_step(make_model(family), batch)
    if backend == "aot_eager":
        model(input_ids=batch["input_ids"], output_hidden_states=True)
    memkernels.patch(model, recompute=recompute)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=family != "GptOss", backend=backend)
    assert_same_step(train_step(model, batch, compiled), exact, plain)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["Llama", "Qwen2", "GPT2"])
def test_batches_of_other_lengths_share_a_graph(make_model, make_batch, family):
    model = make_model(family)
    memkernels.patch(model, recompute="layer")
    torch.compiler.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    for length in (37, 29, 21):
        batch = {name: of[:, :length] for name, of in make_batch().items()}
        expected = train_step(model, batch)
        for name, value in train_step(model, batch, compiled).items():
            torch.testing.assert_close(value, expected[name])
    assert graphs.frame_count == 2


@pytest.mark.parametrize("recompute", ["sublayer", "layer"])
@pytest.mark.parametrize(
    ("family", "module"), [("Llama", "model.layers.0.mlp.gate_proj"), ("GPT2", "transformer.h.0.mlp.c_fc")]
)
def test_gradient_checkpointing_of_the_user(make_model, make_batch, family, module, recompute):
    batch, model = make_batch(), make_model(family)
    plain, exact = train_step(model, batch), exact_step(make_model(family), batch)
    memkernels.patch(model, recompute=recompute)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    calls = []
    model.get_submodule(module).register_forward_hook(lambda *_: calls.append(1))
    assert_same_step(train_step(model, batch), exact, plain)
    assert len(calls) == 2  # forward and one recomputation


@pytest.mark.parametrize("family", ["Llama", "GPT2"])
def test_outputs_of_layers_cost_later_calls_nothing(make_model, make_batch, family):
    """transformers leaves its hooks on the layers."""
    batch, model = make_batch("right"), make_model(family)
    memkernels.patch(model, recompute="layer")

    def saved():
        return saved_bytes(lambda: model(**batch).loss, exclude=tuple(model.parameters()))

    before, plain = saved(), train_step(model, batch)
    states = model(**batch, output_hidden_states=True).hidden_states
    assert len(states) == 3 and all(of.shape == (2, 37, 48) for of in states)
    assert saved() == before
    assert all(torch.equal(value, plain[name]) for name, value in train_step(model, batch).items())


def test_dropout_of_attention_is_the_same_when_recomputed(make_model, make_batch):
    batch, model = make_batch(), make_model(attention_dropout=0.3)
    steps = {}
    for recompute in ("sublayer", "layer"):
        memkernels.patch(model, recompute=recompute)
        torch.manual_seed(0)
        steps[recompute] = train_step(model, batch)
        memkernels.unpatch(model)
    for name, value in steps["layer"].items():
        torch.testing.assert_close(value, steps["sublayer"][name])
    assert not torch.equal(steps["layer"]["loss"], train_step(make_model(), batch)["loss"])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_cached_generation_after_training(make_model, make_batch, family, cache):
    batch, model = make_batch("left"), make_model(family)
    prompt = {name: batch[name] for name in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "cache_implementation": cache}
    expected = model.eval().generate(**prompt, **options)
    memkernels.patch(model, recompute="layer")
    train_step(model.train(), make_batch("right"))
    assert torch.equal(model.eval().generate(**prompt, **options), expected)


def test_a_cache_filled_with_gradient(make_model, make_batch):
    ids, model = make_batch()["input_ids"], make_model()
    expected = model(input_ids=ids).logits
    memkernels.patch(model)
    first = model(input_ids=ids[:, :30], use_cache=True)
    cache = {name: first[name] for name in CACHES if name in first}
    rest = model(input_ids=ids[:, 30:], **cache, use_cache=True)
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), expected, rtol=1e-4, atol=1e-4)


def test_trains_as_the_unpatched_model_under_the_trainer(make_model, make_batch, tmp_path):
    transformers = pytest.importorskip("transformers")
    rows = [{name: value[i] for name, value in make_batch("right").items()} for i in (0, 1)] * 4
    losses = []
    for patched in (False, True):
        model = make_model()
        if patched:
            memkernels.patch(model, recompute="layer")
        options = transformers.TrainingArguments(
            str(tmp_path), per_device_train_batch_size=1, gradient_accumulation_steps=2, learning_rate=1e-2,
            num_train_epochs=1, logging_steps=1, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        trainer = transformers.Trainer(model, options, train_dataset=rows, eval_dataset=rows[:2])
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        losses[-1].append(trainer.evaluate()["eval_loss"])
    assert losses[0][-1] < losses[0][0]
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=1e-4, atol=1e-4)
