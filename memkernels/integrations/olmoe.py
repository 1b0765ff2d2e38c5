"""OLMoE: Llama with norms over all heads of q and of k, and experts instead of MLPs."""

from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.models.olmoe import modeling_olmoe as olmoe

from memkernels.integrations.family import Family

FAMILY = Family(
    norm=olmoe.OlmoeRMSNorm,
    attention=olmoe.OlmoeAttention,
    mlp=None,
    decoder_layer=None,
    model=None,
    causal_lm=olmoe.OlmoeForCausalLM,
    eager_attention=olmoe.eager_attention_forward,
    attention_left="its norms of q and k span all heads",
    outputs=MoeCausalLMOutputWithPast,
    router_loss=olmoe.load_balancing_loss_func,
    experts=olmoe.OlmoeExperts,
)
