"""What a request may ask for, and whether the libraries are there that a server needs: this file does without."""

import importlib
from dataclasses import dataclass, fields

from core.checks import ConfigError, require

LIBRARIES = ("starlette", "uvicorn", "brotli")


@dataclass(frozen=True)
class Limits:
    """What a request may ask for."""

    body: int = 1 << 20
    """Bytes of a request, and of a text that is scored."""
    letters: int = 16_384
    """Characters of a prompt, or of a text whose tokens are shown."""
    tokens: int = 1024
    """Tokens to write."""
    seconds: float = 50.0
    """Time of a request."""
    requests: int = 8
    """Requests that run at the same time: one more is told to come back."""

    def check(self) -> None:
        """Raise ConfigError for a limit that lets nothing through."""
        for field in fields(self):
            value = getattr(self, field.name)
            require(0 < value < 1e15, f"--{field.name} {value}: expected more than 0")


def require_libraries(verb: str) -> None:
    """Raise ConfigError where the extra of servers is not installed."""
    for name in LIBRARIES:
        try:
            importlib.import_module(name)
        except ImportError as error:
            command = "pip install -c constraints.txt -e '.[serve]'"
            raise ConfigError(f"{verb} needs {name}, which is not installed; run: {command}") from error
