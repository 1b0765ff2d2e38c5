"""Drop-in modules: the same parameters and state_dict keys as the modules that they replace."""

from memkernels.nn.adapted_experts import AdaptedExperts, ExpertsLoRA
from memkernels.nn.attention import Attention
from memkernels.nn.decoder_layer import DecoderLayer
from memkernels.nn.lora_embedding import LoRAEmbedding
from memkernels.nn.lora_linear import LoRALinear
from memkernels.nn.loss import LinearCrossEntropy
from memkernels.nn.mlp import GatedMLP
from memkernels.nn.moe import MoE, SwitchFFN
from memkernels.nn.norm import LayerNorm, RMSNorm
from memkernels.nn.rotary import RotaryEmbedding
from memkernels.nn.routers import ExpertChoiceRouter, SwitchRouter, TopKRouter

__all__ = [
    "AdaptedExperts",
    "Attention",
    "DecoderLayer",
    "ExpertChoiceRouter",
    "ExpertsLoRA",
    "GatedMLP",
    "LayerNorm",
    "LinearCrossEntropy",
    "LoRAEmbedding",
    "LoRALinear",
    "MoE",
    "RMSNorm",
    "RotaryEmbedding",
    "SwitchFFN",
    "SwitchRouter",
    "TopKRouter",
]
