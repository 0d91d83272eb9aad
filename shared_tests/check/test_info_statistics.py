"""`skc info RUN --statistics`: second moments of what enters each matrix, over training text. Budget: 6 s."""

from pathlib import Path

import numpy as np
import pytest

from core import presets
from core.cli import main
from core.config import RunConfig
from core.data.batches import batch
from core.data.dataset import open_dataset
from core.engine.loading import load_engine
from core.engine.protocol import EngineOptions
from core.export.artifact import read_artifact, write_artifact
from core.verbs import info_statistics
from shared_tests.support.command_line import call, refuse
from shared_tests.support.killed import small_data

Capture = pytest.CaptureFixture[str]
SEQ = 32


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """An artifact and its data."""
    folder = tmp_path_factory.mktemp("statistics")
    dataset = open_dataset(small_data(folder))
    config = presets.get("debug").config
    model = load_engine("mlx", config, options=EngineOptions(dtype="float32", compile=False))
    sha256, about = dataset.tokenizer.sha256, {"preset": "debug", "train_seq": SEQ}
    path = folder / "debug.skc"
    write_artifact(path, config.model, model.quantised(), tokenizer_sha256=sha256, provenance=about)
    return str(path), dataset.path


def test_statistics_are_of_the_sums_over_training_text(
    place: tuple[str, str], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three passes of two rows: by hand, and by the other backend."""
    artifact, data = place
    monkeypatch.setattr(info_statistics, "TOKENS", 6 * SEQ + 1)
    monkeypatch.setattr(info_statistics, "AT_ONCE", 2 * SEQ)
    argv = ("info", artifact, "--data.path", data, "--statistics", "--backend")
    found, other = (call(capsys, *argv, backend)["statistics"] for backend in ("mlx", "cuda"))
    assert found["tokens"] == other["tokens"] == 6 * SEQ and found["backend"] == "mlx"
    config: RunConfig = presets.get("debug").config
    engine = load_engine("mlx", config, read_artifact(artifact).weights, EngineOptions(dtype="float64", compile=False))
    dataset = open_dataset(data)
    text = np.concatenate([batch(dataset.train, step, 2, SEQ, config.seed).tokens for step in range(3)])
    whole = engine.second_moments(text)
    assert list(found["matrices"]) == list(whole) == list(other["matrices"])
    for name, moment in whole.items():
        sums = np.diagonal(moment)
        wanted = {"trace": sums.sum(), "largest": sums.max(), "mean": sums.mean()}
        assert found["matrices"][name] == pytest.approx(wanted, rel=1e-4), name
        assert other["matrices"][name] == pytest.approx(wanted, rel=1e-4), name
    assert main(list(argv[:-1])) == 0
    shown = capsys.readouterr().out
    assert f"sums of a a^T over {6 * SEQ} tokens of {data}" in shown and "blocks.1.mlp.down.weight" in shown


def test_info_of_an_artifact_is_that_of_its_model(place: tuple[str, str], capsys: Capture) -> None:
    value, preset = call(capsys, "info", place[0]), call(capsys, "info", "debug")
    assert "statistics" not in value
    same = ("parameters", "table", "bytes_by_storage", "state_per_token")
    assert [value[name] for name in same] == [preset[name] for name in same] and value["seq"] == SEQ


def test_plug_ins_that_are_not_ours_are_not_run_to_look_at_a_model(place: tuple[str, str], capsys: Capture) -> None:
    call(capsys, "info", place[0], "--eval.plugins", "no.such.module:Class")
    assert "'tempratur' is not a plug-in" in refuse(capsys, "info", place[0], "--eval.plugins", "tempratur")


def test_what_has_no_statistics_is_refused(place: tuple[str, str], capsys: Capture, tmp_path: Path) -> None:
    artifact, data = place
    assert "not of preset debug: name a run instead" in refuse(capsys, "info", "debug", "--statistics")
    line = refuse(capsys, "info", artifact, "--data.path", data, "--statistics", "--model.layers", "1")
    assert "leave out other settings of it" in line
    assert "which is not here" in refuse(capsys, "info", artifact, "--data.path", str(tmp_path / "no"), "--statistics")
    assert "does not exist" in refuse(capsys, "info", str(tmp_path / "nothing"))
    (tmp_path / "empty").mkdir()
    assert "empty" in refuse(capsys, "info", str(tmp_path / "empty"))
