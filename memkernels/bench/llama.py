"""The Llama that whole steps are measured on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import LlamaConfig

LLAMA = {
    "width": 1024,
    "feed_forward": 2816,
    "layers": 6,
    "q_heads": 16,
    "k_heads": 4,
    "vocabulary": 32000,
    "tokens": 2048,
}


def llama_config(sizes: Mapping[str, int]) -> LlamaConfig:
    """transformers' configuration of a Llama of a case's sizes, those of `LLAMA` or others."""
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=sizes["width"],
        intermediate_size=sizes["feed_forward"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["q_heads"],
        num_key_value_heads=sizes["k_heads"],
        vocab_size=sizes["vocabulary"],
        max_position_embeddings=sizes["tokens"],
        use_cache=False,
    )
