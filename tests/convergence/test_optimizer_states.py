"""A byte-level Llama trained by AdamW with states in few bits learns as it does with float32 states."""

import pytest
import torch

from memkernels import optim
from memkernels.demo.data import standard_library, windows
from memkernels.demo.llama import Settings, make_model, mean_loss

pytestmark = pytest.mark.xdist_group("optimizer_states")  # one run of torch's optimizer for all

SETTINGS = Settings(recompute=None, steps=500, tokens=256, width=256, feed_forward=704, layers=4)


def held_out_loss(optimizer_class, dtype=torch.float32, **options):
    torch.manual_seed(0)
    model = make_model(SETTINGS).to(dtype)
    # At the demo's 1e-3 training by windows so short is unstable: any rounding decides what loss it ends with.
    optimizer = optimizer_class(model.parameters(), lr=3e-4, **options)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, SETTINGS.steps)
    text, held_out = standard_library()
    for batch in windows(text, SETTINGS.steps, SETTINGS.tokens, seed=0):
        model(input_ids=batch[None], labels=batch[None]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return mean_loss(model.float(), windows(held_out, 40, SETTINGS.tokens, seed=1))


@pytest.fixture(scope="module")
def float32_loss():
    return held_out_loss(torch.optim.AdamW)


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
def test_held_out_loss_after_500_steps(float32_loss, options, allowed):
    loss = held_out_loss(optim.AdamW, **options)
    print(f"{options}: {loss:.4f}, {loss / float32_loss - 1:+.2%} of torch's {float32_loss:.4f}")
    assert loss < float32_loss * (1 + allowed)
