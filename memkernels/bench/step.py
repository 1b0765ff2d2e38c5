"""One provider's computation, and what is run of it in each mode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from memkernels.bench.timer import Action

TIME_MODES = ("forward", "backward", "full")


@dataclass(frozen=True)
class Step:
    """`forward` returns a tensor or a tuple of them, made of `inputs` and `parameters`.

    Both take the gradients they require; parameters do not count as saved for backward, inputs do. `release` frees what
    the provider keeps in memory from one step for the next: it is part of a step's peak.
    """

    forward: Callable[[], torch.Tensor | tuple[torch.Tensor, ...]]
    inputs: tuple[torch.Tensor, ...] = ()
    parameters: tuple[torch.Tensor, ...] = ()
    release: Callable[[], None] = lambda: None

    def outputs(self) -> tuple[torch.Tensor, ...]:
        """What `forward` returns, as a tuple."""
        produced = self.forward()
        return produced if isinstance(produced, tuple) else (produced,)

    def grad_outputs(self) -> list[torch.Tensor]:
        """Incoming gradients, the same for every provider: one for a scalar (a loss), normal noise otherwise."""
        gradients = []
        for out in (tensor.detach() for tensor in self.outputs()):
            generator = torch.Generator(device=out.device).manual_seed(1)
            noise = torch.empty(out.shape, dtype=out.dtype, device=out.device)
            gradients.append(torch.ones_like(out) if out.dim() == 0 else noise.normal_(generator=generator))
        return gradients

    def clear_gradients(self) -> None:
        for tensor in self.inputs + self.parameters:
            tensor.grad = None

    def action(self, mode: str, grad_outputs: list[torch.Tensor]) -> Action:
        """What is timed in a mode. A backward pass consumes its graph, so each gets a new forward outside the clock."""

        def forward_untimed() -> tuple[torch.Tensor, ...]:
            self.clear_gradients()
            return self.outputs()

        if mode == "forward":
            return Action(lambda _: self.forward())
        if mode == "backward":
            return Action(lambda produced: torch.autograd.backward(produced, grad_outputs), forward_untimed)
        return Action(lambda _: torch.autograd.backward(self.outputs(), grad_outputs), self.clear_gradients)
