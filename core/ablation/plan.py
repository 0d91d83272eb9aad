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

[search], what `--search` does, is read by core/ablation/search/space.py.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

from core import presets
from core.ablation.fields import closest, flat, named, only, put, seeds, typed
from core.ablation.search.space import FOUND, TRIAL, Search, read_search
from core.checks import told
from core.config import MOST_STEPS, ConfigError, RunConfig, from_json, to_json
from core.engine.protocol import BACKENDS
from core.formats.toml import read_toml

KEYS = (
    "name", "purpose", "base", "seeds", "backends", "dtype", "reference", "budget", "settings", "variants", "search",
)  # fmt: skip
BUDGETS = ("steps", "tokens", "seconds")
MOST_AMOUNT = 10**11
MOST_VARIANTS = 256
MOST_RUNS = 4096
"""Runs of one ablation: every report reads all of them."""


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
    search: Search | None = None
    """What `--search` does; nothing without it."""

    def jobs(self) -> list[Job]:
        """Return its runs, seed by seed, so that a table of all variants is there early."""
        made = []
        for seed in self.seeds:
            for backend in self.backends:
                for name in self.variants:
                    made.append(Job(name, seed, backend, self.config(name, seed), self.dtype))  # type: ignore[arg-type]
        return made

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
            kind, amount = self.budget
            train = config.train
            if kind == "seconds":
                train = dataclasses.replace(train, seconds=float(amount), steps=MOST_STEPS)
            else:
                steps = int(amount) if kind == "steps" else -(-int(amount) // train.tokens_per_step)
                train = dataclasses.replace(train, seconds=None, steps=steps)
            return dataclasses.replace(config, train=train)
        except ConfigError as error:
            raise ConfigError(f"{where}: {str(error).replace('config.', '', 1)}") from error


def read_plan(path: str | Path) -> Ablation:
    """Read an ablation file; ConfigError names the file and the field that is wrong."""
    where = str(path)
    value = read_toml(path)
    only(value, KEYS, where)
    base = typed(value, "base", str, where)
    if base not in presets.PRESETS:
        hint = closest(base, presets.PRESETS, f"known: {', '.join(presets.PRESETS)}")
        raise ConfigError(f"{where}: base: {told(base)} is no preset; {hint}")
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
    made = Ablation(
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
    )
    runs = len(made.seeds) * len(made.backends) * len(made.variants)
    if runs > MOST_RUNS:
        raise ConfigError(f"{where}: {runs:,} runs; expected at most {MOST_RUNS:,}: fewer seeds or variants")
    seen: dict[str, str] = {}
    for name in made.variants:
        digest = json.dumps(to_json(made.config(name, 0)))
        if digest in seen:
            raise ConfigError(f"{where}: variants.{name}: is the same as variants.{seen[digest]}; remove one")
        seen[digest] = name
    if "search" not in value:
        return made
    taken = next((name for name in made.variants if name == FOUND or TRIAL.fullmatch(name)), None)
    if taken:
        raise ConfigError(f"{where}: variants.{taken}: is what [search] calls its own; give it another name")
    return made._replace(search=read_search(typed(value, "search", dict, where), made, f"{where}: search"))


def job_key(job: Job, code: str, data: dict[str, str]) -> str:
    """Return what names a run for ever: settings, backend, type, code and data, not the ablation or variant."""
    config = to_json(job.config)
    config.pop("preset")
    config.pop("data")  # where the text is: `data` says which it is
    value = {"config": config, "backend": job.backend, "dtype": job.dtype, "code": code, "data": data}
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _backends(names: list[Any], where: str) -> tuple[str, ...]:
    from core.engine.protocol import choose_backend

    for name in names[: len(BACKENDS) + 1]:
        if name not in ("auto", *BACKENDS):
            raise ConfigError(f"{where}: backends: {told(name)}: expected auto, {', '.join(BACKENDS)}")
    found = tuple(choose_backend(name) for name in names[: len(BACKENDS) + 1])
    if not found or len(set(found)) < len(found):
        expected = "expected one or more, each once (auto is one of the others)"
        raise ConfigError(f"{where}: backends: {told(names)}: {expected}")
    return found


def _dtype(value: Any, where: str) -> str | None:
    if value not in (None, "float32", "bfloat16", "float64"):
        raise ConfigError(f"{where}: dtype: {told(value)}: expected float32, bfloat16 or float64")
    return value


def _budget(value: dict[str, Any], where: str) -> tuple[str, float]:
    if len(value) != 1 or next(iter(value)) not in BUDGETS:
        raise ConfigError(f"{where}: budget: {told(value)}: expected one of steps, tokens, seconds")
    kind, amount = next(iter(value.items()))
    whole = kind != "seconds"
    if type(amount) is not int and (whole or type(amount) is not float) or not 0 < amount <= MOST_AMOUNT:
        expected = f"expected a positive {'whole ' if whole else ''}number"
        raise ConfigError(f"{where}: budget.{kind}: {told(amount)}: {expected} of at most {MOST_AMOUNT:,}")
    return kind, amount
