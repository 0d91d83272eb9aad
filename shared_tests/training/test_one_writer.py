"""One writer per run folder; stopped by a signal; checkpoints by the minute; a finished run. Budget: 15 s."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import core.training.loop
from core.cli import main
from core.data.batch import Batch
from core.data.bundled import open_data
from core.data.dataset import Dataset
from core.engine.plan import StepPlan
from core.engine.ranks import Stopped
from core.training.loop import train
from core.training.run import Run, RunError
from core.training.writer import hold
from shared_tests.support.command_line import SHORT, call
from shared_tests.support.hostile import contents
from shared_tests.support.numpy_runs import BigramEngine, Done, config_of, go, start


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    """The bundled text."""
    return open_data("sample")


def test_a_second_writer_touches_nothing(dataset: Dataset, tmp_path: Path) -> None:
    run = go(tmp_path / "run", config_of(steps=2), dataset)
    with hold(run.path):
        (run.path / ("metrics.jsonl." + "0" * 16 + ".tmp")).write_text("the first writer's")
        before = contents(run.path)
        for command in (
            ["train", "debug", "--out", str(run.path)], ["export", str(run.path)], ["track", str(run.path)],
        ):  # fmt: skip
            assert main(command) == 2
        with pytest.raises(RunError, match="another process writes into it"), hold(run.path):
            raise AssertionError("two hold it")
        assert contents(run.path) == before
    with hold(run.path):
        assert not list(run.path.glob("*.tmp")), "what killed writers left is swept by the next"


def test_a_killed_writer_holds_nothing(tmp_path: Path) -> None:
    program = "import os, sys; from core.training.writer import hold\nwith hold(sys.argv[1]): os.kill(os.getpid(), 9)"
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "run")], timeout=300)
    assert done.returncode == -signal.SIGKILL and (tmp_path / "run" / "lock").exists()
    with hold(tmp_path / "run"):
        pass


def test_no_lock_is_left_where_something_else_is(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(RunError, match="is not a run"), hold(tmp_path):
        pass
    assert os.listdir(tmp_path) == ["mine.txt"]


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A job that a shell starts in the background has SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Signalled(BigramEngine):
    """Gets a signal, as from a user, while it takes its n-th step."""

    def __init__(self, config: Any, at: int, *numbers: signal.Signals) -> None:
        super().__init__(config)
        self.at, self.numbers = at, numbers

    def train_step(self, batch: Batch, plan: StepPlan) -> Done:
        if plan.step == self.at and len(self.started) > 1:
            for number in self.numbers:
                os.kill(os.getpid(), number)
        return super().train_step(batch, plan)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_run_goes_on_bit_for_bit(
    number: signal.Signals, dataset: Dataset, tmp_path: Path
) -> None:
    whole, handlers = go(tmp_path / "whole", config_of(), dataset), [signal.getsignal(n) for n in (2, 15)]
    run, _ = start(tmp_path / "run", config_of(), dataset)
    engine: Any = Signalled(run.config, 11, number)
    said: list[str] = []
    with pytest.raises(Stopped):
        train(run, engine, dataset, said.append)
    saved = run.checkpoint()
    assert saved and saved.step == 12 and any("saving step 12" in line for line in said)
    assert [signal.getsignal(n) for n in (2, 15)] == handlers, "the signals are given back"
    go(run.path, config_of(), dataset)
    ours, theirs = run.checkpoint(), whole.checkpoint()
    assert ours and theirs and all(np.array_equal(ours.params[n], v) for n, v in theirs.params.items())
    assert all(np.array_equal(ours.optimizer[n], v) for n, v in theirs.optimizer.items())


@pytest.mark.usefixtures("interruptible")
def test_the_last_step_and_a_second_signal(dataset: Dataset, tmp_path: Path) -> None:
    run, _ = start(tmp_path / "last", config_of(steps=6), dataset)
    engine: Any = Signalled(run.config, 5, signal.SIGTERM, signal.SIGTERM)
    with pytest.raises(Stopped):
        train(run, engine, dataset, lambda line: None)
    saved = run.checkpoint()
    assert saved and saved.step == 6
    run, _ = start(tmp_path / "again", config_of(steps=6), dataset)
    engine = Signalled(run.config, 3, signal.SIGINT, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt) as caught:
        train(run, engine, dataset, lambda line: None)
    assert not isinstance(caught.value, Stopped) and run.checkpoint() is None, "the second one does not wait"


def test_another_thread_may_train(dataset: Dataset, tmp_path: Path) -> None:
    thread = threading.Thread(target=go, args=(tmp_path / "run", config_of(steps=2), dataset))
    thread.start()
    thread.join()
    assert Run.open(tmp_path / "run").checkpoint()


@pytest.mark.parametrize("minutes, expected", [(None, [24]), (1.5, [15, 24]), (1.0, [10, 20, 24])])
def test_checkpoints_by_the_minute(
    minutes: float | None, expected: list[int], dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of six seconds; every fifth is logged, and what is saved by the minute adds no line of its own."""
    now = [0.0]
    config = config_of(save_every=None, eval_every=None, save_minutes=minutes)
    run, engine = start(tmp_path / "run", config, dataset)
    step, save, saves = engine.train_step, run.save, []

    def slow(*arguments: Any) -> Any:
        now[0] += 6.0
        return step(*arguments)

    engine.train_step = slow
    monkeypatch.setattr(core.training.loop.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(run, "save", lambda engine, at, *given: (saves.append(at), save(engine, at, *given)))
    train(run, engine, dataset, lambda line: None)
    assert saves == expected
    assert [row["step"] for row in run.metrics()] == [5, 10, 15, 20, 24]


def test_a_finished_run_is_shown_and_scored_again_if_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("train", "debug", *SHORT, "--out", str(tmp_path / "run"))
    first = call(capsys, *command)
    before = contents(tmp_path / "run")
    second = call(capsys, *command)
    assert contents(tmp_path / "run") == before, "nothing is written"
    assert second["already"] and {k: second[k] for k in first if k not in ("seconds", "ok")} == {
        k: v for k, v in first.items() if k not in ("seconds", "ok")
    }
    assert main([*command]) == 0 and "already finished at step 6" in capsys.readouterr().out
    third = call(capsys, *command, "--again")
    assert "already" not in third and third["score"] == first["score"]
    finals = [row for row in Run.open(tmp_path / "run").metrics() if "final/score" in row]
    assert len(finals) == 1, "the earlier score gives way"
    fourth = call(capsys, *command, "--eval.documents", "3")
    assert fourth["score"]["documents"] == 3, "asked for another score, it is made"
    (tmp_path / "run" / "report.md").unlink()
    assert "already" not in call(capsys, *command, "--eval.documents", "3"), "an end that is not whole is made whole"


def test_over_the_budget_ends_with_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("core.verbs.train.check_budget", lambda config: None)
    command = [
        "train",
        "debug",
        *SHORT,
        "--export.budget",
        "41000",
        "--export.code-bytes",
        "40000",
        "--out",
        str(tmp_path / "run"),
    ]
    assert main(command) == 1
    assert main(command) == 1, "shown, it is over the budget too"
    assert "OVER the 1,000" in capsys.readouterr().out
