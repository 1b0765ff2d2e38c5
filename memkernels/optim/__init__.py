"""Optimizers whose states take 8, 4, 2 or 1 bytes a parameter, as `torch.optim.Optimizer`s."""

from typing import TYPE_CHECKING, Any

from memkernels.optim.adafactor import Adafactor
from memkernels.optim.adamw import AdamW
from memkernels.optim.gradient_tiers import offload_gradients
from memkernels.optim.in_backward import StepInBackward, step_in_backward
from memkernels.optim.lion import Lion
from memkernels.optim.muon import Muon
from memkernels.optim.sgd import SGD
from memkernels.optim.tiers import offload_states

if TYPE_CHECKING:
    from memkernels.optim.sharded import (
        RankFailure,
        ShardedGradScaler,
        ShardedOptimizer,
        load_checkpoint,
        save_checkpoint,
    )

__all__ = [
    "SGD",
    "Adafactor",
    "AdamW",
    "Lion",
    "Muon",
    "RankFailure",
    "ShardedGradScaler",
    "ShardedOptimizer",
    "StepInBackward",
    "load_checkpoint",
    "offload_gradients",
    "offload_states",
    "save_checkpoint",
    "step_in_backward",
]


def __getattr__(name: str) -> Any:
    """What needs torch.distributed, which takes seconds to import, when it is asked for."""
    if name in __all__:
        from memkernels.optim import sharded

        return getattr(sharded, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
