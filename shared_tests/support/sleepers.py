"""A small model with an expert that gets no token: two experts have equal rows in the router, which is not trained."""

import dataclasses
from typing import Any

from core import presets
from core.config import ModelConfig, RunConfig, changed
from core.engine.protocol import Arrays
from shared_tests.support.harness import working_weights

TINY: dict[str, Any] = {
    "vocab": 29, "dim": 16, "layers": 2, "attention.heads": 2, "attention.kv_heads": 1, "attention.rope_dims": 4,
    "mlp.hidden": 20, "koopman.dim": 8, "experts.count": 4, "experts.hidden": 12,
}  # fmt: skip
SLEEPER = 2
"""Ties go to the lower index."""


def run_with(changes: dict[str, Any], **train: Any) -> RunConfig:
    """Return a run of the tiny model with other settings."""
    config = presets.mini(presets.get("debug").config)
    config = dataclasses.replace(config, model=changed(ModelConfig(), TINY | changes))
    return changed(config, {f"train.{name}": value for name, value in train.items()})


def sleeping(rule: str) -> tuple[RunConfig, Arrays]:
    """Return a run, and weights with which expert SLEEPER of layer 1 gets no token; decay is on."""
    train = {"matrix_rule": rule, "lr_vector": 0.0, "seq": 16, "weight_decay": 0.5, "quantise": "always"}
    config = run_with({"experts.shared": 5, "matrix_storage": "ternary/64"}, **train)
    weights = dict(working_weights(config.model, 1.0))
    router = weights["blocks.1.mlp.router"].copy()
    router[SLEEPER] = router[SLEEPER - 1]
    return config, weights | {"blocks.1.mlp.router": router}


def kept(before: Arrays, after: Arrays) -> dict[str, list[bool]]:
    """Return for every tensor of experts, moments too, which of them kept their bits."""
    own = [name for name in before if name.startswith(("blocks.1.mlp.up.weight", "blocks.1.mlp.down.weight"))]
    parts = {name: [arrays[name].reshape(4, -1) for arrays in (before, after)] for name in own}
    return {name: [a.tobytes() == b.tobytes() for a, b in zip(*both, strict=True)] for name, both in parts.items()}
