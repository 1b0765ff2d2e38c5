"""`patch` and `unpatch`: first a plan of every replacement, then all of them at once.

A replacement is an instance attribute `forward` on a module: a partial of a function and that module.
Classes, parameters and submodules stay as they are, and so do other instances and state_dict keys.
"""

from __future__ import annotations

import types
from collections import Counter
from dataclasses import dataclass, field

from torch import nn

from memkernels.integrations.family import FAMILIES, CustomFamily, Family, class_of, family_of
from memkernels.integrations.norm import plan_norm
from memkernels.integrations.plain import has_foreign_forward, replaced_slot, slot
from memkernels.integrations.replacement import Forward, Replacement
from memkernels.ops.checks import check_flag, check_module

RECOMPUTE = ("none", "sublayer", "layer")


@dataclass(frozen=True)
class PatchReport:
    """What `patch` did; print it.

    Args:
        model: class of the model.
        recompute: the option.
        replaced: by a module's name, what it now is.
        left: by a module's name, why it was left to transformers or PEFT, wholly or in part, as the model is now: in
            training or in evaluation, with the adapters that are active.
    """

    model: str
    recompute: str
    replaced: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.model}, recompute={self.recompute!r}: {len(self.replaced)} modules replaced"]
        for what, count in Counter(self.replaced.values()).items():
            lines.append(f"  {count:3}  {what}")
        if self.left:
            lines.append("left as they were:")
        for why, count in Counter(self.left.values()).items():
            first = next(name for name, reason in self.left.items() if reason == why)
            others = f" and {count - 1} more" if count > 1 else ""
            lines.append(f"  {count:3}  {first}{others}: {why}")
        return "\n".join(lines)


def patch(model: nn.Module, *, recompute: str = "sublayer", loss: bool = True) -> PatchReport:
    """Puts memkernels into a model of transformers, this instance only: families as in `family.FAMILIES`.

    Replaced are RMS norms, attention, MLPs, gated or not, head and loss, and with `recompute` the sublayers of a layer,
    each with the norm in front, RMS or layer norm, as one op. Parameters, state_dict keys and classes stay as they are;
    cached generation, save_pretrained, copy.deepcopy, pickle and torch.compile work. The model may be anywhere inside
    `model`. Weights may be plain ones or of `memkernels.quant`; where one is another (distributed, quantised otherwise)
    or has hooks, now or later, its module is called and only what surrounds it is replaced. `ops.attention` stands in
    for "sdpa" and "eager" where it has a kernel and attention is causal, within windows and packed sequences too, and
    no (S, S) mask is built; where a mask hides other tokens, or attention weights are asked for, the model's own
    attention implementation computes. So it does under torch.compile in a call with attention_mask or position_ids, for
    which transformers builds its mask: what they say is not known when a graph is made. Padding is computed there too.
    gpt-oss has packed sequences told by position_ids, which transformers does not look for in it.

    LoRA adapters of PEFT (rsLoRA, DoRA, dropout, any of which is active, merged or disabled) are computed with their
    base by `ops.lora_linear`, in any model, and within the ops above at every recompute level, whether PEFT wrapped the
    model before or after `patch`; in a batch with adapter_names, all adapters in one product. Left to PEFT are several
    active adapters at once, and its other kinds of adapter.

    Weights in NF4 of bitsandbytes' Linear4bit (load_in_4bit, nested or not) and in int8 of its Linear8bitLt, under
    PEFT's adapters or alone, are read where they are and dequantised a tile at a time: NF4 where the layer's
    compute_dtype is that of the product, its input's or autocast's; int8 in training. Left to bitsandbytes are others,
    FP4, an output head, int8 in evaluation, where it rounds the input too, and all of them under torch.compile.

    Training with labels yields loss without logits (`outputs.logits` is None). Logits are there after `model.eval()`,
    with labels or without, and in training without labels. Labels are shifted, ignore_index, num_items_in_batch,
    shift_labels and an integer logits_to_keep are honoured as transformers does; with a logits_to_keep tensor or a loss
    function of the user's, transformers computes logits and loss. Training fills no cache unless the call asks for one.
    In training with labels, tokens padded on the right are not computed at all, if none of them has a label, but under
    torch.compile.

    Qwen2-VL, Qwen2.5-VL and Qwen3-VL train so with images and videos. In their vision towers attention within images
    and windows, MLPs and, with `recompute`, blocks are replaced; embeddings of patches and mergers are not. Gemma 3
    that reads images has transformers' vision tower, and in a batch whose token_type_ids name images, whose tokens see
    each other, transformers' masks and attention implementation; padding is computed there.

    BERT's encoder computes the visible tokens of a padded batch alone, for "sdpa" and "eager"; hidden positions of
    last_hidden_state are zero, in evaluation too, unless a label, the pooler, spans of answers, a hook or an output of
    each layer reads them, or torch.compile runs. A row is one sequence, as in transformers: position_ids tell BERT of
    no packed sequences, and a mask of four dimensions, which may, is left to transformers' attention. Dropout of
    attention has masks of its own, other than torch's for one seed. Its layers keep 4 d with "sublayer" and 3 d with
    "layer"; heads and losses stay transformers'.

    The experts of Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE and DeepSeek-V3 are computed by `ops.moe_mlp`, which keeps their
    input and the routing, with "none" the pre-activation too, and never multiplies out the adapters that PEFT's
    target_parameters puts on their weights. Routers are transformers', and so are attention in OLMoE and DeepSeek-V3,
    whose layers are called as they are at every level, and gpt-oss's experts, with "layer" computed again in backward.
    The routers' loss (output_router_logits) is added to a loss without logits.

    SwitchTransformers' experts are computed so too, from the weights of each, and its dense feed-forward layers by
    `ops.gated_mlp`; dropout within either keeps a seed instead of a mask, another than torch's for one seed. Its
    attention, whose scores have a learned bias, is transformers', with "layer" computed again in backward.

    Patch before `fully_shard`, `torch.compile` and DistributedDataParallel; torch.nn.DataParallel is not supported.

    Args:
        model: holds at least one module that can be replaced.
        recompute: what is computed again in backward, and with it what is kept, per token, layer and d = hidden size.
            "none": nothing is. "sublayer": `ops.attention_block` keeps its input and attention's output,
            `ops.gated_mlp` its input: 3 d. "layer": `ops.decoder_layer` keeps its input and attention's output: 2 d;
            with experts in the place of the MLP 4 d, with the norm's output, and 3 d. Where attention is not the op's,
            "sublayer" recomputes the MLP alone, and "layer" keeps the inputs of both sublayers. Gradient checkpointing
            enabled on the model takes the place of "layer".
        loss: whether head and loss are replaced.

    Returns:
        What was replaced, and what was left and why.

    Raises:
        TypeError: model is not a torch.nn.Module, or loss no bool.
        ValueError: an unknown recompute; a model that is patched already, holds nothing to replace, or is of a release
            of transformers too old for its family. It is unchanged.
    """
    check_module(model)
    if recompute not in RECOMPUTE:
        raise ValueError(f"recompute: expected one of {', '.join(RECOMPUTE)}, got {recompute!r}.")
    check_flag("loss", loss)
    if any(replaced_slot(module) for module in model.modules()):
        raise ValueError("model: it is patched already; call memkernels.unpatch(model) first.")
    report = PatchReport(type(model).__name__, recompute)
    forwards: list[tuple[nn.Module, Forward]] = []
    for name, module in model.named_modules():
        family = family_of(module)
        plan = None if family is None else _plan(module, family, recompute, loss)
        if plan is None:
            continue
        if plan.forward is not None and has_foreign_forward(module):
            plan = Replacement(plan.what, left="its forward was replaced by someone else")
        if plan.forward is not None:
            forwards.append((module, plan.forward))
            report.replaced[name] = plan.what
        if plan.left is not None:
            report.left[name] = plan.left
    if not forwards:
        reasons = "".join(f" {name}: {why}." for name, why in report.left.items())
        raise ValueError(
            f"model: found nothing to replace in {type(model).__name__}; memkernels replaces parts of transformers' "
            f"{', '.join(FAMILIES)} models, and PEFT's LoRA layers.{reasons}"
        )
    for module, forward in forwards:
        setattr(module, slot(module), forward)
    return report


def unpatch(model: nn.Module) -> None:
    """Takes out what `patch` put in: every module's forward is that of its class again.

    Raises:
        TypeError: model is not a torch.nn.Module.
        ValueError: nothing in the model is patched.
    """
    check_module(model)
    replaced = [(module, replaced_slot(module)) for module in model.modules()]
    if not any(place for _, place in replaced):
        raise ValueError(f"model: nothing in this {type(model).__name__} is patched.")
    for module, place in replaced:
        if place == "forward":
            del module.forward
        elif place == "_original_forward":  # what accelerate made of it holds it for good
            module._original_forward.__setstate__((type(module).forward, (module,), {}, None))  # type: ignore[operator]
        elif place is not None:
            setattr(module, place, types.MethodType(type(module).forward, module))


def _plan(module: nn.Module, family: Family | CustomFamily, recompute: str, loss: bool) -> Replacement | None:
    """What becomes of a module; None: nothing, and that needs no reason."""
    if isinstance(family, CustomFamily):
        return family.plan(module, recompute, loss)
    # These files import transformers, which is loaded where there is a family.
    from memkernels.integrations.attention import plan_attention
    from memkernels.integrations.decoder_layer import plan_layer
    from memkernels.integrations.loss import plan_loss
    from memkernels.integrations.mlp import plan_mlp
    from memkernels.integrations.model import plan_model
    from memkernels.integrations.vision_layer import plan_vision

    vision = None if family.vision is None else plan_vision(module, family.vision, recompute)
    if vision is not None:
        return vision
    kind = class_of(module)
    if kind is family.norm:
        return plan_norm(module, family)
    if kind is family.attention:
        return _left("attention", family.attention_left) or plan_attention(module, family)
    if kind is family.mlp:
        return plan_mlp(module, family, recompute != "none")
    if kind is family.experts:
        from memkernels.integrations.experts import plan_experts

        # With "layer" the sublayer is checkpointed: it runs again right before its backward.
        recomputed = recompute != "none" and not (recompute == "layer" and family.decoder_layer)
        return _left("experts", family.experts_left) or plan_experts(module, recomputed)
    if kind is family.decoder_layer and recompute != "none":
        return plan_layer(module, family, recompute)
    multimodal = family.multimodal
    for of in (family,) if multimodal is None else (family, multimodal):
        if kind is of.model:
            return plan_model(module, of)
        if kind is of.causal_lm and loss:
            return _left("head and loss", of.head_left) or plan_loss(module, of)
    return None


def _left(what: str, why: str | None) -> Replacement | None:
    return None if why is None else Replacement(what, left=why)
