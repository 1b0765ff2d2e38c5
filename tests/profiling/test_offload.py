"""memkernels.profile of steps under offload: a line of its own, and hooks that begin and end within each other."""

import os

import pytest
import torch
from profiled_steps import build

import memkernels
from memkernels.offload import offload_activations

pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")

KB, MB = 1 << 10, 1 << 20
FLOAT = 4


def offload_everything(path):
    pytest.importorskip("memkernels._runtime", reason="built without pybind11 or Python's headers")
    folder = path if not memkernels._runtime.SpillFile(str(path), threads=1).in_memory else os.getcwd()
    return offload_activations("disk", path=folder, min_bytes=KB, keep_last_layers=0)


def test_offload_is_a_line_of_its_own(tmp_path):
    model, _, x = build()
    offload = offload_everything(tmp_path)
    with memkernels.profile() as recorded:
        with offload:
            loss = model(x).square().mean()
        loss.backward()
    (timeline,) = recorded.timelines
    assert max(timeline.offloaded) == offload.statistics["disk_bytes_written"] >= FLOAT * 4 * 512 * 128
    assert timeline.offloaded[-1] == 0
    assert max(timeline.series["activations"]) <= FLOAT * 512 * 128


def test_offload_goes_on_where_the_profile_begins_within_it(tmp_path):
    model, _, x = build()
    offload = offload_everything(tmp_path)
    with offload:
        with memkernels.profile() as recorded:
            model(x).square().mean().backward()
        moved = offload.statistics["moved"]
        loss = model(x).square().mean()
    assert moved >= 4 and offload.statistics["moved"] == 2 * moved
    loss.backward()
    (timeline,) = recorded.timelines
    assert max(timeline.offloaded) >= FLOAT * 4 * 512 * 128
    assert max(timeline.series["activations"]) <= FLOAT * 2 * 512 * 128


def test_blocks_of_hooks_may_end_within_the_profile_and_begin_there(tmp_path):
    model, _, x = build()
    offload = offload_everything(tmp_path)
    profiled = memkernels.profile()
    with offload:
        profiled.__enter__()
    before = offload.statistics["moved"]
    model(x)
    assert offload.statistics["moved"] == before
    with offload:
        model(x)
        profiled.__exit__(None, None, None)
        now = offload.statistics["moved"]
        assert now > before
        model(x)
        assert offload.statistics["moved"] > now
    assert not torch._C._autograd._top_saved_tensors_default_hooks(True)
    assert max(profiled.timelines[0].series["activations"]) >= FLOAT * 4 * 512 * 128


def test_what_tiers_hold_before_is_counted_and_nothing_after(tmp_path):
    model, _, x = build()
    offload = offload_everything(tmp_path)
    with offload:
        loss = model(x).square().mean()
    held = offload.statistics["disk_bytes_written"]
    with memkernels.profile() as recorded:
        loss.backward()
        with offload:
            loss = model(x).square().mean()
    (timeline,) = recorded.timelines
    assert timeline.offloaded[0] == timeline.offloaded[-1] == held > 0 and min(timeline.offloaded) == 0
    with memkernels.profile() as recorded:
        del loss
    (timeline,) = recorded.timelines
    assert (timeline.offloaded[0], timeline.offloaded[-1]) == (held, 0)
    with memkernels.profile() as recorded:
        torch.empty(MB)
    assert set(recorded.timelines[0].offloaded) == {0}
