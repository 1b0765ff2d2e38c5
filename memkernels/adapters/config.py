"""PEFT's adapter_config.json, of LoRA adapters as memkernels has them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FILE = "adapter_config.json"

# What says nothing about how an adapter computes.
_SILENT = (
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules",
    "fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_ga_config",
    "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config", "target_modules", "task_type",
)  # fmt: skip
# Ways of drawing an adapter that leave the base as it is.
_INITS = (True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class AdapterConfig:
    """How the adapters of a model compute; the patterns are by name of a layer, as regular expressions on its end."""

    r: int
    lora_alpha: float
    lora_dropout: float = 0.0
    use_dora: bool = False
    use_rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    def rank_of(self, name: str) -> int:
        return _by_pattern(self.rank_pattern, name, self.r)

    def alpha_of(self, name: str) -> float:
        return _by_pattern(self.alpha_pattern, name, self.lora_alpha)

    def to_json(self, targets: list[str] | str, *, fan_in_fan_out: bool, base_model: str | None) -> str:
        """The file's text; `targets` are the names of the layers."""
        values = {
            "peft_type": "LORA", "task_type": None, "base_model_name_or_path": base_model, "inference_mode": True,
            "target_modules": targets, "fan_in_fan_out": fan_in_fan_out, "bias": "none", "init_lora_weights": True,
        }  # fmt: skip
        return json.dumps(values | vars(self), indent=2, sort_keys=True) + "\n"


def read_config(directory: Path) -> AdapterConfig:
    """The configuration in a directory.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not JSON, or of another kind of adapter than memkernels computes; file and key are named.
    """
    file = directory / FILE
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file}: expected an object, got {type(values).__name__}.")
    fields: dict[str, Any] = {
        "r": _number(file, values, "r", int, 1),
        "lora_alpha": _number(file, values, "lora_alpha", (int, float)),
        "lora_dropout": _number(file, {"lora_dropout": 0.0} | values, "lora_dropout", (int, float), 0),
        "use_dora": bool(values.get("use_dora")),
        "use_rslora": bool(values.get("use_rslora")),
    }
    patterns: dict[str, Any] = {name: values.get(name) or {} for name in ("rank_pattern", "alpha_pattern")}
    for name, pattern in patterns.items():
        if not isinstance(pattern, dict):
            raise ValueError(f"{file}: {name}: expected an object, got {pattern!r}.")
        for key in pattern:
            _number(file, pattern, key, (int, float), 1 if name == "rank_pattern" else None)
    expected = {"peft_type": ("LORA",), "bias": ("none", None), "init_lora_weights": _INITS}
    for key, allowed in expected.items():
        if values.get(key, allowed[0]) not in allowed:
            raise ValueError(f"{file}: {key}: expected {' or '.join(map(repr, allowed))}, got {values[key]!r}.")
    for key, value in values.items():
        if value and key not in (*fields, *patterns, *expected, *_SILENT):
            raise ValueError(f"{file}: {key}: memkernels has no adapter with this option, got {value!r}.")
    if fields["lora_dropout"] >= 1.0:
        raise ValueError(f"{file}: lora_dropout: expected a number in [0, 1), got {fields['lora_dropout']}.")
    return AdapterConfig(**fields, **patterns)


def _number(file: Path, values: dict, key: str, kind: Any, least: int | None = None) -> Any:
    value = values.get(key)
    if not isinstance(value, kind) or isinstance(value, bool) or (least is not None and value < least):
        raise ValueError(
            f"{file}: {key}: expected a number{'' if least is None else f' from {least} up'}, got {value!r}."
        )
    return value


def _by_pattern(patterns: dict[str, Any], name: str, default: Any) -> Any:
    """The value of the first pattern that the end of the name matches, as PEFT reads them."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default
