"""Gemma 3: an RMS norm over each head of q and k, a sliding window in most layers, images that see themselves."""

from dataclasses import replace

from transformers.models.gemma3 import modeling_gemma3 as gemma3

from memkernels.integrations import gemma
from memkernels.integrations.family import Family, own_window, release

_TEXT = Family(
    norm=gemma3.Gemma3RMSNorm,
    attention=gemma3.Gemma3Attention,
    mlp=gemma3.Gemma3MLP,
    decoder_layer=gemma3.Gemma3DecoderLayer,
    model=gemma3.Gemma3TextModel,
    causal_lm=gemma3.Gemma3ForCausalLM,
    eager_attention=gemma3.eager_attention_forward,
    norm_offset=gemma.NORM_OFFSET,
    norm_eps=gemma.NORM_EPS,
    norms=gemma.NORMS,
    sliding_window=own_window,
)
_IS_NEW = release() >= (5, 24)
_MULTIMODAL = replace(
    _TEXT,
    model=gemma3.Gemma3Model if _IS_NEW else None,
    causal_lm=gemma3.Gemma3ForConditionalGeneration,
    outputs=gemma3.Gemma3CausalLMOutputWithPast,
    head_left=None if _IS_NEW else "before transformers 5.24 its loss is another: upgrade transformers",
    image_types=True,
)
FAMILY = replace(_TEXT, multimodal=_MULTIMODAL)
