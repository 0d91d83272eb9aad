"""P5, the artifact half: what one backend writes, the other scores. Budget: 30 s."""

from pathlib import Path

import numpy as np
import pytest

from core import schedule
from core.engine import Engine
from core.export.artifact import read_artifact, write_artifact
from core.scoring.accounting import bits_per_byte
from shared_tests.harness import BACKENDS, batches, engine, mini, minis, tokens
from shared_tests.tolerances import P5_BPB

pytestmark = pytest.mark.pair


def trained(backend: str, name: str) -> Engine:
    """Return an engine after a few steps, so that no output projection is zero."""
    config = mini(name)
    made = engine(backend, config, dtype="float32")
    for step, batch in enumerate(batches(config, 5)):
        made.train_step(batch, schedule.plan(step, 0.5, config.train)).result()
    return made


def export(made: Engine, name: str, path: Path) -> None:
    write_artifact(
        path, mini(name).model, made.params(), tokenizer_sha256="0" * 64, provenance={"preset": name}, quality=5
    )


@pytest.mark.parametrize("first, second", [BACKENDS, BACKENDS[::-1]])
@pytest.mark.parametrize("name", minis())
def test_an_artifact_of_one_backend_scores_the_same_on_the_other(
    name: str, first: str, second: str, tmp_path: Path
) -> None:
    config, path = mini(name), tmp_path / "a.skc"
    export(trained(first, name), name, path)
    artifact = read_artifact(path)
    assert artifact.model == config.model
    rows = tokens("score", 8, 65, config.model.vocab, config.model.bos)
    scores = []
    for backend in (first, second):
        made = engine(backend, config, artifact.weights, dtype="float32")
        for key, value in artifact.weights.items():
            assert made.params()[key].tobytes() == value.tobytes(), "the device holds what the artifact holds"
        nats = made.nll(rows[:, :-1], rows[:, 1:])
        scores.append(bits_per_byte(float(nats.astype(np.float64).sum()), nats.size))
    assert abs(scores[0] - scores[1]) <= P5_BPB


@pytest.mark.parametrize("name", minis())
def test_both_backends_write_the_same_bytes_for_the_same_weights(name: str, tmp_path: Path) -> None:
    weights = trained("mlx", name).params()
    for backend in BACKENDS:
        export(engine(backend, mini(name), weights, dtype="float32"), name, tmp_path / backend)
    assert (tmp_path / "mlx").read_bytes() == (tmp_path / "cuda").read_bytes()
