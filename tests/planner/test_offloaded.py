"""What a plan has of activations, states and gradients in memory that a tier takes."""

import json

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

import memkernels
from memkernels.offload.session import Policy
from memkernels.optim import ShardedOptimizer
from memkernels.optim.local import local_of
from memkernels.optim.tiers import TieredState
from memkernels.planner.estimate import Technique, estimate
from memkernels.planner.optimizers import make_optimizers
from memkernels.planner.per_parameter import TIER_BYTES, PerParameter
from memkernels.planner.step import Job, Sizes, trace_model, trace_step
from memkernels.planner.timeline import Moment, Timeline, timeline
from memkernels.planner.trace import Event, Happening

CPU = torch.device("cpu")


def test_gradients_leave_for_a_tier_as_soon_as_they_are_complete():
    m = TIER_BYTES
    events = [
        Event(*event)
        for event in (
            (Happening.ALLOCATE, 10 * m, 1), (Happening.ALLOCATE, 4 * m, 2), (Happening.COMPLETE, 4 * m, 2),
            (Happening.ALLOCATE, 5, 3), (Happening.COMPLETE, 5, 3),  # too small to move
            (Happening.ALLOCATE, 6 * m, 4), (Happening.COMPLETE, 6 * m, 4), (Happening.RELEASE, 10 * m, 1),
        )
    ]  # fmt: skip
    step = timeline(events, {1}, on_host=True)
    assert (step.gradients, step.small_gradients) == (10 * m + 5, 5)
    assert step.moments == [Moment(4 * m + 5, 10 * m, 6 * m)]
    # The sum of earlier parts comes back when the gradient is added to it, on a device with those around it.
    first = [Moment(5, 10 * m, 6 * m)]
    assert step.tiered == (first, first)
    assert timeline(events, {1}, on_host=False).tiered == (first, [Moment(5, 10 * m, 16 * m)])


def test_what_is_offloaded_leaves_a_parameters_share_in_memory():
    m = TIER_BYTES
    sizes = Sizes(
        12 * m, 12 * m, (12 * m,), 4, (0, 0), (0, 0), {32: PerParameter([(8 * m, 3), (5, 2)])}, 3 * m,
        PerParameter([(4 * m, 3)]),
    )  # fmt: skip
    assert (sizes.states[32].total, sizes.states[32].moved) == (24 * m + 10, 24 * m)
    step = Timeline([Moment(12 * m, 0, 0)], 12 * m, 1, 0, tiered=([Moment(0, 0, 4 * m)], [Moment(0, 0, 8 * m)]))

    def of(states, gradients, on_host, batch=1, stage=0, ranks=2):
        technique = Technique("none", "none", stage, 32, 1, False, states, gradients)
        return estimate(technique, sizes, step, step, batch=batch, ranks=ranks if stage else 1, on_host=on_host)

    def parts(*arguments, **options):
        found = of(*arguments, **options).parts
        return tuple(found[name] // m for name in ("gradients", "states", "transients", "buffers"))

    assert of("none", "none", True).peak == (12 + 12 + 24) * m + 10
    # Of one parameter where they change; on a device as they come too, and those around it, but no staging blocks.
    assert parts("disk", "none", True) == (12, 0, 8, 24)
    assert parts("disk", "none", False) == parts("host", "none", False) == (12, 0, 3 * 8 + 8, 0)
    assert parts("disk", "none", False, stage=3) == (6, 0, (3 * 8 + 8) / 2, 0)
    # Of 16 ranks each has rows of half a MiB, which stay.
    assert parts("disk", "none", False, stage=3, ranks=16) == parts("none", "none", False, stage=3, ranks=16)
    assert parts("disk", "none", False, stage=3, ranks=8)[1] == 0
    assert parts("disk", "disk", True) == (0, 0, 8, 24 + 12)
    assert parts("none", "disk", True) == (0, 24, 4, 12) and parts("none", "disk", True, batch=2) == (0, 24, 8, 12 + 4)
    assert parts("none", "disk", False, batch=2) == parts("none", "disk", False) == (0, 24, 3 * 4, 0)
    # At stage 2 a rank's sums of buckets, here of one.
    assert parts("none", "none", True, stage=2) == (6, 12, 0, 2 * 12)
    assert parts("none", "disk", True, stage=2) == (0, 12, 0, 2 * 12 + 6 + 6)
    assert parts("none", "host", False, stage=2) == (0, 12, 0, 2 * 12 + 6)
    assert of("none", "disk", True, batch=3, stage=2).disk_bytes == 3 * 2 * 6 * m
    assert (of("disk", "none", True).disk_bytes, of("disk", "none", True).host_bytes) == (2 * 24 * m, 0)
    both = of("disk", "host", False, batch=3)
    assert (both.disk_bytes, both.host_bytes) == (2 * 24 * m, 3 * 2 * 12 * m)


def test_states_and_gradients_are_tried_on_every_tier_of_a_device(config):
    options = {"memory": "1GB", "seq": 64, "recompute": "layer", "offload": "none", "stage": 0, "state_bits": 32}
    found = {
        (of.technique.offload_states, of.technique.offload_gradients, of.technique.step_in_backward)
        for of in memkernels.plan(config, **options).estimates
    }
    assert found == {("none", "none", within) for within in (False, True)}  # none of a MiB
    options |= {"offload_states": "disk", "offload_gradients": "disk"}
    (technique,) = [of.technique for of in memkernels.plan(config, **options).estimates]
    assert (technique.offload_states, technique.offload_gradients) == ("disk", "disk")
    wide = type(config)(**(config.to_dict() | {"hidden_size": 256, "vocab_size": 4000}))
    del options["offload_states"], options["offload_gradients"]
    tiers = {"cpu": ("none", "disk")} | ({"cuda": ("none", "host", "disk")} if torch.version.cuda else {})
    for device, on in tiers.items():
        techniques = [of.technique for of in memkernels.plan(wide, device=device, **options).estimates]
        pairs = {(of.offload_states, of.offload_gradients) for of in techniques if not of.step_in_backward}
        assert pairs == {(states, gradients) for states in on for gradients in on}
        assert {of.offload_gradients for of in techniques if of.step_in_backward} == {"none"}


def sharded_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"vocab_size": 700, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6}
    return LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **shape))


def offloaded(name, stage, folder):
    """Bytes of this rank's states that are in memory, and that are on disk."""
    model = sharded_model()
    in_layers, name_of = set(model.model.layers.parameters()), {of: name for name, of in model.named_parameters()}
    made = [
        (type(of), [name_of[parameter] for parameter in of.param_groups[0]["params"]])
        for of in make_optimizers(name, list(name_of), in_layers)
    ]
    optimizers = [
        ShardedOptimizer(
            model, cls, stage=stage, params=list(map(model.get_parameter, names)), process_group=dist.new_group()
        )
        for cls, names in made
    ]
    ids = torch.zeros(1, 4, dtype=torch.int64)
    model(input_ids=ids, labels=ids).loss.backward()
    sizes = [0, 0]
    for optimizer in optimizers:
        optimizer.step()
        memkernels.optim.offload_states(optimizer.local, "disk", path=folder)
        for state in optimizer.local.state.values():
            nbytes = sum(local_of(value).nbytes for key, value in state.items() if key != "step")
            sizes[isinstance(state, TieredState)] += nbytes
    return sizes


def offloaded_by_two_ranks(cases, folder):
    for case in cases:
        sizes = [None] * 2
        dist.all_gather_object(sizes, offloaded(*case, folder))
        (folder / "-".join(map(str, case))).write_text(json.dumps(sizes))


def test_what_a_rank_offloads_is_what_it_has_of_each_parameter(config, tmp_path):
    pytest.importorskip("memkernels._runtime", reason="built without pybind11 or Python's headers")
    cases = (("adamw", 1), ("muon", 1), ("muon", 3))
    run_ranks(offloaded_by_two_ranks, 2, tmp_path, cases, tmp_path, seconds=300)
    for name, stage in cases:
        sizes = trace_model(Job(sharded_model().config, 64, torch.float32, None, None, CPU, name), (32,))
        assert sum(sizes.buckets) == sizes.trained
        planned = sizes.states[32].at_stage(stage, 2)
        of_ranks = json.loads((tmp_path / f"{name}-{stage}").read_text())
        assert [planned.total - planned.moved, planned.moved] in of_ranks, (name, stage)


def test_offload_moves_what_forward_keeps(config, monkeypatch):
    monkeypatch.setattr("memkernels.planner.offload.Policy", lambda: Policy(min_bytes=1 << 10, keep_last_layers=0))
    job = Job(config, 64, torch.float32, None, None, CPU)
    kept, moved = (trace_step(job, 2, "layer", offload) for offload in (False, True))
    tokens, d, layers = 128, 64, 6
    assert kept.moved == 0 and moved.flops == kept.flops and moved.gradients == kept.gradients
    by_layers = layers * tokens * (2 * d * 4 + 4 * 4)  # x, out and lse of 4 heads
    assert by_layers <= moved.moved <= 1.2 * by_layers
    held = [max(of.activations for of in step.moments) for step in (kept, moved)]
    assert held[0] >= by_layers and held[1] < 0.3 * by_layers
