"""The planner's parts: traces, repeated layers, ZeRO's formulas, the search, and the command."""

import json

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import run_ranks

import memkernels
from memkernels.cli import main
from memkernels.offload.session import Policy
from memkernels.optim import ShardedOptimizer
from memkernels.optim.buckets import BUCKET_BYTES, bytes_exchanged
from memkernels.optim.local import local_of
from memkernels.optim.tiers import TieredState
from memkernels.planner import stack
from memkernels.planner.estimate import Technique, estimate
from memkernels.planner.memory_size import format_bytes, parse_bytes
from memkernels.planner.optimizers import make_optimizers
from memkernels.planner.per_parameter import TIER_BYTES, PerParameter
from memkernels.planner.step import Job, Sizes, trace_model, trace_step
from memkernels.planner.timeline import Moment, Timeline, timeline
from memkernels.planner.trace import Event, Happening, Trace

CPU = torch.device("cpu")
NONE = PerParameter(())


@pytest.fixture(scope="module")
def config():
    transformers = pytest.importorskip("transformers", reason="it is not installed: pip install memkernels[plan]")
    return transformers.LlamaConfig(
        vocab_size=600, hidden_size=64, intermediate_size=160, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip


def traced(function):
    trace = Trace(CPU)
    with trace.running():
        function(trace)
    return trace.events


def highest(events):
    in_use = peak = 0
    for event in events:
        in_use += {Happening.ALLOCATE: event.amount, Happening.RELEASE: -event.amount}.get(event.happening, 0)
        peak = max(peak, in_use)
    return peak, in_use


def test_a_trace_counts_storages_as_long_as_they_live():
    def function(trace):
        a = torch.zeros(1000)  # 4000 bytes
        b = a.view(10, 100).t() + 1  # 4000 more; the view has none
        del a
        b += 1
        c = b.double()  # 8000
        del b, c

    assert highest(traced(function)) == (12000, 0)


def test_a_trace_counts_products_and_answers_questions_about_values():
    def function(trace):
        x, w = torch.randn(4, 8, requires_grad=True), torch.randn(16, 8)
        assert bool((x > 0).all()) and w.isfinite().all().item()
        F.linear(x, w).sum().backward()

    events = traced(function)
    assert sum(event.amount for event in events if event.happening is Happening.COMPUTE) == 2 * (2 * 4 * 8 * 16)


@pytest.mark.parametrize(("window", "pairs"), [((-1, -1), 25), ((-1, 0), 15), ((1, 0), 9), ((2, 1), 16)])
def test_attention_counts_the_pairs_that_see_each_other(window, pairs):
    def function(trace):
        q, k = torch.randn(2, 5, 4, 16, requires_grad=True), torch.randn(2, 5, 2, 16, requires_grad=True)
        memkernels.ops.attention(q, k, k * 2, window=window).sum().backward()

    flops = sum(event.amount for event in traced(function) if event.happening is Happening.COMPUTE)
    assert flops == 2 * 4 * pairs * 2 * (2 + 5) * 16


def test_the_buffers_of_operators_that_are_python_count():
    rows, size, vocabulary = 64, 32, 5000

    def function(trace):
        x, weight = torch.randn(rows, size, requires_grad=True), torch.randn(vocabulary, size)
        trace.events.clear()
        memkernels.ops.linear_cross_entropy(x, weight, torch.zeros(rows, dtype=torch.int64)).backward()

    tile = rows * vocabulary * 4  # below TILE_BYTES: all of it is one
    assert tile < highest(traced(function))[0] < 1.1 * tile


def test_a_timeline_tells_gradients_activations_and_transients_apart():
    def function(trace):
        weight = torch.zeros(10, 10, requires_grad=True)
        kept.append(weight)
        weight.register_post_accumulate_grad_hook(lambda weight: trace.complete(weight.grad))
        x = torch.zeros(50, 10)
        trace.events.clear()
        y = (x @ weight).exp()  # keeps y, 2000 bytes
        saved.update(trace.alive())
        y.backward(torch.ones(50, 10))
        del y

    kept, saved = [], set()
    found = timeline(traced(function), saved, on_host=True)
    assert found.gradients == 400 and found.flops == 2 * 2 * 50 * 10 * 10 and found.moved == 0
    top = max(found.moments, key=sum)
    assert top.activations == 2000 and top.gradients == 0 and top.transients >= 4000


def test_the_step_of_a_parameter_takes_memory_within_backward_or_after_it():
    events = [
        (Happening.ALLOCATE, 40, 1), (Happening.ALLOCATE, 10, 2), (Happening.ALLOCATE, 8, 3),
        (Happening.COMPLETE, 8, 3), (Happening.UPDATE, 50, -1), (Happening.RELEASE, 10, 2), (Happening.RELEASE, 40, 1),
        (Happening.ALLOCATE, 6, 4), (Happening.COMPLETE, 6, 4), (Happening.UPDATE, 18, -1),
    ]  # fmt: skip
    step = timeline([Event(*event) for event in events], {1}, on_host=True)
    assert (step.update, step.updates, step.gradients) == (50, [Moment(0, 40, 10 + 8 + 50)], 14)
    sizes = Sizes(14, 14, (8,), 1, (0, 0), (0, 0), {32: PerParameter([(5, 1)])}, 14, NONE)

    plain = Timeline([], 14, 1, 0)

    def peak(within):
        technique = Technique("none", "none", 0, 32, 1, within)
        return estimate(technique, sizes, step, plain, batch=1, ranks=1, on_host=False).peak - 14 - 5

    assert (peak(within=True), peak(within=False)) == (40 + 10 + 8 + 50, 14 + 50)


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


def test_a_step_within_a_trace_is_one_event():
    def function(trace):
        parameter = torch.nn.Parameter(torch.zeros(30, 20))
        parameter.grad = torch.zeros(30, 20)
        optimizer = memkernels.optim.Muon([parameter])
        optimizer._state_of(parameter, optimizer.param_groups[0])
        trace.events.clear()
        with trace.updating():
            optimizer.step_parameter(0, 0, 1.0)
        recorded.extend(trace.events)

    recorded = []
    traced(function)
    ((happening, amount, _),) = recorded
    tensors = 4 * 30 * 20  # in float32
    assert happening is Happening.UPDATE and 2 * tensors < amount < 4.5 * tensors


def test_muon_takes_the_matrices_of_layers_and_adafactor_keeps_means(config):
    d, inner, layers, vocabulary = 64, 160, 6, 600
    shapes = [(d, d), (d, d), (d // 2, d), (d // 2, d), (inner, d), (inner, d), (d, inner)]
    vectors = (2 * layers + 1) * d
    muon, adafactor = (
        {bits: of.total for bits, of in sizes.states.items()}
        for name in ("muon", "adafactor")
        for sizes in (trace_model(Job(config, 64, torch.float32, None, None, CPU, name), (32, 8)),)
    )
    of_layers = layers * sum(rows * columns for rows, columns in shapes)
    assert muon[32] == 4 * of_layers + 8 * (2 * vocabulary * d + vectors)
    assert muon[8] < 0.3 * muon[32]
    means = layers * sum(map(sum, shapes)) + 2 * (vocabulary + d)
    assert adafactor == {32: 4 * (means + vectors), 8: 4 * (means + vectors)}


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


@pytest.mark.parametrize("recompute", [None, "none", "sublayer", "layer"])
def test_three_layers_stand_for_any_number(config, monkeypatch, recompute):
    job = Job(config, 64, torch.float32, None, None, CPU)
    short = trace_step(job, 2, recompute, False)
    monkeypatch.setattr(stack, "_ENOUGH", 99)
    assert trace_step(job, 2, recompute, False) == short


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


def test_recomputing_more_keeps_less_and_computes_more(config):
    estimates = [
        memkernels.plan(config, memory="1GB", seq=128, batch=2, recompute=recompute, offload="none", state_bits=32,
                        step_in_backward=False, micro_batch=2).estimates[0]
        for recompute in ("none", "sublayer", "layer")
    ]  # fmt: skip
    kept = [estimate.parts["activations"] for estimate in estimates]
    extra = [estimate.extra_flops for estimate in estimates]
    assert kept == sorted(kept, reverse=True) and extra == sorted(extra) and extra[0] == 0
    tokens, d, layers = 256, 64, 6
    assert kept[1] - kept[2] == layers * tokens * d * 2  # 3 d and 2 d a token and layer, in bfloat16


def sizes_of(parameters):
    """Mixed precision as the paper has it: parameters and gradients of 2 bytes, states of 12."""
    return Sizes(
        2 * parameters,
        2 * parameters,
        (6,) * 3,
        2,
        (0, 0),
        (0, 0),
        {32: PerParameter([(12 * parameters, 1)])},
        parameters,
        NONE,
    )


@pytest.mark.parametrize(("stage", "gigabytes"), [(0, 120), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_stages_take_what_the_paper_says(stage, gigabytes):
    """Rajbhandari et al. 2019, figure 1: 7.5 billion parameters on 64 ranks."""
    sizes, count = sizes_of(7_500_000_000), 7_500_000_000
    step = Timeline([Moment(2 * count, 0, 0)], 2 * count, 1, 0)
    technique = Technique("none", "none", stage, 32, 1, False)
    found = estimate(technique, sizes, step, step, batch=1, ranks=64, on_host=False)
    assert (found.peak - found.parts["buffers"]) / 1e9 == pytest.approx(gigabytes, abs=0.05)
    assert found.parts["buffers"] == {1: 12, 2: 30}.get(stage, 0)
    assert found.sent_bytes == (3 if stage == 3 else 2) * 2 * count * 63 // 64


def test_gradients_of_earlier_parts_are_there_throughout():
    sizes = Sizes(1000, 1000, (1000,), 2, (0, 0), (0, 0), {32: NONE}, 500, NONE)
    step = Timeline([Moment(1000, 0, 10), Moment(100, 300, 0)], 1000, 1, 0)

    def peak(micro_batch, within=False, stage=0):
        technique = Technique("none", "none", stage, 32, micro_batch, within)
        found = estimate(technique, sizes, step, step, batch=2, ranks=1, on_host=False)
        return found.peak - found.parts["buffers"]

    assert (peak(2), peak(1), peak(2, within=True)) == (1000 + 1010, 1000 + 1300, 1000 + 300)
    assert peak(2, stage=1) == 1000 + 1300  # all have their place from the start


@pytest.mark.parametrize(
    ("buckets", "first", "second"),
    [
        ([1000], 1000, 2000),  # adapters: no bucket is full
        ([1000, 700], 2000, 4000),
        ([BUCKET_BYTES] * 9, 2 * BUCKET_BYTES, 5 * BUCKET_BYTES),
        ([1000, 9 * BUCKET_BYTES, 1000, 1000, 1000], 2000 + 9 * BUCKET_BYTES, 5000 + 18 * BUCKET_BYTES),
        ([3 * BUCKET_BYTES] * 4, 6 * BUCKET_BYTES, 15 * BUCKET_BYTES),
    ],
)
def test_buffers_are_as_large_as_the_buckets(buckets, first, second):
    for stage, expected in ((1, first), (2, second)):
        assert bytes_exchanged(buckets, stage, ranks=2, itemsize=4, sent_itemsize=4) == expected


@pytest.mark.parametrize(("itemsize", "sent", "first", "second"), [(2, 2, 2, 5), (2, 4, 4, 5), (4, 2, 4, 5)])
def test_what_is_sent_in_another_dtype_has_buffers_of_its_own(itemsize, sent, first, second):
    elements = 1 << 20
    for stage, buffers in ((1, first), (2, second)):
        found = bytes_exchanged([itemsize * elements] * 4, stage, ranks=4, itemsize=itemsize, sent_itemsize=sent)
        assert found == buffers * sent * elements


def test_one_rank_sends_nothing():
    for stage, sent, expected in ((1, 2, 0), (2, 2, 1), (1, 4, 1), (2, 4, 1)):
        found = bytes_exchanged([20, 10], stage, ranks=1, itemsize=2, sent_itemsize=sent)
        assert found == expected * 10 * sent


def test_gradients_sent_in_float32_take_twice_the_bytes(config):
    options = {"memory": "1GB", "seq": 64, "ranks": 2, "recompute": "layer", "offload": "none", "state_bits": 32}
    plain, same, wide = (
        {
            of.technique.stage: of
            for of in memkernels.plan(config, step_in_backward=False, reduce_dtype=sent, **options).estimates
        }
        for sent in (None, "bfloat16", "float32")
    )
    assert plain == same and wide[0] == plain[0]
    for stage in (1, 2, 3):
        assert wide[stage].parts["buffers"] > plain[stage].parts["buffers"]
        # Half of the gradients goes to the other rank.
        assert wide[stage].sent_bytes - plain[stage].sent_bytes == plain[1].parts["gradients"] // 2


def test_stage_three_has_whole_gradients_and_copies_that_are_sent():
    sizes = Sizes(10_000, 9_000, (), 2, (1000, 900), (500, 400), {32: NONE}, 5000, NONE)
    technique = Technique("none", "none", 3, 32, 1, False)

    def parts(*moments, batch=1, **options):
        step = Timeline(list(moments), 9_000, 1, 0)
        return estimate(technique, sizes, step, step, batch=batch, ranks=10, on_host=False, **options).parts

    forward = parts(Moment(0, 5000, 0))
    assert (forward["gradients"], forward["buffers"]) == (0, 2000)
    within = parts(Moment(9_000, 5000, 0))
    assert (within["gradients"], within["buffers"]) == (900 + 400 + 7700 // 10, 2000 + 400)
    ends = parts(Moment(0, 0, 0))
    assert (ends["gradients"], ends["activations"], ends["buffers"]) == (900 + 900, 0, 1000 + 900)
    # In float32, with this rank's part of the sum until it is rounded.
    assert parts(Moment(9_000, 5000, 0), sent_itemsize=4)["buffers"] == 2000 + 800 + 800 // 10
    # Which is added to that of the part before.
    assert parts(Moment(9_000, 5000, 0), batch=2)["buffers"] == 2000 + 400 + 400 // 10
    assert parts(Moment(9_000, 5000, 0), batch=2, sent_itemsize=4)["buffers"] == 2000 + 800 + (800 + 400) // 10


def test_the_cheapest_that_fits_comes_first_and_none_is_lost(config):
    found = memkernels.plan(config, memory="10MB", seq=128, batch=2, dtype="float32", offload="none")
    fitting = [estimate.peak <= found.memory for estimate in found.estimates]
    assert any(fitting) and not all(fitting) and fitting == sorted(fitting, reverse=True)
    assert len({estimate.technique for estimate in found.estimates}) == len(found.estimates)
    assert found.best is found.estimates[0]
    small = memkernels.plan(config, memory=1000, seq=128, recompute="layer", offload="none")
    assert small.best is None and "none fits" in str(small)
    peaks = [estimate.peak for estimate in small.estimates]
    assert peaks == sorted(peaks)


def test_nothing_of_a_plan_is_left_behind(config):
    memkernels.plan(config, memory="1GB", seq=64, lora=4, base="nf4", recompute="layer", offload="disk")
    parameter = torch.nn.Parameter(torch.ones(512))
    optimizer = memkernels.optim.AdamW([parameter], state_bits=8)
    parameter.sum().backward()
    optimizer.step()
    assert type(parameter.data) is torch.Tensor and float(parameter.detach().max()) < 1
    assert float(memkernels.quant.quantize_nf4(torch.ones(64, 64)).dequantize().mean()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"memory": "much"}, "memory: expected a number of bytes"),
        ({"seq": 0}, "seq: expected a positive integer"),
        ({"batch": 2.5}, "batch: expected a positive integer"),
        ({"base": "nf4"}, "base: 'nf4' is what adapters are put on"),
        ({"lora": 4, "base": "int3"}, "base: expected one of"),
        ({"lora": 0}, "r: expected a positive number"),
        ({"recompute": "all"}, "recompute: expected one of none, sublayer, layer, transformers"),
        ({"offload": "tape"}, "offload: expected one of none, disk"),
        ({"offload": "host", "device": "cpu"}, "offload: expected one of none, disk, got 'host'"),
        ({"offload_states": "tape"}, "offload_states: expected one of none, disk"),
        ({"offload_gradients": "tape"}, "offload_gradients: expected one of none, disk"),
        ({"offload_gradients": "disk", "stage": 1, "ranks": 2}, "no offload_gradients, which takes stage 0 or 2"),
        ({"stage": 4}, "stage: expected one of 0, 1, 2, 3"),
        ({"state_bits": 5}, "state_bits: expected one of 32, 16, 8, 4"),
        ({"micro_batch": 3, "batch": 2}, "micro_batch: expected a number of rows from 1 to batch=2"),
        ({"optimizer": "sophia"}, "optimizer: expected one of adamw, lion, sgd, adafactor, muon"),
        ({"dtype": "float64"}, "dtype: expected one of bfloat16, float32"),
        ({"reduce_dtype": "float16"}, "reduce_dtype: expected one of bfloat16, float32"),
        ({"device": "tpu"}, "device: expected cpu, or cuda"),
        ({"step_in_backward": True, "stage": 1, "ranks": 2}, "step_in_backward: it steps once a backward"),
    ],
)
def test_bad_arguments_are_named(config, options, error):
    with pytest.raises((TypeError, ValueError), match=error):
        memkernels.plan(config, **({"memory": "1GB", "seq": 64, "recompute": "layer", "offload": "none"} | options))


def test_a_model_that_is_none_is_refused(config, tmp_path, monkeypatch):
    import transformers

    with pytest.raises(TypeError, match="model: expected a name, a path or a configuration, got int"):
        memkernels.plan(3, memory="1GB", seq=64)
    with pytest.raises(ValueError, match="no causal language model of ViTConfig"):
        memkernels.plan(transformers.ViTConfig(), memory="1GB", seq=64)
    for path in (str(tmp_path / "nowhere"), tmp_path / "nowhere", "./nowhere", "nowhere/config.json"):
        with pytest.raises(FileNotFoundError, match=f"model: {path} does not exist"):  # the hub is not asked
            memkernels.plan(path, memory="1GB", seq=64)


@pytest.mark.parametrize(
    ("written", "size"), [("24GB", 24 * 10**9), ("1.5 GiB", 3 << 29), ("80gib", 80 << 30), (7, 7), ("9", 9)]
)
def test_sizes_are_read(written, size):
    assert parse_bytes("memory", written) == size


@pytest.mark.parametrize(
    ("size", "written"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 KB"),
        (15_360, "15.4 KB"),
        (999_400, "999 KB"),
        (999_600, "1 MB"),
        (2_500_000_000, "2.5 GB"),
        (12_345 * 10**12, "12345 TB"),
    ],
)
def test_sizes_are_written(size, written):
    assert format_bytes(size) == written


def test_the_command_prints_a_table_and_draws_it(config, tmp_path, capsys):
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    path, picture = tmp_path / "config.json", tmp_path / "plots" / "plan.png"
    path.write_text(json.dumps(config.to_dict() | {"architectures": ["LlamaForCausalLM"]}))
    command = ["plan", "--model", str(path), "--memory", "100MB", "--seq", "64", "--offload", "none", "--lora", "4"]
    assert main([*command, "--output", str(picture)]) == 0
    printed = capsys.readouterr().out
    for expected in ("recompute", "activations", "sublayer", "adapters of rank 4", str(picture)):
        assert expected in printed
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 5000
    assert main([*command, "--memory", "1KB", "--recompute", "layer", "--output", str(picture)]) == 1
    capsys.readouterr()
    assert main([*command, "--base", "nf4", "--stage", "2", "--model", str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.startswith("plan: ")
