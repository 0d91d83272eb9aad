"""P2, part by part: a small model with one part switched on equals the oracle. A failure names it. Budget: 20 s.

A part is its file in shared_tests/oracle, with settings of odd shapes in its EXAMPLE.
"""

import dataclasses
from typing import Any

import numpy as np
import pytest

from core import presets
from core.check.tolerances import P2_FLOAT64, relative_rms
from core.config import ModelConfig, RunConfig, changed
from core.model.context import each_array
from shared_tests import oracle
from shared_tests.support.harness import BACKENDS, engine, tokens, working_weights

TINY = changed(ModelConfig(), {
    "vocab": 29, "dim": 32, "layers": 2, "attention.heads": 2, "attention.kv_heads": 2, "attention.rope_dims": 4,
    "mlp.hidden": 20, "koopman.dim": 8,
})  # fmt: skip


def of(changes: dict) -> RunConfig:
    """Return a run of the tiny model with other settings."""
    return dataclasses.replace(presets.mini(presets.get("debug").config), model=changed(TINY, changes))


@pytest.mark.pair
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", oracle.EXAMPLES)
def test_a_part_alone_equals_its_oracle(name: str, backend: str) -> None:
    config = of(oracle.EXAMPLES[name])
    weights, rows = working_weights(config.model, 5.0), tokens(f"parts/{name}", 2, 29, 29, 1)
    logits = engine(backend, config, weights, dtype="float64").logits(rows)
    assert relative_rms(logits, oracle.model(config.model, weights, rows)) <= P2_FLOAT64


@pytest.mark.parametrize("name", oracle.EXAMPLES)
def test_a_fault_in_a_part_shows_in_its_example(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An example that did not use its part would hold nothing to anything."""
    config, right = of(oracle.EXAMPLES[name]), oracle.PARTS[name]
    weights, rows = working_weights(config.model, 5.0), tokens(f"parts/{name}", 2, 29, 29, 1)

    def uneven(x: np.ndarray) -> np.ndarray:
        return x * np.where(np.arange(x.shape[-1]) % 2, 1.001, 1.0)  # a norm would not see all channels scaled alike

    def faulty(*given: Any) -> Any:
        out, before = right(*given), next((one for one in given if isinstance(one, oracle.Stream)), None)
        if not isinstance(out, oracle.Stream):
            return each_uneven(out)
        made = {name: value for name, value in out._asdict().items() if value is not getattr(before, name, None)}
        return out._replace(**{name: each_uneven(value) for name, value in made.items()})

    def each_uneven(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: uneven(one) for key, one in value.items()}
        return each_array(value, uneven)

    expected = oracle.model(config.model, weights, rows)
    for place in (*map(vars, oracle.MODULES.values()), oracle.PARTS, oracle.MODULES["layer"].MIXERS):
        for key in [key for key, value in place.items() if value is right]:
            monkeypatch.setitem(place, key, faulty)
    assert relative_rms(oracle.model(config.model, weights, rows), expected) > 1e3 * P2_FLOAT64
