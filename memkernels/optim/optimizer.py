"""What the package's optimizers share: a step over all parameters of a group in one call, and their states' storage."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from memkernels.optim import checks
from memkernels.optim.blocks import ALIGNMENT, check_division
from memkernels.optim.clipping import as_number, clip_factor, divided, is_on_gpu, total_norm
from memkernels.optim.codes import new_moment
from memkernels.optim.loading import Loaded, prepare
from memkernels.optim.local import as_parameter, divided_as, first_element, is_distributed, local_of
from memkernels.optim.operators import step_group

if TYPE_CHECKING:
    from memkernels.optim.gradient_tiers import GradientTiers
    from memkernels.optim.tiers import StateTiers


class Moment(NamedTuple):
    """A moment by its key in the state; `signed` says which code it takes."""

    key: str
    signed: bool


class LowMemoryOptimizer(torch.optim.Optimizer):
    """The base of the package's optimizers.

    A subclass names its operator and its moments, and checks its hyperparameters.
    """

    operator: ClassVar[str]
    # Whether torch's optimizer of the same name counts steps in its states.
    saves_step: ClassVar[bool] = True
    # Hyperparameters that torch's has not: a checkpoint of it leaves them as they are.
    not_in_torch: ClassVar[tuple[str, ...]] = ()
    # Whether an element's update depends on nothing of the parameter's others but those of its block.
    elementwise: ClassVar[bool] = True
    # torch.amp.GradScaler leaves the division by its scale, and the skipping of a step, to the optimizer.
    _step_supports_amp_scaling = True
    grad_norm: Tensor | None = None
    tiers: StateTiers | None = None  # where states are between steps, by `offload_states`
    gradient_tiers: GradientTiers | None = None  # where gradients are until the step, by `offload_gradients`
    steps_in_backward = False  # by `step_in_backward`, which has hooks on its parameters

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        # Of a parameter that is a part of a larger one, which of its elements is the first.
        self.origins: dict[Tensor, int] = {}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as torch's optimizers do; RuntimeError after `step_in_backward`, which would not step it."""
        if self.steps_in_backward:
            raise RuntimeError(
                "step_in_backward: it steps the parameters it was made with; make it anew with all groups."
            )
        super().add_param_group(param_group)
        try:
            self._check_options(self.param_groups[-1])
            checks.check_shared(self.param_groups[-1])
            params = [p for group in self.param_groups for p in group["params"]]
            checks.check_parameters(self._names(), params, self.takes_division)
            self._check_blocks(self.param_groups[-1], [p for p in self.param_groups[-1]["params"] if p.requires_grad])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    @abstractmethod
    def moments(self, group: dict[str, Any]) -> tuple[Moment, ...]:
        """The moments that parameters of a group have."""

    def has_blocks(self, group: dict[str, Any]) -> bool:
        """Whether parameters of a group have moments in blocks, which no rank may cut."""
        return group["state_bits"] < 16 and len(self.moments(group)) > 0

    def float_states(self, shape: torch.Size) -> dict[str, tuple[int, ...]]:
        """The shapes of a parameter's states beside the moments, float32 at any state_bits; of a rank's rows those of
        its states."""
        return {}

    @staticmethod
    def takes_division(parameter: Tensor) -> bool:
        """Whether it steps a parameter that is divided as this DTensor."""
        return is_distributed(parameter)

    @abstractmethod
    def _check_options(self, group: dict[str, Any]) -> None:
        """Raises for a hyperparameter that is out of its range."""

    @abstractmethod
    def _numbers(self, group: dict[str, Any]) -> dict[str, Any]:
        """A group's hyperparameters, in the order and by the names that the operator has for them."""

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        max_norm: float | None = None,
        loss_scale: float | Tensor = 1.0,
    ) -> Any:
        """One step over the parameters that have a gradient; the gradients are not changed. After `offload_gradients`
        it consumes them.

        Args:
            closure: computes the loss and its gradients anew; its result is returned.
            max_norm: the gradients are multiplied by min(1, max_norm / (norm + 1e-6)), where norm is that of all of
                them together, which `grad_norm` holds afterwards. They are read once more for it, and not written.
            loss_scale: what the loss was multiplied by: the gradients are divided by it, before they are clipped.
                A tensor on a GPU is not waited for, and not checked.
                With `torch.amp.GradScaler`, `scaler.step(optimizer)` hands its scale over itself, and steps whose
                gradients are not finite are skipped.

        Raises:
            TypeError: a gradient is sparse, complex, or of another dtype than its parameter. Or torch's GradScaler
                called it, which does not see the gradients that `offload_gradients` moved.
            ValueError: max_norm or loss_scale is not positive.
        """
        checks.check_step(max_norm, 1.0 if is_on_gpu(loss_scale) else loss_scale)
        if self.gradient_tiers is not None and hasattr(self, "found_inf"):
            raise TypeError("optimizer: its gradients are offloaded, and torch.amp.GradScaler does not see them.")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf, amp_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        if found_inf is not None and found_inf.item() > 0:
            return loss
        scale = divided(1.0, loss_scale)
        if amp_scale is not None:
            scale = divided(scale, amp_scale)
        self._take_gradients()
        if max_norm is not None:
            squares = [] if self.gradient_tiers is None else self.gradient_tiers.squares()
            grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
            self.grad_norm = total_norm(grads, squares) * scale
            scale = scale * clip_factor(self.grad_norm, max_norm)
        self.step_scaled(scale)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the gradients, as torch's optimizers do, and those that `offload_gradients` moved."""
        super().zero_grad(set_to_none)
        if self.gradient_tiers is not None:
            self.gradient_tiers.drop()

    @torch.no_grad()
    def step_scaled(self, scale: float | Tensor) -> None:
        """A step whose gradients are multiplied by `scale`, a number or one float32 beside them, and not checked."""
        first = 0
        with nullcontext() if self.tiers is None else self.tiers.step():
            for group in self.param_groups:
                chosen = {first + i: p for i, p in enumerate(group["params"]) if self._has_gradient(p)}
                if chosen:
                    self._step_group(group, chosen, scale)
                first += len(group["params"])

    @torch.no_grad()
    def step_parameter(self, group: int, index: int, scale: float | Tensor) -> None:
        """The step of one parameter, by its group's number and its own place in the optimizer: `step_in_backward`'s."""
        chosen = self.param_groups[group]
        place = index - sum(len(before["params"]) for before in self.param_groups[:group])
        param = chosen["params"][place]
        checks.check_gradient(f"params[{index}]", param, param.grad)
        param.grad = divided_as(param, param.grad)
        # Backward comes to those before it next.
        with nullcontext() if self.tiers is None else self.tiers.step():
            self._step_group(chosen, {index: param}, scale, chosen["params"][:place][::-1])
            self._opt_called = True  # as schedulers ask of a step

    def _step_group(
        self, group: dict[str, Any], chosen: dict[int, Tensor], scale: float | Tensor, then: Sequence[Tensor] = ()
    ) -> None:
        """A step of parameters of a group, by their places in the optimizer, all with a gradient; `then` come next."""
        if self.tiers is None and self.gradient_tiers is None:
            self._step_in_memory(group, chosen, scale)
            return
        together = list(self._together(chosen))
        following = [*(param for several in together for param in several.values()), *then]
        for several in together:
            with ExitStack() as fetched:
                for param in several.values():
                    following = following[1:]
                    self._fetch(param, following, fetched)
                self._step_in_memory(group, several, scale)

    def _together(self, chosen: dict[int, Tensor]) -> Iterator[dict[int, Tensor]]:
        """The parameters of a step in the order that they are stepped in, by those that tiers lend at a time."""
        for index, param in chosen.items():
            yield {index: param}

    def _fetch(self, param: Tensor, then: Sequence[Tensor], fetched: ExitStack) -> None:
        """Has what tiers hold of a parameter in memory until `fetched` is closed; `then` come next."""
        if self.gradient_tiers is not None:
            fetched.enter_context(self.gradient_tiers.fetched(param, then))
        if self.tiers is not None:
            fetched.enter_context(self.tiers.fetched(self, param, then))

    def _has_gradient(self, param: Tensor) -> bool:
        return param.grad is not None if self.gradient_tiers is None else self.gradient_tiers.has(param)

    def _step_in_memory(self, group: dict[str, Any], chosen: dict[int, Tensor], scale: float | Tensor) -> None:
        moments = self.moments(group)
        states = [self._state_of(p, group) for p in chosen.values()]
        states = [{key: local_of(value) for key, value in state.items()} for state in states]
        params = [local_of(p) for p in chosen.values()]
        dense = [p if p.is_contiguous() else p.contiguous() for p in params]
        remainders = [state.get("remainder", torch.empty(0, dtype=torch.int16)) for state in states]
        arguments = (
            dense,
            [local_of(p.grad).contiguous() for p in chosen.values() if p.grad is not None],
            [state[key] for key, _ in moments for state in states],
            [state[f"{key}_absmax"] for key, _ in moments for state in states if f"{key}_absmax" in state],
            remainders if group["rounding"] == "remainder" else [],
            [int(state["step"]) + 1 for state in states],
            list(chosen),
            [self._origin_of(p, group) for p in chosen.values()],
            group["seed"],
            group["state_bits"],
            -scale if group["maximize"] else scale,
        )
        numbers = {
            name: as_number(value) if name == "lr" else _number(value) for name, value in self._numbers(group).items()
        }
        step_group(self.operator, [signed for _, signed in moments], arguments, numbers)
        for param, value, state in zip(params, dense, states, strict=True):
            state["step"].add_(1)
            if value is not param:
                param.copy_(value)
        torch.autograd.graph.increment_version(list(chosen.values()))

    def _origin_of(self, param: Tensor, group: dict[str, Any]) -> int:
        """Where a parameter's random bits begin: at its first element; where moments are in blocks, at that of one,
        also of a part without elements."""
        if param not in self.origins:
            self.origins[param] = first_element(param)
        origin = self.origins[param]
        return origin // ALIGNMENT * ALIGNMENT if self.has_blocks(group) else origin

    def _state_of(self, param: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        state, local = self.state[param], local_of(param)
        if not state:
            self._check_blocks(group, [param])  # of one that was frozen when it was added
        state.setdefault("step", torch.tensor(0.0))
        for key in (key for key, _ in self.moments(group) if key not in state):
            moment, absmax = new_moment(local, group["state_bits"])
            state[key] = as_parameter(moment, param) if absmax is None else moment
            if absmax is not None:
                state[f"{key}_absmax"] = absmax
        for key, shape in self.float_states(local.shape).items():
            if key not in state:
                state[key] = torch.zeros(shape, dtype=torch.float32, device=param.device)
        if group["rounding"] == "remainder" and param.dtype == torch.bfloat16 and "remainder" not in state:
            state["remainder"] = as_parameter(torch.zeros(local.shape, dtype=torch.int16, device=local.device), param)
        return state

    def _check_blocks(self, group: dict[str, Any], params: Sequence[Tensor]) -> None:
        divided = [param for param in params if is_distributed(param)]
        if divided and self.has_blocks(group):
            everyone = [param for of_group in self.param_groups for param in of_group["params"]]
            names = dict(zip(everyone, self._names(), strict=True))
            for param in divided:
                check_division(names[param], param)

    def _take_gradients(self) -> None:
        """Checks the gradients first, then has them divided as their parameters are."""
        params = [p for group in self.param_groups for p in group["params"]]
        for name, param in zip(self._names(), params, strict=True):
            if param.grad is not None:
                checks.check_gradient(name, param, param.grad)
        for param in params:
            if param.grad is not None:
                param.grad = divided_as(param, param.grad)

    def _names(self) -> list[str]:
        """What errors call each parameter: its name where the groups have names, else its index."""
        names: list[str] = []
        for group in self.param_groups:
            of_group = group.get("param_names") or [f"params[{len(names) + i}]" for i in range(len(group["params"]))]
            names += of_group
        return names

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` of this optimizer or of torch's gave; the tensors are copied.

        `state_bits`, `rounding` and `seed` stay those of this optimizer, and states of another width are converted:
        exactly into more bits, by the nearest code into fewer. Hyperparameters are taken from the checkpoint, as
        torch's optimizers do.

        Raises:
            ValueError: the groups, or the shapes or keys of the states, do not fit; nothing is changed then.
        """
        handle = self.register_load_state_dict_pre_hook(prepare)  # after those of the user
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"origins": self.origins}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for param, loaded in self.state.items():
            if isinstance(loaded, Loaded):
                self.state[param] = loaded.state
        if self.tiers is not None:
            self.tiers.move_all(self)


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value
