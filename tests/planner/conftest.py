"""A small Llama's configuration."""

import pytest


@pytest.fixture(scope="module")
def config():
    transformers = pytest.importorskip("transformers", reason="it is not installed: pip install memkernels[plan]")
    return transformers.LlamaConfig(
        vocab_size=600, hidden_size=64, intermediate_size=160, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
