"""What enters every matrix, summed as a a^T: both backends against the oracle, looped layers included. Budget: 10 s.

The oracle multiplies by one function: here it notes what comes in, and numpy sums up the outer products.
"""

import dataclasses
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from core.check.tolerances import P2_FLOAT32, P2_FLOAT64, relative_rms
from core.checks import ConfigError
from core.config import RunConfig
from core.model.params import param_table
from shared_tests import oracle
from shared_tests.reference.ops import linear
from shared_tests.support.harness import BACKENDS, EVERYTHING, engine, mini, shortened, tokens, working_weights

pytestmark = pytest.mark.pair
ROWS, SEQ = 2, 21


class Noted:
    """Sums up a a^T of what the oracle multiplies a matrix with, by the matrix's name."""

    def __init__(self, weights: dict[str, np.ndarray]) -> None:
        self._names = {id(value): name for name, value in weights.items()}
        self.moments: dict[str, np.ndarray] = {}
        self.tokens: dict[str, int] = {}

    def __call__(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        name = self._names[id(weight)]
        rows = x.reshape(-1, x.shape[-1])
        self.moments[name] = self.moments.get(name, 0.0) + np.einsum("ni,nj->ij", rows, rows)
        self.tokens[name] = self.tokens.get(name, 0) + len(rows)
        return linear(x, weight)


def looped() -> RunConfig:
    """Return a run whose three layers share two blocks, the middle one twice in a row."""
    config = mini("debug")
    model = dataclasses.replace(config.model, layers=3, shared_blocks=2, repeat_layers=(1,))
    return dataclasses.replace(config, model=model)


def config_of(name: str) -> RunConfig:
    return looped() if name == "looped" else mini(name)


def modules() -> Iterator[ModuleType]:
    yield from (module for module in (oracle, *oracle.MODULES.values()) if hasattr(module, "linear"))


def expected(config: RunConfig, weights: dict[str, np.ndarray], text: np.ndarray) -> Noted:
    wide = {name: np.array(value, np.float64) for name, value in weights.items()}
    noted = Noted(wide)
    with pytest.MonkeyPatch.context() as patch:
        for module in modules():
            patch.setattr(module, "linear", noted)
        oracle.model(config.model, wide, text)
    return noted


def case(name: str, backend: str, dtype: str = "float64") -> tuple[Any, Noted, np.ndarray]:
    config = config_of(name)
    made = engine(backend, config, working_weights(config.model, 3.0), dtype=dtype)
    text = tokens("moments", ROWS, SEQ, config.model.vocab, config.model.bos)
    return made, expected(config, made.weights(), text), text


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", [*shortened(["debug", "skc_mac", "ternary_74m", EVERYTHING]), "looped"])
def test_second_moments_equal_the_oracle(name: str, backend: str) -> None:
    made, noted, text = case(name, backend)
    moments = made.second_moments(text)
    table = param_table(config_of(name).model)
    vectors = "embed.weight", "head.weight"
    assert list(moments) == [name for name, row in table.items() if row.group == "matrix" or name in vectors]
    assert moments.keys() == noted.moments.keys()
    for matrix, moment in moments.items():
        assert moment.shape == (table[matrix].shape[1],) * 2
        assert relative_rms(moment, noted.moments[matrix]) <= P2_FLOAT64, matrix
        assert np.array_equal(moment, moment.T) or relative_rms(moment, moment.T) <= 1e-14, matrix


def test_a_looped_layer_counts_every_pass() -> None:
    """Three layers of two blocks, one of them repeated: what is used twice or thrice sums so many tokens."""
    _, noted, _ = case("looped", "cuda")
    uses = {name: count // (ROWS * SEQ) for name, count in noted.tokens.items()}
    assert (
        uses["embed.weight"] == 1 and sorted({uses["blocks.0.mlp.up.weight"], uses["blocks.1.mlp.up.weight"]})[-1] > 1
    )
    assert uses["blocks.0.mlp.up.weight"] + uses["blocks.1.mlp.up.weight"] == 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_sums_in_float32(backend: str) -> None:
    made, noted, text = case("skc_mac", backend, "float32")
    for matrix, moment in made.second_moments(text).items():
        assert moment.dtype == np.float32 and relative_rms(moment, noted.moments[matrix]) <= 10 * P2_FLOAT32, matrix


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_is_summed_in_float32(backend: str) -> None:
    """Sums of many tokens in bfloat16 would stop to grow: the trace of all is that of the halves."""
    config = mini("debug")
    made = engine(backend, config, working_weights(config.model, 3.0), dtype="bfloat16")
    text = tokens("moments", 16, 37, config.model.vocab, config.model.bos)
    whole = made.second_moments(text, ["blocks.0.mlp.down.weight"])
    halves = [made.second_moments(part, ["blocks.0.mlp.down.weight"]) for part in (text[:8], text[8:])]
    (moment,), parts = whole.values(), [half["blocks.0.mlp.down.weight"] for half in halves]
    assert moment.dtype == np.float32 and relative_rms(moment, parts[0] + parts[1]) <= 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_names_choose_and_nothing_stays_behind(backend: str) -> None:
    made, noted, text = case("debug", backend)
    before = made.logits(text)
    names = ["embed.weight", "blocks.1.mixer.o.weight"]
    for _ in range(2):  # a second call begins at zero
        moments = made.second_moments(text, names)
        assert list(moments) == names
        assert all(relative_rms(moments[name], noted.moments[name]) <= P2_FLOAT64 for name in names)
    assert np.array_equal(made.logits(text), before)
    assert made.params().keys() == param_table(config_of("debug").model).keys()
    with pytest.raises(
        ConfigError, match=r"blocks.0.mlp.op.weight: is no matrix .* did you mean blocks.0.mlp.up.weight"
    ):
        made.second_moments(text, ["blocks.0.mlp.op.weight"])
    with pytest.raises(ConfigError, match="blocks.0.mixer.q_gain: is no matrix"):
        made.second_moments(text, ["blocks.0.mixer.q_gain"])
