"""The example whose ranks are actors of Monarch: the same losses at any number of them, and an error passed on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("monarch.actor", reason="it is not installed: pip install torchmonarch")

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_zero_monarch.py"


def train(ranks, steps, folder):
    command = [sys.executable, str(EXAMPLE), "--every", "2", "--output", str(folder)]
    command += ["--ranks", str(ranks), "--steps", str(steps)]
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_actors_go_on_at_another_number_of_ranks(tmp_path):
    losses = []
    for runs in (((1, 4),), ((2, 2), (3, 4))):
        done = [train(ranks, steps, tmp_path / str(len(runs))) for ranks, steps in runs]
        assert [of.returncode for of in done] == [0] * len(runs), done
        said = [line for of in done for line in of.stdout.splitlines() if "loss" in line]
        assert [line.rpartition(" ")[0] for line in said] == [f"step {step}: loss" for step in (1, 2, 3, 4)]
        losses.append([float(line.rpartition(" ")[2]) for line in said])
    assert losses[1] == pytest.approx(losses[0], abs=2e-4)
    failed = train(5, 6, tmp_path / "2")
    assert failed.returncode == 1 and "the batch of 24 does not fall to 5 ranks" in failed.stderr
