"""A byte-level Llama trained by AdamW with states in few bits learns as it does with float32 states."""

import pytest
import torch

from memkernels import optim
from memkernels.demo.data import standard_library, windows
from memkernels.demo.llama import Settings, make_model, mean_loss

pytestmark = pytest.mark.xdist_group("optimizer_states")  # one run of torch's optimizer for all

SETTINGS = Settings(recompute=None, steps=500, tokens=256, width=256, feed_forward=704, layers=4)
# Of weights and text: in 500 steps a rounding grows to some tenths of a percent of the loss, to either side.
DRAWS = 4


def held_out_loss(optimizer_class, draw, dtype=torch.float32, **options):
    torch.manual_seed(draw)
    model = make_model(SETTINGS).to(dtype)
    optimizer = optimizer_class(model.parameters(), lr=1e-3, **options)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, SETTINGS.steps)
    text, held_out = standard_library()
    for batch in windows(text, SETTINGS.steps, SETTINGS.tokens, seed=draw):
        model(input_ids=batch[None], labels=batch[None]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return mean_loss(model.float(), windows(held_out, 40, SETTINGS.tokens, seed=1))


@pytest.fixture(scope="module")
def float32_losses():
    return [held_out_loss(torch.optim.AdamW, draw) for draw in range(DRAWS)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"state_bits": 16}, 0.005),
        ({"state_bits": 8}, 0.005),
        ({"state_bits": 4}, 0.02),
        ({"dtype": torch.bfloat16, "rounding": "remainder"}, 0.01),
        ({"dtype": torch.bfloat16, "state_bits": 8}, 0.02),
    ],
    ids=str,
)
def test_held_out_loss_after_500_steps(float32_losses, options, allowed):
    """Above torch's by no more than is allowed, in the mean over the draws and within two standard errors of it."""
    losses = [held_out_loss(optim.AdamW, draw, **options) for draw in range(DRAWS)]
    above = torch.tensor(losses) / torch.tensor(float32_losses) - 1
    mean, error = above.mean().item(), above.std().item() / DRAWS**0.5
    by_draw = ", ".join(f"{of:+.2%}" for of in above.tolist())
    print(f"{options}: {mean:+.2%} of torch's, standard error {error:.2%}; by draw {by_draw}")
    assert mean - 2 * error <= allowed
