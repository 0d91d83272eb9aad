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

import math
import re
import types
import typing
from collections.abc import Iterator
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from core.ablation.fields import flat, hint, meant, only, put, seeds, typed
from core.checks import LARGEST, told
from core.config import ConfigError, to_json

if TYPE_CHECKING:
    from core.ablation.plan import Ablation

KEYS = ("trials", "seeds", "variant", "round", "sampler_seed", "space")
FIELD_KEYS = ("low", "high", "log", "step", "values")
SECTIONS = ("model", "train")
"""What a search may change: other sections say what is measured, and their best value would only measure less."""
FOUND = "found"
"""The variant that a search's best trial becomes."""
TRIAL = re.compile(r"trial-\d+")
MOST_TRIALS = 10_000
MOST_VALUES = 256
MOST_STEPS = 10**12
"""Most steps of a range."""
MOST_CHECKS = 5_000
"""Settings that are tried out before anything runs: a second or two."""
ROUND = 4
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


def read_search(value: dict[str, Any], plan: "Ablation", where: str) -> Search:
    """Read [search] of a plan that is checked; ConfigError names the file and what is wrong."""
    only(value, KEYS, where)
    variant = typed(value, "variant", str, where, plan.reference)
    if variant not in plan.variants:
        raise ConfigError(f"{where}: variant: {variant!r} is not a variant; known: {', '.join(plan.variants)}")
    trials = _count(typed(value, "trials", int, where), f"{where}: trials", 1, MOST_TRIALS)
    own = seeds(typed(value, "seeds", list, where), where)
    common = sorted(set(own) & set(plan.seeds))
    if common:
        raise ConfigError(
            f"{where}: seeds: {', '.join(map(str, common))} also among the ablation's seeds: the best of many trials "
            "looks better on its own seeds than it is, so that it is judged on others; choose other seeds here"
        )
    space = typed(value, "space", dict, where)
    fields = tuple(_fields(flat(space, f"{where}.space"), plan, variant, f"{where}.space"))
    if not fields:
        raise ConfigError(
            f'{where}.space: empty; add at least one field, as in "train.lr_matrix" = {{low=..., high=...}}'
        )
    sizes = [field.size for field in fields]
    if None not in sizes and math.prod(size or 0 for size in sizes) < trials:
        most = math.prod(size or 0 for size in sizes)
        raise ConfigError(f"{where}: trials: {trials}: the space has only {most} settings; make it {most} or fewer")
    _check_ends(fields, plan, variant, f"{where}.space")
    return Search(
        trials,
        own,
        variant,
        _count(typed(value, "round", int, where, ROUND), f"{where}: round", 1, MOST_TRIALS),
        _count(typed(value, "sampler_seed", int, where, 0), f"{where}: sampler_seed", 0, 2**31 - 1),
        fields,
    )


def trial_plan(plan: "Ablation", search: Search, trials: dict[str, dict[str, Any]]) -> "Ablation":
    """Return the ablation whose variants are trials: name -> settings in which it differs from the start."""
    start = plan.variants[search.variant]
    changed = {name: {**start, **settings} for name, settings in trials.items()}
    return plan._replace(seeds=search.seeds, backends=plan.backends[:1], variants=changed, search=None)


def _fields(space: dict[str, Any], plan: "Ablation", variant: str, where: str) -> Iterator[Field]:
    start = to_json(plan.config(variant, plan.seeds[0]))
    for name, value in space.items():
        put(start, name, None, where)
        if name.partition(".")[0] not in SECTIONS:
            raise ConfigError(f"{where}: {name}: says what is measured, not what is trained; only {_sections()}")
        if not isinstance(value, dict):
            raise ConfigError(f"{where}: {name}: expected {{low=..., high=...}} or {{values=[...]}}, got {told(value)}")
        only(value, FIELD_KEYS, f"{where}: {name}")
        yield _values(name, value, where) if "values" in value else _range(name, value, f"{where}: {name}")


def _sections() -> str:
    return " and ".join(f"{name}.*" for name in SECTIONS)


def _values(name: str, value: dict[str, Any], where: str) -> Field:
    where = f"{where}: {name}"
    if len(value) > 1:
        raise ConfigError(f"{where}: values exclude low, high, log and step")
    values = [meant(name, v) for v in typed(value, "values", list, where)]
    if len(values) < 2 or len(set(map(repr, values))) < len(values) or len(values) > MOST_VALUES:
        raise ConfigError(f"{where}: values: {told(values)}: expected 2 to {MOST_VALUES}, all different")
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
            raise ConfigError(f"{where}: {key}: {told(number)}: expected {expected}")
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
    found = hint(name)
    union = typing.get_origin(found) in (typing.Union, types.UnionType)
    kinds = typing.get_args(found) if union else (found,)
    return "float" if float in kinds else "int" if int in kinds else None


def _whole(low: float, high: float, step: float) -> bool:
    """Whether steps lead from low to high, in the decimals that people write."""
    return (Decimal(str(high)) - Decimal(str(low))) % Decimal(str(step)) == 0


def _check_ends(fields: tuple[Field, ...], plan: "Ablation", variant: str, where: str) -> None:
    """Raise ConfigError for a value that no run could have: not with the start, not with one other field changed."""

    checks = 0

    def refused(**changes: Any) -> str | None:
        nonlocal checks
        checks += 1
        if checks > MOST_CHECKS:
            raise ConfigError(f"{where}: too many values to check, most of which no run can have; give fewer")
        start = plan.variants[variant]
        try:
            plan._replace(variants={"x": {**start, **changes}}).config("x", plan.seeds[0])
        except ConfigError as error:
            return str(error).removeprefix(f"{plan.path}: variants.x: ")
        return None

    for field in fields:
        for value in field.ends:
            error = refused(**{field.name: value})
            others = ((other.name, end) for other in fields if other is not field for end in other.some)
            if error and all(refused(**{field.name: value, name: end}) for name, end in others):
                raise ConfigError(f"{where}: {error if field.name in error else f'{field.name} = {value!r}: {error}'}")


def _count(value: int, where: str, least: int, most: int) -> int:
    if not least <= value <= most:
        raise ConfigError(f"{where}: {value}: expected a whole number from {least:,} to {most:,}")
    return value
