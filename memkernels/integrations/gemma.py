"""What the Gemma families share: norms that add one to their weight, before and after each sublayer."""

NORM_OFFSET = 1.0
NORM_EPS = "eps"
NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
