"""memkernels.profile: every byte of the allocator in its category."""

import gc
import os
import sys
import textwrap
import weakref

import pytest
import torch
from profiled_steps import SCRIPT, build, step
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.utils.checkpoint import checkpoint

import memkernels
from memkernels.cli import main
from memkernels.testing import peak_bytes, run_in_child

matplotlib = pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")

MB = 1 << 20
FLOAT = 4


def at_end_of(timeline, phase):
    """Bytes by category when the phase ends."""
    end = next(last for name, _, last in timeline.phases if name == phase)
    return timeline.by_category(max(i for i, time in enumerate(timeline.times) if time <= end))


def left_by_other_tests():
    """Bytes by category."""
    with memkernels.profile() as recorded:
        torch.ones(1)
    (timeline,) = recorded.timelines
    return timeline.by_category(len(timeline.times) - 1)


def test_categories_hold_what_they_must_to_the_byte():
    left = left_by_other_tests()
    model, optimizer, x = build()
    parameters = FLOAT * 4 * (128 * 128 + 128)
    for number in range(2):
        with memkernels.profile() as recorded:
            step(model, optimizer, x)
        (timeline,) = recorded.timelines
        assert timeline.device == "cpu" and [name for name, *_ in timeline.phases] == [
            "forward",
            "backward",
            "optimizer",
        ]
        forward, backward, optimized = (
            {name: nbytes - left[name] for name, nbytes in at_end_of(timeline, phase).items()}
            for phase in ("forward", "backward", "optimizer")
        )
        assert {found["parameters"] for found in (forward, backward, optimized)} == {parameters}
        # The input and the results of each tanh; the products' are gone. The input is still there in the end.
        assert forward["activations"] == FLOAT * 5 * 512 * 128 and backward["activations"] == FLOAT * 512 * 128
        assert (forward["gradients"], backward["gradients"]) == (0, parameters)
        steps = FLOAT * 8  # each parameter counts its own
        assert optimized["optimizer"] == 2 * parameters + steps
        assert forward["optimizer"] == (2 * parameters + steps) * number
        assert timeline.by_category(len(timeline.times) - 1)["gradients"] == left["gradients"]  # zero_grad freed them
        # Autograd takes a gradient over and does not copy it, as without the hook that tells which it is.
        gradients = sum(a.nbytes for a in timeline.allocations if a.category == "gradients")
        assert gradients - left["gradients"] == parameters
        products = [a for a in timeline.allocations if (a.op, a.module) == ("aten::linear", "2.0") and a.nbytes > 1000]
        assert [a.nbytes for a in products] == [FLOAT * 512 * 128]


def test_memory_that_an_op_takes_for_itself_is_seen():
    x, weight = torch.randn(1, 3, 64, 64), torch.randn(8, 3, 3, 3)
    columns, result = FLOAT * 9 * 3 * 62 * 62, FLOAT * 8 * 62 * 62
    with (
        memkernels.profile() as recorded,
        torch.no_grad(),
        torch.backends.mkldnn.flags(enabled=False, allow_tf32=False),
    ):
        torch.nn.functional.conv2d(x, weight)
    (timeline,) = recorded.timelines
    assert timeline.peak - timeline.total(0) >= columns + result


def test_what_existed_before_is_counted_until_it_is_freed():
    before = torch.empty(5 * MB)
    with memkernels.profile() as recorded:
        del before
        torch.empty(MB)
    (timeline,) = recorded.timelines
    assert timeline.total(0) - timeline.total(len(timeline.times) - 1) == 5 * MB * FLOAT


def test_gradients_and_results_keep_their_bits():
    model, _, x = build()
    model(x).square().mean().backward()
    expected = [p.grad for p in model.parameters()]
    model.zero_grad()
    with memkernels.profile():
        model(x).square().mean().backward()
    for param, grad in zip(model.parameters(), expected, strict=True):
        assert torch.equal(param.grad, grad)


def test_nothing_is_left_behind_after_an_exception(tmp_path):
    model, optimizer, x = build()
    push = torch._C._autograd._push_saved_tensors_default_hooks
    with pytest.raises(ArithmeticError), memkernels.profile(tmp_path / "step"):
        model(x)
        raise ArithmeticError
    assert not list(tmp_path.iterdir()) and torch._C._autograd._push_saved_tensors_default_hooks is push
    assert not nn.modules.module._global_forward_hooks and not nn.modules.module._global_forward_pre_hooks
    assert not _global_optimizer_pre_hooks and not _global_optimizer_post_hooks
    assert all(not p._backward_hooks for p in model.parameters())
    with memkernels.profile() as recorded:
        step(model, optimizer, x)
    assert recorded.timelines[0].peak > 0


def test_checkpointing_shows_recomputed_activations_and_none_of_those_let_go():
    model, _, x = build(layers=6)

    def largest(checkpointed):
        with memkernels.profile() as recorded:
            h = x
            for layer in model:
                h = checkpoint(layer, h, use_reentrant=False) if checkpointed else layer(h)
            h.square().mean().backward()
        return max(recorded.timelines[0].series["activations"])

    plain = largest(False)
    assert plain >= FLOAT * 6 * 512 * 128
    # What each layer is given, and within backward what one computes again.
    assert FLOAT * 5 * 512 * 128 <= largest(True) <= plain + FLOAT * 2 * 512 * 128


def test_a_profile_keeps_no_parameter_alive():
    model, optimizer, x = build()
    with memkernels.profile() as recorded:
        step(model, optimizer, x)
    alive = weakref.ref(model[0][0].weight)
    del model, optimizer
    gc.collect()
    assert alive() is None and recorded.timelines[0].peak > 0


class Unmade(nn.Module):
    def __init__(self, kept):
        kept.append(self)
        raise ArithmeticError


def test_modules_whose_making_failed_are_passed_over():
    kept = []
    with pytest.raises(ArithmeticError):
        Unmade(kept)
    with memkernels.profile() as recorded:
        torch.empty(MB)
    assert recorded.timelines[0].peak >= FLOAT * MB


def test_tensors_of_tracers_are_passed_over():
    fake, functional = FakeTensorMode().from_tensor(torch.ones(3)), torch._to_functional_tensor(torch.ones(3))
    with FunctionalTensorMode():
        wrapped = FunctionalTensor.to_functional(torch.ones(3))
    with memkernels.profile() as recorded:
        torch.empty(MB)
    assert recorded.timelines[0].peak >= FLOAT * MB
    del fake, functional, wrapped


def test_an_error_at_the_beginning_ends_the_profiler(monkeypatch):
    def fails(watch):
        raise ArithmeticError

    with monkeypatch.context() as patched:
        patched.setattr("memkernels.profiling.watch.Watch._mark_what_exists", fails)
        with pytest.raises(ArithmeticError), memkernels.profile():
            pass
    assert not torch.autograd._profiler_enabled()


def test_another_profiler_goes_on(tmp_path, monkeypatch):
    """And a script that has one is told, by an error in it and no other."""
    with torch.profiler.profile() as other:
        with pytest.raises(RuntimeError, match="profile: another profiler runs"), memkernels.profile():
            pass
        torch.ones(3).exp()
    assert "aten::exp" in {event.key for event in other.key_averages()}
    with memkernels.profile() as recorded:
        with pytest.raises(RuntimeError, match="profile: another profiler runs"), memkernels.profile():
            pass
        torch.empty(MB)
    assert recorded.timelines[0].peak >= FLOAT * MB
    begun = pytest.raises(
        RuntimeError, match="profile: nothing was recorded: nothing ran, or another profiler was begun"
    )
    with begun, memkernels.profile(), torch.profiler.profile():
        pass
    begin, loop = SCRIPT.split("for i", 1)
    loop = textwrap.indent(f"for i{loop}", "    ")
    (tmp_path / "train.py").write_text(f"{begin}with torch.profiler.profile():\n{loop}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(RuntimeError, match="profile: another profiler runs") as raised:
        main(["profile", "--", "train.py", "4"])
    assert raised.value.__context__ is None
    assert not _global_optimizer_post_hooks and not torch.autograd._profiler_enabled()


def test_a_folder_that_cannot_be_written_to_is_told_first(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(PermissionError, match=f"path: {tmp_path} cannot be written to"):
        memkernels.profile(tmp_path / "step")


@pytest.mark.parametrize("path", ["", ".", "..", "/"])
def test_a_path_that_names_no_file_is_told_first(path):
    with pytest.raises(IsADirectoryError, match="path: expected the beginning of two files' names, got "):
        memkernels.profile(path)


def test_a_plot_leaves_the_backend_alone(tmp_path):
    before = matplotlib.get_backend()
    matplotlib.use("svg")
    try:
        with memkernels.profile(tmp_path / "step"):
            torch.empty(MB)
        assert matplotlib.get_backend() == "svg" and (tmp_path / "step.png").exists()
    finally:
        matplotlib.use(before)


def test_names_of_modules_may_hold_anything():
    model = nn.Sequential()
    model.add_module("a|b", nn.Linear(128, 128))
    with memkernels.profile() as recorded:
        model(torch.randn(512, 128))
    assert [a.module for a in recorded.timelines[0].allocations if a.nbytes == FLOAT * 512 * 128][-1] == "a|b"


def peaks():
    """Of a step by the timeline and by the resident set."""
    model, optimizer, _ = build(layers=8, dim=256)
    x = torch.randn(4096, 256)
    step(model, optimizer, x)
    resident = peak_bytes(lambda: step(model, optimizer, x))
    with memkernels.profile() as recorded:
        step(model, optimizer, x)
    (timeline,) = recorded.timelines
    return timeline.peak - timeline.total(0), resident


def test_the_peak_is_that_of_the_resident_set():
    drawn, resident = run_in_child(peaks)
    assert drawn > 30 * MB and abs(drawn - resident) < 0.03 * resident + 2 * MB
