"""Settings, which are nested frozen dataclasses, as plain values: made of these, changed, compared."""

import dataclasses
import functools
import types
import typing
from typing import Any, Literal

from core.checks import MOST_ENTRIES, ConfigError, closest, in_words, require

type_hints = functools.cache(typing.get_type_hints)
"""Field -> type of a dataclass: Python reads the annotations anew at every call, which takes a list of runs seconds."""


def rebuilt(kind: type, values: Any, where: str) -> Any:
    """Return dataclass `kind` of plain values; ConfigError names an unknown key or a wrong type."""
    require(isinstance(values, dict), f"{where}: expected an object, got {type(values).__name__}")
    hints = type_hints(kind)
    fields = [f.name for f in dataclasses.fields(kind)]
    for key in values:
        if key not in fields:
            from core.model.upgrade import moved  # here: an evaluation, whose code is counted, does not need it

            close = moved(f"{where.rpartition('.')[2]}.{key}") or closest(str(key), fields)
            raise ConfigError(f"{where}.{key}: unknown key" + (f"; did you mean {close}?" if close else ""))
    return kind(**{n: _coerce(hints[n], values[n], f"{where}.{n}") for n in fields if n in values})


def _coerce(hint: Any, value: Any, where: str) -> Any:
    """Check a JSON value against a field's type and return it as that type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return rebuilt(typing.cast(type, hint), value, where)
    if origin is Literal:
        require(value in arguments, f"{where}={in_words(value)}: expected one of {', '.join(map(repr, arguments))}")
        return value
    if origin is types.UnionType:
        if value is None:
            return None
        return _coerce(next(a for a in arguments if a is not type(None)), value, where)
    if origin is tuple:
        require(isinstance(value, list | tuple), f"{where}: expected a list, got {type(value).__name__}")
        require(len(value) <= MOST_ENTRIES, f"{where}: {len(value):,} entries, expected at most {MOST_ENTRIES:,}")
        return tuple(_coerce(arguments[0], v, where) for v in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        require(abs(value) < 2**1023, f"{where}: too large a number")
        return float(value)
    require(type(value) is hint, f"{where}={in_words(value)}: expected {hint.__name__}, got {type(value).__name__}")
    return value


def changed(config: Any, fields: dict[str, Any]) -> Any:
    """Return a config dataclass with other values of some fields, which are named with dots: `train.steps`."""
    own: dict[str, Any] = {}
    inner: dict[str, dict[str, Any]] = {}
    for name, value in fields.items():
        part, _, rest = name.partition(".")
        if rest:
            inner.setdefault(part, {})[rest] = value
        else:
            own[part] = value
    return dataclasses.replace(config, **own, **{part: changed(getattr(config, part), v) for part, v in inner.items()})


def departures(values: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Return the values that are not the defaults, nested as they were."""
    others = {
        n: departures(v, defaults[n]) if isinstance(v, dict) else v for n, v in values.items() if v != defaults[n]
    }
    return {name: value for name, value in others.items() if value != {}}


def flattened(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by their dotted names: {"train.steps": 5} of {"train": {"steps": 5}}."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= flattened(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Return one line per field in which two configs of one type differ."""
    if dataclasses.is_dataclass(a):
        lines = []
        for f in dataclasses.fields(a):
            lines += differences(getattr(a, f.name), getattr(b, f.name), f"{where}.{f.name}" if where else f.name)
        return lines
    return [] if a == b else [f"{where}: {a!r} -> {b!r}"]
