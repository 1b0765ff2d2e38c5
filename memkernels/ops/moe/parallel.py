"""The experts' feed-forward layer with the experts on several ranks: autograd Functions and the op."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._compile import _disable_dynamo  # as torch.compiler.disable, which imports the compiler at once

from memkernels.ops.autocast import as_product_dtype, check_product_dtype, product_dtype
from memkernels.ops.checks import check_shape
from memkernels.ops.gated_activation.op import check_activation
from memkernels.ops.moe.dispatch import check_tokens, check_weights, dispatch_rows, moe_combine
from memkernels.ops.moe.exchange import Exchange, InFlight, agree, failing_together, tell
from memkernels.ops.moe.op import moe_mlp
from memkernels.ops.moe.plan import DispatchPlan, moe_plan
from memkernels.ops.once_differentiable import once_differentiable

Result = TypeVar("Result")


class _Journey:
    """The rows of one call that are in flight between one Function and the next."""

    def __init__(self, exchange: Exchange):
        self.exchange = exchange
        self.received: InFlight | None = None
        self.received_weights: InFlight | None = None
        self.y: InFlight | None = None
        self.dy: InFlight | None = None
        self.x: InFlight | None = None

    def take(self, name: str) -> Tensor:
        flight = getattr(self, name)
        setattr(self, name, None)
        return flight.wait()


class _WeightsOfRows(torch.autograd.Function):
    """(R, 1): the router's weight of each grouped row, zero where it belongs to no expert."""

    @staticmethod
    def forward(ctx, expert_weights, row_of_pair, pair_of_row):
        ctx.save_for_backward(row_of_pair)
        return torch.where(pair_of_row >= 0, expert_weights.reshape(-1)[pair_of_row.clamp(min=0)], 0.0)[:, None]

    @staticmethod
    @once_differentiable
    def backward(ctx, drow_weight):
        (row_of_pair,) = ctx.saved_tensors
        if drow_weight.shape[0] == 0:
            return drow_weight.new_zeros(row_of_pair.shape), None, None
        return torch.where(row_of_pair >= 0, drow_weight[row_of_pair.clamp(min=0), 0], 0.0), None, None


class _ToExperts(torch.autograd.Function):
    """The grouped rows and their weights, on their way to the experts, which wait for them. Saves nothing."""

    @staticmethod
    def forward(ctx, journey, x_grouped, row_weight):
        ctx.journey, ctx.rows = journey, x_grouped.shape[0]
        journey.received = journey.exchange.to_experts(x_grouped)
        journey.received_weights = journey.exchange.to_experts(row_weight)
        return journey.received.rows, journey.received_weights.rows

    @staticmethod
    @once_differentiable
    def backward(ctx, dx, dweights):
        if ctx.journey.x is not None:  # without a row here nothing was kept that it stands for
            ctx.journey.take("x")
        from_experts = ctx.journey.exchange.from_experts
        needed = zip((dx, dweights), ctx.needs_input_grad[1:], strict=True)
        flights = [from_experts(grad, ctx.rows) if need else None for grad, need in needed]
        return None, *(None if flight is None else flight.wait() for flight in flights)


class _FromExperts(torch.autograd.Function):
    """The experts' rows, on their way back. `_Combine` waits for them, and in backward starts what this waits for."""

    @staticmethod
    def forward(ctx, journey, y, num_rows):
        ctx.journey = journey
        journey.y = journey.exchange.from_experts(y, num_rows)
        return journey.y.rows

    @staticmethod
    @once_differentiable
    def backward(ctx, _):
        return None, ctx.journey.take("dy"), None


class _Combine(torch.autograd.Function):
    """`moe_combine` of the rows in flight. Saves the plan and, to send it again in backward, x unless it is None."""

    @staticmethod
    def forward(ctx, journey, y_grouped, x, *plan):
        ctx.journey = journey
        ctx.save_for_backward(x, *plan)
        return moe_combine(journey.take("y"), DispatchPlan(*plan))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, *tensors = ctx.saved_tensors
        plan, journey = DispatchPlan(*tensors), ctx.journey
        dy_grouped = dispatch_rows(dy.contiguous(), plan)
        journey.dy = journey.exchange.to_experts(dy_grouped)
        if x is not None:
            journey.x = journey.exchange.to_experts(dispatch_rows(x, plan))
        return None, dy_grouped, None, *(None for _ in tensors)


class _SentAgain(torch.autograd.graph.saved_tensors_hooks):
    """Within, what autograd would keep of the received rows is given up, and taken from the journey in backward."""

    def __init__(self, received: Tensor, journey: _Journey):
        place, shape = received.data_ptr(), received.shape

        def pack(tensor: Tensor) -> Tensor | _Journey:
            return journey if tensor.data_ptr() == place and tensor.shape == shape and tensor.numel() else tensor

        def unpack(kept: Tensor | _Journey) -> Tensor:
            return kept.take("x") if isinstance(kept, _Journey) else kept

        super().__init__(pack, unpack)


class PendingMoE:
    """A call whose results are on their way back from the experts."""

    def __init__(self, journey: _Journey, y_grouped: Tensor, x: Tensor | None, plan: DispatchPlan):
        self.journey = journey
        self.y_grouped = y_grouped
        self.x = x
        self.plan = plan

    def beside(self, work: Callable[..., Result], *arguments: Tensor) -> Result:
        """work(*arguments) beside the exchange. What raises within raises here, and on the other ranks in `finish`."""
        try:
            return work(*arguments)
        except Exception:
            self.journey.take("y")
            tell(self.journey.exchange.group, self.y_grouped.device, failed=True).wait()
            raise

    @_disable_dynamo
    def finish(self) -> Tensor:
        """Waits for the experts' results and combines them: y, (T, d). To be called once.

        Raises:
            RuntimeError: another rank failed in its experts or in `beside`; on a GPU a device-side assertion.
        """
        failed = tell(self.journey.exchange.group, self.y_grouped.device, failed=False).wait()
        torch._assert_async(
            (failed == 0).all(), "expert_mesh: another rank failed beside the exchange; its own error says why."
        )
        return _Combine.apply(self.journey, self.y_grouped, self.x, *self.plan)


@_disable_dynamo
def start_moe_mlp(
    x: Tensor,
    plan: DispatchPlan,
    expert_weights: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    group: dist.ProcessGroup,
    *,
    activation: str = "silu",
    dropout_p: float = 0.0,
    recompute: bool = True,
) -> PendingMoE:
    """`ops.moe_mlp` with the experts on the ranks of a group, each rank with tokens of its own.

    Each rank sends its tokens' rows and their weights to the ranks of their experts, computes its own experts by
    `ops.moe_mlp` and sends the results back. An expert's rows are in the order of the ranks and within a rank in that
    of its tokens, as they are where one process has all tokens in the order of the ranks: every result and gradient is
    that process's, bit for bit. (Lepikhin et al. 2020, GShard, arXiv 2006.16668; without its padding to a capacity.)

    The gradients of x and expert_weights are of all ranks' losses together, and so are those of the rank's experts.
    All ranks make the same calls and the same backward passes, in the same order. torch.compile does not trace it.

    Args:
        x: (T, d), as `ops.moe_mlp`; T may differ between ranks and be 0.
        plan: that of all E experts for this rank's tokens; a capacity is of these tokens.
        expert_weights: (T, k).
        w_gate_up: (E / ranks, 2 n, d), or (E / ranks, n, d): rank r's are of the experts r E / ranks to
            (r + 1) E / ranks.
        w_down: (E / ranks, d, n).
        group: its ranks hold E experts in equal parts.
        activation, dropout_p: as `ops.moe_mlp`; each rank draws a seed of its own.
        recompute: keep x alone; else what each rank received and its pre-activation.

    Returns:
        What waits for the experts' results and combines them. What it runs `beside`, the shared experts for one, runs
        beside the exchange of the results, and its backward beside the exchange of dy and, with `recompute`, of x. The
        exchange of x runs beside what the experts need in front of their products: the plan of the received rows and,
        under autocast, the cast of the weights.

    Raises:
        TypeError, ValueError: of arguments, as `ops.moe_mlp`; on this rank, and a RuntimeError on the others.
        ValueError: ranks differ in the dtype of x, in what needs a gradient or in recompute; on every rank.
        RuntimeError: as the experts' products; on the other ranks in `finish`.

    Saved for backward: with `recompute` x (d elements a token), which is sent again, 12 bytes a choice here and 12 a
    row received. Without it, for each row received, d and n or 2 n elements and 12 bytes, and 12 bytes a choice here.
    """
    with failing_together(group, plan.num_experts, w_down.device):
        check_activation(activation)
        size = w_down.shape[-1]
        check_tokens("x", x, plan)
        check_weights("expert_weights", expert_weights, plan)
        experts = plan.num_experts // dist.get_world_size(group)
        check_shape("w_down", w_down, (experts, x.shape[1], size), "experts of the rank, the last dimension of x, n")
        width = size if w_gate_up.shape[1] == size else 2 * size
        check_shape("w_gate_up", w_gate_up, (experts, width, x.shape[1]), "that of w_down, n or 2 n in the middle")
        dtype = product_dtype(x)
        check_product_dtype(x, dtype, w_gate_up=w_gate_up, w_down=w_down)
        narrow, expert_weights = x.to(dtype), expert_weights.float()
        trained = [tensor.requires_grad for tensor in (x, expert_weights, w_gate_up, w_down)]
        sent = dispatch_rows(narrow, plan), _WeightsOfRows.apply(expert_weights, plan.row_of_pair, plan.pair_of_row)
    fields = [dtype, *(torch.is_grad_enabled() and needed for needed in trained), recompute]
    exchange, expert_of_row = agree(group, plan.offsets.diff(), fields)
    journey, rows = _Journey(exchange), plan.pair_of_row.shape[0]
    received, received_weights = _ToExperts.apply(journey, *sent)
    del sent
    try:
        local = moe_plan(expert_of_row[:, None], experts)
        weights = as_product_dtype(x, dtype, w_gate_up=w_gate_up, w_down=w_down)
        journey.take("received")
        journey.take("received_weights")
        with _SentAgain(received, journey) if recompute else nullcontext():
            y = moe_mlp(
                received, local, received_weights, **weights, activation=activation, dropout_p=dropout_p,
                recompute=recompute,
            )  # fmt: skip
    except Exception:
        exchange.from_experts(received.detach(), rows).wait()  # what the other ranks wait for
        tell(group, received.device, failed=True).wait()
        raise
    y_grouped = _FromExperts.apply(journey, y, rows)
    return PendingMoE(journey, y_grouped, narrow.detach() if recompute else None, plan)
