"""What a run ends with: the artifact is the model that was scored, or the run says so. Budget: 40 s."""

import dataclasses
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import core.training.finish
from core import presets
from core.config import RunConfig, changed
from core.console import Console
from core.data.bundled import open_data
from core.data.dataset import Dataset, identity
from core.engine.loading import load_engine
from core.export.artifact import read_artifact
from core.scoring.evaluation import Evaluation
from core.scoring.score import score
from core.training.environment import environment
from core.training.finish import PromiseError, finish
from core.training.loop import train
from core.training.run import Run
from shared_tests.support.harness import engine

pytestmark = pytest.mark.pair


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return open_data("sample")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many final scores are made."""
    count = [0]

    def counted(*arguments: Any, **options: Any) -> Any:
        count[0] += 1
        return score(*arguments, **options)

    monkeypatch.setattr(core.training.finish, "score", counted)
    return count


def small(**changes: Any) -> RunConfig:
    """Return `ablate` made small, with widths that do not fill their groups, for a few steps of real text."""
    base = presets.get("ablate").config
    model = changed(
        base.model,
        {
            "dim": 48,
            "layers": 2,
            "attention.heads": 2,
            "attention.kv_heads": 1,
            "attention.rope_dims": 8,
            "mlp.hidden": 189,
            **changes.pop("model", {}),
        },
    )
    train = dataclasses.replace(
        base.train, steps=6, batch=4, seq=64, eval_every=None, save_every=3, muon_momentum_steps=0, **changes
    )
    return dataclasses.replace(base, model=model, train=train, eval=dataclasses.replace(base.eval, seq=64, documents=2))


def ended(config: RunConfig, backend: str, dataset: Dataset, path: Path) -> tuple[Run, dict[str, Any], str]:
    """Train and finish a run; return it, what `finish` returned and what it said.

    The weights in memory are scored here too: what `finish` says of them has to be that, to the last bit.
    """
    run = Run.create(path, config, dataset.tokenizer.model, identity(dataset))
    made = engine(backend, config)
    run.record_environment(environment(made, dataset, "skc train", 0))
    text = io.StringIO()
    say = Console(False)
    with say.copied_to(text):
        summary = train(run, made, dataset, say)
        of_memory = score(made, Evaluation.of(dataset.val, config, config.eval.documents))
        value = finish(run, made, dataset, summary.steps, say)
    assert value["score"] == of_memory.to_json()
    return run, value, text.getvalue()


STORED: dict[str, dict[str, Any]] = {
    "ternary": {},
    "averaged": {"average_from": 0.3, "average_decay": 0.5},
    "all averaged": {"average_from": 0.3, "average_decay": 0.5, "average_ternary": True},
    "late": {"quantise": "late", "quantise_below": 0.9, "seq_stages": (16, 32), "seq_until": (0.3, 0.6)},
    "int4 and fp8": {"model": {"matrix_storage": "int4/64", "embedding.storage": "fp8/row", "output_norm": "gain"}},
}


CASES = [
    ("ternary", "mlx"),
    ("ternary", "cuda"),
    ("averaged", "mlx"),
    ("all averaged", "cuda"),
    ("late", "cuda"),
    ("late", "mlx"),
]
CASES += [("int4 and fp8", "mlx")]


@pytest.mark.parametrize("name, backend", CASES)
def test_the_gap_is_zero_and_the_artifact_is_the_forward_pass(
    name: str, backend: str, dataset: Dataset, tmp_path: Path, made: list[int]
) -> None:
    config = small(**dict(STORED[name]))
    run, value, said = ended(config, backend, dataset, tmp_path / "run")
    stored = value["artifact"]
    assert stored["gap"] == 0.0 and stored["exact"] is True and value["score"] == stored["score"]
    assert "bit for bit: one score is made" in said and "round-trip gap +0.000000" in said
    assert stored["once"] is True and made == [1]
    assert "the trained weights, bit for bit, so scored once" in (run.path / "report.md").read_text()
    saved = run.checkpoint()
    assert saved and saved.quantise
    weights = core.training.finish.read_artifact(run.artifact_path).weights
    again = load_engine("cuda" if backend == "mlx" else "mlx", config, weights)
    assert all(again.weights()[key].tobytes() == weight.tobytes() for key, weight in weights.items())


def test_weights_rounded_after_training_have_a_measured_gap(dataset: Dataset, tmp_path: Path, made: list[int]) -> None:
    run, value, said = ended(small(quantise="never"), "cuda", dataset, tmp_path / "run")
    stored = value["artifact"]
    assert stored["gap"] != 0.0 and stored["exact"] is False
    assert stored["once"] is False and made == [2] and "each get a score of their own" in said
    assert "bit for bit" not in said and "rounded after training" in (run.path / "report.md").read_text()


def test_one_bit_apart_is_apart() -> None:
    zeros = np.zeros(3, np.float32)
    assert core.training.finish.same_bits({"a": zeros}, {"a": zeros.astype(np.float64)})
    assert not core.training.finish.same_bits({"a": zeros}, {"a": -zeros})
    third = np.full(3, 1 / 3)  # an engine in float64 may have what float32 cannot hold
    assert not core.training.finish.same_bits({"a": third.astype(np.float32)}, {"a": third})


def test_an_artifact_that_is_not_what_was_scored_is_never_passed_off(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def faulty(path: Path) -> Any:
        artifact = read_artifact(path)
        first = artifact.stored["embed.weight"]
        assert first.scales is not None
        first.scales[3] *= np.float16(1.01)
        return artifact

    monkeypatch.setattr(core.training.finish, "read_artifact", faulty)
    with pytest.raises(PromiseError, match="embed.weight is not the weight of the forward pass"):
        ended(small(), "cuda", dataset, tmp_path / "run")
