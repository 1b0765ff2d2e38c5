"""The rule of tolerance: at most twice the error of plain PyTorch at the same dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_within_factor_two(
    name: str,
    actual: Tensor,
    exact: Tensor,
    plain: Tensor,
    *,
    roundings: float = 1.0,
    atol: float = 1e-6,
    draws: bool = False,
) -> None:
    """Asserts |actual - exact| <= 2 |plain - exact| + roundings * eps * max|exact| + atol, by largest and mean error.

    Args:
        name: what is compared, for the message.
        actual: the result under test.
        exact: the same in float64.
        plain: the same in plain PyTorch at actual's dtype.
        roundings: allowed roundings of the largest element, since a lucky `plain` is exact.
        atol: the absolute tolerance; the default is what float32 leaves where terms of order one cancel.
        draws: the first dimension are draws of the same; of theirs, the medians of these errors are compared.
    """
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    assert actual.dtype == plain.dtype, f"{name}: dtype {actual.dtype}, expected {plain.dtype}"
    if exact.numel() == 0:
        return
    exact = exact.cpu().double()
    error, allowed = (value.detach().cpu().double().sub(exact).abs() for value in (actual, plain))
    count = exact.shape[0] if draws else 1

    def largest(values: Tensor) -> float:
        return values.reshape(count, -1).amax(1).median().item()

    def mean(values: Tensor) -> float:
        return values.reshape(count, -1).mean(1).median().item()

    rounding = roundings * torch.finfo(actual.dtype).eps * largest(exact.abs())
    assert not error.isnan().any(), f"{name}: NaN in {int(error.isnan().sum())} of {error.numel()} elements"
    for kind, measure in (("largest", largest), ("mean", mean)):
        ours, theirs = measure(error), measure(allowed)
        # The mean over many elements is a small part of the largest rounding.
        bound = 2.0 * theirs + atol + (rounding if kind == "largest" or error.numel() < 64 else rounding / 16)
        assert ours <= bound, f"{name}: {kind} error {ours:.3e} over the bound {bound:.3e} (plain PyTorch {theirs:.3e})"
