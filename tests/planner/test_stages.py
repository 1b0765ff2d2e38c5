"""ZeRO's stages by formulas: the bytes of parameters, gradients and states on a rank, and on their way."""

import pytest

import memkernels
from memkernels.optim.buckets import BUCKET_BYTES, bytes_exchanged
from memkernels.planner.estimate import Technique, estimate
from memkernels.planner.per_parameter import PerParameter
from memkernels.planner.step import Sizes
from memkernels.planner.timeline import Moment, Timeline

NONE = PerParameter(())


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
