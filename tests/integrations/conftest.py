"""Small random models of every family that `patch` knows."""

import pytest
import torch
from padding import pad

SIZES = {
    "hidden_size": 48,
    "intermediate_size": 104,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 101,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # logits far from uniform
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Windows shorter than the sequences of the tests.
OWN = {
    "Llama": {"attention_bias": True, "mlp_bias": True},
    "Mistral": {"sliding_window": 16},
    "Qwen2": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    "Phi3": {"partial_rotary_factor": 0.5, "sliding_window": 16, "resid_pdrop": 0.0},
    "Gemma2": {
        "head_dim": 20,
        "sliding_window": 16,
        "query_pre_attn_scalar": 20,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "Gemma3": {
        "head_dim": 20,
        "sliding_window": 16,
        "query_pre_attn_scalar": 20,
        "sliding_window_pattern": 2,
        "final_logit_softcapping": None,
    },
    "GptOss": {
        "head_dim": 20,
        "sliding_window": 16,
        "num_local_experts": 3,
        "num_experts_per_tok": 2,
        "experts_implementation": "eager",
    },
    "Qwen3": {"head_dim": 20, "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    "GPT2": {"n_inner": 104, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}


@pytest.fixture
def make_model():
    """make_model(family, dtype, **config): a model in training mode, the same on every call."""
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed: pip install memkernels[hf]"
    )

    def make(family="Llama", dtype=torch.float32, **config):
        torch.manual_seed(0)
        text = "Text" if family == "Gemma3" else ""
        config = getattr(transformers, f"{family}{text}Config")(**(SIZES | OWN[family] | config))
        model = getattr(transformers, "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM")(config)
        for name, parameter in model.named_parameters():
            is_norm = "norm" in name or ".ln_" in name
            if is_norm or "bias" in name or "sinks" in name:
                mean = is_norm and not name.endswith("bias") and not family.startswith("Gemma")  # whose norms add one
                torch.nn.init.normal_(parameter, mean=float(mean), std=0.3)
        return model.to(dtype).train()

    return make


@pytest.fixture
def make_batch():
    """make_batch(padding): two sequences of up to 37 tokens with labels; padding is None, "left" or "right"."""

    def make(padding=None):
        ids = torch.randint(3, SIZES["vocab_size"], (2, 37), generator=torch.Generator().manual_seed(1))
        batch = {"input_ids": ids, "labels": ids.clone()}
        return pad(batch, padding, SIZES["pad_token_id"])

    return make
