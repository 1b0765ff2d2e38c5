"""Rotary position embedding: positions to the cos and sin that `ops.apply_rotary` takes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from memkernels.nn.rotary_scaling import RotaryScaling
from memkernels.ops.checks import check_dense, check_dtype, check_flag, check_integer, check_number


class RotaryEmbedding(torch.nn.Module):
    """cos and sin of position * frequency, both halves alike, as Hugging Face's models hold them.

    frequency_i = base^(-2i/R), i < R/2 (Su et al. 2021, arXiv 2104.09864), stretched by `scaling`, with
    R = fraction * head_size. With `sections` a position has three coordinates (time, height, width) and each frequency
    turns with one of them: Qwen2-VL's in three runs (arXiv 2409.12191), Qwen3-VL's, `interleaved_sections`, in turns
    t, h, w, t, h, w, ..., where height and width end after their share and time takes the rest.

    Args:
        head_size: D.
        base: of the frequencies.
        scaling: one of `nn.rotary_scaling`; None leaves the frequencies as they are.
        fraction: of the head that turns (partial rotary).
        sections: frequencies for time, height and width; they sum to R / 2.
        interleaved_sections: spreads the sections over the frequencies instead of laying them end to end.

    Raises:
        TypeError: a head_size that is no integer, a base or fraction that is no number, a scaling of another kind,
            sections that are no integers, or an interleaved_sections that is no bool.
        ValueError: a base that is not positive and finite, a fraction outside (0, 1], an odd R, or sections that are
            negative or do not sum to R / 2.

    It has no parameters and saves nothing.
    """

    def __init__(
        self,
        head_size: int,
        base: float = 10000.0,
        *,
        scaling: RotaryScaling | None = None,
        fraction: float = 1.0,
        sections: tuple[int, int, int] | None = None,
        interleaved_sections: bool = False,
    ):
        super().__init__()
        check_integer("head_size", head_size)
        check_number("base", base, "a positive number", lambda number: 0 < number < math.inf)
        check_number(
            "fraction",
            fraction,
            f"one in (0, 1] that rotates an even part of {head_size}",
            lambda number: 0 < number <= 1 and int(head_size * number) >= 2 and int(head_size * number) % 2 == 0,
        )
        check_flag("interleaved_sections", interleaved_sections)
        if scaling is not None and (isinstance(scaling, type) or not hasattr(scaling, "frequencies")):
            raise TypeError(f"scaling: expected one of nn.rotary_scaling or None, got {scaling!r}.")
        size = int(head_size * fraction)
        if sections is not None:
            if not isinstance(sections, (tuple, list)):
                raise TypeError(f"sections: expected three numbers or None, got {sections!r}.")
            for section in sections:
                check_integer("sections", section, "integers from 0 up", least=0)
            if len(sections) != 3 or sum(sections) != size // 2:
                raise ValueError(f"sections: expected three numbers that sum to {size // 2}, got {sections}.")
        self.rotated_size, self.base, self.scaling = size, base, scaling
        self.register_buffer(
            "axis", None if sections is None else _axes(sections, interleaved_sections), persistent=False
        )

    axis: Tensor | None

    @torch.no_grad()
    def forward(self, positions: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """cos and sin, (..., S, R) in `dtype`, for positions (..., S), of any dtype, or with sections (3, ..., S).

        Raises:
            TypeError: positions that are no dense tensor; a dtype other than float32, bfloat16, float16 or float64.
            ValueError: with sections, positions whose first dimension is not 3.
        """
        check_dense("positions", positions)
        check_dtype("dtype", dtype)
        axis = self.axis
        if axis is not None and positions.shape[:1] != (3,):
            raise ValueError(f"positions: expected shape (3, ..., S) with sections, got {tuple(positions.shape)}.")
        # No buffer: a model's `.to(torch.bfloat16)` would round it, and turn late positions by whole radians.
        exponents = torch.arange(0, self.rotated_size, 2, device=positions.device).float() / self.rotated_size
        frequencies, factor = 1.0 / self.base**exponents, 1.0
        if self.scaling is not None:
            length = positions.max() + 1 if positions.numel() else positions.new_zeros(())
            frequencies = self.scaling.frequencies(frequencies, self.base, length)
            factor = self.scaling.attention_factor
        if axis is None:
            angles = positions[..., None].float() * frequencies
        else:
            angles = positions.float().movedim(0, -1)[..., axis] * frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)


def _axes(sections: tuple[int, int, int], interleaved: bool) -> Tensor:
    """The coordinate, 0 to 2, that each frequency turns with."""
    if not interleaved:
        return torch.repeat_interleave(torch.arange(3), torch.tensor(sections))
    axis = torch.zeros(sum(sections), dtype=torch.int64)
    for coordinate in (1, 2):
        axis[coordinate : 3 * sections[coordinate] : 3] = coordinate
    return axis
