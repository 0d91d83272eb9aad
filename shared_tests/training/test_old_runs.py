"""Runs that commit 8af4887 made: settings, checkpoints and stores are read, artifacts are written anew. Budget: 15 s.

golden/old_runs.tar.xz holds a finished run of six steps in float64, with the checkpoint of step 3 kept beside the last
one, the text that it was trained on, and the store of a small ablation; pictures, locks and the store's weights are
left out.
"""

import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.ablation.store import Place
from core.check.tolerances import P4_FLOAT64
from core.checks import ConfigError
from core.cli import main
from core.config import RunConfig, flattened, from_json, to_json
from core.export.artifact import read_artifact
from core.formats.tensors import read_tensors, write_tensors
from core.model.upgrade import MOVED, RENAMED
from core.training.checkpoint import digest
from core.training.run import Run, RunError, config_digest
from shared_tests.support.harness import BACKENDS

GOLDEN = Path(__file__).parents[1] / "golden"
Capture = pytest.CaptureFixture[str]
TRAIN = """train debug --data.path data --dtype float64 --backend cuda --out run
    --model.dim 8 --model.layers 2 --model.blocks skc attention --model.koopman.dim 4 --model.koopman.times 1 4
    --model.skc.capsules 2 --model.skc.block 2 --model.skc.intra 0.25 --model.mlp.hidden 8 --model.attention.heads 2
    --model.attention.kv-heads 1 --model.attention.rope-dims 2 --model.attention.q-gain 2 --model.attention.conv on
    --model.embedding.dim 1 --model.skips.on on --model.bank.at head --model.bank.heads 1 --model.bank.capsules 2
    --model.engram.orders 1 --model.engram.heads 1 --model.engram.buckets 11 --model.engram.dim 2
    --model.engram.storage int4/row --model.bigram.buckets 13 --model.bigram.dim 2 --model.smear.on on
    --train.steps 6 --train.batch 2 --train.seq 16 --train.save-every 3 --train.keep-every 1 --train.log-every 1
    --train.eval-every none --train.sample-every none --eval.seq 16 --eval.documents none --train.average-from 0.25
    --train.average-decay 0.9 --train.matrix-rule muon"""
"""The command of that run, in the spelling of today."""


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder from which 8af4887 was called, with what it wrote."""
    with tarfile.open(GOLDEN / "old_runs.tar.xz") as tar:
        tar.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def said(capsys: Capture, code: int, *argv: str) -> str:
    """Run a command and return all that it says."""
    capsys.readouterr()
    assert main(list(argv)) == code
    return "".join(capsys.readouterr())


# Settings.


def test_every_setting_has_its_old_value(old: Path) -> None:
    before = json.loads((old / "run/config.json").read_text())
    now = flattened(to_json(Run.open(old / "run").config))
    assert before.pop("schema") == 2 and before.pop("preset") == now["preset"] and before.pop("seed") == now["seed"]
    for section, settings in before.items():
        for name, value in settings.items():
            place = MOVED.get(name, name) if section == "model" else name
            assert now[f"{section}.{place}"] == (tuple(value) if isinstance(value, list) else value), name
    assert now["train.save_minutes"] == RunConfig().train.save_minutes, "what came later has its default"


def test_every_moved_setting_has_one_place_of_today() -> None:
    places = {f"model.{place}" for place in MOVED.values()}
    assert places <= flattened(to_json(RunConfig())).keys() and len(places) == len(MOVED)


@pytest.mark.parametrize(
    "model, words",
    [
        ({"attention": {"heads": 2}, "heads": 2}, "c.model.attention: unknown key of schema 2"),
        ({"bank.heads": 2}, "c.model.bank.heads: unknown key"),
        ({"bank_heads": "four"}, "c.model.bank.heads='four': expected int"),
        ([], "c.model: expected an object, got list"),
    ],
)
def test_what_schema_2_cannot_hold_is_refused(model: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        from_json(RunConfig, {"schema": 2, "model": model}, "c")


def test_schema_3_has_no_old_names() -> None:
    with pytest.raises(ConfigError, match=r"c.model.bank_heads: unknown key; did you mean model\.bank\.heads\?"):
        from_json(RunConfig, {"schema": 3, "model": {"bank_heads": 2}}, "c")


def test_no_default_has_changed() -> None:
    """A setting that an artifact or a config.json lacks has its default, so that this must stay what it is for ever."""
    known, now = json.loads((GOLDEN / "defaults.json").read_text()), flattened(to_json(RunConfig()))
    assert {name: json.loads(json.dumps(now[name])) for name in known} == known


# Checkpoints.


@pytest.mark.parametrize("backend", BACKENDS)
def test_training_goes_on(backend: str, old: Path, capsys: Capture) -> None:
    """From step 3 to the weights, averages, momenta and losses that 8af4887 had at step 6; MLX has them in rows now."""
    last, kept, metrics = "run/state/checkpoint.safetensors", "run/state/step-3.safetensors", Path("run/metrics.jsonl")
    _, theirs = read_tensors(last, 1 << 20)
    losses = [row for row in map(json.loads, metrics.read_text().splitlines()) if "train/loss" in row]
    shutil.copy(kept, last)
    assert not Run.open("run").logged_configs(), "a digest of another kind is no other configuration"
    assert "already finished" not in said(capsys, 0, *TRAIN.replace("cuda", backend).split())
    run = Run.open("run")
    assert json.loads((old / "run/config.json").read_text())["schema"] == 3
    assert run.logged_configs() == {config_digest(run.config)}
    ours = run.checkpoint()
    assert ours and ours.step == 6
    arrays = {f"param/{name}": value for name, value in ours.params.items()}
    arrays |= {f"optim/{name}": value for name, value in ours.optimizer.items()}
    assert arrays.keys() == {now(key) for key in theirs}
    for key, value in theirs.items():
        assert np.abs(arrays[now(key)] - value).max() < P4_FLOAT64, key
    again = [row for row in run.metrics() if "train/loss" in row]
    assert [row["step"] for row in again] == [1, 2, 3, 4, 5, 6]
    assert all(abs(a["train/loss"] - b["train/loss"]) < P4_FLOAT64 for a, b in zip(again, losses, strict=True))


def now(key: str) -> str:
    """Return the key of today of an array in a checkpoint."""
    for before, name in RENAMED.items():
        if key == f"param/{before}" or key in {f"optim/{before}.{slot}" for slot in ("m", "v", "ema")}:
            return key.replace(before, name, 1)
    return key


def test_every_renamed_parameter_was_in_the_old_run(old: Path) -> None:
    _, theirs = read_tensors(old / "run/state/checkpoint.safetensors", 1 << 20)
    assert {f"param/{name}" for name in RENAMED} <= theirs.keys()


def test_an_old_checkpoint_with_a_parameter_twice_is_refused(old: Path) -> None:
    path = old / "run/state/checkpoint.safetensors"
    metadata, arrays = read_tensors(path, 1 << 20)
    arrays["param/smear.share"] = arrays["param/smear"]
    state = json.loads(metadata["skc"]) | {"sha256": digest(arrays)}
    write_tensors(path, arrays, {"skc": json.dumps(state)})
    with pytest.raises(RunError, match="unknown tensor"):
        Run.open(old / "run").checkpoint()


# Artifacts.


def test_an_old_artifact_is_written_anew(old: Path, capsys: Capture) -> None:
    """`skc eval` scores the checkpoint and says what to do; `skc export` does it, with the old score."""
    shutil.copy("run/artifact.skc", "alone.skc")
    assert said(capsys, 2, "eval", "alone.skc").count("write it again from its run: skc export RUN") == 1
    assert said(capsys, 2, "audit", "run").count("skc export run") == 1
    assert said(capsys, 0, "eval", "run", "--backend", "cuda").count("skc export run") == 1
    assert said(capsys, 0, "info", "run").count("skc export run") == 1
    before = Run.open("run").last("final/artifact")["score"]["bpb"]
    said(capsys, 0, "export", "run", "--backend", "cuda")
    assert read_artifact("run/artifact.skc").model == Run.open("run").config.model
    assert abs(Run.open("run").last("final/artifact")["score"]["bpb"] - before) < P4_FLOAT64
    assert "skc export" not in said(capsys, 0, "eval", "run", "--backend", "cuda")
    assert "bits a value" in said(capsys, 0, "info", "run")


# Ablations.


def test_an_old_store_is_read_and_not_continued(old: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = sorted(map(str, Path("store/runs").glob("*/run")))
    assert len(runs) == 2 and "model.smear.on" in said(capsys, 0, "compare", *runs)
    line = said(capsys, 2, "ablate", "two.toml", "--store", "store")
    assert "unknown field 'model.embed_dim'; did you mean model.embedding.dim?" in line and line.count("\n") == 1
    text = Path("two.toml").read_text()
    for name in ("embed_dim", "mlp_hidden", "rope_dims", "smear"):
        text = text.replace(f"model.{name}", f"model.{MOVED[name]}")
    Path("two.toml").write_text(text)
    asked: list[Place] = []
    monkeypatch.setattr("core.verbs.ablate.run_all", lambda store, places, **_: asked.extend(places))
    shown = said(capsys, 1, "ablate", "two.toml", "--store", "store")
    assert shown.count("2 runs in store were made by an earlier version: they are read, not continued") == 1
    assert len(asked) == 2 and not any(place.home.exists() for place in asked), "they are trained anew"
