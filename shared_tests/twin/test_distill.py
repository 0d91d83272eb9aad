"""skc distill and skc sample --draft twin, from the command line: the frozen model stays, killed runs go on, drafted
text is the undrafted one. Budget: 40 s."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import skc
from core.checks import ConfigError
from core.cli import main
from core.config import changed
from core.decoding.generate import Text, write
from core.decoding.settings import Decoding
from core.decoding.statistics import DraftStatistics
from core.export.artifact import read_artifact
from core.training.checkpoint import digest
from core.twin import distilling, own_text
from core.twin.distill_config import DistillConfig
from core.twin.settings import TwinConfig
from core.twin.sidecar import read_sidecar
from shared_tests.support.command_line import Capture, call, refuse
from shared_tests.support.decoding import Numbers
from shared_tests.support.distilling import SHORT, data_of, small_artifact, small_config, state_of
from shared_tests.support.harness import BACKENDS, HYBRID, mini, reader, tokens
from shared_tests.support.killed import fix_threads, small_data

pytestmark = pytest.mark.pair


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """An artifact alone in its folder, and a text."""
    folder = tmp_path_factory.mktemp("twin")
    return small_artifact(folder / "model"), data_of(folder)


@pytest.mark.parametrize("backend", BACKENDS)
def test_distil_and_draft(backend: str, place: tuple[str, str], tmp_path: Path, capsys: Capture) -> None:
    """All of it once: the report, the sidecar, the same weights before and after; then a killed one goes on to the same
    bits, and the twin drafts the text that is written without it."""
    fix_threads(backend)
    artifact, data = place
    options = ("--data", data, *SHORT)
    twin = str(tmp_path / "calm.safetensors")
    value = call(
        capsys, "distill", artifact, *options, "--backend", backend, "--out", str(tmp_path / "calm"), "--twin", twin
    )
    assert value["step"] == 6 and value["frozen"] == digest(read_artifact(artifact).weights)
    for kind in ("own", "corpus"):
        near, drafts = value["places"][kind], value["decoding"][kind]
        assert len(near["agreement"]) == len(near["kl"]) == 4 and near["agreement"][0] == 1 and near["kl"][0] == 0
        assert len(near["cosine"]) == 2 and max(near["kl"]) > 0
        assert drafts["plain"]["tpf"] == 1 and all(arm["same"] == arm["texts"] == 2 for arm in drafts.values())
    own = value["decoding"]["own"]["twin"]
    assert own["tokens"] == 16 and own["tpf"] >= 0.9, "an exact anchor is worth its pass, but for the ends of texts"
    rows = [json.loads(line) for line in (tmp_path / "calm" / "metrics.jsonl").read_text().splitlines()]
    names = {name for row in rows for name in row}
    assert {"train/loss", "opt/lr", "twin/text", "twin/places", "twin/decoding", "twin/frozen"} <= names
    assert "train/bpb" not in names and sum("train/loss" in row for row in rows) == 6
    assert json.loads((tmp_path / "calm" / "env.json").read_text())["backend"] == backend
    sidecar = read_sidecar(twin, read_artifact(artifact).model, artifact)
    assert sidecar.steps == 6 and sidecar.weights_sha256 == value["frozen"]

    out = str(tmp_path / "killed")
    command = [sys.executable, "-m", "shared_tests.support.distilling", backend, out, artifact, *options]
    command += ["--twin", str(tmp_path / "killed.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == -9, done.stdout + done.stderr
    assert not (tmp_path / "killed.safetensors").exists() and state_of(out) != state_of(str(tmp_path / "calm"))
    call(
        capsys, "distill", artifact, *options, "--backend", backend, "--out", out,
        "--twin", str(tmp_path / "killed.safetensors"),
    )  # fmt: skip
    assert "resumed at step 4" in (Path(out) / "log.txt").read_text()
    assert "own text read again" in (Path(out) / "log.txt").read_text()
    assert (tmp_path / "killed.safetensors").read_bytes() == (tmp_path / "calm.safetensors").read_bytes()

    sample = ("sample", artifact, "--data", data, "--prompt", "The cat", "", "Number 3", "--tokens", "20")
    for temperature in ("0", "1"):
        how = ("--temperature", temperature, "--backend", backend)
        plain = call(capsys, *sample, *how)
        drafted = call(capsys, *sample, *how, "--draft", "twin", "--twin", twin, "--block", "4")
        assert drafted["samples"] == plain["samples"] and drafted["decoding"]["draft_passes"] > 0
    named: Any = backend
    model = skc.load(artifact, data=data, backend=named)
    assert model.sample("The cat", 12, draft="twin", twin=twin, block=4) == model.sample("The cat", 12)
    with pytest.raises(ConfigError, match="only with draft=twin"):
        model.sample("The cat", 12, twin=twin)


def test_refusals(place: tuple[str, str], tmp_path: Path, capsys: Capture) -> None:
    """One line each, before anything is computed."""
    artifact, data = place
    base = ("distill", artifact, "--data", data, "--backend", "cuda", "--out", str(tmp_path / "out"))
    assert "there is no twin" in refuse(capsys, "sample", artifact, "--data", data, "--draft", "twin")
    assert "only with --draft twin" in refuse(capsys, "sample", artifact, "--data", data, "--twin", "x")
    assert "no such run folder or artifact" in refuse(capsys, "distill", str(tmp_path / "nothing"))
    for options, word in (
        (("--distill.seq", "64"), "expected at most"),
        (("--distill.seq", "12"), "expected at least 25"),
        (("--distill.lr", "-1"), "distill.lr"),
        (("--distill.warmup", "2"), "distill.warmup"),
        (("--distill.weights", "1", "0"), "7 numbers"),
        (("--distill.text", "training", "--distill.prompt", "3"), "change nothing"),
        (("--distill.twin.block", "2"), "no other is left"),
        (("--distill.twin.block", "1"), "distill.twin.block=1"),
        (("--distill.twin.alpha", "1"), "distill: distill.twin.alpha=1.0: distill.twin.rank=0 clones in full"),
        (("--distill.twin.rank", "1000"), "distill: distill.twin.rank=1000: two factors would be no smaller"),
    ):
        assert word in refuse(capsys, *base, *options)
    planned = call(capsys, *base, *SHORT, "--dry-run")
    assert planned["parameters"] > 0 and "step" not in planned
    assert not (tmp_path / "out").exists()
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    assert "is not empty" in refuse(capsys, *base[:-1], str(folder), *SHORT)


def test_what_would_fail_at_the_end_is_refused_at_the_beginning(
    place: tuple[str, str], tmp_path: Path, capsys: Capture
) -> None:
    artifact, data = place
    bytes_then = Path(artifact).read_bytes()
    base = ("distill", artifact, "--data", data, "--backend", "cuda", "--out", str(tmp_path / "out"), *SHORT)
    assert "choose another --twin" in refuse(capsys, *base, "--twin", artifact)
    assert "there is no folder" in refuse(capsys, *base, "--twin", str(tmp_path / "nowhere" / "twin.safetensors"))
    little = (*base[:3], small_data(tmp_path / "text", 4), *base[4:], "--distill.seq", "30")
    assert "25 tokens, too few for texts of 30: lower distill.seq" in refuse(capsys, *little)
    assert Path(artifact).read_bytes() == bytes_then and not (tmp_path / "out").exists()


def test_rows_of_one_token_more_than_a_block_are_measured(
    place: tuple[str, str], tmp_path: Path, capsys: Capture
) -> None:
    """Training text has no prompt: what is left of a row in front of a block is its BOS. The last line can be run."""
    artifact, data = place
    twin = str(tmp_path / "the twin.safetensors")
    options = ("--distill.text", "training", "--distill.seq", "5", "--distill.twin.block", "4", "--distill.steps", "1")
    options += ("--distill.report-texts", "1", "--out", str(tmp_path / "out"), "--twin", twin)
    assert main(["distill", artifact, "--data", data, "--backend", "cuda", *options]) == 0
    assert f"skc sample {artifact} --draft twin --twin '{twin}';" in capsys.readouterr().out


def test_a_distillation_of_other_settings_is_not_gone_on_with(tmp_path: Path) -> None:
    config, run = small_config(), tmp_path / "run"
    settings, origin = DistillConfig(), {"artifact_sha256": "a"}
    begun = distilling.TwinRun.begin(mkdir(run), config, settings, origin)
    distilling.TwinRun.begin(run, config, changed(settings, {"lr": 0.5}), origin)  # nothing is trained yet
    begun.checkpoint_path.write_bytes(b"")
    with pytest.raises(ConfigError, match="distill.lr: 0.5 -> 0.001"):
        distilling.TwinRun.begin(run, config, settings, origin)
    with pytest.raises(ConfigError, match='artifact_sha256: "a" -> "b"'):
        distilling.TwinRun.begin(run, config, changed(settings, {"lr": 0.5}), {"artifact_sha256": "b"})
    distilling.TwinRun.begin(run, config, changed(settings, {"lr": 0.5, "log_every": 3}), origin)


def mkdir(path: Path) -> Path:
    path.mkdir()
    return path


def test_frozen_weights_that_change_are_noticed() -> None:
    distilling.check_frozen("a", "a")
    with pytest.raises(ValueError, match="the frozen weights changed"):
        distilling.check_frozen("a", "b")


@pytest.mark.parametrize("backend", BACKENDS)
def test_own_text_is_what_the_model_says(backend: str, tmp_path: Path) -> None:
    """Every token behind the prompts is the likeliest one of the whole text so far; the file gives the same rows."""
    config = mini(HYBRID)
    model, vocab = reader(backend, config, 1.0, dtype="float64"), config.model.vocab
    begun = np.array([[1, 5, 6], [1, 7, 2], [1, 9, 9]], np.int32)
    rows = own_text.continued(model, begun, 12, lambda done, total: None)
    assert (rows[:, :3] == begun).all()
    assert (rows[:, 3:] == model.logits(rows).argmax(-1)[:, 2:-1]).all()
    path, made = tmp_path / "own.safetensors", {"seed": 3}
    own_text.write_own(path, rows, made)
    again = own_text.read_own(path, 3, 12, vocab, made)
    assert again is not None and (again == rows).all()
    assert own_text.read_own(path, 3, 12, vocab, {"seed": 4}) is None
    data = bytearray(path.read_bytes())
    data[-4] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(ValueError, match="not the text that was written"):
        own_text.read_own(path, 3, 12, vocab, made)
    assert own_text.distinct([[1, 2, 3, 1, 2, 3]], 2) == 3 / 5


TWINS = {"exact": TwinConfig(block=5), "free": TwinConfig(block=5, exact_anchor=False)}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", TWINS)
def test_an_untrained_twin_drafts_the_undrafted_text(name: str, backend: str) -> None:
    """T5, T6, T9 with a real twin: several texts of unequal length, limits, samplers; whole tokens per pass with the
    exact anchor, whatever it has learned."""
    config = mini(HYBRID)
    model = reader(backend, config, 1.0, dtype="float64")
    twin = model.twin(TWINS[name], None)
    numbers: Any = Numbers()
    for how, limit in ((Decoding(15, 0.0, block=5), None), (Decoding(15, 1.3, None, seed=2, block=5), 14)):
        ids: list[Any] = []
        for drafter in (None, twin):
            texts = [Text(numbers, prompt, i) for i, prompt in enumerate(("", "5 6 7", "4 5 6 7 8 9 10 11"))]
            statistics = DraftStatistics()
            for _ in write(model, texts, how, limit, statistics=statistics, twin=drafter):
                pass
            ids.append([text.ids for text in texts])
        assert ids[0] == ids[1]
        drafts = statistics.turns - statistics.count
        ended = sum(text.said < how.tokens for text in texts)
        assert drafts > 0
        if name == "exact":
            assert statistics.count - statistics.cycles[0] >= drafts - ended, "a draft is kept in every cycle"


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_a_block_rule_does_to_frozen_weights(backend: str) -> None:
    """The seed's first test: exact rows are the model's own at every place; rows that read the block's end are so at
    the last place alone, and farthest at the first. The first order is not even right at the last."""
    config = small_config()
    config = changed(config, {"model.blocks": ("delta", "delta")})
    model = reader(backend, config, 1.0, dtype="float64")
    rows = tokens("alike", 2, 24, config.model.vocab, config.model.bos, documents=False)
    anchors, found = np.array([[3, 8, 12], [2, 9, 14]]), {}
    for rule in ("causal", "end", "first_order"):
        twin = model.twin(TwinConfig(rule=rule, exact_anchor=False, block=6), None)
        found[rule] = twin.alike(rows, anchors)["blocks.0"]
    assert found["causal"].shape == (6,) and np.allclose(found["causal"], 1, atol=1e-9)
    assert abs(found["end"][-1] - 1) < 1e-9 and found["end"][0] < min(0.9, found["end"][-2])
    assert found["first_order"][0] < 0.9 and abs(found["first_order"][-1] - 1) > 1e-6


def test_a_step_that_moves_a_frozen_weight_fails(place: tuple[str, str], tmp_path: Path, capsys: Capture) -> None:
    """Planted: the program itself notices, and writes no twin."""
    artifact, data = place
    real = distilling.TwinLearner.train_step

    def careless(self: Any, batch: Any, plan: Any) -> Any:
        weights = self._engine.params()
        name = next(iter(weights))
        weights[name] = weights[name] + 1e-3
        self._engine.load_params(weights)
        return real(self, batch, plan)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distilling.TwinLearner, "train_step", careless)
        out = str(tmp_path / "twin.safetensors")
        base = ("distill", artifact, "--data", data, *SHORT, "--backend", "cuda", "--out", str(tmp_path / "out"))
        capsys.readouterr()
        assert main([*base, "--twin", out]) == 2
        assert "the frozen weights changed" in capsys.readouterr().err and not os.path.exists(out)
