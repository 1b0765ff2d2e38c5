"""What Qwen2-VL, Qwen2.5-VL and Qwen3-VL share: positions in text, time, height and width."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def sequence_positions(position_ids: Tensor | None) -> Tensor | None:
    """Positions in the text, the first of (4, B, S); those of the other three axes tell no sequences."""
    if position_ids is None or position_ids.dim() != 3 or position_ids.shape[0] != 4:
        return None
    return position_ids[0]


def positions(model: Any, arguments: dict[str, Any]) -> Tensor:
    """Positions in text, time, height and width, (4, B, S), that the model itself gives a call without a cache."""
    ids = arguments["input_ids"]
    text = torch.arange(ids.shape[1], device=ids.device).expand(1, *ids.shape)
    names = ("image_grid_thw", "video_grid_thw", "mm_token_type_ids", "second_per_grid_ts")
    given = {name: arguments[name] for name in names if arguments.get(name) is not None}
    axes = model.compute_3d_position_ids(
        **({"image_grid_thw": None, "video_grid_thw": None} | given), input_ids=ids, inputs_embeds=None,
        attention_mask=arguments["attention_mask"], cache=None,
    )  # fmt: skip
    return torch.cat((text, text.expand(3, -1, -1) if axes is None else axes))
