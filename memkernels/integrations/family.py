"""What `patch` needs to know of a family of models."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from memkernels.integrations.replacement import Replacement

# By their packages in transformers, the oldest release that they were tested with: older ones compute otherwise.
FAMILIES = {
    "llama": (5, 0),
    "mistral": (5, 0),
    "qwen2": (5, 0),
    "qwen3": (5, 0),
    "phi3": (5, 0),
    "gemma2": (5, 24),
    "gemma3": (5, 0),
    "gpt_oss": (5, 0),
    "gpt2": (5, 24),
    "bert": (5, 24),
    "qwen2_vl": (5, 24),
    "qwen2_5_vl": (5, 24),
    "qwen3_vl": (5, 24),
    "mixtral": (5, 24),
    "qwen2_moe": (5, 24),
    "qwen3_moe": (5, 24),
    "olmoe": (5, 24),
    "deepseek_v3": (5, 24),
    "switch_transformers": (5, 24),
}


@dataclass(frozen=True)
class VisionTower:
    """A vision tower's classes: packed images (T, d), each token seeing those of its image or window.

    Args:
        attention: `qkv`, a rotary embedding of halves, attention within cu_seqlens in both directions, `proj`.
        mlp: down(act(gate(x)) * up(x)), or down(act(up(x))).
        block: h = x + attn(norm1(x)), y = h + mlp(norm2(h)).
        norm: an RMS norm, or torch.nn.LayerNorm.
        gate_up: attributes of the MLP; gate is None in an ungated one.
        down: an attribute of the MLP.
        activation: an attribute of the MLP.
        norm_eps: the attribute of an RMS norm.
        norm_offset: what an RMS norm adds to its weight.
    """

    attention: type[nn.Module]
    mlp: type[nn.Module]
    block: type[nn.Module]
    norm: type[nn.Module]
    gate_up: tuple[str | None, str] = ("gate_proj", "up_proj")
    down: str = "down_proj"
    activation: str = "act_fn"
    norm_eps: str = "variance_epsilon"
    norm_offset: float = 0.0


@dataclass(frozen=True)
class Family:
    """A family's classes in transformers, and how they differ.

    Their attributes have the names that transformers gives them throughout, but for those that a family names.

    Args:
        norm: an RMS norm, or torch.nn.LayerNorm.
        attention: projections, norms over the heads if it has `q_norm` and `k_norm`, rotary embedding if the model has
            one, attention with the module's `sinks` and `attn_logit_softcapping` if it has them.
        mlp: down(act(gate(x)) * up(x)), or down(act(up(x))); None: another kind, which is called as it is, and so is
            what a layer has in the place of one.
        experts: the weights of a mixture of experts, within what a layer has in the place of an MLP.
        experts_left: why experts are transformers' own.
        router_loss: router_loss(router_logits, num_experts, k, attention_mask): the loss that
            `output_router_logits` asks for, times the model's `router_aux_loss_coef`.
        attention_left: why attention is transformers' own. `decoder_layer` and `model` are None then.
        decoder_layer: h = x + norm(self_attn(norm(x))), y = h + norm(mlp(norm(h))), with `norms`, and with the residual
            dropout of `dropouts`.
        model: embeddings, decoder layers and a norm.
        causal_lm: `model`, or what has it as `language_model`, then `lm_head`, the configuration's
            final_logit_softcapping and ForCausalLMLoss.
        eager_attention: what computes attention where the configuration says "eager".
        outputs: what causal_lm returns; None: CausalLMOutputWithPast.
        head_left: why head and loss are transformers' own.
        multimodal: the family where `causal_lm` reads images too, and `model` is its base model, which builds a mask
            for each type of layer.
        image_types: token_type_ids of 1 are tokens of images, which see each other.
        norm_offset: what a norm adds to its weight.
        norm_eps: the attribute of a norm.
        norms: attributes of a decoder layer: norms before and after attention, before and after the MLP.
        dropouts: attributes of a decoder layer: dropout after attention and after the MLP.
        inner_dropouts: attributes of attention and of the MLP: dropout of what they return.
        layers: an attribute of the model.
        embeddings: an attribute of the model: those of tokens.
        self_attention: an attribute of a decoder layer.
        attention_dropout: an attribute of attention: dropout of its weights, a probability or a torch.nn.Dropout.
        qkv: attributes of attention: three projections, or the one of all three.
        o: an attribute of attention.
        gate_up: attributes of the MLP: two projections, or the one of both; gate is None in an ungated one.
        down: an attribute of the MLP.
        activation: the attribute of the MLP.
        half_tables: cos and sin come for half a head.
        sliding_window: the window that an attention module passes on; None: it passes none.
        positions: positions(model, arguments): the position_ids, of any shape (..., B, S), that the base model gives a
            call with these arguments and neither a cache nor position_ids; None: tokens are counted.
        sequence_positions: of the position_ids of a call to `model`, if any, those (B, S) that tell packed sequences,
            if any; None: they do as they are.
        packed_masks: packed_masks(model, position_ids, dtype): by type of layer what "eager" attention adds to scores,
            where the model's own masks know of no packed sequences; None: they do.
        vision: the tower that embeds images.
    """

    norm: type[nn.Module]
    attention: type[nn.Module]
    mlp: type[nn.Module] | None
    decoder_layer: type[nn.Module] | None
    model: type[nn.Module] | None
    causal_lm: type[nn.Module]
    eager_attention: Callable
    attention_left: str | None = None
    outputs: type | None = None
    head_left: str | None = None
    multimodal: Family | None = None
    image_types: bool = False
    experts: type[nn.Module] | None = None
    experts_left: str | None = None
    router_loss: Callable[..., Tensor | int] | None = None
    norm_offset: float = 0.0
    norm_eps: str = "variance_epsilon"
    norms: tuple[str, str | None, str, str | None] = ("input_layernorm", None, "post_attention_layernorm", None)
    dropouts: tuple[str | None, str | None] = (None, None)
    inner_dropouts: tuple[str | None, str | None] = (None, None)
    layers: str = "layers"
    embeddings: str = "embed_tokens"
    self_attention: str = "self_attn"
    attention_dropout: str = "attention_dropout"
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    o: str = "o_proj"
    gate_up: tuple[str | None, ...] = ("gate_proj", "up_proj")
    down: str = "down_proj"
    activation: str = "act_fn"
    half_tables: bool = False
    sliding_window: Callable[[nn.Module], int | None] | None = None
    positions: Callable[[nn.Module, dict], Tensor] | None = None
    sequence_positions: Callable[[Tensor | None], Tensor | None] | None = None
    packed_masks: Callable[[nn.Module, Tensor, torch.dtype], dict[str, Tensor]] | None = None
    vision: VisionTower | None = None


@dataclass(frozen=True)
class CustomFamily:
    """A family built otherwise than Llama.

    Args:
        plan: plan(module, recompute, loss): what becomes of a module of the family; None: nothing.
    """

    plan: Callable[[nn.Module, str, bool], Replacement | None]


def own_window(attention: Any) -> int | None:
    """A `sliding_window` that is the module's, if it has one."""
    return getattr(attention, "sliding_window", None)


def configured_window(attention: Any) -> int | None:
    """A `sliding_window` that is the configuration's."""
    return attention.config.sliding_window


def release() -> tuple[int, ...]:
    """Of transformers, which is loaded: major and minor."""
    return tuple(int(part) for part in sys.modules["transformers"].__version__.split(".")[:2])


def class_of(module: nn.Module) -> type[nn.Module]:
    """Its class, or that of the module whose place an `nn.AdaptedExperts` has taken."""
    return getattr(module, "replaced_class", None) or type(module)


def family_of(module: nn.Module) -> Family | CustomFamily | None:
    """The family whose file in transformers or PEFT defines the module's class. No other family's code is imported.

    Raises:
        ValueError: it is one of a release older than those tested.
    """
    place = class_of(module).__module__.split(".")
    if place[:2] == ["peft", "tuners"]:
        return importlib.import_module("memkernels.integrations.peft").FAMILY
    if place[:2] != ["transformers", "models"] or place[2] not in FAMILIES:
        return None
    major, minor = FAMILIES[place[2]]
    if release() < (major, minor):
        found = sys.modules["transformers"].__version__
        raise ValueError(
            f"model: {place[2]} needs transformers {major}.{minor} or newer, found {found}: "
            "pip install --upgrade transformers"
        )
    return importlib.import_module(f"memkernels.integrations.{place[2]}").FAMILY
