"""A run that stops anywhere, on any backend, and goes on ends in the same bits; kept checkpoints. Budget: 60 s."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import core.training.loop
from core import presets, rng
from core.check.tolerances import P4_FLOAT32, P4_FLOAT64, P5_BPB, relative_rms
from core.cli import main
from core.config import ConfigError, DataConfig, RunConfig, changed
from core.data.batch import Batch
from core.data.batches import Prefetch
from core.data.dataset import Dataset, identity, open_dataset
from core.engine.plan import StepPlan
from core.engine.protocol import Arrays, Engine
from core.export.artifact import read_artifact
from core.training.loop import train
from core.training.run import Run, RunError
from core.training.schedule import plan, progress_by_steps
from shared_tests.support.harness import BACKENDS, engine
from shared_tests.support.killed import everything, fingerprint, small_data, timeless

pytestmark = pytest.mark.pair
Stop = Callable[[Engine], None]


class Stopped(Exception):
    """What ends a run early in these tests."""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Some short documents."""
    return open_dataset(small_data(tmp_path_factory.mktemp("small")))


def go(
    path: Path,
    config: RunConfig,
    dataset: Dataset,
    backend: str,
    *,
    stop: int | None = None,
    stop_line: int | None = None,
    dtype: str = "float32",
) -> tuple[Run, Engine]:
    """Start or resume a run; it stops before step `stop`, or when the line of step `stop_line` is printed."""
    run = Run.create(path, config, dataset.tokenizer.model)
    made = engine(backend, config, dtype=dtype)
    step, passed = made.train_step, len(set(config.train.lengths))  # steps of the warm-up

    def stopping(batch: Batch, plan: StepPlan) -> Any:
        nonlocal passed
        passed -= 1
        if passed < 0 and plan.step == stop:
            raise Stopped
        return step(batch, plan)

    def say(line: str) -> None:
        if line.startswith(f"step {stop_line}/"):
            raise Stopped

    setattr(made, "train_step", stopping)  # noqa: B010
    if stop is None and stop_line is None:
        train(run, made, dataset, say)
    else:
        with pytest.raises(Stopped):
            train(run, made, dataset, say)
    return run, made


def same_bits(ours: Arrays, theirs: Arrays) -> bool:
    """Whether two sets of arrays are equal in every bit."""
    return ours.keys() == theirs.keys() and all(ours[name].tobytes() == theirs[name].tobytes() for name in ours)


def assert_same(ours: Run, theirs: Run) -> None:
    """Two finished runs have the same bits and the same records; names the first record that differs."""
    for left, right in zip(timeless(ours), timeless(theirs), strict=True):
        assert left == right
    a, b = ours.checkpoint(), theirs.checkpoint()
    assert a and b and (a.step, a.quantise) == (b.step, b.quantise)
    assert same_bits(a.params, b.params) and same_bits(a.optimizer, b.optimizer) and fingerprint(a) == fingerprint(b)


def test_the_run_has_everything_on(dataset: Dataset) -> None:
    """The steps that the stops below are about are the steps at which something changes."""
    settings = everything(dataset.path).train
    plans = [plan(step, progress_by_steps(step, settings), settings) for step in range(settings.steps)]
    assert [p.seq for p in plans] == [8] * 4 + [16] * 4 + [32] * 8
    assert [p.average > 0 for p in plans] == [False] * 7 + [True] * 9
    assert [p.quantise for p in plans] == [False] * 9 + [True] * 7
    falling = [step for step in range(1, 16) if plans[step].lr_matrix < plans[step - 1].lr_matrix]
    assert falling[0] < 8 and falling[-1] > 10, "quantisation switches on in the middle of the warm-down"
    assert len({p.momentum for p in plans[:11]}) == 11 and settings.matrix_rule == "muon"


# Stops and resumes on one backend.


@pytest.fixture(scope="module", params=BACKENDS)
def whole(request: pytest.FixtureRequest, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run that nothing stopped, with estimates on its way, its engine and its backend."""
    config = everything(dataset.path, eval_every=6, log_every=5)
    return *go(tmp_path_factory.mktemp("whole") / "run", config, dataset, request.param), request.param


def test_a_run_may_stop_before_every_step(whole: Any, dataset: Dataset, tmp_path: Path) -> None:
    """16 resumes, at every step of every stage."""
    config = everything(dataset.path, save_every=1, keep_every=6)
    ours, theirs = tmp_path / "stopping", tmp_path / "calm"
    calm, reference = go(theirs, config, dataset, whole[2])
    for step in range(1, config.train.steps):
        run, _ = go(ours, config, dataset, whole[2], stop=step)
        saved = run.checkpoint()
        assert saved and saved.step == step
    run, made = go(ours, config, dataset, whole[2])
    assert_same(run, calm)
    assert same_bits(made.optimizer(), reference.optimizer()) and same_bits(made.weights(), reference.weights())
    saved, other = run.checkpoint(), whole[0].checkpoint()
    assert saved and fingerprint(saved) == fingerprint(other), "how often it is saved and judged changes nothing"
    assert run.kept() == [6, 12]


@pytest.mark.parametrize("stops", [(3, 6), (5, 12), (9, 15)])
def test_a_run_may_stop_between_checkpoints(
    stops: tuple[int, int], whole: Any, dataset: Dataset, tmp_path: Path
) -> None:
    """Once before a step, then when a line is printed; the steps since the checkpoint are done again."""
    config = whole[0].config
    run, _ = go(tmp_path, config, dataset, whole[2], stop=stops[0])
    saved = run.checkpoint()
    assert saved and saved.step == stops[0] // 2 * 2
    run, _ = go(tmp_path, config, dataset, whole[2], stop_line=stops[1])
    saved = run.checkpoint()
    assert saved and saved.step == (stops[1] - 1) // 2 * 2, "the line of a step is printed before it is saved"
    run, made = go(tmp_path, config, dataset, whole[2])
    assert_same(run, whole[0])
    assert same_bits(made.weights(), whole[1].weights())
    _, again = go(tmp_path, config, dataset, whole[2])  # trains nothing: what it scores is what was saved
    assert same_bits(again.weights(), made.weights()) and again.quantise
    assert_same(run, whole[0])


def forget(*slots: str) -> Callable[[pytest.MonkeyPatch], None]:
    """Return a planted fault: a checkpoint that loses these slots of the optimizer."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        honest = Run.checkpoint

        def lossy(run: Run, step: int | None = None) -> Any:
            saved = honest(run, step)
            lost = {n: v * 0 if n.endswith(slots) else v for n, v in saved.optimizer.items()} if saved else {}
            return saved and saved._replace(optimizer=lost)

        patch.setattr(Run, "checkpoint", lossy)

    return plant


def start_data_again(patch: pytest.MonkeyPatch) -> None:
    """Plant a data order that starts from its beginning when a run is resumed."""

    def again(make: Callable[[int, int, int], Batch], first: int, *shape: int) -> Prefetch:
        return Prefetch(lambda tokens, *shape: make(tokens - first, *shape), first, *shape)

    patch.setattr(core.training.loop, "Prefetch", again)


@pytest.mark.parametrize(
    "plant", [forget(".ema"), forget("weight.m"), forget(".v"), start_data_again], ids=["average", "m", "v", "data"]
)
def test_a_resume_that_forgets_is_noticed(
    plant: Callable[[pytest.MonkeyPatch], None],
    whole: Any,
    dataset: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    go(tmp_path, whole[0].config, dataset, whole[2], stop=10)
    with monkeypatch.context() as patch:
        plant(patch)
        run, _ = go(tmp_path, whole[0].config, dataset, whole[2])
    with pytest.raises(AssertionError):
        assert_same(run, whole[0])


# From one backend to the other.


def losses(run: Run) -> np.ndarray:
    """Return the loss of every step."""
    return np.array([row["train/loss"] for row in run.metrics() if "train/loss" in row])


EXCHANGES = [("mlx", "cuda", "mlx"), ("cuda", "mlx", "cuda")]


@pytest.mark.parametrize("order", EXCHANGES, ids="-".join)
@pytest.mark.parametrize(
    "dtype, limit, changes",
    [("float64", P4_FLOAT64, {}), ("float32", P4_FLOAT32, {"quantise": "never"})],
    ids=["ternary", "float"],
)
def test_a_run_moves_to_the_other_backend_and_back(
    order: Sequence[str], dtype: str, limit: float, changes: dict[str, Any], dataset: Dataset, tmp_path: Path
) -> None:
    config = everything(dataset.path, **changes)
    alone, _ = go(tmp_path / "alone", config, dataset, order[1], dtype=dtype)
    moved = alone
    for backend, stop in zip(order, (5, 11, None), strict=True):
        moved, _ = go(tmp_path / "moved", config, dataset, backend, stop=stop, dtype=dtype)
    assert len(losses(moved)) == 16 and np.abs(losses(moved) - losses(alone)).max() <= limit
    a, b = moved.checkpoint(), alone.checkpoint()
    assert a and b
    for ours, theirs in ((a.params, b.params), (a.optimizer, b.optimizer)):
        assert max(relative_rms(ours[name], theirs[name]) for name in theirs) <= limit


def test_switches_and_noise_go_on_on_the_other_backend(dataset: Dataset, tmp_path: Path) -> None:
    """Experts, repeats at every third step, an untied head and noise: what is on follows from the step alone."""
    model = {
        "layers": 2, "repeat_layers": (1,), "feedback.width": 3, "experts.count": 3, "experts.hidden": 8,
        "experts.shared": 4, "experts.start": 0.5, "head.untied": True, "bank.at": "head", "bank.heads": 2,
        "bank.capsules": 3, "skc.block": 4,
    }  # fmt: skip
    settings = {
        "quantise": "always", "repeat_from": 0.2, "repeat_every": 3, "route_from": 0.4, "untie_from": 0.6, "quiet": 0.2,
        "depth_drop": 0.3, "ternary_noise": 0.2, "consistency": 0.01, "batch_stages": (2,), "batch_until": (0.3,),
        "micro_batch": 2, "warmdown": 0.4, "save_every": 4, "seq_stages": (), "seq_until": (),
    }  # fmt: skip
    both = (("model", model), ("train", settings))
    more = {f"{part}.{name}": value for part, values in both for name, value in values.items()}
    config = changed(everything(dataset.path), more)
    plans = [plan(step, progress_by_steps(step, config.train), config.train) for step in range(16)]
    assert [step for step, now in enumerate(plans) if now.repeat] == [3, 6, 9, 12, 15]
    assert [[now.route for now in plans].index(True), [now.untie for now in plans].index(1.0)] == [6, 9]
    alone, _ = go(tmp_path / "alone", config, dataset, "cuda", dtype="float64")
    for backend, stop in (("cuda", 5), ("mlx", 11), ("cuda", None)):
        moved, _ = go(tmp_path / "moved", config, dataset, backend, stop=stop, dtype="float64")
    assert len(losses(moved)) == 16 and np.abs(losses(moved) - losses(alone)).max() <= P4_FLOAT64
    a, b = moved.checkpoint(), alone.checkpoint()
    assert a and b and all(relative_rms(a.params[name], b.params[name]) <= P4_FLOAT64 for name in b.params)


# Kept checkpoints.


def tell(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    """Run a verb with --json and return its object."""
    capsys.readouterr()
    assert main([*argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refuse(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Run a verb that must refuse with exit code 2 and return its one line."""
    capsys.readouterr()
    assert main(list(argv)) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.out == "", captured
    return captured.err


def test_kept_checkpoints_are_the_run_at_that_step(whole: Any, dataset: Dataset, tmp_path: Path) -> None:
    run, _, backend = whole
    names = {file.name for file in run.checkpoint_path.parent.iterdir()}
    assert names == {"checkpoint.safetensors", "step-6.safetensors", "step-12.safetensors"} and run.kept() == [6, 12]
    for step, stop in ((6, 7), (12, 13)):
        then, _ = go(tmp_path, run.config, dataset, backend, stop=stop)
        saved, kept = then.checkpoint(), run.checkpoint(step)
        assert saved and kept and saved.step == kept.step == step and fingerprint(saved) == fingerprint(kept)
        assert kept.quantise is (step > 9)
    last = run.checkpoint()
    assert last and run.checkpoint(16) is not None and fingerprint(run.checkpoint(16)) == fingerprint(last)


def test_a_kept_checkpoint_is_scored_sampled_and_stored(
    whole: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was kept of these steps gives the estimates that the run made there."""
    run, _, backend = whole
    estimates = {row["step"]: row["val/bpb"] for row in run.metrics() if "val/bpb" in row}
    assert estimates.keys() == {6, 12}
    path = str(shutil.copytree(run.path, tmp_path / "run"))
    for step, bpb in estimates.items():
        found = tell(capsys, "eval", path, "--step", str(step), "--backend", backend)
        assert found["step"] == step and abs(found["score"]["bpb"] - bpb) <= P5_BPB
    text = tell(capsys, "sample", path, "--step", "6", "--tokens", "3", "--backend", backend)["samples"][0]["text"]
    assert isinstance(text, str)
    value = tell(capsys, "export", path, "--step", "12", "--backend", backend)
    assert value["step"] == 12 and abs(value["score"]["bpb"] - estimates[12]) <= P5_BPB
    assert value["artifact"]["gap"] == 0.0
    assert read_artifact(Path(path) / "artifact-step-12.skc").provenance["step"] == 12
    assert (Path(path) / "metrics.jsonl").read_bytes() == run.metrics_path.read_bytes(), "the run's results stay"
    tell(capsys, "export", path, "--backend", backend)
    for verb in ("eval", "sample", "export"):
        assert "has no checkpoint of step 7; it has 6, 12, 16\n" in refuse(capsys, verb, path, "--step", "7")
    assert "is an artifact" in refuse(capsys, "eval", f"{path}/artifact.skc", "--step", "6")


# What cannot be resumed.


@pytest.fixture
def begun(dataset: Dataset, tmp_path: Path) -> Run:
    """A debug run on the small data, with a checkpoint of step 2."""
    base = presets.get("debug").config
    config = dataclasses.replace(base, data=DataConfig(dataset.path))
    run = Run.create(tmp_path / "begun", config, dataset.tokenizer.model, identity(dataset))
    run.record_environment({"data": identity(dataset)})
    run.save(engine("cuda", config), 2, 1.0)
    return run


@pytest.mark.parametrize(
    "changes, message",
    [
        (("--seed", "4"), "other settings (seed: 1337 -> 4): choose another --out, or repeat them"),
        (("--model.layers", "1"), "(model.layers: 2 -> 1)"),
        (("--model.mlp.activation", "leaky_relu2", "--train.lr_matrix", "1"), "train.lr_matrix: 0.003 -> 1.0)"),
        (("--train.quantise", "late"), "(train.quantise: 'never' -> 'late')"),
        (("--data.path", "OTHER"), "other data than when it began (sha256: '"),
    ],
    ids=["seed", "model", "two", "quantise", "data"],
)
def test_another_run_is_refused_in_one_line(
    changes: Sequence[str], message: str, begun: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [small_data(tmp_path, 299) if word == "OTHER" else word for word in changes]
    command = ("train", "debug", "--backend", "cuda", "--data.path", begun.config.data.path, "--out", str(begun.path))
    for _ in range(2):
        before = {file: file.read_bytes() for file in begun.path.rglob("*") if file.is_file() and file.name != "lock"}
        assert message in refuse(capsys, *command, *given)
        assert before == {
            file: file.read_bytes() for file in begun.path.rglob("*") if file.is_file() and file.name != "lock"
        }
        # The same where only a kept checkpoint is left: it too belongs to the settings of the run.
        if begun.checkpoint_path.exists():
            begun.checkpoint_path.rename(begun.kept_path(2))


def test_a_moved_text_is_the_same_text(begun: Run, tmp_path: Path) -> None:
    """A run goes on with its data in another folder, unless nothing is there to say that it is the same."""
    moved = str(shutil.copytree(begun.config.data.path, tmp_path / "moved"))
    config = dataclasses.replace(begun.config, data=DataConfig(moved))
    data, tokenizer = identity(open_dataset(moved)), begun.tokenizer_path.read_bytes()
    begun.env_path.rename(tmp_path / "env.json")
    with pytest.raises(ConfigError, match="data.path"):
        Run.create(begun.path, config, tokenizer, data)
    (tmp_path / "env.json").rename(begun.env_path)
    run = Run.create(begun.path, config, tokenizer, data)
    assert run.config.data.path == moved and run.checkpoint() is not None


def test_one_flipped_bit_is_refused(begun: Run, capsys: pytest.CaptureFixture[str]) -> None:
    good = begun.checkpoint_path.read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    places = [header, len(good) - 1, *(header + rng.below(0, f"bit/{i}", len(good) - header) for i in range(30))]
    for number, place in enumerate(places):
        begun.checkpoint_path.write_bytes(good[:place] + bytes([good[place] ^ 1 << number % 8]) + good[place + 1 :])
        with pytest.raises(RunError, match=r"checkpoint\.safetensors: skc: sha256: the tensors are not the ones"):
            begun.checkpoint()
    begun.checkpoint_path.rename(begun.kept_path(4))
    assert "step-4.safetensors: skc: sha256: " in refuse(capsys, "eval", str(begun.path), "--step", "4")
    line = refuse(capsys, "eval", str(begun.path), "--step", "5")
    assert "has no checkpoint of step 5; it has 4\n" in line
    begun.kept_path(4).unlink()
    assert "it has none yet\n" in refuse(capsys, "eval", str(begun.path), "--step", "5")
