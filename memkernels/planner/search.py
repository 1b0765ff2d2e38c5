"""`plan`: which combination of techniques trains a model within a memory limit."""

from __future__ import annotations

import functools
import itertools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from memkernels.adapters.base import check_base
from memkernels.integrations.patching import RECOMPUTE
from memkernels.memory_size import parse_bytes
from memkernels.ops.checks import check_flag, check_integer
from memkernels.optim.codes import STATE_BITS
from memkernels.planner.optimizers import OPTIMIZERS

if TYPE_CHECKING:
    from memkernels.planner.estimate import Estimate, Technique
    from memkernels.planner.timeline import Timeline

PLAIN = "transformers"
OFFLOAD = ("none", "host", "disk")
STAGES = (0, 1, 2, 3)
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Plan:
    """What `plan` found; print it, or `save_plot` it.

    Args:
        title: what is trained, in words.
        memory: the limit in bytes.
        estimates: every combination, those that fit first, the cheapest first; then the others, the smallest first.
    """

    title: str
    memory: int
    estimates: tuple[Estimate, ...]

    @property
    def best(self) -> Estimate | None:
        """The cheapest combination that fits; None: none does."""
        first = self.estimates[0]
        return first if first.peak <= self.memory else None

    def __str__(self) -> str:
        from memkernels.planner.report import as_text

        return as_text(self)

    def save_plot(self, path: str | os.PathLike[str]) -> Path:
        """Writes a PNG of stacked bars, one for each combination of the table; returns its path."""
        from memkernels.planner.plot import save_plot

        return save_plot(self, Path(path))


def plan(
    model: Any,
    *,
    memory: int | str,
    seq: int,
    batch: int = 1,
    ranks: int = 1,
    lora: int | None = None,
    base: str | None = None,
    dtype: str = "bfloat16",
    optimizer: str = "adamw",
    rounding: str = "stochastic",
    reduce_dtype: str | None = None,
    recompute: str | None = None,
    offload: str | None = None,
    stage: int | None = None,
    state_bits: int | None = None,
    micro_batch: int | None = None,
    step_in_backward: bool | None = None,
    offload_states: str | None = None,
    offload_gradients: str | None = None,
    device: str | None = None,
) -> Plan:
    """Which techniques train a model within a memory limit, what each takes, and what it costs.

        print(memkernels.plan("meta-llama/Llama-3.1-8B", memory="24GB", seq=8192, lora=16, base="nf4"))

    Nothing is trained and no weight is loaded. The model's own code, patched by `memkernels.patch`, runs one forward
    and backward on tensors without memory, and what it would hold at each moment is counted; without offload three of
    equal layers run and stand for all. So the activations are what the ops save, and the transients (tiles of logits,
    float32 sums of gradients, recomputed hidden layers) what their code allocates. The states are those that the
    optimizer makes.

    Counted is the memory of tensors. Not counted are the libraries, the code and context of a GPU, what an allocator
    keeps beyond them, buffers within torch's operators and within those of this package that are not Python, and the 12
    MiB through which 16-bit products go on a CPU that torch has no fast ones for (`memkernels.ops.matmul`). The code
    that is traced is that of `device`, with its sizes of tiles. ZeRO's parts are by formulas: stage 1 divides states,
    stage 2 gradients too, stage 3 parameters too (Rajbhandari et al. 2019, arXiv 1910.02054), with the buffers of
    `optim.ShardedOptimizer`, at stage 3 the parameters outside of layers and of two layers, whole gradients of a layer
    and outside of layers, and FSDP2's copies of those that it sends: at most, as the largest layer is taken for each.
    What is offloaded is with the functions' own limits: staging blocks where the host's memory is planned, tensors on
    their way where a GPU's is; of states and gradients those of a MiB or more move, with ZeRO those
    of which a rank's part takes as many: at stages 1 and 2 of the rank that keeps most.

    Combinations that fit are ordered by what they cost: bytes to and from disk, those to and from host memory, then
    operations beyond recompute="none", then ZeRO's stage, the number of micro-batches, the bits of the states, and last
    step_in_backward, which excludes a norm's clipping without a second backward.

    Args:
        model: of a causal or vision-language model of transformers: a name on the hub, a folder, a config.json, or a
            configuration. Of the latter what rows of text train: the vision tower's weights are there, frozen; what
            images take is not counted.
        memory: bytes of each rank, a number or as "24GB" (10^9) or "80GiB" (2^30).
        seq: tokens of a row.
        batch: rows of a step, on each rank.
        ranks: ranks of data parallelism.
        lora: rank of adapters on all linear layers (`memkernels.lora`); None: every parameter is trained.
        base: "nf4" quantises what carries adapters.
        dtype: of the parameters, bfloat16 or float32; adapters are float32.
        optimizer: adamw, lion, sgd, with momentum, adafactor, without a first moment, or muon: for the matrices within
            layers, with adamw for all else.
        rounding: of bfloat16 parameters, as the optimizers take it.
        reduce_dtype: of gradients on their way between ranks, as `ShardedOptimizer` takes it, bfloat16 or float32; the
            parameters' by default.
        recompute: "none", "sublayer" or "layer", as `memkernels.patch` takes it, or "transformers": not patched.
        offload: "none", "disk", or on a GPU "host": where activations are between forward and backward.
        stage: of ZeRO, 0 to 3.
        state_bits: 32, 16, 8 or 4.
        micro_batch: rows computed at a time.
        step_in_backward: whether `optim.step_in_backward` steps.
        offload_states: as offload, where the states are between steps (`optim.offload_states`).
        offload_gradients: as offload, where gradients are until the step (`optim.offload_gradients`), at stage 2 their
            sums (`ShardedOptimizer.offload_gradients`); not at stages 1 and 3, and without step_in_backward.
        device: "cpu" or "cuda", whose code is traced; by default cuda where torch finds a device.

        Of those from recompute to offload_gradients all are tried where None is given; "transformers" only as it is.

    Raises:
        TypeError, ValueError: an argument that does not fit; a model that transformers has no causal or
            vision-language model for, or nothing that `patch` replaces, or whose forward fails.
        OSError: the model's configuration cannot be found.
        ImportError: transformers is missing.
    """
    limit = parse_bytes("memory", memory)
    for name, value in (("seq", seq), ("batch", batch), ("ranks", ranks)):
        check_integer(name, value)
    if lora is not None:
        check_integer("lora", lora)
    check_base(base)
    if base is not None and lora is None:
        raise ValueError(f"base: {base!r} is what adapters are put on; give lora.")
    _check_choice("dtype", dtype, DTYPES)
    _check_choice("optimizer", optimizer, OPTIMIZERS)
    if reduce_dtype is not None:
        _check_choice("reduce_dtype", reduce_dtype, DTYPES)
    where = _device(device)
    tiers = OFFLOAD if where.type == "cuda" else ("none", "disk")  # what is in the host's memory is there already
    tried = {
        "micro_batch": _rows_of_a_part(micro_batch, batch),
        "recompute": _choices("recompute", recompute, (*RECOMPUTE, PLAIN)),
        "offload": _choices("offload", offload, tiers),
        "stage": _choices("stage", stage, STAGES) if stage is not None or ranks > 1 else STAGES[:1],
        "state_bits": _choices("state_bits", state_bits, STATE_BITS),
        "step_in_backward": _flags("step_in_backward", step_in_backward),
        "offload_states": _choices("offload_states", offload_states, tiers),
        "offload_gradients": _choices("offload_gradients", offload_gradients, tiers),
    }

    from memkernels.planner.config import load_config
    from memkernels.planner.estimate import Technique, estimate
    from memkernels.planner.step import Job, trace_model, trace_step

    techniques = [Technique(**dict(zip(tried, of, strict=True))) for of in itertools.product(*tried.values())]
    techniques = [of for of in techniques if _goes_together(of, batch, plain_is_offloaded=offload is not None)]
    if not techniques and offload_gradients in (None, "none"):
        raise ValueError(
            "step_in_backward: it steps once a backward, on one rank's gradients: expected stage 0 and"
            f" micro_batch=batch, got stage={stage} and micro_batch={micro_batch} of batch={batch}."
        )
    if not techniques:
        raise ValueError("offload_gradients: expected stage 0 or 2, and steps after backward.")
    job = Job(load_config(model), seq, DTYPES[dtype], lora, base, where, optimizer, rounding)
    sizes = trace_model(job, tuple(tried["state_bits"]))

    @functools.cache
    def step(rows: int, again: str, offloads: bool) -> Timeline:
        return trace_step(job, rows, None if again == PLAIN else again, offloads)

    found = []
    for of in techniques:
        states = sizes.states[of.state_bits].at_stage(of.stage, ranks)
        if (of.offload_states not in ("none", offload_states) and not states.moved) or (
            of.offload_gradients not in ("none", offload_gradients) and not sizes.gradients.moved
        ):  # nothing is large enough to move
            continue
        found.append(
            estimate(
                of, sizes, step(of.micro_batch, of.recompute, of.offload != "none"),
                step(of.micro_batch, "none", False), batch=batch, ranks=ranks, on_host=where.type == "cpu",
                sent_itemsize=None if reduce_dtype is None else DTYPES[reduce_dtype].itemsize,
            )
        )  # fmt: skip
    fitting = sorted((of for of in found if of.peak <= limit), key=_cost)
    others = sorted((of for of in found if of.peak > limit), key=lambda of: of.peak)
    return Plan(_title(job, sizes.count, batch, ranks), limit, (*fitting, *others))


def _device(name: str | None) -> torch.device:
    kind = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind not in ("cpu", "cuda") or (kind == "cuda" and torch.version.cuda is None):
        raise ValueError(f"device: expected cpu, or cuda with a torch that has it, got {name!r}.")
    return torch.device(kind)


def _rows_of_a_part(given: int | None, batch: int) -> Sequence[int]:
    """What is tried of micro_batch: the batch, its half, and so on."""
    if given is None:
        return list(dict.fromkeys(math.ceil(batch / 2**i) for i in range(batch.bit_length() + 1)))
    expected = f"a number of rows from 1 to batch={batch}"
    check_integer("micro_batch", given, expected)
    if given > batch:
        raise ValueError(f"micro_batch: expected {expected}, got {given}.")
    return [given]


def _goes_together(of: Technique, batch: int, *, plain_is_offloaded: bool) -> bool:
    """Whether a combination is one that can be had, and of those without `patch` one that is wanted."""
    if of.recompute == PLAIN and of.offload != "none" and not plain_is_offloaded:
        return False
    if of.step_in_backward and (of.stage > 0 or of.micro_batch < batch):
        return False
    return of.offload_gradients == "none" or (of.stage in (0, 2) and not of.step_in_backward)


def _cost(of: Estimate) -> tuple:
    technique = of.technique
    moved = of.disk_bytes, of.host_bytes
    extra = *moved, round(of.extra_flops, 3), technique.recompute == PLAIN, technique.stage
    return *extra, -technique.micro_batch, -technique.state_bits, technique.step_in_backward, of.peak


def _choices(name: str, given: Any, known: Sequence) -> Sequence:
    """What is tried of an option."""
    if given is None:
        return known
    _check_choice(name, given, known)
    return (given,)


def _flags(name: str, given: bool | None) -> Sequence[bool]:
    if given is None:
        return (False, True)
    check_flag(name, given)
    return (given,)


def _check_choice(name: str, given: Any, known: Any) -> None:
    if isinstance(given, (bool, float)) or given not in list(known):
        raise ValueError(f"{name}: expected one of {', '.join(map(str, known))}, got {given!r}.")


def _title(job: Any, count: int, batch: int, ranks: int) -> str:
    name = getattr(job.config, "name_or_path", "") or type(job.config).__name__
    adapters = "" if job.rank is None else f", adapters of rank {job.rank} on {job.base or 'its weights'}"
    dtype = str(job.dtype).removeprefix("torch.")
    each = f" on each of {ranks} ranks" if ranks > 1 else ""
    return (
        f"{name}: {count / 1e9:.3g} billion parameters in {dtype}{adapters}; {job.optimizer}, {batch} x {job.seq}"
        f" tokens a step{each}, by the code for {job.device.type}"
    )
