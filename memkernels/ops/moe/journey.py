"""The rows of one call of experts on several ranks, between the Functions that start their ways and wait for them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from memkernels.ops.moe.exchange import Exchange, InFlight


class Journey:
    """What is on its way, by its name and the part of the experts that it goes to or comes from.

    Args:
        exchanges: with each part of the experts.
        num_rows: R, of the grouped rows.
    """

    def __init__(self, exchanges: Sequence[Exchange], num_rows: int):
        self.exchanges = exchanges
        self.num_rows = num_rows
        self.flights: dict[tuple[str, int], InFlight] = {}
        self.returned: dict[str, Tensor] = {}

    @property
    def parts(self) -> range:
        return range(len(self.exchanges))

    def send(self, name: str, part: int, grouped: Tensor) -> None:
        """Starts the way of a part's rows, of grouped rows (R, d), to the experts."""
        self.flights[name, part] = self.exchanges[part].to_experts(grouped)

    def send_back(self, name: str, part: int, rows: Tensor) -> None:
        """Starts the way of what a part's experts made of the rows that this rank received."""
        if name not in self.returned:
            grouped = rows.new_empty(self.num_rows, rows.shape[1])
            grouped[max(place.stop for exchange in self.exchanges for place in exchange.sent) :].zero_()
            self.returned[name] = grouped
        self.flights[name, part] = self.exchanges[part].from_experts(rows, self.returned[name])

    def send_gradients(self, part: int, needed: Sequence[bool], *grads: Tensor) -> None:
        """Starts the way of a part's dx and dweights, of each where it is needed and not under way."""
        for name, grad, need in zip(("dx", "dweights"), grads, needed, strict=True):
            if need and (name, part) not in self.flights:
                self.send_back(name, part, grad)

    def take(self, name: str, part: int) -> Tensor:
        """Waits for what was sent: a part's rows that this rank received."""
        return self.flights.pop((name, part)).wait()

    def take_back(self, name: str) -> Tensor:
        """Waits for what all parts sent back: grouped rows (R, d), zero where they belong to no expert."""
        for part in self.parts:
            self.take(name, part)
        return self.returned.pop(name)

    def give_up(self, like: Tensor) -> None:
        """Where this rank fails: takes what is on its way, and sends the other ranks the y that they wait for.

        like: of the dtype, device and last dimension of y.
        """
        for name, part in tuple(self.flights):
            if name != "y":
                self.take(name, part)
        for part in self.parts:
            if ("y", part) not in self.flights:
                self.send_back("y", part, like.new_empty(self.exchanges[part].num_received, like.shape[1]))
        self.take_back("y")


class SentAgain(torch.autograd.graph.saved_tensors_hooks):
    """Within, what autograd would keep of a part's received rows is given up; in backward the journey has it again."""

    def __init__(self, received: Tensor, journey: Journey, part: int):
        place, shape = received.data_ptr(), received.shape

        def pack(tensor: Tensor) -> Tensor | Journey:
            return journey if tensor.data_ptr() == place and tensor.shape == shape and tensor.numel() else tensor

        def unpack(kept: Tensor | Journey) -> Tensor:
            return kept.take("x", part) if isinstance(kept, Journey) else kept

        super().__init__(pack, unpack)
