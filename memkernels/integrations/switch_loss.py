"""The head and loss of SwitchTransformers, without logits, and the losses of its routers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import Seq2SeqMoEOutput
from transformers.models.switch_transformers import modeling_switch_transformers as switch
from transformers.utils import can_return_tuple

from memkernels import ops
from memkernels.integrations.linears import is_head, weight_and_bias
from memkernels.integrations.peft_lora import saved_module
from memkernels.integrations.replacement import by_name

OF_ENCODER = ("input_ids", "attention_mask", "inputs_embeds")
OF_DECODER = ("decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds", "cache")


def why_not(model: Any) -> str | None:
    """Why the loss cannot be computed without logits; None where it can."""
    fits = is_head(saved_module(model.lm_head))
    return None if fits else "lm_head has hooks, or a weight or an adapter of another kind"


@can_return_tuple
def loss_forward(model: Any, *args, names: tuple[str, ...], **kwargs) -> Seq2SeqMoEOutput:
    """In training with labels: the loss by `ops.linear_cross_entropy`, no logits, no cache unless the call asks.

    Otherwise transformers' own.
    """
    kwargs |= by_name(names, args)
    labels = kwargs.get("labels")
    if labels is None or not model.training or why_not(model) is not None:
        return type(model).forward(model, **kwargs)
    given = {name: kwargs.pop(name, None) for name in (*OF_ENCODER, *OF_DECODER, "encoder_outputs", "labels")}
    routed = bool(kwargs.setdefault("output_router_logits", False))
    encoded = given["encoder_outputs"]
    if encoded is None:
        encoded = model.encoder(**{name: given[name] for name in OF_ENCODER}, **kwargs)
    if given["decoder_input_ids"] is None and given["decoder_inputs_embeds"] is None:
        given["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels)
    if torch.is_grad_enabled() and kwargs.get("use_cache") is None and given["cache"] is None:
        kwargs["use_cache"] = False
    decoded = model.decoder(
        **{name.removeprefix("decoder_"): given[name] for name in OF_DECODER}, encoder_hidden_states=encoded[0],
        encoder_attention_mask=given["attention_mask"], **kwargs,
    )  # fmt: skip
    loss = _loss(model, decoded.last_hidden_state, labels)
    of_routers: dict[str, Any] = {}
    if routed:
        for name, outputs in (("encoder", encoded), ("decoder", decoded)):
            sparse_step = getattr(getattr(model, name).config, f"{name}_sparse_step")
            of_routers[f"{name}_z_loss"], of_routers[f"{name}_aux_loss"] = _router_losses(outputs[-1], sparse_step)
        loss = loss + model.router_z_loss_coef * (of_routers["encoder_z_loss"] + of_routers["decoder_z_loss"])
        loss = loss + model.router_aux_loss_coef * (of_routers["encoder_aux_loss"] + of_routers["decoder_aux_loss"])
    return Seq2SeqMoEOutput(
        loss=loss,
        **of_routers,
        cache=decoded.cache,
        decoder_hidden_states=decoded.hidden_states,
        decoder_attentions=decoded.attentions,
        cross_attentions=decoded.cross_attentions,
        decoder_router_logits=decoded.router_logits,
        encoder_last_hidden_state=encoded.last_hidden_state,
        encoder_hidden_states=encoded.hidden_states,
        encoder_attentions=encoded.attentions,
        encoder_router_logits=encoded.router_logits,
    )


def _loss(model: Any, hidden_states: Tensor, labels: Tensor) -> Tensor:
    """The mean over labels, as torch.nn.functional.cross_entropy; a tied head multiplies scaled states."""
    if model.config.tie_word_embeddings:
        hidden_states = hidden_states * model.model_dim**-0.5
    target = labels.flatten().to(hidden_states.device)
    weight, bias = weight_and_bias(saved_module(model.lm_head), hidden_states)
    return ops.linear_cross_entropy(hidden_states.flatten(0, -2), weight, target, bias=bias)


def _router_losses(router_logits: tuple[Tensor, ...], sparse_step: int) -> tuple[Any, Any]:
    """The z-loss and the load balance loss over a stack's routers; none, as in transformers, where all are sparse."""
    if sparse_step <= 1:
        return 0, 0
    logits = torch.cat(router_logits, dim=1)
    balance = switch.load_balancing_loss_func(logits.softmax(-1), logits.argmax(-1))
    return switch.router_z_loss_func(logits), balance
