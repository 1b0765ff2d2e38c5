"""A byte-level transformer whose every other feed-forward layer is a mixture of experts, or none."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from memkernels import nn
from memkernels.nn.routers import Routing

VOCABULARY = 256


@dataclass(frozen=True)
class Shape:
    """Sizes. A token goes through one expert, of the size of a dense layer: the same FLOPs with any number of them."""

    width: int = 128
    feed_forward: int = 512
    layers: int = 4
    heads: int = 4
    experts: int = 16


class FeedForward(torch.nn.Module):
    """The dense layer: act(x W1^T) W2^T, as each expert is."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.mlp = nn.GatedMLP(shape.width, shape.feed_forward, "relu", gated=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Routing | None]:
        return self.mlp(x), None


class Layer(torch.nn.Module):
    """h = x + attention(norm(x)), y = h + feed_forward(norm(h))."""

    def __init__(self, shape: Shape, feed_forward: torch.nn.Module):
        super().__init__()
        self.attention_norm = nn.RMSNorm(shape.width)
        self.attention = nn.Attention(shape.width, shape.heads)
        self.norm = nn.RMSNorm(shape.width)
        self.feed_forward = feed_forward

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Routing | None]:
        norm = self.attention_norm
        h = x + self.attention(x, cos, sin, norm_weight=norm.weight, norm_eps=norm.eps)
        y, routing = self.feed_forward(self.norm(h))
        return h + y, routing


class SwitchLanguageModel(torch.nn.Module):
    """Next-byte prediction. `capacity_factor` None: the dense twin."""

    def __init__(self, shape: Shape, capacity_factor: float | None):
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCABULARY, shape.width)
        torch.nn.init.normal_(self.embedding.weight, std=shape.width**-0.5)
        self.rotary = nn.RotaryEmbedding(shape.width // shape.heads)
        self.layers = torch.nn.ModuleList(
            Layer(shape, self._feed_forward(shape, index, capacity_factor)) for index in range(shape.layers)
        )
        self.norm = nn.RMSNorm(shape.width)
        self.head = nn.LinearCrossEntropy(shape.width, VOCABULARY)

    @staticmethod
    def _feed_forward(shape: Shape, index: int, capacity_factor: float | None) -> torch.nn.Module:
        if capacity_factor is None or index % 2 == 0:
            return FeedForward(shape)
        return nn.SwitchFFN(shape.width, shape.feed_forward, shape.experts, capacity_factor=capacity_factor)

    def forward(self, text: Tensor) -> tuple[Tensor, list[Routing]]:
        """The mean loss of each next byte of text (B, S + 1), and the routing of each mixture."""
        x = self.embedding(text[:, :-1])
        cos, sin = self.rotary(torch.arange(x.shape[1], device=x.device), x.dtype)
        routings = []
        for layer in self.layers:
            x, routing = layer(x, cos, sin)
            if routing is not None:
                routings.append(routing)
        return self.head(self.norm(x), text[:, 1:]), routings
