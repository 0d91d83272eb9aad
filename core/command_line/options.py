"""The words of a command line: which options a verb has, how their values may be spelled, what was meant."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from core.model.upgrade import moved

NOTHING = ("none", "off", "null")
SELDOM = ("eval.adapt.", "eval.phases.")
"""Sections whose options are not meant by a word (--lr, --steps) that another section has."""
SWITCHES = {"true": "True", "yes": "True", "on": "True", "false": "False", "no": "False", "off": "False"}


def options_of(kind: type, prefix: str = "") -> dict[str, Any]:
    """Return option -> type of a verb's dataclass of options, spelled as `--help` does; no positional ones."""
    options, hints = {}, typing.get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        hint, *marks = typing.get_args(hints[field.name]) if _marked(hints[field.name]) else (hints[field.name],)
        if dataclasses.is_dataclass(hint):
            options |= options_of(typing.cast(type, hint), f"{prefix}{field.name}.")
        elif not {"Positional", "Suppress"} & {*map(str, marks)}:
            name = next((mark.name for mark in marks if getattr(mark, "name", None)), field.name)
            options[hyphened(f"--{prefix}{name}")] = hint
    return options


def given(arguments: Sequence[str], known: dict[str, Any]) -> list[str]:
    """Return the options that a command line has, as `--help` spells them."""
    return [name for name, _ in _named(arguments) if name in known]


def value_of(arguments: Sequence[str], option: str) -> str:
    """Return what a command line gives as the value of an option, the last time; nothing if it does not."""
    value = ""
    for word, after in zip(arguments, [*arguments[1:], ""], strict=False):  # no argument at all: no pair
        name, equals, joined = word.partition("=")
        if name.startswith("--") and hyphened(name) == option:
            value = joined if equals else after
    return value


def spelled(arguments: Sequence[str], known: dict[str, Any]) -> list[str]:
    """Return the arguments with None, True and False as Python writes them, where an option takes them.

    An option of text keeps what was typed.
    """
    words, open_ = [], None
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name.startswith("--"):
            open_ = known.get(hyphened(name))
            open_ = None if open_ is bool and "." not in name else open_  # a flag: what follows is not its value
            words.append(f"{name}={_value(value, open_)}" if value else argument)
        else:
            words.append(_value(argument, open_))
            open_ = None
    return words


def taken(arguments: Sequence[str], option: str) -> list[str]:
    """Return a command line without an option and its value."""
    words = iter(arguments)
    rest = []
    for word in words:
        name, equals, _ = word.partition("=")
        if not (name.startswith("--") and hyphened(name) == option):
            rest.append(word)
        elif not equals:
            next(words, None)
    return rest


def unknown(arguments: Sequence[str], known: dict[str, Any], short: Iterable[str] = ()) -> str:
    """Return what to say of the first option that a verb does not have, or nothing; `short`: forms of settings."""
    for name, typed in _named(arguments):
        if name not in known and name.replace("--no-", "--", 1) not in known:
            new = hyphened(f"--{moved(name.removeprefix('--').replace('-', '_'))}")
            close = [new] if new in known else meant_options(name, [*known, *short])
            return f"unknown option {typed}" + (f"; did you mean {' or '.join(close)}?" if close else "")
    return ""


def meant_options(name: str, known: Sequence[str]) -> list[str]:
    """Return the options, or fields, that a wrong name may stand for.

    Those whose last part it is, begins, or nearly is, or all in the section that it nearly is; at most four.
    """
    last = {option: option.rpartition(".")[2].removeprefix("--") for option in known}
    word = name.rpartition(".")[2].removeprefix("--")
    same = [option for option in known if last[option] == word]
    begins = [option for option in known if last[option].startswith((f"{word}_", f"{word}-"))]
    sections = {option.rpartition(".")[0] for option in known if "." in option}
    near = difflib.get_close_matches(name, [*known, *sections], 1, 0.8)
    inside = [option for option in known if option.rpartition(".")[0] in near]
    nearly = difflib.get_close_matches(word, list(last.values()), 1, 0.75)
    usual = [option for option in same if not option.removeprefix("--").startswith(SELDOM)]
    usual = usual or [option for option in begins if not same or not option.removeprefix("--").startswith(SELDOM)]
    likely = [option for option in same if option in near] or usual or same or inside or near
    likely = likely or [option for option in known if nearly and last[option] == nearly[0]]
    return likely[:4] or difflib.get_close_matches(name, known, 1)


def choice(arguments: Sequence[str], known: dict[str, Any]) -> str:
    """Return a hint at the nearest choice of an option that was given another value, or nothing."""
    for name, value in zip(arguments, arguments[1:], strict=False):
        choices = _choices(known.get(hyphened(name.partition("=")[0])))
        close = difflib.get_close_matches(value, choices, 1)
        if close and value not in choices:
            return f"; did you mean {close[0]}?"
    return ""


def _named(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    for argument in arguments:
        typed = argument.partition("=")[0]
        if typed.startswith("--") and len(typed) > 2:
            yield hyphened(typed), typed


def hyphened(name: str) -> str:
    """Return an option as `--help` spells it: with hyphens."""
    return "--" + name[2:].replace("_", "-")


def _value(value: str, hint: Any) -> str:
    kinds = _parts(hint)
    if type(None) in kinds and str not in kinds and value.lower() in NOTHING:
        return "None"
    return SWITCHES.get(value.lower(), value) if kinds == (bool,) else value


def _choices(hint: Any) -> list[str]:
    """Return the choices of an option's type: those of a Literal, of one in a union, of one in a tuple."""
    if typing.get_origin(hint) is typing.Literal:
        return [str(value) for value in typing.get_args(hint)]
    return [value for part in typing.get_args(hint) for value in _choices(part)]


def _parts(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


def _marked(hint: Any) -> bool:
    return typing.get_origin(hint) is typing.Annotated
