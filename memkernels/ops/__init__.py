"""The functional ops. Each is an autograd Function over registered operators; its docstring says what it saves."""

from memkernels.ops import wide_norm as wide_norm  # its operators, which CUDA C++ registers kernels for
from memkernels.ops.attention.op import attention
from memkernels.ops.attention_block.op import attention_block
from memkernels.ops.decoder_layer.op import decoder_layer
from memkernels.ops.gated_activation.op import gated_activation
from memkernels.ops.gated_mlp.op import gated_mlp
from memkernels.ops.layer_norm.op import layer_norm
from memkernels.ops.linear_cross_entropy.op import linear_cross_entropy
from memkernels.ops.lora_embedding.op import lora_embedding
from memkernels.ops.lora_linear.norm import row_squares
from memkernels.ops.lora_linear.op import lora_linear
from memkernels.ops.lora_linear.weight import LoRAWeight
from memkernels.ops.moe.dispatch import moe_combine, moe_dispatch
from memkernels.ops.moe.grouped_matmul import grouped_matmul
from memkernels.ops.moe.lora import ExpertsLoRAWeight
from memkernels.ops.moe.op import moe_mlp
from memkernels.ops.moe.plan import DispatchPlan, expert_choice_plan, moe_plan
from memkernels.ops.rms_norm.op import rms_norm
from memkernels.ops.rotary.op import apply_rotary

__all__ = [
    "DispatchPlan",
    "ExpertsLoRAWeight",
    "LoRAWeight",
    "apply_rotary",
    "attention",
    "attention_block",
    "decoder_layer",
    "expert_choice_plan",
    "gated_activation",
    "gated_mlp",
    "grouped_matmul",
    "layer_norm",
    "linear_cross_entropy",
    "lora_embedding",
    "lora_linear",
    "moe_combine",
    "moe_dispatch",
    "moe_mlp",
    "moe_plan",
    "rms_norm",
    "row_squares",
]
