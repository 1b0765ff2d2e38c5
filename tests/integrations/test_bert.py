"""Patched BERT computes what the unpatched one does at visible tokens, under every head and way to train."""

import pytest
import torch
import torch.nn.functional as F
from compilers import on_every_compiler
from training_step import assert_same_step
from training_step import train_step as step

import memkernels
from memkernels.integrations import bert_packing
from memkernels.ops.attention import op as attention_op
from memkernels.ops.attention import reference
from memkernels.ops.attention_block import op as attention_block_op
from memkernels.testing import saved_bytes

SIZES = {
    "hidden_size": 48, "intermediate_size": 104, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 101,
    "max_position_embeddings": 64, "initializer_range": 0.2, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
RECOMPUTE = ("none", "sublayer", "layer")
HEADS = (
    "ForMaskedLM", "ForPreTraining", "LMHeadModel", "ForNextSentencePrediction", "ForSequenceClassification",
    "ForMultipleChoice", "ForTokenClassification", "ForQuestionAnswering",
)  # fmt: skip
SEED = torch.tensor(1234567890123456789)


def make(kind="ForMaskedLM", dtype=torch.float32, **config):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    model = getattr(transformers, f"Bert{kind}")(transformers.BertConfig(**(SIZES | config)))
    for name, parameter in model.named_parameters():
        if "LayerNorm" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter, mean=float(name.endswith("LayerNorm.weight")), std=0.3)
    return model.to(dtype).train()


def make_batch(padding=None, kind="ForMaskedLM"):
    """Three sequences of up to 37 tokens of two types, and the labels of a head, none of a hidden token."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 101, (3, 37), generator=generator)
    mask = torch.ones_like(ids)
    if padding is not None:
        for row, hidden in ((1, 9), (2, 20)):
            mask[row, slice(0, hidden) if padding == "left" else slice(-hidden, None)] = 0
    types = torch.randint(2, ids.shape, generator=generator)
    batch = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
    of_tokens = {"labels": torch.where(mask == 1, ids, -100)}
    of_rows = torch.tensor([0, 1, 1])
    if kind == "ForMultipleChoice":
        return {name: value[None] for name, value in batch.items()} | {"labels": of_rows[:1]}
    labels = {
        "ForMaskedLM": of_tokens,
        "ForPreTraining": of_tokens | {"next_sentence_label": of_rows},
        "LMHeadModel": of_tokens,
        "ForTokenClassification": {"labels": of_tokens["labels"].clamp(max=1)},
        "ForQuestionAnswering": {"start_positions": of_rows + 20, "end_positions": of_rows + 25},
    }
    return batch | labels.get(kind, {"labels": of_rows})


def assert_trains_as_unpatched(make_one, batch, dtype=torch.float32):
    """At each level of recomputation, with nothing left."""
    model = make_one()
    plain, exact = step(model, batch), step(make_one().double(), batch)
    of_rows = None if batch.get("labels", batch["input_ids"]).dim() > 1 else len(batch["labels"])
    for recompute in RECOMPUTE:
        assert memkernels.patch(model, recompute=recompute).left == {}
        assert_same_step(step(model, batch), exact, plain, dtype, labels=of_rows)
        memkernels.unpatch(model)
    assert all(torch.equal(value, plain[name]) for name, value in step(model, batch).items())


@pytest.fixture
def packs(monkeypatch):
    """A list to which each call of a model adds whether its padding was packed away."""
    found = []

    def recorded(model, mask, pack=bert_packing._pack):
        packed = pack(model, mask)
        found.append(packed is not None)
        return packed

    monkeypatch.setattr(bert_packing, "_pack", recorded)
    return found


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("kind", HEADS)
def test_loss_and_gradients(kind, padding):
    assert_trains_as_unpatched(lambda: make(kind), make_batch(padding, kind))


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("kind", ["ForMaskedLM", "ForSequenceClassification"])
def test_loss_and_gradients_in_bfloat16(kind, padding):
    assert_trains_as_unpatched(lambda: make(kind, torch.bfloat16), make_batch(padding, kind), torch.bfloat16)


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("padding", [None, "right"])
def test_autocast(recompute, padding):
    batch, model = make_batch(padding), make()
    exact = step(make().double(), batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = step(model, batch)
        memkernels.patch(model, recompute=recompute)
        actual = step(model, batch)
    assert_same_step(actual, exact, plain, torch.bfloat16)


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("padding", [None, "right"])
@on_every_compiler
def test_torch_compile(recompute, padding, backend):
    batch, model = make_batch(padding), make()
    plain, exact = step(model, batch), step(make().double(), batch)
    memkernels.patch(model, recompute=recompute)
    torch.compiler.reset()
    assert_same_step(step(model, batch, torch.compile(model, backend=backend)), exact, plain)


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_of_the_user(packs, recompute, reentrant):
    batch, model = make_batch("right"), make()
    plain, exact = step(model, batch), step(make().double(), batch)
    memkernels.patch(model, recompute=recompute)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same_step(step(model, batch), exact, plain)
    assert packs == [True]
    calls = []
    model.bert.encoder.layer[0].output.dense.register_forward_hook(lambda *_: calls.append(1))
    assert_same_step(step(model, batch), exact, plain)
    assert len(calls) == 2  # forward and one recomputation


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_outputs_of_layers_are_transformers_and_cost_later_calls_nothing(packs, implementation):
    batch, model = make_batch("right"), make(attn_implementation=implementation)
    plain, exact = step(model, batch), step(make().double(), batch)
    asked = {"output_hidden_states" if implementation == "sdpa" else "output_attentions": True}
    expected = model(**batch, **asked)
    memkernels.patch(model, recompute="layer")
    before = saved_bytes(lambda: model(**batch).loss, exclude=tuple(model.parameters()))
    assert_same_step(step(model, batch, **asked), exact, plain)
    actual = model(**batch, **asked)
    for name in ("hidden_states", "attentions"):
        for ours, theirs in zip(getattr(actual, name) or (), getattr(expected, name) or (), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert len(actual.hidden_states or actual.attentions) == (3 if implementation == "sdpa" else 2)
    assert packs == [True]
    assert_same_step(step(model, batch), exact, plain)
    assert before == saved_bytes(lambda: model(**batch).loss, exclude=tuple(model.parameters()))
    assert packs == [True] * 3
    torch.testing.assert_close(model(**batch, return_dict=False)[0], plain["loss"])


def test_masks_of_four_dimensions_are_transformers(packs):
    """Each token of a row sees its own; three dimensions are refused by transformers, patched or not."""
    batch, model = make_batch("right"), make()
    visible = batch["attention_mask"].bool()[:, None].expand(-1, 37, -1).tril(20)
    batch["attention_mask"] = visible.long()
    refusals = []
    for recompute in (None, "layer"):
        if recompute is not None:
            memkernels.patch(model, recompute=recompute)
        with pytest.raises((ValueError, IndexError, RuntimeError)) as refusal:
            model(**batch)
        refusals.append(refusal.value)
    assert str(refusals[0]) == str(refusals[1])
    memkernels.unpatch(model)
    batch["attention_mask"] = visible[:, None]
    assert_trains_as_unpatched(make, batch)
    assert packs == []


@pytest.mark.parametrize("padding", [None, "right"])
def test_dropout(monkeypatch, padding):
    """With torch's draws for hidden states, and one mask of ours for the attention of either model."""

    def seeded(q, k, v, attn_mask=None, dropout_p=0.0, scale=None, **_):
        q, k, v = (states.transpose(1, 2) for states in (q, k, v))
        visible = torch.ones(q.shape[:2], dtype=torch.bool) if attn_mask is None else attn_mask[:, 0, 0]
        starts = F.pad(visible.sum(1).cumsum(0), (1, 0)).int()
        packed = {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "dropout_p": dropout_p, "seed": SEED, "scale": scale}
        out, _ = reference.attention(q[visible], k[visible], v[visible], **packed)
        return torch.zeros_like(q).index_put((visible,), out).transpose(1, 2)

    for module in (attention_op, attention_block_op):
        monkeypatch.setattr(module, "seed_tensor", lambda seed, device: SEED)
    monkeypatch.setattr(F, "scaled_dot_product_attention", seeded)
    # Packed states draw other masks.
    hidden = 0.2 if padding is None else 0.0
    model, double = (make(hidden_dropout_prob=hidden, attention_probs_dropout_prob=0.3) for _ in range(2))
    batch = make_batch(padding)

    def seeded_step(model):
        torch.manual_seed(5)
        return step(model, batch)

    plain, exact = seeded_step(model), seeded_step(double.double())
    assert not torch.isclose(plain["loss"], step(make(), batch)["loss"], rtol=1e-3)
    for recompute in RECOMPUTE:
        memkernels.patch(model, recompute=recompute)
        assert_same_step(seeded_step(model), exact, plain)
        memkernels.unpatch(model)


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


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize(
    ("kind", "task", "targets"),
    [
        ("ForMaskedLM", None, "all-linear"),
        ("ForSequenceClassification", "SEQ_CLS", ["query", "value"]),
        ("ForTokenClassification", "TOKEN_CLS", ["query", "value", "dense"]),
    ],
)
def test_peft(packs, kind, task, targets, options):
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install memkernels[hf]")

    def adapted():
        model = make(kind)
        torch.manual_seed(0)
        options_of_all = {"task_type": task, "target_modules": targets, "r": 4, "init_lora_weights": False}
        return peft.get_peft_model(model, peft.LoraConfig(**options_of_all, **options)).train()

    batch, model = make_batch("right", kind), adapted()
    plain, exact = step(model, batch), step(adapted().double(), batch)
    for recompute in RECOMPUTE:
        assert memkernels.patch(model, recompute=recompute).left == {}
        assert_same_step(step(model, batch), exact, plain)
        memkernels.unpatch(model)
    assert packs == [True] * 3


def test_checkpoints_of_a_patched_model(tmp_path):
    batch, model = make_batch("right"), make()
    keys = list(model.state_dict())
    memkernels.patch(model, recompute="layer")
    assert list(model.state_dict()) == keys
    expected = model(**batch).loss
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).train()
    torch.testing.assert_close(again(**batch).loss, expected)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.load_state_dict(again.state_dict())
    torch.testing.assert_close(model(**batch).loss, expected, rtol=0, atol=0)


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


def test_hidden_positions_that_are_read_are_computed(packs):
    batch = make_batch("right")
    batch["labels"] = batch["input_ids"]  # at hidden positions too
    model = make()
    expected = model(**batch).loss
    memkernels.patch(model)
    torch.testing.assert_close(model(**batch).loss, expected)
    assert packs == []


def test_a_decoder_is_left():
    with pytest.raises(ValueError, match="a BERT that decodes"):
        memkernels.patch(make("Model", is_decoder=True))
