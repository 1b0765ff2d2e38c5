"""How rotary embeddings are stretched past the context of pre-training: each a small record with one method.

`frequencies(inverse, base, length)` takes the plain inverse frequencies, base^(-2i/R) for i < R/2 in float32, and the
number of positions in use (a 0-dim tensor), and gives the stretched ones. `attention_factor` scales cos and sin.
What is no number raises TypeError, and a number that does not fit ValueError, which name it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from memkernels.ops.checks import check_flag, check_integer, check_number


class RotaryScaling(Protocol):
    """What `nn.RotaryEmbedding` asks of a scaling."""

    @property
    def attention_factor(self) -> float: ...

    def frequencies(self, inverse: Tensor, base: float, length: Tensor) -> Tensor: ...


def _check_positive(**values: float | None) -> None:
    for name, value in values.items():
        check_number(name, value, "a positive number", lambda number: 0 < number < math.inf)


@dataclass(frozen=True)
class LinearScaling:
    """Position interpolation (Chen et al. 2023, arXiv 2306.15595): positions divided by `factor`."""

    factor: float
    attention_factor: float = 1.0

    def __post_init__(self) -> None:
        _check_positive(factor=self.factor, attention_factor=self.attention_factor)

    def frequencies(self, inverse: Tensor, base: float, length: Tensor) -> Tensor:
        return inverse / self.factor


@dataclass(frozen=True)
class DynamicNTKScaling:
    """Base grown with the length beyond `original_length`: base * (factor L / original - factor + 1)^(R / (R - 2))."""

    factor: float
    original_length: int
    attention_factor: float = 1.0

    def __post_init__(self) -> None:
        _check_positive(factor=self.factor, attention_factor=self.attention_factor)
        check_integer("original_length", self.original_length)

    def frequencies(self, inverse: Tensor, base: float, length: Tensor) -> Tensor:
        size = 2 * inverse.numel()
        stretched = self.factor * length.clamp(min=self.original_length) / self.original_length - (self.factor - 1)
        exponents = torch.arange(0, size, 2, device=inverse.device, dtype=torch.float32) / size
        return 1.0 / (base * stretched ** (size / (size - 2))) ** exponents


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1 (arXiv 2407.21783): wavelengths above original_length / low are divided by factor, below / high kept.

    Between the two, the two frequencies are mixed linearly in original_length / wavelength.
    """

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_length: int
    attention_factor: float = 1.0

    def __post_init__(self) -> None:
        _check_positive(factor=self.factor, attention_factor=self.attention_factor)
        low = self.low_frequency_factor
        check_number("low_frequency_factor", low, "a number from 0 up", lambda number: 0 <= number < math.inf)
        check_number(
            "high_frequency_factor",
            self.high_frequency_factor,
            f"a number above low_frequency_factor {low}",
            lambda number: low < number < math.inf,
        )
        check_integer("original_length", self.original_length)

    def frequencies(self, inverse: Tensor, base: float, length: Tensor) -> Tensor:
        turns = self.original_length * inverse / (2 * math.pi)
        low, high = self.low_frequency_factor, self.high_frequency_factor
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return inverse * keep + inverse / self.factor * (1 - keep)


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (Peng et al. 2023, arXiv 2309.00071): interpolation for slow dimensions, none for fast ones, a ramp between.

    The ramp runs between the dimensions that turn beta_fast and beta_slow times over original_length, rounded outwards
    with `truncate`. attention_factor is 0.1 ln(factor) + 1 unless given.
    """

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    given_attention_factor: float | None = None

    def __post_init__(self) -> None:
        slow = self.beta_slow
        _check_positive(factor=self.factor, beta_slow=slow)
        check_integer("original_length", self.original_length)
        check_number(
            "beta_fast", self.beta_fast, f"a number above beta_slow {slow}", lambda number: slow < number < math.inf
        )
        check_flag("truncate", self.truncate)
        if self.given_attention_factor is not None:
            _check_positive(given_attention_factor=self.given_attention_factor)

    @property
    def attention_factor(self) -> float:
        if self.given_attention_factor is not None:
            return self.given_attention_factor
        return 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

    def frequencies(self, inverse: Tensor, base: float, length: Tensor) -> Tensor:
        size = 2 * inverse.numel()

        def dimension(turns: float) -> float:
            return size * math.log(self.original_length / (turns * 2 * math.pi)) / (2 * math.log(base))

        low, high = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, size - 1)
        steps = torch.arange(inverse.numel(), device=inverse.device, dtype=torch.float32)
        interpolate = ((steps - low) / max(high - low, 1e-3)).clamp(0, 1)
        return inverse / self.factor * interpolate + inverse * (1 - interpolate)


@dataclass(frozen=True)
class LongRopeScaling:
    """LongRoPE (Ding et al. 2024, arXiv 2402.13753): a divisor a dimension, one list up to original_length, one beyond.

    attention_factor is sqrt(1 + ln(factor) / ln(original_length)), factor = longest over original length, unless given.
    """

    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    original_length: int
    factor: float
    given_attention_factor: float | None = None

    def __post_init__(self) -> None:
        for name, divisors in (("short_factors", self.short_factors), ("long_factors", self.long_factors)):
            if not isinstance(divisors, (tuple, list)):
                raise TypeError(f"{name}: expected positive numbers, got {divisors!r}.")
            for divisor in divisors:
                _check_positive(**{name: divisor})
        check_integer("original_length", self.original_length, "an integer from 2 up", least=2)
        _check_positive(factor=self.factor)
        if self.given_attention_factor is not None:
            _check_positive(given_attention_factor=self.given_attention_factor)

    @property
    def attention_factor(self) -> float:
        if self.given_attention_factor is not None:
            return self.given_attention_factor
        return math.sqrt(1 + math.log(self.factor) / math.log(self.original_length)) if self.factor > 1 else 1.0

    def frequencies(self, inverse: Tensor, base: float, length: Tensor) -> Tensor:
        for name, divisors in (("short_factors", self.short_factors), ("long_factors", self.long_factors)):
            if len(divisors) != inverse.numel():
                raise ValueError(f"{name}: expected {inverse.numel()} numbers, one a frequency, got {len(divisors)}.")
        short, long = (inverse / inverse.new_tensor(divisors) for divisors in (self.short_factors, self.long_factors))
        return torch.where(length > self.original_length, long, short)
