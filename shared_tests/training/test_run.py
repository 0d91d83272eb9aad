"""The loop and the run folder, with a numpy model that really learns: resume, kills, damage, clock. Budget: 30 s."""

import dataclasses
import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import core.training.loop
import core.training.run
from core.data.bundled import open_data
from core.data.dataset import Dataset
from core.model.params import param_table, start_values
from core.training.loop import NonFiniteError, train, warm_up
from core.training.run import METRICS, Run, RunError
from shared_tests.support.numpy_runs import BigramEngine, config_of, go, start


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    """The bundled text."""
    return open_data("sample")


def timeless(run: Run) -> list[dict[str, Any]]:
    """Return the metrics without what the clock says."""
    return [{k: v for k, v in row.items() if not k.startswith(("perf/", "clock/"))} for row in run.metrics()]


def assert_same(ours: Run, theirs: Run) -> None:
    """Two finished runs have the same bits and the same records."""
    a, b = ours.checkpoint(), theirs.checkpoint()
    assert a and b and a.step == b.step
    for left, right in ((a.params, b.params), (a.optimizer, b.optimizer)):
        assert left.keys() == right.keys()
        assert all(left[name].tobytes() == right[name].tobytes() for name in left)
    assert timeless(ours) == timeless(theirs)


@pytest.fixture(scope="module")
def whole(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that nothing interrupted."""
    return go(tmp_path_factory.mktemp("runs") / "whole", config_of(), dataset)


def test_a_run_learns_and_records_what_happened(whole: Run, dataset: Dataset) -> None:
    rows = whole.metrics()
    train_rows = [row for row in rows if "train/loss" in row]
    assert [row["step"] for row in train_rows] == [5, 7, 9, 10, 14, 15, 18, 20, 21, 24]
    assert [row["step"] for row in rows if "val/bpb" in row] == [9, 18]
    assert train_rows[-1]["train/loss"] < train_rows[0]["train/loss"] - 0.5
    vals = [row["val/bpb"] for row in rows if "val/bpb" in row]
    assert vals[1] < vals[0] - 0.1
    assert train_rows[-1]["progress"] == 1.0 and train_rows[1]["progress"] == 7 / 24
    assert all(row.keys() - {"step"} <= METRICS.keys() for row in rows)
    last = whole.checkpoint()
    assert last and last.step == 24 and 0 < last.seconds < 60
    counts = dataset.manifest["splits"]["train"]
    nats = train_rows[-1]["train/loss"] * counts["tokens"]
    assert train_rows[-1]["train/bpb"] == pytest.approx(
        nats / np.log(2) / counts["table_bytes"]
    )  # the rule of the score


@pytest.mark.parametrize("stop", [3, 12, 23])
def test_an_interrupted_run_goes_on_bit_for_bit(stop: int, whole: Run, dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "run", config_of(), dataset, stop_step=stop)
    saved = Run.open(tmp_path / "run").checkpoint()
    assert (saved.step if saved else 0) == stop // 7 * 7
    assert_same(go(tmp_path / "run", config_of(), dataset), whole)


def test_a_killed_process_goes_on_bit_for_bit(whole: Run, dataset: Dataset, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from core.data.dataset import open_dataset\n"
        "from shared_tests.support.numpy_runs import config_of, go\n"
        "go(Path(sys.argv[1]), config_of(), open_dataset(sys.argv[2]), hang_step=9)"
    )
    path = tmp_path / "run"
    process = subprocess.Popen([sys.executable, "-c", code, str(path), dataset.path])
    checkpoint, deadline = path / "state" / "checkpoint.safetensors", time.monotonic() + 300
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    saved = Run.open(path).checkpoint()
    assert saved and saved.step == 7
    assert_same(go(path, config_of(), dataset), whole)


def test_a_finished_run_is_not_trained_again(whole: Run, dataset: Dataset) -> None:
    before = whole.metrics()
    run, engine = start(whole.path, whole.config, dataset)
    summary = train(run, engine, dataset, lambda line: None)
    assert summary.steps == 24 and engine.started == [] and run.metrics() == before


def test_a_line_that_a_kill_cut_short_is_dropped(dataset: Dataset, tmp_path: Path) -> None:
    run = go(tmp_path / "run", config_of(steps=7), dataset)
    rows = run.metrics()
    with open(run.metrics_path, "a") as file:
        file.write('{"step": 7, "train/lo')
    assert run.metrics() == rows
    run.log(7, {"val/bpb": 1.5})  # a verb that does not restore, such as export
    assert run.metrics() == [*rows, {"step": 7, "val/bpb": 1.5}]
    with open(run.metrics_path, "a") as file:
        file.write('{"step": 7, "train/lo')
    rows = run.metrics()
    engine: Any = BigramEngine(run.config)
    run.restore(engine)
    assert run.metrics_path.read_text().endswith("}\n") and run.metrics() == rows
    with open(run.metrics_path, "a") as file:
        file.write("oops\n")
    with pytest.raises(RunError, match=r"metrics\.jsonl:\d+: not JSON"):
        run.metrics()


def test_a_bad_step_is_named_and_not_saved(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match="step 12: the loss"):
        go(tmp_path / "run", config_of(), dataset, bad_step=12)
    saved = Run.open(tmp_path / "run").checkpoint()
    assert saved and saved.step == 7
    assert max(row["step"] for row in Run.open(tmp_path / "run").metrics()) <= 10


def test_a_step_that_overflows_float16_is_left_out_and_said(dataset: Dataset, tmp_path: Path) -> None:
    """Ten in a row end the run, whether or not a line comes between them, and so does one in another type."""
    lines: list[str] = []
    run, engine = start(tmp_path / "run", config_of(), dataset, overflows=(3, *range(5, 14)), dtype="float16")
    assert train(run, engine, dataset, lines.append).steps == 24
    said = [line for line in lines if "overflowed float16" in line]
    assert said == [
        f"left the weights as they were, since gradients overflowed float16, in step {steps}"
        for steps in ("3", "5, 6", "7, 8", "9", "10, 11, 12, 13")
    ]  # lines: at 5, 7 (a checkpoint), 9 (an estimate), 10, 14
    norms = {row["step"]: "train/grad_norm" in row for row in run.metrics() if "train/loss" in row}
    assert norms[5] and not norms[10], "a line of no update has no norm"
    with pytest.raises(NonFiniteError, match=r"step 14: .* \(norm inf\) .* learning rate, or --dtype float32$"):
        go(tmp_path / "ten", config_of(), dataset, overflows=range(5, 15), dtype="float16")
    with pytest.raises(NonFiniteError, match="step 3: .* learning rate$"):
        go(tmp_path / "wide", config_of(), dataset, overflows=(3,))
    with pytest.raises(NonFiniteError, match="step 12: the loss"):
        go(tmp_path / "loss", config_of(), dataset, bad_step=12, dtype="float16")


def test_warm_up_leaves_no_trace() -> None:
    engine: Any = BigramEngine(config_of())
    params, optimizer = engine.params(), engine.optimizer()
    warm_up(engine, config_of())
    assert engine.started == [0]
    assert all(np.array_equal(engine.params()[name], value) for name, value in params.items())
    assert all(np.array_equal(engine.optimizer()[name], value) for name, value in optimizer.items())


def test_warm_up_compiles_with_and_without_repeated_layers() -> None:
    config = config_of()
    model = dataclasses.replace(config.model, repeat_layers=(0,))
    config = dataclasses.replace(config, model=model, train=dataclasses.replace(config.train, repeat_from=0.5))
    engine: Any = BigramEngine(config_of())
    step, seen = engine.train_step, []
    engine.train_step = lambda batch, plan: (seen.append(plan.repeat), step(batch, plan))[1]
    warm_up(engine, config)
    assert sorted(seen) == [False, True]


def test_the_clock_counts_training_only(dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(core.training.loop.time, "perf_counter", lambda: now[0])
    config = config_of(seconds=20.0, steps=1000, eval_every=4, save_every=6)
    run, engine = start(tmp_path / "run", config, dataset)
    step, nll, optimizer = engine.train_step, engine.nll, engine.optimizer

    def slow(function: Any, seconds: float) -> Any:
        def call(*arguments: Any) -> Any:
            now[0] += seconds
            return function(*arguments)

        return call

    engine.train_step, engine.nll, engine.optimizer = slow(step, 1.0), slow(nll, 100.0), slow(optimizer, 1000.0)
    summary = train(run, engine, dataset, lambda line: None)
    assert summary.steps == 20 and summary.seconds == pytest.approx(20.0)
    each = [p for row in run.metrics() for p in row.get("progress/each", [])]
    assert each == pytest.approx([s / 20 for s in range(20)])
    rates = {row["perf/step_ms"] for row in run.metrics() if "perf/step_ms" in row}
    assert rates == {1000.0}, "neither evaluation, nor checkpoints, nor the warm-up may look like training"


def test_resume_in_clock_mode_goes_on_from_the_recorded_time(dataset: Dataset, tmp_path: Path) -> None:
    run, engine = start(tmp_path / "run", config_of(seconds=5.0), dataset)
    run.save(engine, 3, 4.999)
    summary = train(run, BigramEngine(run.config), dataset, lambda line: None)  # type: ignore[arg-type]
    assert 3 <= summary.steps <= 5 and summary.seconds >= 5.0


def test_a_full_disk_keeps_the_last_checkpoint(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, engine = start(tmp_path / "run", config_of(), dataset)
    run.save(engine, 3, 1.0)
    engine.values["embed.weight"] += 1

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            run.save(engine, 4, 2.0)
    saved = run.checkpoint()
    assert saved and saved.step == 3 and os.listdir(run.checkpoint_path.parent) == ["checkpoint.safetensors"]
    assert np.array_equal(saved.params["embed.weight"], start_values(run.config.model, run.config.seed)["embed.weight"])


def test_a_checkpoint_holds_the_whole_table(whole: Run) -> None:
    saved = whole.checkpoint()
    assert saved and list(param_table(whole.config.model)) == sorted(
        saved.params, key=list(param_table(whole.config.model)).index
    )
    assert saved.optimizer.keys() == {f"{name}.{slot}" for name in saved.params for slot in ("m", "v")}
