"""The head and loss of causal language models, without logits."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from memkernels import ops
from memkernels.integrations.plain import is_plain_linear
from memkernels.integrations.replacement import Replacement, bind
from memkernels.ops.linear_cross_entropy.reference import shifted

# LlamaForCausalLM.forward and LlamaModel.forward take the same first five arguments, up to inputs_embeds.
_COMMON_ARGUMENTS = 5


def plan_loss(model: nn.Module) -> Replacement:
    left = why_not(model)
    return Replacement("head and loss", bind(causal_lm_forward, model) if left is None else None, left)


@can_return_tuple
def causal_lm_forward(model: Any, *args, **kwargs) -> CausalLMOutputWithPast:
    """In training with labels: the loss by `ops.linear_cross_entropy`, and no logits.

    Otherwise (evaluation, labels=None, positions chosen by a tensor, a loss function of the user's) transformers' own.
    """
    labels, logits_to_keep = kwargs.get("labels"), kwargs.get("logits_to_keep", 0)
    takes = model.training and isinstance(logits_to_keep, int) and len(args) <= _COMMON_ARGUMENTS
    if labels is None or not takes or why_not(model) is not None:
        return type(model).forward(model, *args, **kwargs)
    kwargs = {name: value for name, value in kwargs.items() if name not in ("labels", "logits_to_keep")}
    outputs = dict(model.model(*args, **kwargs))
    hidden_states = outputs.pop("last_hidden_state")[:, -logits_to_keep:]
    return CausalLMOutputWithPast(loss=_loss(model.lm_head, hidden_states, labels, **kwargs), **outputs)


def why_not(model: Any) -> str | None:
    """Why the loss cannot be computed without logits; None where it can."""
    if not is_plain_linear(model.lm_head):
        return "lm_head has an adapter, hooks, or a weight of another kind"
    if model.loss_function is not ForCausalLMLoss:
        return "the model has a loss function of its own"
    return None


def _loss(
    lm_head: nn.Linear,
    hidden_states: Tensor,
    labels: Tensor,
    num_items_in_batch: int | Tensor | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs,
) -> Tensor:
    """ForCausalLMLoss: label t + 1 at position t, the mean over labels, or their sum over num_items_in_batch."""
    target = shifted(labels, ignore_index) if shift_labels is None else shift_labels
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(hidden_states.device)
    return ops.linear_cross_entropy(
        hidden_states.flatten(0, -2), lm_head.weight, target.flatten().to(hidden_states.device), bias=lm_head.bias,
        ignore_index=ignore_index, num_items=num_items_in_batch,
    )  # fmt: skip
