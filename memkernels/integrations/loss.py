"""The head and loss of causal language models, without logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput, can_return_tuple

from memkernels import ops
from memkernels.integrations.family import Family
from memkernels.integrations.linears import is_head, weight_and_bias
from memkernels.integrations.masks import has_cache, stack_of, tells, without_padding
from memkernels.integrations.peft_lora import saved_module
from memkernels.integrations.replacement import Replacement, argument_names, bind, by_name
from memkernels.ops.linear_cross_entropy.reference import shifted


def plan_loss(model: nn.Module, family: Family) -> Replacement:
    left = why_not(model)
    forward = bind(causal_lm_forward, model, family=family, names=argument_names(model)) if left is None else None
    return Replacement("head and loss", forward, left)


@can_return_tuple
def causal_lm_forward(model: Any, *args, family: Family, names: tuple[str, ...], **kwargs) -> ModelOutput:
    """In training with labels: the loss by `ops.linear_cross_entropy`, no logits, and no computation of padding.

    Otherwise (evaluation, labels=None, positions chosen by a tensor, a loss function of the user's, the routers' loss
    of a family without `router_loss`) transformers' own.
    """
    kwargs |= by_name(names, args)
    labels, logits_to_keep = kwargs.get("labels"), kwargs.get("logits_to_keep", 0)
    takes = model.training and isinstance(logits_to_keep, int)
    routed = _wants(model, kwargs, "output_router_logits")
    takes = takes and not (routed and family.router_loss is None)
    if labels is None or not takes or why_not(model) is not None:
        return type(model).forward(model, **kwargs)
    attention_mask, target = kwargs.get("attention_mask"), _target(**kwargs)
    kwargs = {name: value for name, value in kwargs.items() if name not in ("labels", "logits_to_keep")}
    if routed:
        kwargs["output_router_logits"] = True
    if family.model is not None and not logits_to_keep:
        kwargs, target = _without_padding(model, family, kwargs, target)
    outputs = dict(model.base_model(**kwargs))
    hidden_states = outputs.pop("last_hidden_state")[:, -logits_to_keep:]
    loss = _loss(model, hidden_states, target, **kwargs)
    if routed:
        outputs["aux_loss"] = _router_loss(model, family, outputs["router_logits"], attention_mask)
        loss = loss + model.router_aux_loss_coef * outputs["aux_loss"].to(loss.device)
    return (family.outputs or CausalLMOutputWithPast)(loss=loss, **outputs)


def _router_loss(model: Any, family: Any, router_logits: tuple[Tensor, ...], attention_mask: Tensor | None) -> Tensor:
    """The mask hides padding, which is not among the tokens where they were packed."""
    if attention_mask is not None and router_logits[0].shape[0] != attention_mask.numel():
        attention_mask = None
    return family.router_loss(router_logits, model.num_experts, model.num_experts_per_tok, attention_mask)


def _without_padding(model: Any, family: Family, kwargs: dict, target: Tensor) -> tuple[dict, Tensor]:
    """The arguments of the stack of layers and the target, packed where no padded token matters."""
    packed = dict(kwargs)
    if packed.get("use_cache") is None and not has_cache(packed) and torch.is_grad_enabled():
        packed["use_cache"] = False
    if _wants(model, packed, "output_hidden_states") or not tells(stack_of(model.base_model), family, packed):
        return kwargs, target
    return without_padding(model.base_model, family, packed, target, packed.get("ignore_index", -100))


def _wants(model: Any, kwargs: dict, name: str) -> bool:
    """Whether the call, or else the configuration, asks for an output."""
    wanted = kwargs.get(name)
    return bool(getattr(model.config, name, False) if wanted is None else wanted)


def why_not(model: Any) -> str | None:
    """Why the loss cannot be computed without logits; None where it can."""
    if not is_head(saved_module(model.lm_head)):
        return "lm_head has hooks, or a weight or an adapter of another kind"
    if not _has_default_loss(model):
        return "the model has a loss function of its own"
    return None


def _has_default_loss(model: Any) -> bool:
    """Whether the loss is ForCausalLMLoss. GPT-2's class names none, which transformers logs each time it is asked."""
    if model.loss_type is None and not hasattr(model, "_loss_function"):
        return True
    return model.loss_function is ForCausalLMLoss


def _target(labels: Tensor, shift_labels: Tensor | None = None, ignore_index: int = -100, **_) -> Tensor:
    """ForCausalLMLoss: label t + 1 at position t."""
    return shifted(labels, ignore_index) if shift_labels is None else shift_labels


def _loss(
    model: Any,
    hidden_states: Tensor,
    target: Tensor,
    num_items_in_batch: int | Tensor | None = None,
    ignore_index: int = -100,
    **_,
) -> Tensor:
    """ForCausalLMLoss: the mean over labels, or their sum over num_items_in_batch, which may be zero."""
    weight, bias = weight_and_bias(saved_module(model.lm_head), hidden_states)
    loss = ops.linear_cross_entropy(
        hidden_states.flatten(0, -2), weight, target.flatten().to(hidden_states.device), bias=bias,
        ignore_index=ignore_index, softcap=getattr(model.config, "final_logit_softcapping", None),
        reduction="mean" if num_items_in_batch is None else "sum",
    )  # fmt: skip
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss if num_items_in_batch is None else loss / num_items_in_batch
