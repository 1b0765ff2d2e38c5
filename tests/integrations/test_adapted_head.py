"""Patched models whose head is quantised or has an adapter: the loss without logits, and what the unpatched compute."""

from unittest import mock

import pytest
import torch
from training_step import assert_same_step, exact_step, train_step

import memkernels
from memkernels import ops, quant
from memkernels.integrations import loss as loss_module
from memkernels.testing import saved_bytes

peft = pytest.importorskip("peft", reason="peft is not installed: pip install memkernels[hf]")
# As wide as the tests' models are, so that NF4 and plain steps differ by rounding alone.
HEAD_AND_VALUES = ["v_proj", "lm_head"]


def with_peft(model, **options):
    torch.manual_seed(0)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=HEAD_AND_VALUES, r=4, lora_alpha=6, init_lora_weights=False, **options
    )
    return peft.get_peft_model(model, config).train()


def with_lora(model, **options):
    memkernels.lora(model, 4, 6.0, dropout=0.0, targets=HEAD_AND_VALUES, **options)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


def with_quantised_head(model):
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    model.lm_head.weight = torch.nn.Parameter(quant.quantize_int8(model.lm_head.weight), requires_grad=False)
    return model


def dense(model):
    """The same model over dense weights of the same values."""
    for module in model.modules():
        if isinstance(getattr(module, "weight", None), quant.QuantizedTensor) and isinstance(module, torch.nn.Linear):
            module.weight = torch.nn.Parameter(module.weight.dequantize(), requires_grad=False)
    return model


HEADS = {
    "peft": with_peft,
    "peft, float32 adapter of dora": lambda model: with_peft(model, use_dora=True),
    "lora": with_lora,
    "dora": lambda model: with_lora(model, use_dora=True),
    "lora over nf4": lambda model: with_lora(model, base="nf4"),
    "int8": with_quantised_head,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", HEADS)
def test_loss_and_gradients(make_model, make_batch, kind, dtype):
    batch = make_batch("right")
    make = lambda: HEADS[kind](make_model("Gemma2" if kind == "lora" else "Llama", dtype, tie_word_embeddings=False))  # noqa: E731
    plain, exact = train_step(dense(make()), batch), exact_step(dense(make()), batch)
    model = make()
    report = memkernels.patch(model)
    assert report.left == {} and "head and loss" in report.replaced.values()
    with mock.patch.object(loss_module.ops, "linear_cross_entropy", wraps=ops.linear_cross_entropy) as loss:
        assert_same_step(train_step(model, batch), exact, plain, dtype)
    assert loss.call_count == 1


def test_no_logits_are_kept(make_model, make_batch):
    """By the difference between vocabularies: PEFT's step keeps logits, ours labels and statistics alone."""

    def saved(patched, vocab_size):
        model = with_peft(make_model(vocab_size=vocab_size, tie_word_embeddings=False))
        if patched:
            memkernels.patch(model)
        return saved_bytes(lambda: model(**make_batch()).loss, exclude=tuple(model.parameters()))

    assert saved(True, 1101) == saved(True, 101)
    assert saved(False, 1101) > saved(False, 101) + 1000 * 72 * 4


def test_dropout_of_the_heads_adapter_is_drawn_and_off_in_evaluation(make_model, make_batch):
    batch, model = make_batch(), with_peft(make_model(tie_word_embeddings=False), lora_dropout=0.5)
    expected = model.eval()(**batch).loss
    memkernels.patch(model)
    losses = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        losses.append(model.train()(**batch).loss)
    assert losses[0] == losses[1] != losses[2]
    torch.testing.assert_close(model.eval()(**batch).loss, expected)


def test_states_of_an_adapter_that_no_op_takes(make_model, make_batch):
    batch, model = make_batch(), with_peft(make_model(tie_word_embeddings=False))
    memkernels.patch(model)
    adapted = model(**batch).loss
    head = model.base_model.model.lm_head
    with model.disable_adapter():
        without = model(**batch).loss
    assert not torch.isclose(adapted, without)
    head.register_forward_hook(lambda module, inputs, output: output * 0)
    torch.testing.assert_close(model(**batch).loss, torch.tensor(101.0).log())
