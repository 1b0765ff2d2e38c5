"""The functional ops. Each is an autograd Function over registered operators; its docstring says what it saves."""

from memkernels.ops.attention.op import attention
from memkernels.ops.gated_activation.op import gated_activation
from memkernels.ops.linear_cross_entropy.op import linear_cross_entropy
from memkernels.ops.rms_norm.op import rms_norm

__all__ = ["attention", "gated_activation", "linear_cross_entropy", "rms_norm"]
