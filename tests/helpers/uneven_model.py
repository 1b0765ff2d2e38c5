"""A model with the uneven parameters that sharding meets, its optimizer, and its values beside others."""

import torch
import torch.distributed as dist

# eps keeps gradients whose terms cancel from being divided by themselves, rounding and all.
OPTIONS = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-4, "weight_decay": 0.1}
BUCKET = 6000  # bytes: several buckets, and parameters larger than one


class Model(torch.nn.Module):
    """Uneven sizes, a tied weight, a frozen one, a parameter that only some batches use, one that none uses, and one
    of another dtype."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(37, 24)
        self.layers = torch.nn.ModuleList(
            torch.nn.Sequential(torch.nn.Linear(24, 65), torch.nn.GELU(), torch.nn.Linear(65, 24)) for _ in range(3)
        )
        self.frozen = torch.nn.Linear(24, 24).requires_grad_(False)
        self.rare = torch.nn.Linear(24, 24, bias=False)
        self.never = torch.nn.Linear(3, 5)
        self.scale = torch.nn.Parameter(torch.ones(24, dtype=torch.bfloat16))
        self.register_buffer("shift", torch.rand(24) > 0.5)
        self.head = torch.nn.Linear(24, 37, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids, rare=True):
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(x)
        if rare:
            x = x + self.rare(x)
        return self.head(self.frozen(x) + self.shift)


def model_of(seed=0):
    torch.manual_seed(seed)
    return Model()


def loss_of(model, step, part, rank, rare=True):
    """Of a batch that each rank, step and part of a step has for itself; a large gradient at first."""
    ids = torch.randint(0, 37, (4, 9), generator=torch.Generator().manual_seed(1000 * step + 10 * part + rank))
    loss = torch.nn.functional.cross_entropy(model(ids, rare).flatten(0, 1), ids.roll(1).flatten())
    # The bfloat16 parameter's gradient is exact, and too small to change the norm: others are compared to float32.
    return loss * (10.0 if step < 3 else 1.0) + (model.scale.float() * 2**-12 * (1 + part + rank)).sum()


def assert_equal(model, expected, rtol, bfloat16=2**-7):
    """The largest difference of a parameter over its largest magnitude; a tipped rounding in bfloat16."""
    for (name, actual), (_, value) in zip(model.named_parameters(), expected.named_parameters(), strict=True):
        difference = (actual.double() - value.double()).abs().max() / value.double().abs().max()
        assert difference <= (bfloat16 if value.dtype == torch.bfloat16 else rtol), (name, difference)


def assert_same_on_every_rank(model):
    own = torch.cat([tensor.detach().float().reshape(-1) for tensor in (*model.parameters(), *model.buffers())])
    first = own.clone()
    dist.broadcast(first, 0)
    assert torch.equal(own, first)
