"""What stays since backward needs it first: what the last layers save, and what runs after them."""

import pytest
import torch
import torch.nn.functional as F
from offloaded_model import disk
from torch import nn

pytest.importorskip("memkernels._runtime", reason="built without pybind11 or Python's headers")

X, LABELS = torch.randn(256, 64), torch.arange(256) % 97


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(3))
        self.head = nn.Linear(64, 97)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


@pytest.mark.parametrize("loss", [F.cross_entropy, nn.CrossEntropyLoss()])
@pytest.mark.parametrize("embed", [torch.square, nn.Tanh()])
def test_a_loss_is_of_the_model_before_it_and_what_precedes_that_is_not(tmp_path, embed, loss):
    model, offload, moved = Model(), disk(tmp_path), []
    x = X.clone().requires_grad_() * 1
    with offload:
        for _ in range(3):
            before = offload.statistics["moved"]
            loss(model(embed(x)), LABELS).backward()
            moved.append(offload.statistics["moved"] - before)
            x = x.detach().requires_grad_() * 1
    # What the first two layers are given and give, and what is squared.
    assert moved == [3 + (embed is torch.square)] * 3


@pytest.mark.parametrize("keep", [0, 1])
def test_what_backward_saves_is_of_no_last_layer(tmp_path, keep):
    model, offload, x = Model(), disk(tmp_path, keep_last_layers=keep), X.clone().requires_grad_()
    with offload:
        y = model(x).square().sum()
        before = offload.statistics["moved"]
        (dx,) = torch.autograd.grad(y, x, create_graph=True)
    moved = offload.statistics["moved"] - before
    assert moved >= 3
    dx.square().sum().backward()
