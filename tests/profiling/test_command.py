"""`python -m memkernels profile`: one step of a script."""

import os
import re
import subprocess
import sys

import pytest
from profiled_steps import SCRIPT

from memkernels.cli import main

pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")

FLOAT = 4


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
