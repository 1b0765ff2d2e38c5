"""PEFT's adapter_config.json, of LoRA adapters as memkernels has them."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from memkernels.adapters.targets import Targets

FILE = "adapter_config.json"

# What says nothing about how an adapter computes, or which layers have one.
_SILENT = (
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "fan_in_fan_out", "inference_mode",
    "loftq_config", "lora_ga_config", "megatron_core", "peft_version", "qalora_group_size", "revision",
    "runtime_config", "task_type",
)  # fmt: skip
# Ways of drawing an adapter that leave the base as it is.
_INITS = (True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class AdapterConfig:
    """How the adapters of a model compute; the patterns are by name of a layer, as regular expressions on its end.

    bias: "lora_only" trains those of the adapted layers, "all" whatever is called so.
    ensure_weight_tying: what is tied to a module that is trained whole stays so, and is trained with it.
    """

    r: int
    lora_alpha: float
    lora_dropout: float = 0.0
    use_dora: bool = False
    use_rslora: bool = False
    bias: str = "none"
    ensure_weight_tying: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    def rank_of(self, name: str) -> int:
        return _by_pattern(self.rank_pattern, name, self.r)

    def alpha_of(self, name: str) -> float:
        return _by_pattern(self.alpha_pattern, name, self.lora_alpha)

    def to_json(self, targets: Targets, *, fan_in_fan_out: bool, base_model: str | None) -> str:
        """The file's text."""
        values = {
            "peft_type": "LORA", "task_type": None, "base_model_name_or_path": base_model, "inference_mode": True,
            "fan_in_fan_out": fan_in_fan_out, "init_lora_weights": True,
        }  # fmt: skip
        return json.dumps(values | vars(self) | vars(targets), indent=2, sort_keys=True) + "\n"


def read_config(directory: Path) -> tuple[AdapterConfig, Targets]:
    """The configuration in a directory: how the adapters compute, and which layers have one.

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
    return _adapter_config(file, values), _targets(file, values)


def _adapter_config(file: Path, values: dict[str, Any]) -> AdapterConfig:
    fields: dict[str, Any] = {
        "r": _rank(file, "r", values.get("r")),
        "lora_alpha": _number(file, "lora_alpha", values.get("lora_alpha")),
        "lora_dropout": _number(file, "lora_dropout", values.get("lora_dropout", 0.0)),
        "use_dora": bool(values.get("use_dora")),
        "use_rslora": bool(values.get("use_rslora")),
        "bias": values.get("bias") or "none",
        "ensure_weight_tying": bool(values.get("ensure_weight_tying")),
    }
    if not 0.0 <= fields["lora_dropout"] < 1.0:
        raise ValueError(f"{file}: lora_dropout: expected a number in [0, 1), got {fields['lora_dropout']}.")
    patterns: dict[str, Any] = {name: values.get(name) or {} for name in ("rank_pattern", "alpha_pattern")}
    for name, pattern in patterns.items():
        if not isinstance(pattern, dict):
            raise ValueError(f"{file}: {name}: expected an object, got {pattern!r}.")
        for key, value in pattern.items():
            _expression(file, name, key)
            (_rank if name == "rank_pattern" else _number)(file, f"{name}: {key}", value)
    expected = {"peft_type": ("LORA",), "bias": ("none", "lora_only", "all", None), "init_lora_weights": _INITS}
    for key, allowed in expected.items():
        if values.get(key, allowed[0]) not in allowed:
            raise ValueError(f"{file}: {key}: expected {' or '.join(map(repr, allowed))}, got {values[key]!r}.")
    for key in ("lora_dropout", "use_dora") if values.get("target_parameters") else ():
        if fields[key]:
            raise ValueError(f"{file}: {key}: expected none beside target_parameters, got {fields[key]!r}.")
    for key, value in values.items():
        if value and key not in (*fields, *patterns, *expected, *_SILENT, *vars(Targets())):
            raise ValueError(f"{file}: {key}: memkernels has no adapter with this option, got {value!r}.")
    return AdapterConfig(**fields, **patterns)


def _targets(file: Path, values: dict[str, Any]) -> Targets:
    options: dict[str, Any] = {key: values.get(key) for key in vars(Targets())}
    for key, value in options.items():
        kind, many = (int, "whole numbers") if key == "layers_to_transform" else (str, "texts")
        listed = value if isinstance(value, list) else [value]
        if value is not None and not all(type(each) is kind for each in listed):
            raise ValueError(f"{file}: {key}: expected {many}, got {value!r}.")
        if isinstance(value, str) or (key == "layers_pattern" and value):
            for each in listed:
                _expression(file, key, each)
    for key in ("target_parameters", "modules_to_save"):
        if isinstance(options[key], str):
            raise ValueError(f"{file}: {key}: expected a list, got {options[key]!r}.")
    return Targets(**options)


def _rank(file: Path, key: str, value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"{file}: {key}: expected a whole number from 1 up, got {value!r}.")
    return value


def _number(file: Path, key: str, value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{file}: {key}: expected a number, got {value!r}.")
    return value


def _expression(file: Path, key: str, text: str) -> None:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"{file}: {key}: expected a regular expression, got {text!r}: {error}.") from None


def _by_pattern(patterns: dict[str, Any], name: str, default: Any) -> Any:
    """The value of the first pattern that the end of the name matches, as PEFT reads them."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default
