"""Readers of an ablation file's keys and values: every mistake is one line that names the file and the key."""

import dataclasses
import re
import typing
from collections.abc import Iterable, Sequence
from typing import Any

from core import checks
from core.command_line import options
from core.config import ConfigError, EvalConfig, RunConfig, flattened, to_json
from core.model.upgrade import moved
from core.plain import type_hints
from core.scoring import choices

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,60}")


BUDGETED = ("train.steps", "train.seconds")
"""Fields that the budget of an ablation decides."""


def put(values: dict[str, Any], field: str, value: Any, where: str, decided: Sequence[str] = BUDGETED) -> None:
    """Set `model.bank.at` in a run's plain values; ConfigError for an unknown field, or one that [budget] decides."""
    if field.startswith("eval.plugins."):
        name = field.removeprefix("eval.plugins.")
        field, value = "eval.plugins", choices.with_setting(values["eval"]["plugins"], name, value)
    elif field == "eval.plugins" and isinstance(value, dict):
        value = choices.of_table(value)
    known = [name for name in flattened(values) if "." in name]
    if field not in known:
        new = moved(field)
        close = [new] if new else options.meant_options(field, known)
        hint = f"did you mean {' or '.join(close)}?" if close else "see: skc train PRESET --help-all"
        raise ConfigError(f"{where}: unknown field {field!r}; {hint}")
    if field in decided:
        raise ConfigError(f"{where}: {field}: is what [budget] decides")
    if field == "eval.adapt.kind" and value != values["eval"]["adapt"]["kind"]:  # what another kind has goes
        nothing = to_json(EvalConfig())
        values["eval"] |= {name: nothing[name] for name in ("adapt", "phases", "round")}
    *sections, name = field.split(".")
    for section in sections:
        values = values[section]
    values[name] = value


def flat(value: dict[str, Any], where: str, prefix: str = "") -> dict[str, Any]:
    """Return nested tables as dotted fields: {"model": {"dim": 64}} becomes {"model.dim": 64}; "none" becomes None."""
    fields: dict[str, Any] = {}
    for key, inner in value.items():
        name = f"{prefix}{key}"
        section = isinstance(inner, dict) and ("." not in name or dataclasses.is_dataclass(hint(name)))
        for field, v in (flat(inner, where, f"{name}.") if section else {name: meant(name, inner)}).items():
            if field in fields:
                raise ConfigError(f"{where}: {field}: is given twice")
            fields[field] = v
    return fields


def meant(field: str, value: Any) -> Any:
    """Return None for "none", which TOML lacks, unless it is one of the field's own values."""
    return None if value == "none" and "none" not in typing.get_args(hint(field)) else value


def hint(field: str) -> Any:
    """Return the type of a field such as `model.bank.at`, or of a section; None for one that does not exist."""
    kind: Any = RunConfig
    for name in field.split("."):
        kind = type_hints(kind).get(name) if dataclasses.is_dataclass(kind) else None
    return kind


def only(value: dict[str, Any], known: Iterable[str], where: str) -> None:
    """Raise ConfigError for a key that is not known."""
    known = list(known)
    for key in value:
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key!r}; {closest(key, known, 'known: ' + ', '.join(known))}")


def typed(value: dict[str, Any], key: str, kind: type, where: str, default: Any = None) -> Any:
    """Return the value of a key, `default` where it is left out; ConfigError if it is missing or of another type."""
    if key not in value:
        if default is None:
            raise ConfigError(f"{where}: {key}: missing")
        return default
    if type(value[key]) is not kind:
        raise ConfigError(f"{where}: {key}: expected {kind.__name__}, got {type(value[key]).__name__}")
    return value[key]


def named(name: str, where: str) -> str:
    """Return `name` if a folder can have it, else raise ConfigError."""
    if not NAME.fullmatch(name):
        raise ConfigError(f"{where}: {name!r}: expected letters, digits and _ . + -, at most 61")
    return name


def seeds(values: list[Any], where: str) -> tuple[int, ...]:
    """Return seeds; ConfigError unless they are different whole numbers."""
    good = all(type(seed) is int and 0 <= seed < 2**31 for seed in values)
    if not values or not good or len(set(values)) < len(values):
        raise ConfigError(
            f"{where}: seeds: {checks.in_words(values)}: expected different whole numbers from 0 to 2^31 - 1"
        )
    return tuple(values)


def closest(word: str, known: Iterable[str], other: str) -> str:
    """Return `did you mean ...?`, or `other` where nothing known is close."""
    close = checks.closest(word, known)
    return f"did you mean {close}?" if close else other
