"""memkernels.profile: every byte of the allocator in its category, as a PNG and as a page that a browser shows."""

import gc
import html
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import weakref
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.utils.checkpoint import checkpoint

import memkernels
from memkernels.cli import main
from memkernels.offload import offload_activations
from memkernels.profiling.categories import CATEGORIES
from memkernels.profiling.page import _STRETCHES, write
from memkernels.testing import peak_bytes, run_in_child

matplotlib = pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")

KB, MB = 1 << 10, 1 << 20
FLOAT = 4


def build(layers=4, dim=128):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(dim, dim), nn.Tanh()) for _ in range(layers)))
    return model, torch.optim.AdamW(model.parameters(), foreach=False), torch.randn(512, dim)


def step(model, optimizer, x):
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


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


@pytest.fixture(scope="module")
def recorded():
    model, optimizer, x = build()
    step(model, optimizer, x)
    with memkernels.profile() as recorded:
        step(model, optimizer, x)
    return recorded


def test_fewer_points_keep_the_peak(recorded):
    (timeline,) = recorded.timelines
    reduced = timeline.reduced(20)
    assert len(reduced.times) <= 41 < len(timeline.times) and reduced.peak == timeline.peak
    assert reduced.times == sorted(set(reduced.times)) and reduced.times[0] == timeline.times[0] == 0
    assert [reduced.total(i) for i in (0, -1)] == [timeline.total(i) for i in (0, -1)]


BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)


def show(page, path):
    """The page's elements once a browser has run it, as text."""
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={path}", "--dump-dom"]
    done = subprocess.run(
        [*command, "--window-size=1200,900", page.as_uri()], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# Moves the pointer to each fraction of the chart, then out of it; notes the tip: whether it is hidden, and its text.
POINT = """<pre id="told"></pre><script>
  const svg = document.querySelector("svg"), box = svg.getBoundingClientRect(), tip = document.querySelector(".tip");
  const told = FRACTIONS.map((fraction) => {
    const place = LEFT + (svg.viewBox.baseVal.width - LEFT - RIGHT) * fraction;
    const clientX = box.left + place * box.width / svg.viewBox.baseVal.width;
    svg.dispatchEvent(new PointerEvent("pointermove", { clientX, clientY: box.top + 100 }));
    const cells = [...tip.querySelectorAll("tr")].map((row) => [...row.cells].map((cell) => cell.textContent));
    return [tip.style.display, tip.querySelector(".when").textContent, Object.fromEntries(cells)];
  });
  svg.dispatchEvent(new PointerEvent("pointerleave"));
  document.getElementById("told").textContent = JSON.stringify([told, tip.style.display]);
</script></body>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")
def test_a_browser_draws_the_page_and_tells_what_is_under_the_pointer(recorded, tmp_path):
    timeline = recorded.timelines[0].reduced(_STRETCHES)
    page = tmp_path / "step.html"
    write(recorded.timelines, page)
    text = page.read_text()
    assert set(re.findall(r"https?://[^\s\"']+", text)) == {"http://www.w3.org/2000/svg"}  # a name, not fetched
    # Of each phase the middle of what lasts longest between two events.
    events = list(pairwise(timeline.times))
    longest = [
        max((pair for pair in events if first <= pair[0] and pair[1] <= last), key=lambda pair: pair[1] - pair[0])
        for _, first, last in timeline.phases
    ]
    middles = [sum(pair) / 2 for pair in longest]
    fractions = json.dumps([middle / timeline.times[-1] for middle in middles])
    page.write_text(text.replace("</body>", POINT.replace("FRACTIONS", fractions)))
    shown = show(page, tmp_path / "browser")
    drawn = re.findall(r'data-series="(\w+)"', shown)
    series = timeline.series | {"offloaded": timeline.offloaded}
    assert drawn == [name for name, values in series.items() if any(values)]
    assert "Memory on cpu" in shown and ("aten::linear" in shown or "TanhBackward0" in shown)
    told, after = json.loads(html.unescape(re.search('<pre id="told">(.*?)</pre>', shown).group(1)))
    expected = []
    for middle, (phase, *_) in zip(middles, timeline.phases, strict=True):
        found = timeline.by_category(max(i for i, time in enumerate(timeline.times) if time <= middle))
        rows = {CATEGORIES[name].label: human(value) for name, value in found.items() if name in drawn}
        expected.append(["", f"{1000 * middle:.{2 if middle < 0.1 else 1}f} ms, {phase}", rows])
        expected[-1][2]["in all"] = human(sum(found.values()))
    assert told == expected and after == "none"
    assert len({str(rows) for *_, rows in told}) == 3


def human(value):
    """Bytes as the page writes them."""
    units = iter(("B", "kB", "MB", "GB"))
    unit = next(units)
    while value >= 999.5:
        value, unit = value / 1000, next(units)
    return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:#.3g} {unit}"


SCRIPT = """
import sys
import torch
model = torch.nn.Linear(64, 64)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for i in range(int(sys.argv[1])):
    model(torch.randn(8, 64)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
print("ended with", sys.argv[1:], __name__)
"""


def test_a_script_is_run_and_one_step_of_it_drawn(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "memkernels", "profile", "--step", "3", "--output", "found", "--", "train.py"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}
    done = subprocess.run([*command, "4", "--flag"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "ended with ['4', '--flag'] __main__" in done.stdout
    assert "peak of step 3 on cpu: " in done.stdout and "found.png and found.html" in done.stdout
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")
    assert '"gradients"' in (tmp_path / "found.html").read_text()


def test_the_first_step_holds_the_making_of_the_model(tmp_path, monkeypatch, capsys):
    (tmp_path / "train.py").write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert main(["profile", "--step", "1", "--", "train.py", "2"]) == 0
    assert "peak of step 1 on cpu: " in capsys.readouterr().out
    page = (tmp_path / "memory.html").read_text()
    parameters = [int(n) for n in re.search(r'"parameters":\[([\d,]+)\]', page).group(1).split(",")]
    assert parameters[0] < parameters[-1] - FLOAT * 64 * 64


STEPS_IN_THREADS = """
import threading
import torch

together = threading.Barrier(3, timeout=20)

def train():
    model = torch.nn.Linear(300, 300)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        model(torch.randn(4, 300)).sum().backward()
        together.wait()
        optimizer.step()

threads = [threading.Thread(target=train) for _ in range(3)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


def test_steps_of_one_thread_count(tmp_path, monkeypatch, capsys):
    (tmp_path / "train.py").write_text(STEPS_IN_THREADS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert main(["profile", "--", "train.py"]) == 0
    assert "peak of step 2 on cpu: " in capsys.readouterr().out
    assert (tmp_path / "memory.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--step", "0", "--", "train.py"], "--step: expected 1 or more, got 0"),
        (["--", "missing.py"], "missing.py is not a file"),
        (["--output", "no/such/folder/x", "--", "train.py"], "--output: /"),
        (["--output", "no/such/folder/x", "--", "train.py"], "/no/such/folder is not a folder"),
        (["--step", "9", "--", "train.py", "4"], "step 9 was not reached: train.py called optimizer.step() 4 times"),
        (["--step", "9", "--", "exits.py", "4"], "its own message\nprofile: step 9 was not reached"),
    ],
)
def test_what_cannot_be_recorded_is_told(tmp_path, monkeypatch, capsys, arguments, message):
    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "exits.py").write_text(SCRIPT + 'sys.exit("its own message")\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert main(["profile", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("*.png"))
