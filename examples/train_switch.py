"""Trains a small Switch Transformer beside its dense twin, at the same FLOPs a token.

    pip install --no-build-isolation ".[plot]"
    python examples/train_switch.py

Both read Python's standard library byte by byte. In the sparse model every other feed-forward layer is `nn.SwitchFFN`:
sixteen experts, of which a token goes to one, each of the dense layer's size (Fedus et al. 2021, arXiv 2101.03961). The
capacity factor is what an expert takes over what it would if all were loaded alike; what is beyond it is dropped. The
table says at which step each model reached the dense one's last held-out loss, and the plot shows the losses and what
the experts of one layer were sent over time. All models see the same batches. The table is written as switch.md, the
plot as switch.png, and what every checkpoint found as switch.csv.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import torch
from switch_model import Shape, SwitchLanguageModel
from torch import Tensor

from memkernels.bench import machine
from memkernels.bench.table import format_table
from memkernels.demo.data import standard_library, windows
from memkernels.demo.requirements import unmet

CAPACITY_FACTORS = (1.0, 1.25, 2.0)
_ROOT = Path(__file__).parents[1]
# Coefficients of the paper (section 2.2) and of ST-MoE (arXiv 2202.08906).
_LOAD_BALANCE, _Z_LOSS = 1e-2, 1e-3


@dataclass(frozen=True)
class Settings:
    """A run."""

    steps: int = 400
    batch: int = 8
    tokens: int = 256
    learning_rate: float = 3e-3
    warmup: int = 20
    checkpoints: int = 20


@dataclass
class Curve:
    """What one model did: at checkpoints, and at each step."""

    name: str
    parameters: int
    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    load: list[Tensor] = field(default_factory=list)  # of the first mixture: the fraction of tokens sent to each expert
    dropped: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def reaches(self, loss: float) -> int | None:
        """The first checkpoint with a loss as low."""
        return next((step for step, own in zip(self.steps, self.losses, strict=True) if own <= loss), None)


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains, prints and draws; returns 1 where a sparse model needed as many steps as the dense one, 2 where it cannot
    run."""
    parser = argparse.ArgumentParser(description="Train a small Switch Transformer beside its dense twin.")
    parser.add_argument("--steps", type=int, default=Settings.steps, help="training steps of each model")
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder of the table, the plot and the CSV")
    args = parser.parse_args(arguments)
    if args.steps < 1:
        print(f"train_switch: --steps: expected a positive number, got {args.steps}", file=sys.stderr)
        return 2
    if reason := unmet(("matplotlib", "tqdm"), "hf,plot"):
        print(f"train_switch: {reason}", file=sys.stderr)
        return 2
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"train_switch: --output: expected a folder to write to, got {args.output}: {error}", file=sys.stderr)
        return 2
    machine.set_threads()
    settings, shape = Settings(steps=args.steps), Shape()
    text, held_out = standard_library()
    curves = [train(shape, factor, settings, text, held_out) for factor in (None, *CAPACITY_FACTORS)]
    print(table(curves))
    for path in (write_table(curves, args.output), write_checkpoints(curves, args.output), draw(curves, args.output)):
        print(path)
    return 0 if in_fewer_steps(curves) else 1


def train(shape: Shape, capacity_factor: float | None, settings: Settings, text: Tensor, held_out: Tensor) -> Curve:
    """One model, from the same seed and on the same batches as the others."""
    from tqdm import tqdm

    torch.manual_seed(0)
    model = SwitchLanguageModel(shape, capacity_factor)
    name = "dense" if capacity_factor is None else f"switch, capacity factor {capacity_factor}"
    curve = Curve(name, sum(parameter.numel() for parameter in model.parameters()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.01, fused=True)
    batches = windows(text, settings.steps * settings.batch, settings.tokens + 1, seed=0).split(settings.batch)
    checks = windows(held_out, 32, settings.tokens + 1, seed=1)
    every = max(1, settings.steps // settings.checkpoints)
    for step, batch in enumerate(tqdm(batches, desc=name), start=1):
        started = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * _schedule(step, settings)
        loss, routings = model(batch)
        for routing in routings:
            loss = loss + _LOAD_BALANCE * routing.load_balance_loss + _Z_LOSS * routing.z_loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        curve.seconds.append(time.perf_counter() - started)
        if routings:
            counts, tokens = routings[0].plan.counts[:-1], batch[:, 1:].numel()
            curve.load.append(counts / tokens)
            curve.dropped.append(statistics.fmean(int(r.plan.dropped.sum()) / tokens for r in routings))
        if step % every == 0 or step == settings.steps:
            curve.steps.append(step)
            curve.losses.append(held_out_loss(model, checks))
    return curve


def _schedule(step: int, settings: Settings) -> float:
    """Linear warm-up, then linear to a tenth."""
    done = step / settings.steps
    return min(1.0, step / settings.warmup) * (1.0 - 0.9 * done)


@torch.no_grad()
def held_out_loss(model: SwitchLanguageModel, text: Tensor) -> float:
    """In nats a byte; in evaluation experts take twice what they would if all were loaded alike."""
    model.eval()
    loss = statistics.fmean(model(part)[0].item() for part in text.split(8))
    model.train()
    return loss


def in_fewer_steps(curves: Sequence[Curve]) -> bool:
    """Whether each sparse model reached the dense one's last loss, or a lower one, before the dense one did."""
    dense, *sparse = curves
    reached = [curve.reaches(dense.losses[-1]) for curve in sparse]
    own = dense.reaches(dense.losses[-1])
    return own is not None and all(step is not None and step < own for step in reached)


def table(curves: Sequence[Curve]) -> str:
    dense = curves[0]
    rows = []
    for curve in curves:
        step = curve.reaches(dense.losses[-1])
        rows.append([
            curve.name, f"{curve.parameters / 1e6:.1f} million", f"{curve.losses[-1]:.3f}",
            "never" if step is None else str(step),
            f"{100 * statistics.fmean(curve.dropped):.1f}%" if curve.dropped else "",
            f"{statistics.median(curve.seconds) * 1e3:.0f} ms",
        ])  # fmt: skip
    return format_table(
        ["", "parameters", "held-out loss", "steps to the dense model's", "tokens dropped", "step, median"], rows
    )


def write_table(curves: Sequence[Curve], folder: Path) -> Path:
    """switch.md: the table, and what it is from."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "switch.md"
    path.write_text(f"""# A small Switch Transformer beside its dense twin

Written by `python examples/train_switch.py --steps {curves[0].steps[-1]} --output {folder}` on {machine.describe()};
torch {torch.__version__}, commit {machine.commit(_ROOT)}, {datetime.date.today()}. Losses are of held-out text, in
nats a byte; every checkpoint is in [switch.csv](switch.csv).

```
{table(curves)}
```

![Held-out loss of each model, and the fraction of tokens sent to each expert, by step](switch.png)
""")
    return path


def write_checkpoints(curves: Sequence[Curve], folder: Path) -> Path:
    """switch.csv: at each checkpoint of each model its held-out loss, and for the steps since the checkpoint before the
    median milliseconds, the fraction of tokens dropped in all mixtures, and that sent to each expert of the first."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "switch.csv"
    experts = max(len(load) for curve in curves for load in curve.load[:1])
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        head = ["model", "parameters", "step", "held_out_loss", "median_ms", "dropped"]
        writer.writerow([*head, *(f"expert_{expert}" for expert in range(experts))])
        for curve in curves:
            for loss, (begin, end) in zip(curve.losses, pairwise([0, *curve.steps]), strict=True):
                since = slice(begin, end)
                values = [loss, 1e3 * statistics.median(curve.seconds[since])]
                if curve.load:
                    load = torch.stack(curve.load[since]).mean(0)
                    values += [statistics.fmean(curve.dropped[since]), *load.tolist()]
                cells = [f"{value:.6g}" for value in values]
                padding = [""] * (len(head) - 3 + experts - len(cells))
                writer.writerow([curve.name, curve.parameters, end, *cells, *padding])
    return path


def draw(curves: Sequence[Curve], folder: Path) -> Path:
    """switch.png: the losses, and the load of the experts of one layer, capacity factor 1.25."""
    from matplotlib.figure import Figure  # not pyplot, which has a state that is the user's

    folder.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    losses, load = figure.subplots(1, 2)
    for curve in curves:
        losses.plot(curve.steps, curve.losses, "k--" if not curve.load else "-", label=curve.name)
    losses.set(xlabel="step", ylabel="held-out loss, nats a byte")
    losses.legend()
    shown = curves[1 + CAPACITY_FACTORS.index(1.25)]
    shares = torch.stack(shown.load).t()
    load.stackplot(range(1, shares.shape[1] + 1), shares.numpy(), linewidth=0)
    load.set(xlabel="step", ylabel="fraction of tokens sent to each expert", ylim=(0, 1), title=shown.name)
    path = folder / "switch.png"
    figure.savefig(path, dpi=120)
    return path


if __name__ == "__main__":
    sys.exit(main())
