"""What the values of a JSON file must be: people edit these files and copy them from elsewhere, so each is checked.

A kind is a Leaf; a dict of kinds by name; or a list of one kind. Of an object's names "x?" may be left out, "x??" may
also be null, and "*" stands for all other names, without which there are no others.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from core.checks import in_words
from core.files import FileError


class Leaf(NamedTuple):
    """A kind of text, number or truth value."""

    what: str
    fits: Callable[[Any], bool]


Kind = Leaf | dict[str, Any] | list[Any]


def number(what: str, low: float, high: float) -> Leaf:
    """Return the finite numbers from `low` to `high`."""
    return Leaf(what, lambda value: type(value) in (int, float) and low <= value <= high)  # NaN is in no range


def whole(what: str, low: int, high: int) -> Leaf:
    """Return the whole numbers from `low` to `high`."""
    return Leaf(what, lambda value: type(value) is int and low <= value <= high)


def among(*words: str) -> Leaf:
    """Return some words."""
    return Leaf(" or ".join(words), lambda value: isinstance(value, str) and value in words)


def text(letters: int) -> Leaf:
    """Return the texts of so many letters at most."""
    return Leaf(f"a text of at most {letters:,} letters", lambda v: isinstance(v, str) and len(v) <= letters)


def or_null(leaf: Leaf) -> Leaf:
    """Return what a leaf has, and null."""
    return Leaf(leaf.what, lambda value: value is None or leaf.fits(value))


COUNT = whole("a whole number from 0 up", 0, 2**53)
NUMBER = number("a finite number", -1e15, 1e15)
FLAG = Leaf("true or false", lambda value: type(value) is bool)
SCALAR = Leaf(
    "a text, a number, true, false or null", lambda value: value is None or type(value) in (str, int, float, bool)
)
ANYTHING = Leaf("anything", lambda value: True)


def check_value(value: Any, kind: Kind, where: str, cure: str = "mend or remove it") -> None:
    """Raise FileError unless `value` is of a kind: it says where, what was given, what was expected and the cure."""
    if isinstance(kind, Leaf):
        _require(kind.fits(value), value, kind.what, where, cure)
    elif isinstance(kind, list):
        _require(type(value) is list, value, "a list", where, cure)
        for i, entry in enumerate(value):
            check_value(entry, kind[0], f"{where}[{i}]", cure)
    else:
        _require(type(value) is dict, value, "an object", where, cure)
        kinds = {name.rstrip("?"): (name, inner) for name, inner in kind.items()}
        for name in kind:
            if not name.endswith("?") and name != "*" and name not in value:
                raise FileError(f"{where}: {name}: missing; {cure}")
        for name, entry in value.items():
            spelled, inner = kinds.get(name) or ("", kind.get("*"))
            if inner is None:
                raise FileError(f"{where}: {in_words(name)}: unknown name; {cure}")
            if entry is not None or not spelled.endswith("??"):
                shown = name if len(name) < 40 and name.isprintable() else in_words(name)
                check_value(entry, inner, f"{where}: {shown}", cure)


def _require(good: bool, value: Any, what: str, where: str, cure: str) -> None:
    if not good:
        raise FileError(f"{where}: {in_words(value)}, expected {what}; {cure}")
