"""The configuration of a model of transformers, from wherever it is."""

from __future__ import annotations

import os
from typing import Any


def load_config(model: Any) -> Any:
    """The configuration of a language model, with or without a vision tower: by its name on the hub, its folder, its
    config.json, or itself.

    Raises:
        ImportError: transformers is missing.
        OSError: there is none.
        TypeError: model is none of these.
        ValueError: it is of another kind of model, or transformers fails on it.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError("model: transformers is missing: pip install 'memkernels[plan]'") from error
    config = model
    if isinstance(model, str | os.PathLike):
        if _is_path(model) and not os.path.exists(model):
            raise FileNotFoundError(f"model: {os.fspath(model)} does not exist.")
        try:
            config = transformers.AutoConfig.from_pretrained(model)
        except (ImportError, OSError):
            raise
        except Exception as error:  # of any kind: an unknown model_type, no heads, a size that is no number
            raise ValueError(f"model: transformers makes no configuration of it: {in_one_line(error)}") from error
    if not isinstance(config, transformers.PretrainedConfig):
        raise TypeError(f"model: expected a name, a path or a configuration, got {type(model).__name__}.")
    model_class(config)
    return config


def model_class(config: Any) -> Any:
    """What makes the model of a configuration, with a head and a loss: one of transformers' Auto classes.

    Raises:
        ValueError: it is of another kind of model.
    """
    import transformers

    if type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        return transformers.AutoModelForCausalLM
    if type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return transformers.AutoModelForImageTextToText
    raise ValueError(f"model: transformers has no causal language model of {type(config).__name__}.")


def in_one_line(error: Exception) -> str:
    """An error's kind and the first paragraph of what it says."""
    return " ".join(f"{type(error).__name__}: {error}".split("\n\n")[0].split())


def _is_path(model: str | os.PathLike[str]) -> bool:
    """Whether it cannot be a name on the hub, which is `name` or `owner/name`."""
    if not isinstance(model, str):
        return True
    return model.endswith(".json") or model.startswith((".", "/")) or model.count("/") > 1
