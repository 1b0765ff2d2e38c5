"""Optimizers whose states and gradients are divided among the ranks of a process group (ZeRO)."""

from memkernels.optim.agreement import RankFailure
from memkernels.optim.sharded.checkpoint import load_checkpoint, save_checkpoint
from memkernels.optim.sharded.grad_scaler import ShardedGradScaler
from memkernels.optim.sharded.optimizer import ShardedOptimizer

__all__ = ["RankFailure", "ShardedGradScaler", "ShardedOptimizer", "load_checkpoint", "save_checkpoint"]
