"""offload_activations: after an error of any kind the step runs again, and after a kill nothing is left."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from offloaded_model import assert_free, assert_same_bits, batch, build, disk, in_use, step
from torch import nn

from memkernels.offload import offload_activations

pytest.importorskip("memkernels._runtime", reason="built without pybind11 or Python's headers")

KB, MB = 1 << 10, 1 << 20


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_after_an_exception_the_step_runs_again(tmp_path, where):
    model, x, offload = build(), batch(), disk(tmp_path)
    expected = step(model, x)

    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            if where == "forward":
                raise ArithmeticError
            return x.clone()

        @staticmethod
        def backward(ctx, dx):
            raise ArithmeticError

    handle = model.layers[2].register_forward_hook(lambda module, args, out: Failing.apply(out))
    with pytest.raises(ArithmeticError):
        step(model, x, offload)
    handle.remove()
    assert_free(offload)
    assert_same_bits(step(model, x, offload), expected)
    torch.ones(4 * KB, requires_grad=True).exp().sum().backward()  # no hook is left


def test_hooks_that_are_disabled_leave_nothing_behind(tmp_path):
    offload = disk(tmp_path)
    with torch.autograd.graph.disable_saved_tensors_hooks("not now"), pytest.raises(RuntimeError, match="not now"):
        offload.__enter__()
    assert not nn.modules.module._has_any_global_hook()
    x = torch.randn(64, 64, requires_grad=True)
    with offload:
        y = x.exp()
    assert offload.statistics["moved"] == 1 and not nn.modules.module._has_any_global_hook()
    y.sum().backward()


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"min_bytes": 0}, ValueError, "min_bytes: expected an integer of 1 or more, got 0"),
        ({"keep_last_layers": -1}, ValueError, "keep_last_layers: expected an integer of 0 or more, got -1"),
        ({"prefetch": 1.5}, TypeError, "prefetch: expected an integer of 0 or more, got 1.5"),
        ({"max_host_bytes": -1}, ValueError, "max_host_bytes: expected a positive number"),
        ({"max_host_bytes": "1GB"}, TypeError, "max_host_bytes: expected a positive number.*'1GB'"),
        ({"path": "/no/such/folder"}, OSError, "disk tier: .*'/no/such/folder'"),
    ],
)
def test_bad_arguments_are_named(options, kind, message):
    with pytest.raises(kind, match=message):
        offload_activations("disk", **options)


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_a_limit_smaller_than_one_tensor_leaves_the_step_to_be_run_again(tmp_path, tier):
    model, x = build(), batch()
    expected = step(model, x)
    model.zero_grad()
    options = {"path": tmp_path} if tier == "disk" else {}
    with pytest.raises(MemoryError, match=rf"tier '{tier}'.* bytes .*wanted, \d+ "):
        step(model, x, offload_activations(tier, max_host_bytes=20 * KB, min_bytes=KB, **options))
    assert all(p.grad is None for p in model.parameters())
    assert_same_bits(step(model, x, disk(tmp_path)), expected)


def test_damage_is_an_error_in_backward_and_the_step_runs_again(tmp_path):
    model, x, offload = build(), batch(), disk(tmp_path)
    expected = step(model, x)
    before = [p.detach().clone() for p in model.parameters()]

    def damage(loss):
        with open(f"/proc/self/fd/{offload._store._file.fileno()}", "r+b") as raw:
            for page in range(0, in_use(offload), 4096):
                raw.seek(page)
                raw.write(b"damaged!")
        loss.backward()

    with pytest.raises(OSError, match=r"disk tier: the checksum of \d+ bytes at offset \d+ does not match"):
        step(model, x, offload, damage)
    assert_same_bits([p.detach() for p in model.parameters()], before)
    assert_same_bits(step(model, x, offload), expected)


def train_on_a_full_disk(path):
    # MKL's first logsumexp of a process, if two threads take it at once, errs by 5e-5 in one of them now and then.
    torch.ones(1).logsumexp(0)
    model, x, offload = build(), batch(), disk(path)
    try:
        step(model, x, offload)
    except OSError as error:
        print(error)
    os.environ["FULL_DISK_PREALLOCATES"] = os.environ["FULL_DISK_HOLDS"] = str(1 << 40)
    assert_same_bits(step(model, x, offload), step(model, x))
    print("again")


@pytest.mark.parametrize("limit", ["PREALLOCATES", "HOLDS"])
def test_a_disk_that_fills_up_is_an_error_and_the_step_runs_again(tmp_path, full_disk, limit):
    said = run_function("train_on_a_full_disk", tmp_path, **full_disk, **{f"FULL_DISK_{limit}": str(MB)})
    error, again = said.splitlines()
    assert "disk tier: " in error and "No space left on device" in error and str(tmp_path) in error
    assert "bytes wanted" in error and " available" in error and again == "again"


def be_killed(path):
    model, x, offload = build(), batch(), disk(path)
    with offload:
        loss = model(x)
    assert in_use(offload) > MB and loss is not None
    os.kill(os.getpid(), signal.SIGKILL)


def test_nothing_is_left_behind_when_killed(tmp_path):
    run_function("be_killed", tmp_path, status=-signal.SIGKILL)
    assert not list(tmp_path.iterdir())


def run_function(name, path, status=0, **environment):
    """A function of this file in a process of its own; what it printed."""
    code = f"import runpy; runpy.run_path({str(Path(__file__))!r})[{name!r}]({str(path)!r})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == status, done.stderr
    return done.stdout
