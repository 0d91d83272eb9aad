"""How a plug-in is chosen: `NAME`, or `NAME(field=value, ...)` with settings, the same in config.json, TOML and Score.

A command line and TOML may give a setting by itself: `--eval.plugins.NAME.field value`. Nothing here imports a plug-in.
"""

import json
import math
from collections.abc import Sequence
from typing import Any

from core.checks import ConfigError, in_words, require

Value = bool | int | float | str
MARKS = "(),="
"""Letters that no setting holds."""


def parsed(choice: str) -> tuple[str, dict[str, Value]]:
    """Return (name, settings) of a plug-in that was chosen; ConfigError."""
    name, opened, rest = choice.partition("(")
    if not opened:
        return name, {}
    settings: dict[str, Value] = {}
    good = rest.endswith(")") and name != ""
    for part in rest[:-1].split(",") if good else ():
        field, equals, text = part.strip().partition("=")
        good = good and field.isidentifier() and bool(equals) and not set(text) & set(MARKS) and field not in settings
        settings[field] = read_value(text)
    require(good, f"eval.plugins: {in_words(choice)}: expected NAME, or NAME(field=value, field=value)")
    for field, value in settings.items():
        finite = not isinstance(value, float) or math.isfinite(value)
        require(finite, f"eval.plugins.{name}.{field}={value}: expected a finite number")
    return name, settings


def settings_of(choices: Sequence[str]) -> dict[str, dict[str, Value]]:
    """Return name -> settings of the plug-ins that were chosen; ConfigError for one that is named twice."""
    plugins: dict[str, dict[str, Value]] = {}
    for name, settings in map(parsed, choices):
        require(name not in plugins, f"eval.plugins: {name!r} is named twice; name it once, with all its settings")
        plugins[name] = settings
    return plugins


def read_value(text: str) -> Value:
    """Return the number or truth value that a text stands for, or the text."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return float(text) if text.lower().removeprefix("-") in ("inf", "infinity", "nan") else text
    return value if isinstance(value, bool | int | float) else text


def spelled_choice(name: str, settings: dict[str, Value]) -> str:
    """Return what `parsed` reads."""
    texts = {field: value if isinstance(value, str) else json.dumps(value) for field, value in settings.items()}
    return f"{name}({', '.join(f'{field}={text}' for field, text in texts.items())})" if settings else name


def with_setting(choices: Sequence[str], setting: str, value: Any) -> list[str]:
    """Return the choices with `NAME.field` set; a plug-in that was not chosen is added at the end. ConfigError."""
    name, dot, field = setting.rpartition(".")
    where = f"eval.plugins.{setting}"
    require(bool(dot and name) and field.isidentifier(), f"{where}: expected eval.plugins.NAME.field")
    scalar = isinstance(value, Value) and not (isinstance(value, str) and set(value) & set(MARKS))
    require(scalar, f"{where}={in_words(value)}: expected a number, true, false, or text without any of {MARKS}")
    plugins = settings_of(choices)
    plugins[name] = {**plugins.get(name, {}), field: value}
    return [spelled_choice(*pair) for pair in plugins.items()]


def of_table(table: dict[str, Any]) -> list[str]:
    """Return the choices that TOML's tables {NAME: {field: value}} stand for; ConfigError."""
    choices = [name for name in table]
    for name, settings in table.items():
        require(isinstance(settings, dict), f"eval.plugins.{name}={in_words(settings)}: expected a table of settings")
        for field, value in settings.items():
            choices = with_setting(choices, f"{name}.{field}", value)
    return choices


def folded(arguments: Sequence[str], option: str, default: Sequence[str]) -> list[str]:
    """Return a command line with `OPTION.NAME.field value` in the values of OPTION, as tyro can read it.

    `default`: what was chosen where the command line does not say. ConfigError for a setting without a value.
    """
    rest: list[str] = []
    settings: list[tuple[str, str]] = []
    words = iter(arguments)
    for word in words:
        if not word.startswith(f"{option}."):
            rest.append(word)
            continue
        setting, equals, value = word.removeprefix(f"{option}.").partition("=")
        value = value if equals else next(words, "--")
        if value.startswith("--"):
            raise ConfigError(f"{word}: expected a value")
        settings.append((setting.replace("-", "_"), value))
    if not settings:
        return rest
    choices = list(default)
    for place in [i for i, word in enumerate(rest) if word == option or word.startswith(f"{option}=")][-1:]:
        end = next((i for i in range(place + 1, len(rest)) if rest[i].startswith("--")), len(rest))
        choices = [*filter(None, [rest[place].partition("=")[2]]), *rest[place + 1 : end]]
        del rest[place:end]
    for setting, value in settings:
        choices = with_setting(choices, setting, read_value(value))
    return [*rest, option, *choices]
