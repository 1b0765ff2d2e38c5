"""A model whose steps are profiled, and a script that makes some."""

import torch
from torch import nn


def build(layers=4, dim=128):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(dim, dim), nn.Tanh()) for _ in range(layers)))
    return model, torch.optim.AdamW(model.parameters(), foreach=False), torch.randn(512, dim)


def step(model, optimizer, x):
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


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
