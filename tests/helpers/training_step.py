"""One step of a transformers model: loss and gradients, as it computes them and exactly."""

from unittest import mock

import torch.nn.functional as F

from memkernels.integrations.family import family_of
from memkernels.ops.rms_norm import reference


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


def _found(model, loss):
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
