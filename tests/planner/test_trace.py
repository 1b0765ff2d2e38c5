"""Traces of steps on tensors without memory, and what timelines tell of their events."""

import pytest
import torch
import torch.nn.functional as F

import memkernels
from memkernels.optim import Adafactor, Muon
from memkernels.planner.estimate import Technique, estimate
from memkernels.planner.per_parameter import PerParameter
from memkernels.planner.step import Sizes
from memkernels.planner.timeline import Moment, Timeline, timeline
from memkernels.planner.trace import Event, Happening, Trace

CPU = torch.device("cpu")
NONE = PerParameter(())


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


@pytest.mark.parametrize(("optimizer_class", "least", "most"), [(Muon, 4, 4.5), (Adafactor, 0, 0.2)])
def test_a_step_within_a_trace_is_one_event(optimizer_class, least, most):
    """In float32 tensors of its size: Muon takes four and their small products, Adafactor a row and a column."""

    def function(trace):
        parameter = torch.nn.Parameter(torch.zeros(30, 20))
        parameter.grad = torch.zeros(30, 20)
        optimizer = optimizer_class([parameter])
        optimizer._state_of(parameter, optimizer.param_groups[0])
        trace.events.clear()
        with trace.updating():
            optimizer.step_parameter(0, 0, 1.0)
        recorded.extend(trace.events)

    recorded = []
    traced(function)
    ((happening, amount, _),) = recorded
    assert happening is Happening.UPDATE and least < amount / (4 * 30 * 20) < most
