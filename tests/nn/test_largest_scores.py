"""The choice of the largest scores, with ties, in one order on every device, and what it costs."""

import pytest
import torch

from memkernels import nn
from memkernels.nn.routers.router import largest

SPECIAL = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 1.0, -1.0, 1e-45, -1e-45, 3.4e38, -3.4e38])


def by_sorting(scores, k):
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :k]


@pytest.mark.parametrize("k", [1, 3, 10])
def test_of_equal_scores_the_lower_index_comes_first(k):
    generator = torch.Generator().manual_seed(k)
    for scores in (
        SPECIAL[torch.randint(len(SPECIAL), (200, 12), generator=generator)],
        torch.randint(-3, 3, (200, 30), generator=generator).float(),
        torch.randn(200, 10, generator=generator),
        torch.randint(3, (40, 20), generator=generator).float().t(),
    ):
        assert torch.equal(largest(scores, k), by_sorting(scores, k))


@pytest.mark.parametrize("make", [lambda: nn.SwitchRouter(8, 6), lambda: nn.TopKRouter(8, 6, 2)])
def test_the_balance_loss_counts_choices_in_front_of_the_capacity(make):
    """Without a tensor (T, k, E): f_e is of the plan's counts."""
    router, x = make(), torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    padding = torch.arange(50) % 4 == 1
    routing = router(x, padding)
    ids = routing.expert_ids[~padding]
    fraction = torch.bincount(ids.flatten(), minlength=6).double() / len(ids)
    mean = (x.double() @ router.weight.double().t()).softmax(1)[~padding].mean(0)
    torch.testing.assert_close(routing.load_balance_loss.double(), 6 * fraction @ mean, rtol=1e-5, atol=0)


def test_experts_that_choose_among_no_token_take_none():
    router = nn.ExpertChoiceRouter(8, 6)
    routing = router(torch.zeros(0, 8))
    assert router.capacity(0) == 0 and routing.expert_ids.shape == (0,) and routing.plan.counts.sum() == 0
