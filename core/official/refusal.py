"""What an official checkpoint may ask for, and how a wrong one is refused: shared by all that read such a file."""

from pathlib import Path
from typing import NoReturn

MAX_BYTES = 1 << 28
"""Of the file, and of what it inflates to."""
MAX_VALUES = 1 << 26
MAX_TENSORS = 2048
MOST_SHOWN = 80
"""Characters of a hostile name that an error shows."""


class OfficialError(ValueError):
    """A file is not an official checkpoint that can be imported: the message names the file and what is wrong."""


def fail(path: str | Path, problem: str) -> NoReturn:
    """Raise OfficialError."""
    raise OfficialError(f"{path}: {problem}")


def excerpt(value: object) -> str:
    """Return something out of a hostile file fit for one line of a terminal."""
    try:
        return ascii(value)[:MOST_SHOWN]
    except RecursionError:
        return f"a {type(value).__name__}"
