"""How a TOML file is read: its size and depth are bounded before the parser sees it, its numbers afterwards."""

import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core.files import FileError, decode_text, read_file

MOST_BYTES = 1 << 20
DEPTH = 32
"""Most parts of a dotted key, and most lists and tables inside each other: the parser's time and memory grow with the
square of the one and its stack with the other."""
TOKEN = re.compile(
    r'"""(?:[^\\"]|\\.|"(?!""))*"{3,5}|' + r"'''(?:[^']|'(?!''))*'{3,5}|"
    r'"(?:[^\\"\n]|\\.)*"|' + r"'[^'\n]*'|"
    r"#[^\n]*|[][{}=,.\n\"']",
    re.DOTALL,
)
"""Strings and comments as a whole, and the marks that keys and nesting are made of; a quote alone opens a string that
does not end."""


def read_toml(path: str | Path) -> tuple[dict[str, Any], str]:
    """Return what a TOML file says, and its text; FileError names the file and what is wrong, OSError."""
    text = decode_text(path, read_file(path, MOST_BYTES))
    _check_depth(path, text)
    try:
        value = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # a ValueError of its own, or of a number with thousands of digits
        raise FileError(f"{path}: not TOML: {error}") from error
    _check_numbers(path, value)
    return value, text


def toml_text(table: Mapping[str, Any], where: str) -> str:
    """Return a TOML text of a table of text, numbers, lists and tables; FileError, which `where` begins."""
    return "".join(f"{_text(key)} = {_value(value, f'{where}.{key}')}\n" for key, value in table.items())


def _value(value: Any, where: str, depth: int = 0) -> str:
    if depth > DEPTH:
        raise FileError(f"{where}: nested too deeply; expected at most {DEPTH} levels")
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, int | float):
        return str(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(_value(one, where, depth + 1) for one in value)}]"
    if isinstance(value, Mapping):
        inner = (f"{_text(key)} = {_value(one, f'{where}.{key}', depth + 1)}" for key, one in value.items())
        return f"{{{', '.join(inner)}}}"
    raise FileError(f"{where}: {type(value).__name__}; expected text, a number, a list or a table")


def _text(value: object) -> str:
    """Return a TOML string: JSON's, whose letters TOML also has, but for the one that it wants written out."""
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")


def _check_depth(path: str | Path, text: str) -> None:
    depth = dots = 0
    for match in TOKEN.finditer(text):
        token = match[0]
        if token in ('"', "'"):
            line = text.count("\n", 0, match.start()) + 1
            raise FileError(f"{path}: not TOML: line {line}: a string that does not end")
        if token == ".":
            dots += 1
        elif token in tuple("[]{}=,\n"):
            dots = 0
            depth = max(0, depth + (token in "[{") - (token in "]}"))
        if max(depth, dots + 1) > DEPTH:
            line = text.count("\n", 0, match.start()) + 1
            raise FileError(f"{path}: line {line}: nested too deeply; expected at most {DEPTH} levels")


def _check_numbers(path: str | Path, value: Any) -> None:
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict | list):
            waiting += one.values() if isinstance(one, dict) else one
        elif isinstance(one, int) and not -(2**63) <= one < 2**63:
            raise FileError(f"{path}: a whole number of {one.bit_length():,} bits; expected at most 64")
