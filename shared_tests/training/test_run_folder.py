"""The run folder: what it refuses to touch, damage that is named, and the digest of its settings. Budget: 15 s."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

import core.training.run
from core import presets, rng
from core.config import ConfigError, DataConfig, changed, to_json
from core.data.bundled import open_data
from core.data.dataset import Dataset
from core.training.checkpoint import digest
from core.training.run import Run, RunError, config_digest
from shared_tests.support.numpy_runs import config_of, go, start


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    """The bundled text."""
    return open_data("sample")


def test_nothing_in_the_way_is_touched(dataset: Dataset, tmp_path: Path) -> None:
    config, model = config_of(), dataset.tokenizer.model
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(RunError, match="is a file"):
        Run.create(file, config, model)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    with pytest.raises(RunError, match="not empty and is not a run"):
        Run.create(folder, config, model)
    assert file.read_text() == "mine" and os.listdir(folder) == ["thesis.txt"]
    (tmp_path / "empty").mkdir()
    assert Run.create(tmp_path / "empty", config, model).config == Run.open(tmp_path / "empty").config == config


def test_a_run_with_other_settings_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    run = go(tmp_path / "run", config_of(steps=1), dataset)
    other = dataclasses.replace(config_of(steps=2), seed=7)
    with pytest.raises(ConfigError, match=r"seed: 1337 -> 7; train\.steps: 1 -> 2") as caught:
        Run.create(run.path, other, dataset.tokenizer.model)
    assert "\n" not in str(caught.value) and Run.open(run.path).config == run.config
    free = config_of(steps=1, log_every=3, save_every=None)
    assert Run.create(run.path, free, dataset.tokenizer.model).config == Run.open(run.path).config == free
    with pytest.raises(ConfigError, match=r"tokenizer\.model"):
        Run.create(run.path, free, b"another")


def test_other_data_under_the_same_name_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    run, _ = start(tmp_path / "run", config_of(), dataset)
    run.record_environment({"data": {"sha256": "a"}, "command": "one"})
    run.record_environment({"data": {"sha256": "a"}, "command": "two"})
    env = run.environment()
    assert env["command"] == "two" and [e["command"] for e in env["earlier"]] == ["one"]
    before = (run.path / "config.json").read_bytes()
    other = dataclasses.replace(config_of(), seed=99)
    with pytest.raises(ConfigError, match="holds other data"):
        Run.create(run.path, other, dataset.tokenizer.model, {"sha256": "b"})
    with pytest.raises(ConfigError, match="tokenizer"):
        Run.create(run.path, other, b"another", {"sha256": "a"})
    assert (run.path / "config.json").read_bytes() == before, "what is refused changes nothing"


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "not JSON"),
        ("[]", "expected an object"),
        ('{"schema": 9}', "schema 9"),
        ("\xff", "config.json"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_damaged_settings_are_named(text: str, message: str, dataset: Dataset, tmp_path: Path) -> None:
    run, _ = start(tmp_path / "run", config_of(), dataset)
    (run.path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(RunError, match=message) as caught:
        Run.open(run.path)
    assert "config.json" in str(caught.value) and "\n" not in str(caught.value)


def rewrite(run: Run, **changes: Any) -> None:
    """Write the run's checkpoint again with tensors or metadata changed."""
    saved = run.checkpoint()
    assert saved
    arrays = {f"param/{k}": v for k, v in saved.params.items()} | {f"optim/{k}": v for k, v in saved.optimizer.items()}
    arrays |= changes.get("arrays", {})
    for name in changes.get("drop", ()):
        del arrays[name]
    state = {"schema": 2, "dtype": saved.dtype, "quantise": saved.quantise, "step": saved.step}
    state |= {"seconds": saved.seconds, "sha256": digest(arrays)} | changes.get("state", {})
    run.checkpoint_path.write_bytes(safetensors.numpy.save(arrays, {"skc": json.dumps(state)}))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"drop": ["param/embed.weight"]}, "embed.weight is missing"),
        ({"drop": ["optim/embed.weight.m"]}, "optimizer state"),
        ({"arrays": {"param/embed.weight": np.zeros((3, 3), np.float32)}}, "embed.weight has shape"),
        ({"arrays": {"param/extra": np.zeros(3, np.float32)}}, "extra"),
        ({"arrays": {"other": np.zeros(3, np.float32)}}, "other: unknown tensor"),
        ({"arrays": {"param/embed.weight": np.zeros((1024, 16), np.int64)}}, "dtype int64"),
        ({"state": {"step": -1}}, "step: -1"),
        ({"state": {"step": True}}, "step: True"),
        ({"state": {"seconds": "long"}}, "seconds"),
        ({"state": {"seconds": float("nan")}}, "NaN is no JSON number"),
        ({"state": {"schema": 1}}, "schema: 1"),
        ({"state": {"quantise": 1}}, "quantise: 1"),
        ({"state": {"sha256": "0" * 64}}, "sha256: the tensors are not the ones that were saved"),
        ({"state": {"dtype": 32}}, "dtype"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_damaged_checkpoint_is_named(changes: dict, message: str, dataset: Dataset, tmp_path: Path) -> None:
    run, engine = start(tmp_path / "run", config_of(), dataset)
    run.save(engine, 3, 1.0)
    rewrite(run, **changes)
    with pytest.raises(RunError, match=message) as caught:
        run.restore(engine)
    assert "checkpoint.safetensors" in str(caught.value) and "\n" not in str(caught.value)


def test_no_bytes_break_the_checkpoint_reader(dataset: Dataset, tmp_path: Path) -> None:
    run, engine = start(tmp_path / "run", config_of(), dataset)
    run.save(engine, 3, 1.0)
    whole = run.checkpoint_path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    refused = 0
    for i in range(150):
        position, value = rng.below(i, "position", header), rng.below(i, "value", 256)
        broken = bytearray(whole)
        broken[position] = value
        if i % 3 == 0:
            broken = broken[: rng.below(i, "length", len(whole))]
        run.checkpoint_path.write_bytes(broken)
        try:
            run.restore(engine)
        except RunError as error:
            refused += 1
            assert "checkpoint.safetensors" in str(error)
    assert refused > 100


def test_the_digest_of_settings() -> None:
    """All that decides the weights counts, and nothing else; a field that older files lack counts off its default."""
    config = presets.get("debug").config
    digest = config_digest(config)
    same = [
        dataclasses.replace(config, seed=7),
        dataclasses.replace(config, eval=dataclasses.replace(config.eval, seq=64)),
        dataclasses.replace(config, data=DataConfig("elsewhere")),
        dataclasses.replace(config, train=dataclasses.replace(config.train, save_every=3)),
    ]
    assert {config_digest(other) for other in same} == {digest}
    other = [
        dataclasses.replace(config, train=dataclasses.replace(config.train, lr_matrix=0.5)),
        dataclasses.replace(config, train=dataclasses.replace(config.train, lr_hash=0.5)),
        dataclasses.replace(config, model=changed(config.model, {"smear.on": True})),
    ]
    assert len({digest, *map(config_digest, other)}) == 4
    with pytest.MonkeyPatch.context() as patch:  # what a version without the field would have written
        plain = to_json(config)
        del plain["train"]["lr_hash"]
        patch.setattr(core.training.run, "to_json", lambda _: plain)
        assert config_digest(config) == digest
