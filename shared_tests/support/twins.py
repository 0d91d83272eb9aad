"""What the twins compute of a mini, under names that both share."""

import numpy as np

from core.check.tolerances import relative_rms
from core.config import RunConfig
from core.model import params
from core.training import schedule
from shared_tests.support.harness import (
    batches,
    engine,
    mini,
    minis,
    working_weights,
)


def outcome(backend: str, config: RunConfig, scale: float, **options) -> dict[str, np.ndarray]:
    """Return activations, logits, nll and gradients of one batch under names that both backends share."""
    made = engine(backend, config, working_weights(config.model, scale), **options)
    batch = batches(config, 1)[0]
    out = {f"activation {name}": value for name, value in made.activations(batch.tokens).items()}
    objective, grads = made.gradients(batch)
    out |= {f"gradient {name}": value for name, value in grads.items()}
    return out | {
        "logits": made.logits(batch.tokens),
        "nll": made.nll(batch.tokens, batch.targets),
        "objective": np.array(objective),
    }


def assert_same(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], limit: float) -> None:
    assert list(ours) == list(theirs)
    worst = max(ours, key=lambda name: relative_rms(ours[name], theirs[name]))
    assert relative_rms(ours[worst], theirs[worst]) <= limit, worst


def by_group(out: dict[str, np.ndarray], config: RunConfig) -> dict[str, np.ndarray]:
    """Join the gradients of each optimizer group: a gain's few float32 gradients are sums that nearly cancel."""
    joined = {name: value for name, value in out.items() if not name.startswith("gradient ")}
    for group, names in params.by_group(config.model).items():
        joined[f"gradients {group}"] = np.concatenate([out[f"gradient {name}"].ravel() for name in names])
    return joined


STEPS = 50


def curve(backend: str, name: str, dtype: str, steps: int = STEPS) -> np.ndarray:
    """Return the losses of a run over 7 batches that repeat, so that there is something to learn."""
    config = mini(name)
    made, data = engine(backend, config, dtype=dtype), batches(config, 7)
    pending = []
    for step in range(steps):
        plan = schedule.plan(step, schedule.progress_by_steps(step, config.train), config.train)
        pending.append(made.train_step(data[step % 7], plan))
    results = [p.result() for p in pending]
    assert all(r.finite for r in results)
    return np.array([r.loss for r in results])


STORED = [name for name in minis() if mini(name).train.quantise != "never"]
"""Presets that train with stored weights: in float32 their free-running curves part, by nature."""
