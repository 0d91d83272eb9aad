"""What the functions of `import skc` make of wrong arguments and of files that fail: errors of the documented types."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from core.checks import in_words, require
from core.files import FileError
from core.verbs.errors import message


@contextmanager
def documented() -> Iterator[None]:
    """Let an OSError be a FileError, which is a ValueError, as docs/python.md says of all that can go wrong."""
    try:
        yield
    except OSError as error:
        raise FileError(message(error)) from error


def check_path(name: str, value: Any, expected: str) -> None:
    """Raise ConfigError unless an argument is a path."""
    require(isinstance(value, str | os.PathLike), f"{name}={in_words(value)}: expected {expected}")
