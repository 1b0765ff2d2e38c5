import itertools

import pytest

from memkernels.bench.timer import Action, Plan, time_interleaved, wall_clock


class FakeClock:
    """Time that passes only when `spend` is called."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def spend(self, seconds):
        self.now += seconds


def measure_with(clock):
    return lambda run: wall_clock(run, clock)


def test_providers_alternate_and_the_first_of_a_round_rotates():
    order = []
    actions = {name: Action(lambda _, name=name: order.append(name)) for name in "abc"}
    time_interleaved(actions, "a", plan=Plan(budget=0, least=4, most=4, warmup=1))
    assert "".join(order) == "abc" + "abc" + "bca" + "cab" + "abc"


def test_medians_deciles_and_paired_ratios():
    clock = FakeClock()
    # A busy neighbour in two of five rounds: the ratio within a round does not see it, a ratio of means would.
    slow = iter([1, 1, 1, 9, 1, 5])
    fast = iter([0.5, 0.5, 0.5, 4.5, 0.5, 1.0])
    actions = {
        "slow": Action(lambda _: clock.spend(next(slow))),
        "fast": Action(lambda _: clock.spend(next(fast))),
    }
    plan = Plan(budget=0, least=5, most=5, warmup=1)
    timings = time_interleaved(actions, "slow", plan=plan, measure=measure_with(clock))
    assert timings["slow"].median == 1
    assert timings["slow"].p10 == 1
    assert timings["slow"].p90 == pytest.approx(5 + 0.6 * 4)  # rank 0.9 * 4 between 5 and 9, sorted 1 1 1 5 9
    assert timings["fast"].ratio == 0.5
    assert timings["slow"].ratio == 1


def test_preparation_and_warmup_are_outside_the_clock():
    clock = FakeClock()
    costs = itertools.chain([100], itertools.repeat(2))
    action = Action(lambda prepared: clock.spend(prepared), lambda: (clock.spend(50), next(costs))[1])
    timing = time_interleaved({"only": action}, "only", plan=Plan(0, 3, 3, warmup=1), measure=measure_with(clock))
    assert (timing["only"].median, timing["only"].p90) == (2, 2)


@pytest.mark.parametrize(("budget", "rounds"), [(1.0, 3), (10.0, 5), (1000.0, 8)])
def test_rounds_fill_the_budget_within_bounds(budget, rounds):
    clock, calls = FakeClock(), []
    action = Action(lambda _: (calls.append(1), clock.spend(2)))
    time_interleaved({"only": action}, "only", plan=Plan(budget, 3, 8, warmup=2), measure=measure_with(clock))
    assert len(calls) == 2 + rounds


def test_an_unknown_baseline_is_refused():
    with pytest.raises(ValueError, match=r"baseline must be one of \['a'\], got 'b'"):
        time_interleaved({"a": Action(lambda _: None)}, "b")
