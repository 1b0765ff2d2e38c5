"""One step of a transformers model: loss and gradients, as it computes them and exactly; and how close they must be."""

from unittest import mock

import torch
import torch.nn.functional as F

from memkernels.integrations.family import family_of
from memkernels.ops.rms_norm import reference
from memkernels.testing import assert_within_factor_two


def train_step(model, batch, run=None, **arguments):
    """Loss and gradients of one step, by name; `run` is called in the place of the model."""
    model.zero_grad()
    loss = (model if run is None else run)(**batch, **arguments).loss
    loss.backward()
    return _found(model, loss)


def exact_step(model, batch):
    """The step of an unpatched model in float64, where transformers' norms, softmax and loss round to float32."""
    model, softmax = model.double(), F.softmax
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            family = family_of(module)
            module.forward = lambda x, norm=module, family=family: reference.rms_norm(
                x, norm.weight, getattr(norm, family.norm_eps), weight_offset=family.norm_offset
            )
    with mock.patch.object(F, "softmax", lambda x, dim=-1, dtype=None: softmax(x, dim)):
        outputs = model(**{name: value for name, value in batch.items() if name != "labels"})
    loss = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    if outputs.get("aux_loss") is not None:
        loss = loss + model.router_aux_loss_coef * outputs.aux_loss
    loss.backward()
    return _found(model, loss)


def assert_same_step(actual, exact, plain, dtype=torch.float32, *, labels=None):
    """By the factor-two rule, with what `dtype` rounds to where a wider gradient was computed from narrower states.

    The loss, one number, may besides be off by what the rule grants a mean, or, of few `labels`, by its own rounding
    and by two of n labels' over sqrt(n): over 40 draws the losses of Qwen-VL models, plain or patched, were off by up
    to 2.1 roundings in float32 and 0.3 in bfloat16, by 0.6 and 0.1 in the root mean square.
    A bias of keys moves all scores of a query alike, which softmax does not see: its gradient is zero, and what is
    computed is the rounding of terms that cancel, of the size of those of the keys' weight. Under a rotation this holds
    for the slow pairs of a head. The bias of an adapter of keys has that gradient too.
    DoRA's magnitudes are granted three roundings through a whole model: over 8 draws in bfloat16 ours and PEFT's
    largest errors have a median ratio of 0.97, and the worst of 112 magnitudes needed 2.7.
    """
    assert actual.keys() == plain.keys()
    eps = torch.finfo(dtype).eps
    granted = eps / 16 if labels is None else torch.finfo(torch.float32).eps + 2 * eps / labels**0.5
    for name, value in actual.items():
        roundings, atol = eps / torch.finfo(value.dtype).eps, 1e-6
        if name == "loss":
            atol = exact[name].item() * granted
        elif name.endswith("bias") and ("key." in name or "k_proj." in name):
            atol += exact[name.replace("bias", "weight")].abs().max().item() * eps
        elif "magnitude" in name:
            roundings *= 3
        assert_within_factor_two(name, value, exact[name], plain[name], roundings=roundings, atol=atol)


def _found(model, loss):
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
