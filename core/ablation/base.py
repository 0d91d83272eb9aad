"""What a command line changes of an ablation's base: short forms of settings, which variants' own settings replace."""

from typing import Any

from core import presets
from core.ablation.plan import Ablation, check_variants
from core.command_line.short_forms import RATES, read_factor
from core.config import ConfigError
from core.engine.loading import check_dtype, choose_backend

SETTINGS = {
    "data": "data.path", "batch": "train.batch", "seq": "train.seq", "storage": "model.matrix_storage",
    "blocks": "model.blocks",
}  # fmt: skip
NAMES = (*SETTINGS, "steps", "seconds", "lr", "backend")
"""Options of `skc ablate` that change the base."""


def with_base(plan: Ablation, given: dict[str, Any]) -> Ablation:
    """Return an ablation with another base, budget or backend: `given` are values by NAMES, None for none.

    ConfigError where a variant cannot be had with it.
    """
    chosen: dict[str, Any] = {}
    chosen.update((name, given[name]) for name in NAMES if given[name] is not None)
    if not chosen:
        return plan
    if "steps" in chosen and "seconds" in chosen:
        raise ConfigError("--steps and --seconds are two budgets, and an ablation has one: give one of them")
    settings, words = dict(plan.settings), []
    for name, value in chosen.items():
        listed = name == "blocks"
        words += [f"--{name}", *map(str, value if listed else [value])]
        if name in SETTINGS:
            settings[SETTINGS[name]] = list(value) if listed else value
        elif name in ("steps", "seconds"):
            if not value > 0:
                raise ConfigError(f"--{name} {value}: expected a positive number")
            plan = plan._replace(budget=(name, value))
        elif name == "backend":
            check_dtype(backend := choose_backend(value), plan.dtype, f"{plan.path}: dtype:")
            plan = plan._replace(backends=(backend,))
        else:
            base, by = presets.get(plan.base).config.train, read_factor(value)
            settings |= {f"train.{rate}": by * settings.get(f"train.{rate}", getattr(base, rate)) for rate in RATES}
    plan = plan._replace(settings=settings, options=tuple(words))
    check_variants(plan)
    return plan
