"""BERT: attention in both directions, layer norms after the residual, padding packed away, an ungated MLP."""

from __future__ import annotations

from typing import Any

from transformers.models.bert import modeling_bert as bert

from memkernels.integrations.bert_attention import attention_forward
from memkernels.integrations.bert_layer import plan_layer
from memkernels.integrations.bert_packing import encoder_forward, head_forward, model_forward
from memkernels.integrations.family import CustomFamily
from memkernels.integrations.replacement import Replacement, argument_names, bind

# Heads that compute something at every position, and so may at hidden ones; and whether they always do: spans of
# answers compete with them, and before a first visible token a hidden position predicts it.
HEADS = {
    bert.BertForMaskedLM: False,
    bert.BertForPreTraining: False,
    bert.BertForTokenClassification: False,
    bert.BertForQuestionAnswering: True,
    bert.BertLMHeadModel: True,
}


def plan(module: Any, recompute: str, loss: bool) -> Replacement | None:
    kind = type(module)
    if getattr(getattr(module, "config", None), "is_decoder", False) or getattr(module, "is_decoder", False):
        return Replacement("model", left="a BERT that decodes") if kind is bert.BertModel else None
    if kind is bert.BertSelfAttention:
        return Replacement("attention", bind(attention_forward, module))
    if kind is bert.BertLayer and recompute != "none":
        return plan_layer(module, recompute)
    if kind is bert.BertEncoder:
        return Replacement("encoder of packed tokens", bind(encoder_forward, module))
    if kind is bert.BertModel:
        return Replacement("model that packs visible tokens", bind(model_forward, module, names=argument_names(module)))
    if kind in HEADS:
        forward = bind(head_forward, module, names=argument_names(module), reads_all=HEADS[kind])
        return Replacement("head that may read hidden tokens", forward)
    return None


FAMILY = CustomFamily(plan)
