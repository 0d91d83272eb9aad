"""How a setting is refused: one clear line, whoever finds it."""

import dataclasses
import difflib
import math
from collections.abc import Iterable
from typing import Any

MOST_LETTERS = 4096
"""Letters of a setting that is text: no name and no path is longer."""
MOST_ENTRIES = 1024
"""Entries of a setting that is a list."""
LARGEST = 1e36
"""Largest number that is not a whole one: a float32 holds it, and a hundred times as much."""
FEW = 8
"""Entries of the longest list that a message shows."""
WORD = 100
"""Letters of the longest word for which a word like it is looked for."""


class ConfigError(ValueError):
    """The user's setting cannot be honoured: the message names the field, the value and what to do."""


def require(condition: bool, message: str) -> None:
    """Raise ConfigError with `message` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def require_limits(section: str, config: Any, largest: int, **limits: int) -> None:
    """Raise ConfigError for a field of `config` that asks for more time or memory than any run has a use for.

    Whole numbers are at most `largest`, or what `limits` says of their field, other numbers finite; the fields of a
    section inside are checked too. What is computed from them afterwards is bounded by that, so that this check comes
    before all others.
    """
    for f in dataclasses.fields(config):
        value, where = getattr(config, f.name), f"{section}.{f.name}"
        if dataclasses.is_dataclass(value):
            require_limits(where, value, largest, **limits)
        if isinstance(value, tuple):
            require(len(value) <= MOST_ENTRIES, f"{where}: {len(value):,} entries, expected at most {MOST_ENTRIES:,}")
        for one in value if isinstance(value, tuple) else (value,):
            if isinstance(one, str):
                require_text(where, one)
            elif isinstance(one, float):
                require(math.isfinite(one), f"{where}={value}: expected a finite number")
                require(abs(one) <= LARGEST, f"{where}={one}: expected at most {LARGEST:g}")
            elif isinstance(one, int):
                most = limits.get(f.name, largest)
                require(abs(one) <= most, f"{where}={whole_in_words(one)}: expected at most {most:,}")


def require_least(section: str, config: Any, least: int, *names: str) -> None:
    """Raise ConfigError for a field of `config`, among those named, that is below `least`."""
    for name in names:
        value, expected = getattr(config, name), f"at least {least}" if least else "a number from 0 up"
        require(value >= least, f"{section}.{name}={value}: expected {expected}")


def require_text(where: str, value: str) -> None:
    """Raise ConfigError for a name or path that is too long, or that no file and no terminal can have."""
    require(len(value) <= MOST_LETTERS, f"{where}: {len(value):,} letters, expected at most {MOST_LETTERS:,}")
    odd = next((letter for letter in value if ord(letter) < 32 or 0x7F <= ord(letter) < 0xA0), None)
    require(odd is None, f"{where}={value!r}: holds a control character ({odd!r}); expected plain text")
    require(not any(0xD800 <= ord(letter) < 0xE000 for letter in value), f"{where}={value!r}: is not UTF-8")


def in_words(value: Any) -> str:
    """Return any value in a few words: of long text its start, of what holds much its length."""
    if isinstance(value, list | tuple | dict):
        inner = [*value, *value.values()] if isinstance(value, dict) else value
        if len(inner) > FEW or any(isinstance(one, list | tuple | dict) for one in inner):
            return f"a {'table' if isinstance(value, dict) else 'list'} of {len(value):,}"
        pairs = [f"{in_words(key)}: {in_words(one)}" for key, one in value.items()] if isinstance(value, dict) else None
        return f"{{{', '.join(pairs)}}}" if pairs is not None else f"[{', '.join(map(in_words, value))}]"
    if isinstance(value, int) and not isinstance(value, bool):
        return whole_in_words(value)
    if isinstance(value, str) and len(value) > WORD:
        return f"{value[:WORD]!r}..."
    return repr(value)


def whole_in_words(value: int) -> str:
    """Return a whole number as text: of one with thousands of digits, which Python does not print, its length."""
    return str(value) if value.bit_length() <= 256 else f"a number of {value.bit_length():,} bits"


def closest(word: str, known: Iterable[str]) -> str | None:
    """Return the known word that is most like `word`, None if none is; a word of megabytes is like none."""
    return next(iter(difflib.get_close_matches(word, list(known), 1)), None) if len(word) <= WORD else None
