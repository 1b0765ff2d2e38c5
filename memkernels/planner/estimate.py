"""What a technique takes: bytes at the highest moment of a step, operations, and bytes moved."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from memkernels.offload.store import STAGING_BYTES
from memkernels.optim.buckets import bytes_exchanged
from memkernels.planner.per_parameter import PerParameter
from memkernels.planner.step import Sizes
from memkernels.planner.timeline import Moment, Timeline

PARTS = ("parameters", "gradients", "states", "activations", "transients", "buffers")


@dataclass(frozen=True)
class Technique:
    """A combination of what saves memory.

    Args:
        recompute: as `memkernels.patch` takes it, or "transformers": not patched.
        offload: "none", or the tier of `offload_activations`, "host" or "disk".
        stage: of ZeRO, 0 to 3; 0: every rank has everything.
        state_bits: of the optimizer's states.
        micro_batch: rows that are computed at a time.
        step_in_backward: `optim.step_in_backward`.
        offload_states, offload_gradients: as `offload`, of `optim.offload_states` and `optim.offload_gradients`.
    """

    recompute: str
    offload: str
    stage: int
    state_bits: int
    micro_batch: int
    step_in_backward: bool
    offload_states: str = "none"
    offload_gradients: str = "none"


@dataclass(frozen=True)
class Estimate:
    """What a technique takes on each rank.

    Args:
        technique: the technique.
        parts: bytes at the highest moment of a step, by `PARTS`. Gradients are those that are complete, activations
            what forward keeps for backward, transients what an op, or the step of a parameter, holds while it
            computes, buffers what is on its way to other ranks or to the disk.
        flops: operations of the forward and backward of the whole batch.
        extra_flops: those beyond recompute="none", over them.
        disk_bytes: written and read in a step, of all that is offloaded to disk.
        host_bytes: of what is offloaded to host memory.
        sent_bytes: that a rank sends in a step, by a ring.
    """

    technique: Technique
    parts: dict[str, int]
    flops: int
    extra_flops: float
    disk_bytes: int
    host_bytes: int
    sent_bytes: int

    @cached_property
    def peak(self) -> int:
        """Bytes at the highest moment."""
        return sum(self.parts.values())


def estimate(
    technique: Technique,
    sizes: Sizes,
    step: Timeline,
    plain: Timeline,
    *,
    batch: int,
    ranks: int,
    on_host: bool,
    sent_itemsize: int | None = None,
) -> Estimate:
    """What a technique takes.

    Args:
        step: forward and backward of technique.micro_batch rows.
        plain: the same with recompute="none" and without offload.
        batch: rows of a step, on each rank.
        on_host: whether the memory that is planned is the host's, where offload's staging blocks are.
        sent_itemsize: of an element of a gradient on its way between ranks, from stage 1 on; that of the parameters by
            default.
    """
    stage, parts = technique.stage, math.ceil(batch / technique.micro_batch)
    sent = sent_itemsize if stage and sent_itemsize else sizes.itemsize
    of_buckets = 0
    if stage in (1, 2):
        of_buckets = bytes_exchanged(sizes.buckets, stage, ranks=ranks, itemsize=sizes.itemsize, sent_itemsize=sent)

    def exchanged(complete: int) -> int:
        return _of_fsdp2(sizes, complete, ranks, sent, parts) if stage == 3 else of_buckets

    to_tier = technique.offload_gradients != "none"
    sums = sizes.gradients  # with ZeRO a rank's of each bucket
    if stage:
        sums = PerParameter((math.ceil(nbytes / ranks), 1) for nbytes in sizes.buckets)
    if to_tier and stage and not on_host:
        of_buckets += sums.in_flight

    def gradients_at(moment: Moment) -> int:
        if to_tier and stage:
            return sums.total - sums.moved
        if to_tier:
            return step.small_gradients if parts > 1 else moment.gradients
        return _gradients(moment, technique, sizes, parts, ranks)

    states = _States(technique, sizes.states[technique.state_bits].at_stage(stage, ranks), on_host)
    moments = step.tiered[parts > 1] if to_tier and not stage else step.moments
    kept = [(of, gradients_at(of), exchanged(of.gradients)) for of in moments]
    if technique.step_in_backward:
        kept += [(of._replace(transients=of.transients + states.fetched(0)), 0, 0) for of in step.updates]
    elif step.update or states.moved or to_tier:
        # With ZeRO a rank's parameters' gradients are whole for an update that needs them so.
        taken = states.fetched(step.update) + (math.ceil(sizes.trained / ranks) if stage and step.update else 0)
        complete = math.ceil(sizes.trained / ranks) if stage == 3 else gradients_at(Moment(step.gradients, 0, 0))
        if to_tier and not stage:
            complete = step.small_gradients
            taken += 0 if on_host else sums.in_flight
        kept.append((Moment(0, 0, taken), complete, of_buckets))
    if stage == 3:  # when backward ends, gradients outside of layers are copied and sent
        outside, trained = sizes.outside
        copies = _copies(trained, sizes, ranks, sent, parts)
        kept.append((Moment(0, 0, 0), math.ceil(sizes.trained / ranks) + trained, outside + copies))
    moment, gradients, on_its_way = max(kept, key=lambda of: of[0].activations + of[0].transients + of[1] + of[2])
    # By tier: bytes that are there at once, and how often they are written and read in a step.
    moved = (
        (technique.offload, step.moved, parts),
        (technique.offload_states, states.moved, 1),
        (technique.offload_gradients, sums.moved, parts),
    )
    staged = 0
    if on_host:  # in staging blocks, besides which a parameter's states, or its sum until it is written anew, are lent
        of_states = min(states.moved, STAGING_BYTES + states.largest)
        of_gradients = min(sums.moved, STAGING_BYTES) + (sums.largest if parts > 1 or stage else 0)
        blocks = (min(step.moved, STAGING_BYTES), of_states, of_gradients)
        staged = sum(of for of, (tier, _, _) in zip(blocks, moved, strict=True) if tier == "disk")
    bytes_by_part = (
        math.ceil(sizes.parameters / ranks) if stage == 3 else sizes.parameters,
        gradients,
        states.kept,
        moment.activations,
        moment.transients,
        on_its_way + staged,
    )
    return Estimate(
        technique,
        dict(zip(PARTS, bytes_by_part, strict=True)),
        flops=step.flops * parts,
        extra_flops=step.flops / plain.flops - 1,
        disk_bytes=2 * sum(nbytes * times for tier, nbytes, times in moved if tier == "disk"),
        host_bytes=2 * sum(nbytes * times for tier, nbytes, times in moved if tier == "host"),
        sent_bytes=_sent(stage, sizes, parts, ranks, sent),
    )


class _States:
    """A rank's states of the optimizer: bytes that are kept in memory, bytes that move to a tier, and of those the most
    that is lent at a time."""

    def __init__(self, technique: Technique, states: PerParameter, on_host: bool) -> None:
        moves = technique.offload_states != "none"
        self.moved = states.moved if moves else 0
        self.kept = states.total - self.moved
        self.largest = states.largest if moves else 0
        # Of a parameter, where it changes, and on a device as it comes, and of those on their way with it.
        self._step = self.largest + (0 if on_host or not moves else states.in_flight)

    def fetched(self, update: int) -> int:
        """Bytes within a parameter's step, which takes `update` itself."""
        return self._step + update


def _gradients(moment: Moment, technique: Technique, sizes: Sizes, parts: int, ranks: int) -> int:
    """The gradients that are kept at a moment: where a batch comes in parts, those of the parts before; at stage 1
    there is always memory for all, at stage 2 for this rank's; at stage 3 those of the layer that backward is at and
    those outside of layers are whole, the others this rank's part."""
    own = math.ceil(sizes.trained / ranks)
    if technique.stage == 3:
        whole = min(moment.gradients, sizes.outside[1] + sizes.largest_layer[1])
        return whole + (own if parts > 1 else math.ceil((moment.gradients - whole) / ranks))
    if technique.stage == 2:
        return own
    if technique.stage == 1 or parts > 1:
        return sizes.trained
    return 0 if technique.step_in_backward else moment.gradients


def _of_fsdp2(sizes: Sizes, complete: int, ranks: int, sent: int, parts: int) -> int:
    """Stage 3's buffers of what is on its way between ranks while gradients are `complete`: the parameters outside of
    layers are together throughout a step, and those of two layers: one computes, the next arrives. FSDP2 copies the
    gradients of a layer, which it sends.
    """
    copies = _copies(min(complete, sizes.largest_layer[1]), sizes, ranks, sent, parts)
    return sizes.outside[0] + 2 * sizes.largest_layer[0] + copies


def _copies(gradients: int, sizes: Sizes, ranks: int, sent: int, parts: int) -> int:
    """FSDP2's of gradients, with elements of `sent` bytes; and this rank's part of their sum, where it does not become
    the gradient itself, but is rounded to it, added to that of parts before, or both."""
    copies = gradients * sent // sizes.itemsize
    rounded, added = sent != sizes.itemsize, parts > 1
    sums = (copies if rounded or added else 0) + (gradients if rounded and added else 0)
    return copies + sums // ranks


def _sent(stage: int, sizes: Sizes, parts: int, ranks: int, sent: int) -> int:
    """By Rajbhandari et al. 2019, arXiv 1910.02054, section 7, over rings.

    Gradients are summed once a step, from stage 2 on once a part; stages 1 and 2 gather new parameters once a step,
    stage 3 all of them in each forward and each backward.
    """
    reduced = sizes.trained * sent // sizes.itemsize * (parts if stage >= 2 else 1)
    gathered = 2 * sizes.parameters * parts if stage == 3 else sizes.trained
    return (reduced + gathered) * (ranks - 1) // ranks
