"""The experts' feed-forward layer with the experts on several ranks: autograd Functions and the op."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._compile import _disable_dynamo  # as torch.compiler.disable, which imports the compiler at once

from memkernels.ops.autocast import check_product_dtype, product_dtype
from memkernels.ops.checks import check_flag, check_shape
from memkernels.ops.gated_activation.op import check_activation
from memkernels.ops.moe.dispatch import check_tokens, check_weights, dispatch_rows, moe_combine
from memkernels.ops.moe.exchange import agree, failing_together, tell
from memkernels.ops.moe.journey import Journey, SentAgain
from memkernels.ops.moe.lora import ExpertsLoRAWeight
from memkernels.ops.moe.op import moe_mlp
from memkernels.ops.moe.plan import DispatchPlan, moe_plan, num_experts_of
from memkernels.ops.moe.weights import as_product_weights, stand_in
from memkernels.ops.once_differentiable import once_differentiable

Result = TypeVar("Result")


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
    """Starts the grouped rows' and their weights' way to the experts. Saves nothing.

    What it and `_FromExperts` return is empty: it tells autograd what comes after what. In backward, of nodes that are
    ready the one made last runs first, so that each exchange has a node where it starts and one where it ends.
    """

    @staticmethod
    def forward(ctx, journey, x_grouped, row_weight):
        ctx.journey = journey
        for part in journey.parts:
            journey.send("x", part, x_grouped)
            journey.send("weights", part, row_weight)
        return x_grouped.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx, _):
        needed = zip(("dx", "dweights"), ctx.needs_input_grad[1:], strict=True)
        return None, *(ctx.journey.take_back(name) if need else None for name, need in needed)


class _AtExperts(torch.autograd.Function):
    """The received rows of a part of the experts and their weights, once they are here; what `_ToExperts` waits for in
    backward starts here, unless `moe_mlp` did so earlier. Saves nothing."""

    @staticmethod
    def forward(ctx, journey, part, needed, _):
        ctx.journey, ctx.part, ctx.needed = journey, part, needed
        return journey.take("x", part), journey.take("weights", part)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        ctx.journey.send_gradients(ctx.part, ctx.needed, *grads)
        return None, None, None, grads[0].new_empty(0)


class _FromExperts(torch.autograd.Function):
    """Starts the way back of a part's results. `_Combine` starts what this waits for in backward. Saves nothing."""

    @staticmethod
    def forward(ctx, journey, part, y):
        ctx.journey, ctx.part = journey, part
        journey.send_back("y", part, y)
        return y.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx, _):
        if again := ctx.journey.flights.get(("x", ctx.part)):
            again.wait()  # not only where `SentAgain` takes it, which is nowhere for a part that received no row
        return None, None, ctx.journey.take("dy", ctx.part)


class _Combine(torch.autograd.Function):
    """`moe_combine` of what is back. Saves the plan and, to send it again in backward, x unless it is None."""

    @staticmethod
    def forward(ctx, journey, y_grouped, x, row_of_pair, pair_of_row, offsets, counts, token_offsets, *_):
        ctx.journey = journey
        plan = DispatchPlan(row_of_pair, pair_of_row, offsets, counts, token_offsets)
        ctx.save_for_backward(x, *plan)
        return moe_combine(y_grouped, plan)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, *tensors = ctx.saved_tensors
        plan, journey = DispatchPlan(*tensors), ctx.journey
        dy_grouped = dispatch_rows(dy.contiguous(), plan)
        x_grouped = None if x is None else dispatch_rows(x, plan)
        for part in reversed(journey.parts):  # as they are waited for
            journey.send("dy", part, dy_grouped)
            if x_grouped is not None:
                journey.send("x", part, x_grouped)
        return *(None for _ in range(8)), *(dy.new_empty(0) for _ in journey.parts)


class PendingMoE:
    """A call whose results are on their way back from the experts.

    Args:
        journey: that of the call.
        group: its ranks.
        ends: what `_FromExperts` returned of each part of the experts.
        x: (T, d), in the dtype of the products, detached.
        plan: of the dispatch.
        recompute: x is dispatched again in backward.
    """

    def __init__(
        self,
        journey: Journey,
        group: dist.ProcessGroup,
        ends: Sequence[Tensor],
        x: Tensor,
        plan: DispatchPlan,
        recompute: bool,
    ):
        self.journey = journey
        self.group = group
        self.ends = ends
        self.x = x
        self.plan = plan
        self.recompute = recompute

    def beside(self, work: Callable[..., Result], *arguments: Tensor) -> Result:
        """work(*arguments) beside the exchange. What raises within raises here, and on the other ranks in `finish`."""
        try:
            return work(*arguments)
        except Exception:
            _give_up(self.journey, self.group, self.x)
            raise

    @_disable_dynamo
    def finish(self) -> Tensor:
        """Waits for the experts' results and combines them: y, (T, d). To be called once.

        Raises:
            RuntimeError: another rank failed in its experts or in `beside`; on a GPU a device-side assertion.
        """
        told = tell(self.group, self.x.device, failed=False)
        y_grouped = self.journey.take_back("y")
        torch._assert_async(
            (told.wait() == 0).all(), "expert_mesh: another rank failed beside the exchange; its own error says why."
        )
        return _Combine.apply(self.journey, y_grouped, self.x if self.recompute else None, *self.plan, *self.ends)


def _give_up(journey: Journey, group: dist.ProcessGroup, x: Tensor) -> None:
    """Where this rank fails after `agree`: the other ranks get what they wait for, and are told."""
    journey.give_up(x)
    tell(group, x.device, failed=True).wait()


@_disable_dynamo
def start_moe_mlp(
    x: Tensor,
    plan: DispatchPlan,
    expert_weights: Tensor,
    w_gate_up: Tensor | ExpertsLoRAWeight,
    w_down: Tensor | ExpertsLoRAWeight,
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
            (r + 1) E / ranks. Dense, or quantised and frozen; either in an `ExpertsLoRAWeight`.
        w_down: (E / ranks, d, n), likewise.
        group: its ranks hold E experts in equal parts.
        activation, dropout_p: as `ops.moe_mlp`; each half of a rank's experts draws a seed of its own.
        recompute: keep x alone; else what each rank received and its pre-activation.

    Returns:
        What waits for the experts' results and combines them.

    A rank that holds several experts has them in two halves, with an exchange each. (Whole experts: a product of fewer
    of an expert's rows may round differently.) In forward the second half's x travels beside the first half's products,
    the first half's y beside the second's, and the second's y beside what is run `beside`: the shared experts, for one.
    In backward dy and, with `recompute`, x travel beside the backward of that, those of the first half also beside the
    second's products, and dx beside the gradient of w_gate_up, the second half's also beside the first's products.
    The first half's x in forward, and that of a lone expert, is waited for with nothing beside it: what is run `beside`
    could be there, and then the last y in forward and the first dy in backward had nothing; products of the rank's own
    rows alone would round otherwise than one process's, and be summed apart in the weights' gradients. The halves'
    gradients of a weight are joined: for a moment they and the whole are there.

    Raises:
        TypeError, ValueError: of arguments, as `ops.moe_mlp`; on this rank, and a RuntimeError on the others.
        ValueError: ranks differ in the dtype of x, in what needs a gradient or in recompute; on every rank.
        RuntimeError: as the experts' products; on the other ranks in `finish`.

    Saved for backward: with `recompute` x (d elements a token), which is sent again, 12 bytes a choice here and 12 a
    row received. Without it, for each row received, d and n or 2 n elements and 12 bytes, and 12 bytes a choice here.
    """
    gate_up_like, down_like = stand_in("w_gate_up", w_gate_up), stand_in("w_down", w_down)
    with failing_together(group, num_experts_of(plan), down_like.device):
        check_activation(activation)
        check_flag("recompute", recompute)
        size = down_like.shape[-1]
        check_tokens("x", x, plan)
        check_weights("expert_weights", expert_weights, plan)
        experts = num_experts_of(plan) // dist.get_world_size(group)
        check_shape("w_down", down_like, (experts, x.shape[1], size), "experts of the rank, the last dimension of x, n")
        width = size if gate_up_like.shape[1] == size else 2 * size
        check_shape("w_gate_up", gate_up_like, (experts, width, x.shape[1]), "that of w_down, n or 2 n in the middle")
        dtype = product_dtype(x)
        check_product_dtype(x, dtype, w_gate_up=gate_up_like, w_down=down_like)
        narrow, expert_weights = x.to(dtype), expert_weights.float()
        trained = [tensor.requires_grad for tensor in (x, expert_weights, w_gate_up, w_down)]
        sent = dispatch_rows(narrow, plan), _WeightsOfRows.apply(expert_weights, plan.row_of_pair, plan.pair_of_row)
    fields = [dtype, *(torch.is_grad_enabled() and needed for needed in trained), recompute]
    # Parts of whole experts: each product is then of the rows that it has in one process, and rounds alike.
    sizes = [experts] if experts == 1 else [experts - experts // 2, experts // 2]
    exchanges, expert_of_row = zip(*agree(group, plan.offsets.diff(), fields, sizes), strict=True)
    journey, narrow = Journey(exchanges, plan.pair_of_row.shape[0]), narrow.detach()
    needed, start, ends = [tensor.requires_grad for tensor in sent], _ToExperts.apply(journey, *sent), []
    del sent
    try:
        plans = [moe_plan(expert[:, None], size) for expert, size in zip(expert_of_row, sizes, strict=True)]
        weights = as_product_weights(x, dtype, w_gate_up=w_gate_up, w_down=w_down)
        of_parts = zip(plans, *(_parts(weight, sizes) for weight in weights.values()), strict=True)
        for part, (local, *weights_of_part) in enumerate(of_parts):
            received, received_weights = _AtExperts.apply(journey, part, needed, start)
            with SentAgain(received, journey, part) if recompute else nullcontext():
                y = moe_mlp(
                    received, local, received_weights, *weights_of_part, activation=activation, dropout_p=dropout_p,
                    recompute=recompute, on_input_grads=partial(journey.send_gradients, part, needed),
                )  # fmt: skip
            del received, received_weights
            ends.append(_FromExperts.apply(journey, part, y))
    except Exception:
        _give_up(journey, group, narrow)
        raise
    return PendingMoE(journey, group, ends, narrow, plan, recompute)


def _parts(weight: Tensor | ExpertsLoRAWeight, sizes: Sequence[int]) -> Sequence[Tensor | ExpertsLoRAWeight]:
    """Of a weight (E / ranks, ...), that of each part; a whole one as it is, since `split` copies in backward."""
    return (weight,) if len(sizes) == 1 else weight.split(sizes)
