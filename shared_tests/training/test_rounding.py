"""What GPTQ does to a run's artifact: calibration, codes, the measured gap, and what is refused. Budget: 20 s."""

import dataclasses
import json
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

import core.training.calibrate
import core.training.finish
import core.verbs.export
from backends.cuda import gptq as twin
from core import rng
from core.audit.code import packed_code
from core.cli import main
from core.config import ConfigError, ExportConfig, changed
from core.console import Console
from core.data.dataset import open_dataset
from core.decoding.generate import TEMPERATURE, written_rows
from core.decoding.samplers import choose
from core.engine.loading import load_engine
from core.engine.optimizer_state import exported
from core.engine.protocol import Engine
from core.engine.ranks import Alone
from core.export.artifact import read_artifact
from core.export.budget import predicted_bytes
from core.export.calibration import mean_moments, uniform_rows
from core.export.fit import COARSEST
from core.export.gptq import compensate, compensated
from core.model.params import param_table
from core.training.calibrate import moments_of
from core.training.rounding import chosen_codes, decoded, solver, stepped
from core.training.run import Run
from core.verbs.export import Export, _asked
from core.verbs.train import check_budget
from shared_tests.support.command_line import call, refuse
from shared_tests.support.harness import BACKENDS, engine, mini, tokens, working_weights
from shared_tests.support.killed import small_data

pytestmark = pytest.mark.pair
Capture = pytest.CaptureFixture[str]
GPTQ = ("--export.method", "gptq", "--export.calibration-tokens", "1024")
SHORT = (
    "train", "debug", "--train.steps", "6", "--train.batch", "4", "--train.seq", "32", "--train.eval-every", "none",
    "--eval.seq", "32", "--eval.documents", "4", "--eval.train-documents", "4",
    "--model.matrix-storage", "int4/row", "--model.embedding.storage", "int8/64", "--train.lr-matrix", "0.02",
)  # fmt: skip
"""A short run whose matrices, not their table, are on a coarse grid."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, and a run with a clock whose weights were calibrated inside it: `timed`."""
    folder = tmp_path_factory.mktemp("rounding")
    small_data(folder)
    assert main([*options(folder, "timed"), *GPTQ, "--train.seconds", "600"]) == 0
    return folder


def options(folder: Path, name: str, backend: str = "cuda") -> list[str]:
    return [*SHORT, "--data.path", str(folder / "data"), "--out", str(folder / name), "--backend", backend]


def trained(run: Run, backend: str) -> Engine:
    """Return an engine with the weights of a run's checkpoint."""
    saved = run.checkpoint()
    assert saved is not None
    return load_engine(backend, run.config, exported(run.config.model, run.config.train, saved.params, saved.optimizer))


@pytest.mark.parametrize(("calibration", "backend"), [("train", "mlx"), ("random", "cuda"), ("self", "cuda")])
def test_the_artifact_holds_the_codes_of_gptq_and_is_what_is_scored(
    calibration: str, backend: str, place: Path, capsys: Capture
) -> None:
    """Codes are made here once more, of the checkpoint and the text; the score is that of the file, scored alone."""
    name = f"{calibration}-{backend}"
    value = call(capsys, *options(place, name, backend), *GPTQ, "--export.calibration", calibration)
    run, artifact = Run.open(place / name), read_artifact(place / name / "artifact.skc")
    made, dataset = trained(run, backend), open_dataset(str(place / "data"))
    step = artifact.provenance["step"]
    assert type(step) is int and artifact.provenance["method"] == "gptq"
    assert artifact.provenance["calibration"] == calibration and artifact.provenance["calibration_tokens"] == 1024
    moments = moments_of(run, made, dataset, step, Console(True))
    table, plain = param_table(run.config.model), made.quantised()
    codes = compensate(plain, made.weights(), moments, table, run.config.export.damping, compensated)
    matrices = [n for n, row in table.items() if row.group == "matrix" or n == "embed.weight"]
    assert sorted(moments) == sorted(matrices)
    for tensor, stored in artifact.stored.items():
        assert stored.codes.tobytes() == codes[tensor].codes.tobytes(), tensor
        assert (stored.codes.tobytes() != plain[tensor].codes.tobytes()) == (tensor in matrices), tensor
    scored = call(capsys, "eval", str(place / name / "artifact.skc"), "--documents", "4", "--seq", "32",
                  "--data", str(place / "data"), "--backend", backend)["score"]  # fmt: skip
    assert scored["bpb"] == value["artifact"]["score"]["bpb"]
    rounding = value["artifact"]["rounding"]
    assert value["artifact"]["gap"] == pytest.approx(rounding["gap"], abs=1e-9), "the same documents here"
    text = dataset.val.read(0, 320).reshape(10, 32)
    before = made.logits(text)
    lost = []
    for weights in (artifact.weights, decoded(plain, run.config)):
        made.load_params(weights)
        lost.append(float(np.square(made.logits(text) - before).mean()))
    assert lost[0] < 0.5 * lost[1], "of what the model says"
    report, log = (run.path / "report.md").read_text(), run.log_path.read_text()
    assert f"gptq {rounding['gap']:+.6f}, plain rounding {rounding['plain']:+.6f} (estimates)" in report
    assert f"plain rounding on the same steps {rounding['plain']:+.6f} (estimates, 4 documents)" in log


def test_calibration_is_inside_the_clock_and_kept_for_later_exports(
    place: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training text is read before it is closed, and by no export: without the moments it is refused."""
    means = mean_moments

    def slow(*given: Any) -> Any:
        time.sleep(0.3)
        return means(*given)

    monkeypatch.setattr(core.training.calibrate, "mean_moments", slow)
    data = ("--data.path", str(place / "data"), "--out", str(tmp_path / "run"), "--backend", "cuda")
    assert main([*SHORT, *data, *GPTQ, "--train.seconds", "600"]) == 0
    run = Run.open(tmp_path / "run")
    assert run.last("clock/closed") - run.last("clock/stopped") >= 0.3
    first = (run.path / "artifact.skc").read_bytes()

    def never(*given: Any) -> Any:
        raise AssertionError("training text is read after the clock")

    monkeypatch.setattr(core.training.calibrate, "batch", never)
    call(capsys, "export", str(run.path), "--backend", "cuda")
    assert (run.path / "artifact.skc").read_bytes() == first
    assert main([*SHORT, *data, *GPTQ, "--train.seconds", "600", "--again"]) == 0, "nothing is trained, nothing is read"
    assert (run.path / "artifact.skc").read_bytes() == first
    moments = run.path / "state" / "moments.safetensors"
    whole = moments.read_bytes()
    moments.write_bytes(whole[:-5])
    assert "delete it and export again" in refuse(capsys, "export", str(run.path), "--backend", "cuda")
    moments.write_bytes(whole)
    arrays = safetensors.numpy.load(whole)
    metadata = {"of": "step 6, 1024 tokens", "tensors": str(len(arrays))}
    del arrays[min(arrays)]
    moments.write_bytes(safetensors.numpy.save(arrays, metadata))
    assert f"{len(arrays)} tensors, expected {len(arrays) + 1}" in refuse(capsys, "export", str(run.path))
    moments.unlink()
    train = [*SHORT, *data, *GPTQ, "--train.seconds", "600"]
    assert "which have passed without it" in refuse(capsys, *train, "--again")
    assert Run.open(run.path).finished() is not None, "what the run came to is still there"
    line = refuse(capsys, "export", str(run.path), "--backend", "cuda")
    assert "export.calibration=train reads training text inside train.seconds, which have passed without it" in line
    monkeypatch.setattr(core.training.calibrate, "mean_moments", means)
    call(capsys, "export", str(run.path), "--backend", "cuda", "--calibration", "random")
    assert read_artifact(run.path / "artifact.skc").provenance["calibration"] == "random"


def test_export_may_choose_another_method(place: Path, tmp_path: Path, capsys: Capture) -> None:
    shutil.copytree(place / "timed", tmp_path / "run")
    run = Run.open(tmp_path / "run")
    plain = trained(run, "cuda").quantised()
    value = call(capsys, "export", str(run.path), "--backend", "cuda", "--method", "round")
    artifact = read_artifact(run.path / "artifact.skc")
    assert "rounding" not in value["artifact"] and "method" not in artifact.provenance
    assert all(stored.codes.tobytes() == plain[name].codes.tobytes() for name, stored in artifact.stored.items())
    assert Run.open(run.path).config.export.method == "gptq", "the run's settings stay"
    settings = json.loads((run.path / "config.json").read_text())
    settings["export"]["calibration_tokens"] = 512
    (run.path / "config.json").write_text(json.dumps(settings))
    line = refuse(capsys, "export", str(run.path), "--backend", "cuda")
    assert "which have passed without it" in line, "the moments that were kept are of twice as many tokens"


@pytest.mark.parametrize("damping", [0.01, 1.0])
def test_the_damping_is_the_one_that_was_asked_for(damping: float) -> None:
    """As in docs/export.md; tensors without a grid have no moments, and are rounded."""
    config = changed(mini("debug"), {
        "model.matrix_storage": "int4/row", "model.embedding.storage": "fp8/row",
        "export.method": "gptq", "export.calibration": "random", "export.damping": damping,
    })  # fmt: skip
    made, table = engine("cuda", config, working_weights(config.model, 3.0)), param_table(config.model)
    rows = tokens("damping", 4, 32, config.model.vocab, config.model.bos)
    moments = {n: m for n, m in made.second_moments(rows).items() if table[n].storage == "int4/row"}
    codes = chosen_codes(made, config, moments, Console(True), lambda codes: 0)
    plain, weights = made.quantised(), made.weights()
    assert codes.provenance["damping"] == damping and moments
    for name, stored in codes.stored.items():
        expected = plain[name].codes
        if name in moments:
            scales, storage = plain[name].scales, table[name].storage
            assert scales is not None
            expected = compensated(weights[name], moments[name], scales, storage, damping)
        assert stored.codes.tobytes() == expected.tobytes(), name


def test_moments_are_of_what_has_a_grid(place: Path) -> None:
    """Beside matrices on a grid, a table of fp8 and its projections have none."""
    run, dataset = Run.open(place / "timed"), open_dataset(str(place / "data"))
    run.config = changed(run.config, {"model.embedding.storage": "fp8/row", "export.calibration": "random"})
    made = engine("cuda", run.config, working_weights(run.config.model, 3.0))
    table = param_table(run.config.model)
    moments = moments_of(run, made, dataset, 6, Console(True))
    assert sorted(moments) == sorted(n for n, row in table.items() if row.storage == "int4/row")
    chosen_codes(made, run.config, moments, Console(True), lambda codes: 0)


def test_a_fitted_run_starts_if_its_coarsest_steps_fit() -> None:
    deviations = {"mlp": 2.0, "attention": 2.0, "table": 2.0}
    model = changed(mini("debug").model, {"matrix_storage": "int6/row", "embedding.storage": "int6/row"})
    steps = (changed(model, {f"deviations.{n}": f * k for n, k in deviations.items()}) for f in (1.0, COARSEST))
    fine, coarse = (predicted_bytes(one) for one in steps)
    assert coarse < fine
    config = changed(mini("debug"), {
        "model.matrix_storage": "int6/row", "model.embedding.storage": "int6/row", "export.code_bytes": 100,
        **{f"model.deviations.{n}": k for n, k in deviations.items()},
    })  # fmt: skip
    check_budget(changed(config, {"export.budget": coarse + 100, "export.fit": True}))
    for budget, fit in ((coarse + 100, False), (coarse + 99, True)):
        with pytest.raises(ConfigError, match="over what export.budget"):
            check_budget(changed(config, {"export.budget": budget, "export.fit": fit}))


def test_codes_of_gptq_that_are_not_those_read_are_never_passed_off(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def faulty(path: Path) -> Any:
        artifact = read_artifact(path)
        artifact.stored["blocks.0.mlp.up.weight"].codes[0, 0] ^= 1
        return artifact

    shutil.copytree(place / "timed", tmp_path / "run")
    monkeypatch.setattr(core.training.finish, "read_artifact", faulty)
    with pytest.raises(core.training.finish.PromiseError, match=r"blocks\.0\.mlp\.up\.weight is not the weight"):
        main(["export", str(tmp_path / "run"), "--backend", "cuda"])
    assert not (tmp_path / "run" / "artifact.skc").exists()


class Ranks(Alone):
    """Ranks of which one calls after the other: each gets what those before it gave."""

    world = 3

    def __init__(self, before: list[dict[int, np.ndarray]]) -> None:
        self._before, self._mine = before, {}
        before.append(self._mine)

    def gather(self, value: np.ndarray) -> list[np.ndarray]:
        place = len(self._mine)
        self._mine[place] = value
        return [given[place] for given in self._before if place in given]


@pytest.mark.parametrize("backend", BACKENDS)
def test_moments_are_means_over_passes_and_ranks_in_their_order(backend: str) -> None:
    """Layers that run twice count twice, so that a mean over tokens is a sum over passes."""
    config = mini("debug")
    model = changed(config.model, {"layers": 3, "shared_blocks": 2, "repeat_layers": (1,)})
    config = dataclasses.replace(config, model=model)
    made = engine(backend, config, working_weights(model, 3.0), dtype="float32")
    text = tokens("calibration", 6, 21, model.vocab, model.bos)
    alone = [mean_moments(made, text, 6, lambda *_: None) for _ in range(2)]
    for name, moment in made.second_moments(text).items():
        assert alone[0][name].dtype == np.float32 and alone[0][name].tobytes() == alone[1][name].tobytes()
        assert np.allclose(alone[0][name], moment / text.size, rtol=1e-4, atol=1e-6 * moment.max() / text.size)
    before: list[dict[int, np.ndarray]] = []
    for part in (text[:3], text[3:4], text[4:]):
        made.ranks = Ranks(before)
        both = mean_moments(made, part, 6, lambda *_: None)
    made.ranks = Alone()
    for name, moment in both.items():
        first, second, third = (part[list(both).index(name)] for part in before)
        expected = ((first + second + third) / text.size).reshape(moment.shape).astype(np.float32)
        assert moment.tobytes() == expected.tobytes()
        assert np.allclose(moment, alone[0][name], rtol=1e-5, atol=1e-7 * moment.max())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model_writes_its_own_text_from_its_state(backend: str) -> None:
    """The same tokens as by running every prefix anew; a part of the rows is that part, whoever writes it."""
    config = mini("skc_mac")
    made, bos = engine(backend, config, working_weights(config.model, 3.0), dtype="float64"), config.model.bos
    rows = written_rows(made, 5, 9, bos, 7, slice(0, 5))
    assert rows.shape == (5, 9) and rows.dtype == np.int32 and (rows[:, 0] == bos).all()
    assert len({row.tobytes() for row in rows}) == 5
    for place in range(1, 9):
        logits, draws = made.logits(rows[:, :place])[:, -1], rng.uniform(7, f"calibration/{place}", 5)
        drawn = [choose(row, TEMPERATURE, None, draw) for row, draw in zip(logits, draws, strict=True)]
        assert drawn == rows[:, place].tolist()
    assert np.array_equal(written_rows(made, 5, 9, bos, 7, slice(2, 4)), rows[2:4])


def test_a_gpu_runs_its_own_form_and_every_other_device_the_reference() -> None:
    devices = [("cuda", "NVIDIA H100 80GB HBM3"), ("cuda", "CPU, 2 threads"), ("mlx", "Apple M4"), ("numpy", "CPU")]
    chosen = [solver(SimpleNamespace(backend=backend, device=device)) for backend, device in devices]  # type: ignore[arg-type]
    assert chosen == [twin.compensated, compensated, compensated, compensated]


def test_random_tokens_are_all_alike_and_shared_by_rows() -> None:
    rows = uniform_rows(40, 64, 97, 3, slice(None))
    counts = np.bincount(rows.reshape(-1), minlength=97)
    assert rows.dtype == np.int32 and counts.min() > 8 and counts.max() < 60 and len(counts) == 97
    assert np.array_equal(uniform_rows(40, 64, 97, 3, slice(10, 20)), rows[10:20])
    assert not np.array_equal(uniform_rows(40, 64, 97, 4, slice(None)), rows)
    low = uniform_rows(40, 512, 50_257, 3, slice(None)) < (1 << 16) - 50_257  # a draw of 16 bits would be there twice
    assert abs(low.mean() - ((1 << 16) - 50_257) / 50_257) < 0.02


REFUSED = [
    ({"export.method": "gptq", "train.quantise": "always"}, "trains their stored form, which is never rounded again"),
    (
        {"export.method": "gptq", "train.quantise": "late"},
        "export.method=gptq rounds weights after training, but train",
    ),
    ({"export.fit": True, "train.quantise": "always"}, "export.fit rounds weights after training, but train.quantise"),
    (
        {"export.method": "gptq", "model.matrix_storage": "ternary/64", "model.embedding.storage": "float16"},
        "export.method=gptq is for matrices in int storages, of which the model has none: take export.method=round",
    ),
]


@pytest.mark.parametrize(("settings", "line"), REFUSED)
def test_weights_that_cannot_be_rounded_so_are_refused(settings: dict[str, Any], line: str) -> None:
    sound = changed(mini("debug"), {"model.matrix_storage": "int6/row"})
    changed(sound, {"export.method": "gptq"})
    with pytest.raises(ConfigError, match=line):
        changed(sound, settings)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"method": "gptq", "damping": 0.0}, "export.damping=0.0: expected from 1e-6 to 1"),
        ({"method": "gptq", "damping": 1.5}, "export.damping=1.5: expected from 1e-6 to 1"),
        ({"method": "gptq", "calibration_tokens": 0}, "export.calibration_tokens=0: expected at least 1"),
        ({"method": "gptq", "calibration_tokens": 1 << 25}, "export.calibration_tokens=33554432: expected at most"),
        ({"calibration": "self"}, "export.calibration=self changes nothing with export.method=round: leave it out"),
        ({"damping": 0.1}, "export.damping=0.1 changes nothing with export.method=round"),
        ({"calibration_tokens": 5}, "export.calibration_tokens=5 changes nothing with export.method=round"),
    ],
)
def test_settings_without_a_use_are_refused(settings: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        ExportConfig(**settings)


def bits(values: np.ndarray | None) -> bytes | None:
    return None if values is None else values.tobytes()


@pytest.mark.parametrize("factor", [1.0, 0.7, 2.5])
def test_steps_of_another_factor_are_those_of_other_deviations(factor: float) -> None:
    """What an engine stores whose settings say so, bit for bit; at 1 nothing changes."""
    config = changed(mini("debug"), {"model.matrix_storage": "int6/row", "model.embedding.storage": "int7/64"})
    given, weights = {"mlp": 11.5, "table": 14.0}, working_weights(config.model, 3.0)
    ours, theirs = (
        engine("cuda", changed(config, {f"model.deviations.{n}": f * k for n, k in given.items()}), weights)
        for f in (1.0, factor)
    )
    table = param_table(changed(config.model, {f"deviations.{n}": k for n, k in given.items()}))
    made, expected = stepped(ours.quantised(), ours.weights(), table, factor), theirs.quantised()
    for name, stored in expected.items():
        assert made[name].codes.tobytes() == stored.codes.tobytes() and made[name].codes.dtype == stored.codes.dtype
        assert bits(made[name].scales) == bits(stored.scales)


def test_a_fitted_artifact_fills_the_budget(place: Path, tmp_path: Path, capsys: Capture) -> None:
    """Artifact and code end below it by less than 0.2 %; what was scored is what lies there; the factor is recorded."""
    deviations = ("--model.deviations.mlp", "8", "--model.deviations.attention", "8", "--model.deviations.table", "9")
    storage = ("--model.matrix-storage", "int6/row", "--model.embedding.storage", "int7/row", "--train.steps", "2")
    place_of = ("--data.path", str(place / "data"), "--out", str(tmp_path / "run"), "--backend", "cuda")
    assert main([*SHORT, *storage, *deviations, *place_of]) == 0
    run, code = Run.open(tmp_path / "run"), max(packed_code().values())
    before = (run.path / "artifact.skc").stat().st_size
    for budget, method in ((code + round(0.9 * before), "round"), (code + round(1.05 * before), "gptq")):
        settings = json.loads((run.path / "config.json").read_text())
        settings["export"] |= {"budget": budget, "code_bytes": 100}
        (run.path / "config.json").write_text(json.dumps(settings))
        capsys.readouterr()
        assert main(["export", str(run.path), "--fit", "--method", method, "--backend", "cuda"]) == 0
        said, size = capsys.readouterr().out, (run.path / "artifact.skc").stat().st_size
        assert 0.998 * budget <= size + code <= budget and not list(run.path.glob("*.trial"))
        artifact = read_artifact(run.path / "artifact.skc")
        factor = artifact.provenance["step_factor"]
        assert f"steps x {factor:.4f} give {size:,} of {budget - code:,} bytes" in said
        assert run.last("final/artifact")["bytes"] == size and artifact.provenance.get("method", "round") == method
        made = trained(run, "cuda")
        plain = stepped(made.quantised(), made.weights(), param_table(run.config.model), float(factor))
        same = [stored.codes.tobytes() == plain[name].codes.tobytes() for name, stored in artifact.stored.items()]
        assert all(same) == (method == "round")
        assert all(bits(stored.scales) == bits(plain[name].scales) for name, stored in artifact.stored.items())


def test_a_budget_that_the_code_alone_is_over_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core.verbs.export, "packed_code", lambda: {"cuda": 178_000, "mlx": 177_000})
    asked, small = Export("RUN", fit=True), ExportConfig(budget=178_000, code_bytes=100)
    with pytest.raises(ConfigError, match="code takes 178,000 bytes, packed as the audit counts it, and export.budget"):
        _asked(small, asked)
    assert _asked(dataclasses.replace(small, budget=178_001), asked).code_bytes == 178_000


def test_what_has_no_deviations_is_not_fitted(place: Path, capsys: Capture) -> None:
    line = refuse(capsys, "export", str(place / "timed"), "--fit", "--backend", "cuda")
    assert "export.fit changes steps that are so many deviations, and the model has none: set model.deviations" in line
