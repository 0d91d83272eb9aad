"""The model's settings out of the config.json of an exported folder, for the modelling file that lies there."""

import dataclasses
from typing import Any

from core.model.config import ModelConfig


def model_of_spec(values: dict[str, Any]) -> ModelConfig:
    """Return the settings that a config.json holds: they were checked when it was written."""
    return _settings(ModelConfig, values)


def _settings(kind: Any, values: dict[str, Any]) -> Any:
    given = {field.name: _value(field, values[field.name]) for field in dataclasses.fields(kind)}
    return kind(**given)


def _value(field: Any, value: Any) -> Any:
    """Return a field's value: an object is the settings of a part, a list a tuple."""
    if isinstance(value, dict):
        return _settings(field.default_factory, value)
    return tuple(value) if isinstance(value, list) else value
