"""An ablation file: what it says, and the runs that it asks for.

name = "parts"
base = "ablate_float"              # a preset
seeds = [0, 1, 2]
backends = ["auto"]                # auto, mlx, cuda; default: auto
reference = "plain"                # what the others are held against; default: the first variant
[budget]
steps = 250                        # or tokens, or seconds of training
[settings]                         # of every run
"data.path" = "data/mine"
[variants.plain]                   # a variant: a few settings; none: the base as it is
[variants.engram]
"model.engram.orders" = 2

[search], what `--search` does: core/ablation/search/space.py.
"""

import dataclasses
import hashlib
import json
import math
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from core import presets
from core.ablation.fields import closest, flat, named, only, put, seeds, typed
from core.ablation.search.space import FOUND, TRIAL, Field, Search, read_field
from core.checks import in_words
from core.config import MOST_STEPS, ConfigError, RunConfig, from_json, to_json
from core.engine.loading import BACKENDS, check_dtype, choose_backend
from core.engine.protocol import DType
from core.formats.toml import read_toml
from core.scoring.plugins import load_plugins
from core.training.schedule import steps_of

KEYS = (
    "name", "purpose", "base", "seeds", "backends", "dtype", "reference", "budget", "settings", "variants", "search",
)  # fmt: skip
SEARCH_KEYS = ("trials", "seeds", "variant", "round", "sampler_seed", "space")
SECTIONS = ("model", "train")
"""What a search may change: other sections say what is measured, and their best value would only measure less."""
BUDGETS = ("steps", "tokens", "seconds")
MOST_AMOUNT = 10**11
MOST_VARIANTS = 256
MOST_RUNS = 4096
"""Runs of one ablation: every report reads all of them."""
MOST_TRIALS = 10_000
MOST_CHECKS = 5_000
"""Settings of a search that are tried out before anything runs: a second or two."""
ROUND = 4
"""Trials that are asked for together, where the file does not say."""


class Job(NamedTuple):
    """One run that an ablation asks for."""

    variant: str
    seed: int
    backend: Literal["mlx", "cuda"]
    config: RunConfig
    dtype: str | None


class Ablation(NamedTuple):
    """What an ablation file says, checked."""

    name: str
    purpose: str
    base: str
    seeds: tuple[int, ...]
    backends: tuple[str, ...]
    dtype: str | None
    reference: str
    budget: tuple[str, float]
    """(`steps`, `tokens` or `seconds`; how many)."""
    settings: dict[str, Any]
    variants: dict[str, dict[str, Any]]
    path: str
    text: str
    """Of the file."""
    options: tuple[str, ...] = ()
    """Of the command line, where it says something else than the file."""
    search: Search | None = None
    """What `--search` does; nothing without it."""

    def command(self, search: bool) -> str:
        """Return the command that repeats this ablation where its text is saved under its name."""
        return shlex.join(["skc", "ablate", f"{self.name}.toml", *self.options, *(["--search"] if search else [])])

    def jobs(self) -> list[Job]:
        """Return its runs, seed by seed, so that a table of all variants is there early."""
        jobs = []
        for seed in self.seeds:
            for backend in self.backends:
                for name in self.variants:
                    jobs.append(Job(name, seed, backend, self.config(name, seed), self.dtype))  # type: ignore[arg-type]
        return jobs

    def config(self, variant: str, seed: int) -> RunConfig:
        """Return the settings of one run; ConfigError names the file, the variant and the field that is wrong."""
        values = to_json(presets.get(self.base).config)
        where = f"{self.path}: variants.{variant}"
        for source, changes in ((f"{self.path}: settings", self.settings), (where, self.variants[variant])):
            for field, value in changes.items():
                put(values, field, value, source)
        values["seed"] = seed
        try:
            config = from_json(RunConfig, values, "config")
            load_plugins(config.eval.plugins, strangers=False)
            kind, amount = self.budget
            train = config.train
            if kind == "seconds":
                train = dataclasses.replace(train, seconds=float(amount), steps=MOST_STEPS)
            else:
                steps = int(amount) if kind == "steps" else steps_of(int(amount), train)
                train = dataclasses.replace(train, seconds=None, reserve_seconds=0.0, steps=steps)
            return dataclasses.replace(config, train=train)
        except ConfigError as error:
            raise ConfigError(f"{where}: {str(error).replace('config.', '', 1)}") from error

    def of_trials(self, search: Search, trials: dict[str, dict[str, Any]]) -> "Ablation":
        """Return the ablation of a search's trials: name -> settings that differ from the variant it starts from."""
        start = self.variants[search.variant]
        changed = {name: {**start, **settings} for name, settings in trials.items()}
        return self._replace(seeds=search.seeds, backends=self.backends[:1], variants=changed, search=None)


def read_plan(path: str | Path) -> Ablation:
    """Read an ablation file; ConfigError names the file and the field that is wrong."""
    where = str(path)
    value, text = read_toml(path)
    only(value, KEYS, where)
    base = typed(value, "base", str, where)
    if base not in presets.PRESETS:
        hint = closest(base, presets.PRESETS, f"known: {', '.join(presets.PRESETS)}")
        raise ConfigError(f"{where}: base: {in_words(base)} is no preset; {hint}")
    variants = typed(value, "variants", dict, where)
    if not variants:
        raise ConfigError(f"{where}: variants: none; add at least one table [variants.NAME]")
    if len(variants) > MOST_VARIANTS:
        raise ConfigError(f"{where}: variants: {len(variants):,}; expected at most {MOST_VARIANTS}")
    for name, changes in variants.items():
        named(name, f"{where}: variants")
        if not isinstance(changes, dict):
            raise ConfigError(f"{where}: variants.{name}: expected a table, got {type(changes).__name__}")
    settings = typed(value, "settings", dict, where, {})
    reference = typed(value, "reference", str, where, next(iter(variants)))
    if reference not in variants:
        raise ConfigError(f"{where}: reference: {reference!r} is not a variant; known: {', '.join(variants)}")
    plan = Ablation(
        name=named(typed(value, "name", str, where, Path(path).stem), f"{where}: name"),
        purpose=typed(value, "purpose", str, where, ""),
        base=base,
        seeds=seeds(typed(value, "seeds", list, where, [0, 1, 2]), where),
        backends=_backends(typed(value, "backends", list, where, ["auto"]), where),
        dtype=_dtype(value.get("dtype"), where),
        reference=reference,
        budget=_budget(typed(value, "budget", dict, where), where),
        settings=flat(settings, f"{where}: settings"),
        variants={name: flat(changes, f"{where}: variants.{name}") for name, changes in variants.items()},
        path=where,
        text=text,
    )
    for backend in plan.backends:
        check_dtype(backend, plan.dtype, f"{where}: dtype:")
    runs = len(plan.seeds) * len(plan.backends) * len(plan.variants)
    if runs > MOST_RUNS:
        raise ConfigError(f"{where}: {runs:,} runs; expected at most {MOST_RUNS:,}: fewer seeds or variants")
    check_variants(plan)
    if "search" not in value:
        return plan
    taken = next((name for name in plan.variants if name == FOUND or TRIAL.fullmatch(name)), None)
    if taken:
        raise ConfigError(f"{where}: variants.{taken}: is what [search] calls its own; give it another name")
    return plan._replace(search=read_search(typed(value, "search", dict, where), plan, f"{where}: search"))


def check_variants(plan: Ablation) -> None:
    """Raise ConfigError for a variant that no run can have, or that is the same as another one."""
    variant_of: dict[str, str] = {}
    for name in plan.variants:
        digest = json.dumps(to_json(plan.config(name, 0)))
        if digest in variant_of:
            raise ConfigError(f"{plan.path}: variants.{name}: is the same as variants.{variant_of[digest]}; remove one")
        variant_of[digest] = name


def job_key(job: Job, code: str, data: dict[str, str]) -> str:
    """Return what names a run for ever: settings, backend, type, code and data, not the ablation or variant."""
    config = to_json(job.config)
    config.pop("preset")
    config.pop("data")  # where the text is: `data` says which it is
    value = {"config": config, "backend": job.backend, "dtype": job.dtype, "code": code, "data": data}
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _backends(names: list[Any], where: str) -> tuple[str, ...]:
    for name in names[: len(BACKENDS) + 1]:
        if name not in ("auto", *BACKENDS):
            raise ConfigError(f"{where}: backends: {in_words(name)}: expected auto, {', '.join(BACKENDS)}")
    backends = tuple(choose_backend(name) for name in names[: len(BACKENDS) + 1])
    if not backends or len(set(backends)) < len(backends):
        expected = "expected one or more, each once (auto is one of the others)"
        raise ConfigError(f"{where}: backends: {in_words(names)}: {expected}")
    return backends


def _dtype(value: Any, where: str) -> str | None:
    if value is not None and value not in get_args(DType):
        raise ConfigError(f"{where}: dtype: {in_words(value)}: expected one of {', '.join(get_args(DType))}")
    return value


def _budget(value: dict[str, Any], where: str) -> tuple[str, float]:
    if len(value) != 1 or next(iter(value)) not in BUDGETS:
        raise ConfigError(f"{where}: budget: {in_words(value)}: expected one of steps, tokens, seconds")
    kind, amount = next(iter(value.items()))
    whole = kind != "seconds"
    if type(amount) is not int and (whole or type(amount) is not float) or not 0 < amount <= MOST_AMOUNT:
        expected = f"expected a positive {'whole ' if whole else ''}number"
        raise ConfigError(f"{where}: budget.{kind}: {in_words(amount)}: {expected} of at most {MOST_AMOUNT:,}")
    return kind, amount


def read_search(value: dict[str, Any], plan: Ablation, where: str) -> Search:
    """Read [search] of a plan that is checked; ConfigError names the file and what is wrong."""
    only(value, SEARCH_KEYS, where)
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


def _fields(space: dict[str, Any], plan: Ablation, variant: str, where: str) -> Iterator[Field]:
    start = to_json(plan.config(variant, plan.seeds[0]))
    for name, value in space.items():
        put(start, name, None, where)
        if name.partition(".")[0] not in SECTIONS:
            allowed = " and ".join(f"{section}.*" for section in SECTIONS)
            raise ConfigError(f"{where}: {name}: says what is measured, not what is trained; only {allowed}")
        yield read_field(name, value, f"{where}: {name}")


def _check_ends(fields: tuple[Field, ...], plan: Ablation, variant: str, where: str) -> None:
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
