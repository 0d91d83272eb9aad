"""P5, the artifact half: what one backend stores, both compute with, bit for bit. Budget: 60 s."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from core.check.tolerances import P5_BPB
from core.config import RunConfig, changed
from core.engine.optimizer_state import averaged
from core.engine.protocol import Engine
from core.model.storage import STORAGES, Storage
from core.scoring.accounting import bits_per_byte
from core.training import schedule
from shared_tests.support.exchanged import assert_same, export, rows_of
from shared_tests.support.harness import BACKENDS, batches, engine, mini, minis, shortened, working_weights

pytestmark = pytest.mark.pair
ALWAYS = [name for name in minis() if mini(name).train.quantise == "always"]
"""Presets that train with stored weights: their round-trip gap is exactly zero."""


def train(made: Engine, config: RunConfig, steps: int = 5) -> Engine:
    """Train an engine for a few steps, so that no output projection is zero, and return it."""
    for step, batch in enumerate(batches(config, steps)):
        made.train_step(batch, schedule.plan(step, 0.5, config.train)).result()
    return made


def bpb(nats: np.ndarray) -> float:
    return bits_per_byte(float(nats.astype(np.float64).sum()), nats.size)


@pytest.mark.parametrize("first, second", [BACKENDS, pytest.param(*BACKENDS[::-1], marks=pytest.mark.long)])
@pytest.mark.parametrize("name", shortened(minis()))
def test_an_artifact_of_one_backend_scores_the_same_on_the_other(
    name: str, first: str, second: str, tmp_path: Path
) -> None:
    config = mini(name)
    trained = train(engine(first, config, dtype="float32"), config)
    artifact = export(trained, config, tmp_path / "a.skc")
    assert artifact.model == config.model
    scores = []
    for backend in (first, second):
        made = engine(backend, config, dtype="float32")
        made.load_params(artifact.weights)
        assert_same(made.weights(), artifact.weights, "the device holds what the artifact holds")
        scores.append(bpb(made.nll(*rows_of(config))))
    assert abs(scores[0] - scores[1]) <= P5_BPB
    if name in ALWAYS:
        assert_same(trained.weights(), artifact.weights, "trained as it is stored")
        assert bpb(trained.nll(*rows_of(config))) == scores[0]


@pytest.mark.parametrize("name", shortened(minis()))
def test_both_backends_write_the_same_bytes_for_the_same_weights(name: str, tmp_path: Path) -> None:
    config = mini(name)
    weights = train(engine("mlx", config, dtype="float32"), config).params()
    for backend in BACKENDS:
        export(engine(backend, config, weights, dtype="float32"), config, tmp_path / backend)
    assert (tmp_path / "mlx").read_bytes() == (tmp_path / "cuda").read_bytes()


def wide(storage: Storage, width: int, hidden: int) -> RunConfig:
    """A mini of `ablate` whose matrices and table are stored in one way and have both widths as their inputs."""
    config = mini("ablate")
    model = changed(config.model, {
        "dim": width, "layers": 1, "attention.heads": 1, "attention.kv_heads": 1, "mlp.hidden": hidden,
        "embedding.dim": hidden, "attention.rope_dims": 2, "matrix_storage": storage, "embedding.storage": storage,
    })  # fmt: skip
    settings = dataclasses.replace(
        config.train, batch=2, seq=16, average_from=0.1, average_decay=0.9, average_ternary=True, lr_matrix=0.02
    )
    return dataclasses.replace(config, model=model, train=settings)


WIDE = [
    pytest.param(storage, *widths, marks=pytest.mark.long if (i + j) % 2 else ())  # one of both in the short run
    for i, storage in enumerate(STORAGES)
    for j, widths in enumerate(((64, 189), (128, 320)))
]


@pytest.mark.parametrize("storage, width, hidden", WIDE)
def test_every_storage_decodes_to_the_forward_pass(storage: Storage, width: int, hidden: int, tmp_path: Path) -> None:
    """Of fresh weights and of a trained model's averages, on both backends."""
    config = wide(storage, width, hidden)
    for backend in BACKENDS:
        made = engine(backend, config, working_weights(config.model, 1.0), dtype="float32")
        check_promise(made, config, tmp_path / backend)
        train(made, config, 3)
        decoded = check_promise(made, config, tmp_path / "trained")
        state, params = made.optimizer(), made.params()
        averages = {name: state[f"{name}.ema"] for name in averaged(config.model, config.train)}
        assert averages.keys() == params.keys()
        assert all(value.tobytes() != params[name].tobytes() for name, value in averages.items())
        seeded = engine(backend, config, averages, dtype="float32")  # its averages are its weights
        assert_same(seeded.weights(), decoded, "the average is what is stored")
    assert (tmp_path / "mlx").read_bytes() == (tmp_path / "cuda").read_bytes()


def check_promise(made: Engine, config: RunConfig, path: Path) -> dict[str, np.ndarray]:
    """Return an engine's artifact decoded: these must be the weights of its forward pass, and give its losses."""
    decoded = export(made, config, path).weights
    assert_same(made.weights(), decoded, f"{made.backend}, {path.name}")
    other = engine(made.backend, config, dtype="float32")
    other.load_params(decoded)
    assert other.nll(*rows_of(config)).tobytes() == made.nll(*rows_of(config)).tobytes()
    return decoded
