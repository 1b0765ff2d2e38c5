"""One forward and backward of a model under a technique, traced."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import groupby
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor

from memkernels.adapters import lora
from memkernels.integrations import patch
from memkernels.offload.tensors import plain_parts
from memkernels.optim import Muon
from memkernels.optim.optimizer import LowMemoryOptimizer
from memkernels.planner.config import in_one_line, model_class
from memkernels.planner.offload import offloading
from memkernels.planner.optimizers import make_optimizers
from memkernels.planner.per_parameter import PerParameter
from memkernels.planner.stack import ShortenedStack
from memkernels.planner.timeline import Timeline, timeline
from memkernels.planner.trace import Trace


@dataclass(frozen=True)
class Job:
    """What is trained; nothing of how.

    Args:
        config: of a language model of transformers, with or without a vision tower.
        seq: tokens of a row.
        dtype: of the parameters and of what is computed.
        rank, base: as `memkernels.lora` takes r and base; no adapters without rank.
        device: whose code is traced.
        optimizer: one of `OPTIMIZERS`.
        rounding: of bfloat16 parameters, as the optimizers take it.
    """

    config: Any
    seq: int
    dtype: torch.dtype
    rank: int | None
    base: str | None
    device: torch.device
    optimizer: str = "adamw"
    rounding: str = "stochastic"


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model.

    Args:
        parameters: all of them, and buffers.
        trained: those of them that are trained; gradients take as much.
        buckets: of the parameters that are trained, as ZeRO's stages 1 and 2 exchange them.
        itemsize: of an element of those.
        outside: parameters outside of the stack of layers; and those of them that are trained.
        largest_layer: parameters of the largest layer of the stack; and those of a layer that are trained, at most.
        states: of the optimizer, by state_bits.
        count: elements of all parameters, as if none were quantised.
        gradients: of the parameters that are trained.
    """

    parameters: int
    trained: int
    buckets: tuple[int, ...]
    itemsize: int
    outside: tuple[int, int]
    largest_layer: tuple[int, int]
    states: dict[int, PerParameter]
    count: int
    gradients: PerParameter


def trace_model(job: Job, bits: tuple[int, ...]) -> Sizes:
    """Sizes of a job's model and of the optimizer's states, for each of some state_bits."""
    from memkernels.planner.sharding import buckets_of, of_most  # with torch.distributed, which takes seconds to import

    trace = Trace(job.device)
    with trace.running():
        model = make_model(job)
        _check_positions(model, job.seq)
        shortened = ShortenedStack(_decoder(model), trace)
        choose_trained(model, job)
        times = {of: count for layer, count in shortened.layers for of in (*layer.parameters(), *layer.buffers())}
        parameters = list(model.parameters())
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        of_all = list(_repeated(trained, shortened))

        def states(width: int) -> PerParameter:
            optimizers = make_optimizers(job.optimizer, trained, times, state_bits=width, rounding=job.rounding)
            found = {of: _state_bytes(of) for of in optimizers}
            return PerParameter(
                ((nbytes, times.get(parameter, 1)) for of in found.values() for parameter, nbytes in of.items()),
                divide=functools.cache(functools.partial(of_most, found, of_all)),
                gathered=max(
                    (max(of.values()) for optimizer, of in found.items() if type(optimizer) is Muon), default=0
                ),
            )

        return Sizes(
            parameters=_bytes([*parameters, *model.buffers()], times),
            trained=_bytes(trained, times),
            buckets=tuple(bucket.nbytes for bucket in buckets_of(of_all, 1)),
            itemsize=trained[0].element_size(),
            outside=_all_and_trained(parameter for parameter in parameters if parameter not in times),
            largest_layer=max((_all_and_trained(layer.parameters()) for layer, _ in shortened.layers), default=(0, 0)),
            states={width: states(width) for width in bits},
            count=sum(parameter.numel() * times.get(parameter, 1) for parameter in parameters),
            gradients=PerParameter((parameter.nbytes, times.get(parameter, 1)) for parameter in trained),
        )


def trace_step(job: Job, rows: int, recompute: str | None, offload: bool) -> Timeline:
    """Forward, backward and the optimizer's step of `rows` rows, patched with `recompute`; None: transformers' own
    computation."""
    trace = Trace(job.device)
    with trace.running():
        model = make_model(job)
        # Offload keeps what the last layers save, and lets go of others' tensors when it comes to the next.
        shortened = ShortenedStack(_decoder(model), trace, whole=offload)
        choose_trained(model, job)
        if recompute is not None:
            patch(model, recompute=recompute)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        in_layers = {parameter for layer, _ in shortened.layers for parameter in layer.parameters()}
        updates = _Updates(trace, make_optimizers(job.optimizer, trained, in_layers, rounding=job.rounding))
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(updates.on_gradient)
        ids = torch.zeros(rows, job.seq, dtype=torch.int64, device=job.device)
        trace.events.clear()
        with offloading(trace) if offload else nullcontext():
            loss = _forward(model, ids)
        saved = trace.alive()
        loss.backward()
        del loss
        return timeline(shortened.events(), saved, on_host=job.device.type == "cpu")


class _Updates:
    """Records that a parameter's gradient is complete, and what its step takes, which is the same after backward.

    The steps of optimizers that treat elements apart take nothing.
    """

    def __init__(self, trace: Trace, optimizers: Iterable[LowMemoryOptimizer]) -> None:
        self._trace = trace
        self._places: dict[Tensor, tuple[LowMemoryOptimizer, int]] = {}
        for optimizer in (of for of in optimizers if not of.elementwise):
            (group,) = optimizer.param_groups
            for place, parameter in enumerate(group["params"]):
                optimizer._state_of(parameter, group)
                self._places[parameter] = optimizer, place

    def on_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self._trace.complete(parameter.grad)
        with self._trace.updating():
            if parameter in self._places:
                optimizer, place = self._places[parameter]
                optimizer.step_parameter(0, place, 1.0)


def make_model(job: Job) -> nn.Module:
    """The model of a job, in training, without adapters."""
    from transformers import PreTrainedModel

    try:
        # First values are drawn until every one is within bounds, which those that there are not never are.
        with job.device, mock.patch.object(PreTrainedModel, "initialize_weights", lambda _: None):
            return model_class(job.config).from_config(job.config, dtype=job.dtype).train()
    except ImportError:
        raise
    except Exception as error:  # of any kind: an unknown activation, a negative size
        raise ValueError(f"model: transformers makes no model of its configuration: {in_one_line(error)}") from error


def _check_positions(model: Any, seq: int) -> None:
    """Learned positions end where their table does, which tensors without memory do not tell; computed ones go on."""
    limit, words = getattr(model.config, "max_position_embeddings", seq), model.get_input_embeddings()
    tables = (of for of in model.modules() if isinstance(of, nn.Embedding) and of is not words)
    if any(table.num_embeddings == limit < seq for table in tables):
        raise ValueError(f"seq: expected at most {limit}, the positions that the model has, got {seq}.")


def choose_trained(model: Any, job: Job) -> None:
    """Adapters on the weights of a model where a job has them; frozen is what rows of text do not reach, a vision
    tower."""
    if job.rank is not None:
        lora(model, r=job.rank, base=job.base)
    decoder = _decoder(model)
    if decoder is not model:
        reached = set(decoder.parameters())
        for parameter in model.base_model.parameters():
            parameter.requires_grad_(parameter.requires_grad and parameter in reached)


def _decoder(model: Any) -> nn.Module:
    """What has the stack of layers that rows of text pass through."""
    return getattr(model.base_model, "language_model", model)


def _forward(model: nn.Module, ids: Tensor) -> Tensor:
    """The loss of rows of text."""
    try:
        with mock.patch.object(fake_tensor.log, "disabled", True):  # it writes tracebacks of what it raises
            return model(input_ids=ids, labels=ids).loss
    except Exception as error:  # of any kind: more experts for a token than there are
        raise ValueError(f"model: its forward fails: {in_one_line(error)}") from error


def _repeated(trained: Sequence[Tensor], shortened: ShortenedStack) -> Iterator[Tensor]:
    """The parameters as the whole stack has them, those of a layer as often as that stands for layers."""
    layer_of: dict[Tensor, int] = {
        parameter: i for i, (layer, _) in enumerate(shortened.layers) for parameter in layer.parameters()
    }
    for i, run in groupby(trained, key=lambda parameter: layer_of.get(parameter)):
        yield from list(run) * (1 if i is None else shortened.layers[i][1])


def _state_bytes(optimizer: LowMemoryOptimizer) -> dict[Tensor, int]:
    """Of each parameter; the counts of steps are on the host."""
    found = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer._state_of(parameter, group)
            found[parameter] = _bytes((of for key, of in state.items() if key != "step"), {})
    return found


def _all_and_trained(parameters: Iterable[Tensor]) -> tuple[int, int]:
    parameters = list(parameters)
    return _bytes(parameters, {}), _bytes((parameter for parameter in parameters if parameter.requires_grad), {})


def _bytes(tensors: Iterable[Tensor], times: dict[Tensor, int]) -> int:
    """Of the storages of tensors, each counted once, and as often as `times` says where it says so."""
    sizes = {}
    for tensor in tensors:
        for part in plain_parts(tensor):
            storage = part.untyped_storage()
            sizes[storage._cdata] = storage.nbytes() * times.get(tensor, 1)
    return sum(sizes.values())
