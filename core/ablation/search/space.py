"""[search] of an ablation file: which settings `--search` may try, how often, and on which seeds.

[search]
trials = 20                        # settings that are tried
seeds = [100, 101]                 # of every trial: none of the ablation's own
variant = "plain"                  # whose settings a trial starts from; default: the reference
round = 4                          # trials that are asked for together; default: 4
sampler_seed = 0                   # of the draw; default: 0
[search.space]
"train.lr_matrix" = { low = 0.003, high = 0.3, log = true }
"model.engram.dim" = { low = 16, high = 64, step = 16 }
"train.matrix_rule" = { values = ["adamw", "muon"] }
"""

import re
import types
import typing
from decimal import Decimal
from typing import Any, Literal, NamedTuple

from core.ablation.fields import hint, meant, only, typed
from core.checks import LARGEST, in_words
from core.config import ConfigError

FIELD_KEYS = ("low", "high", "log", "step", "values")
FOUND = "found"
"""The variant that a search's best trial becomes."""
TRIAL = re.compile(r"trial-\d+")
MOST_VALUES = 256
MOST_STEPS = 10**12
"""Most steps of a range."""
FEW = 64
DIGITS = 4
"""Significant digits of a number drawn from a range: no more is meant, and last bits differ between machines."""


class Field(NamedTuple):
    """One field of a search: a number from `low` to `high`, or one of `values`."""

    name: str
    kind: Literal["float", "int", "values"]
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    """Whether numbers are drawn by their logarithm."""
    step: float | None = None
    values: tuple[Any, ...] = ()

    def read(self, drawn: Any) -> Any:
        """Return the value of a setting for what a sampler drew: a number, or a place in `values`."""
        if self.kind == "values":
            return self.values[drawn]
        if self.kind == "int":
            return int(drawn)
        return min(max(float(f"{drawn:.{DIGITS if self.step is None else 12}g}"), self.low), self.high)

    def draw(self, value: Any) -> Any:
        """Return what a sampler would have drawn for a value; None where it could not have."""
        if self.kind == "values":
            return next((i for i, v in enumerate(self.values) if type(v) is type(value) and v == value), None)
        if type(value) not in (int, float) or not self.low <= value <= self.high or self.read(value) != value:
            return None
        return value if self.step is None or _whole(self.low, value, self.step) else None

    @property
    def size(self) -> int | None:
        """How many values it has; None for a range without steps."""
        if self.kind == "values":
            return len(self.values)
        return None if self.step is None else round((self.high - self.low) / self.step) + 1

    @property
    def ends(self) -> tuple[Any, ...]:
        """The values that are checked before anything runs."""
        return self.values if self.kind == "values" else (self.low, self.high)

    @property
    def some(self) -> tuple[Any, ...]:
        """All values, if they are few, else the ends."""
        if self.kind == "values" or self.size is None or self.size > FEW:
            return self.ends
        return tuple(self.read(self.low + i * (self.step or 0)) for i in range(self.size))


class Search(NamedTuple):
    """What [search] says, checked."""

    trials: int
    seeds: tuple[int, ...]
    variant: str
    """Whose settings every trial starts from."""
    round: int
    """Trials that are asked for together, knowing those of earlier rounds: never how many run side by side."""
    sampler_seed: int
    space: tuple[Field, ...]


def read_field(name: str, value: Any, where: str) -> Field:
    """Return what [search.space] says of one setting; ConfigError, which `where` begins."""
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: expected {{low=..., high=...}} or {{values=[...]}}, got {in_words(value)}")
    only(value, FIELD_KEYS, where)
    return _values(name, value, where) if "values" in value else _range(name, value, where)


def _values(name: str, value: dict[str, Any], where: str) -> Field:
    if len(value) > 1:
        raise ConfigError(f"{where}: values exclude low, high, log and step")
    values = [meant(name, v) for v in typed(value, "values", list, where)]
    if len(values) < 2 or len(set(map(repr, values))) < len(values) or len(values) > MOST_VALUES:
        raise ConfigError(f"{where}: values: {in_words(values)}: expected 2 to {MOST_VALUES}, all different")
    return Field(name, "values", values=tuple(values))


def _range(name: str, value: dict[str, Any], where: str) -> Field:
    kind = _kind(name)
    if kind is None:
        raise ConfigError(f"{where}: is not a number; expected {{values=[...]}}")
    for key in ("low", "high", "step"):
        if key not in value:
            if key != "step":
                raise ConfigError(f"{where}: {key}: missing")
            continue
        number = value[key]
        good = type(number) is int or (kind == "float" and type(number) is float)
        if not good or not abs(number) <= LARGEST:
            expected = f"a {'whole' if kind == 'int' else 'finite'} number of at most {LARGEST:g}"
            raise ConfigError(f"{where}: {key}: {in_words(number)}: expected {expected}")
    log, step = typed(value, "log", bool, where, False), value.get("step", 1 if kind == "int" else None)
    low, high = (value[key] if kind == "int" else float(value[key]) for key in ("low", "high"))
    if low >= high:
        raise ConfigError(f"{where}: low {low} is not below high {high}")
    if log and low <= 0:
        raise ConfigError(f"{where}: low {low}: a logarithm needs numbers above 0; raise low or leave out log")
    if log and "step" in value:
        raise ConfigError(f"{where}: log and step exclude each other; leave one out")
    if step is not None and step <= 0:
        raise ConfigError(f"{where}: step {step}: expected a number above 0")
    if step is not None and (high - low) / step > MOST_STEPS:
        raise ConfigError(f"{where}: step {step}: is too small for a range from {low} to {high}")
    if step is not None and not _whole(low, high, step):
        raise ConfigError(f"{where}: high {high} is not a whole number of steps of {step} above low {low}")
    return Field(name, kind, low, high, log, None if step is None else step if kind == "int" else float(step))


def _kind(name: str) -> Literal["float", "int"] | None:
    """Return the kind of number that a field takes; None if it takes none."""
    expected = hint(name)
    union = typing.get_origin(expected) in (typing.Union, types.UnionType)
    kinds = typing.get_args(expected) if union else (expected,)
    return "float" if float in kinds else "int" if int in kinds else None


def _whole(low: float, high: float, step: float) -> bool:
    """Whether steps lead from low to high, in the decimals that people write."""
    return (Decimal(str(high)) - Decimal(str(low))) % Decimal(str(step)) == 0
