"""How a setting is refused: one clear line, whoever finds it."""

import dataclasses
import math
from typing import Any


class ConfigError(ValueError):
    """The user's setting cannot be honoured: the message names the field, the value and what to do."""


def require(condition: bool, message: str) -> None:
    """Raise ConfigError with `message` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def require_finite(section: str, config: Any) -> None:
    """Raise ConfigError for a field of `config` that is a number but not a finite one."""
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        numbers = value if isinstance(value, tuple) else (value,)
        finite = all(not isinstance(number, float) or math.isfinite(number) for number in numbers)
        require(finite, f"{section}.{f.name}={value}: expected a finite number")
