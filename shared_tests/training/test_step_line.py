"""On a terminal every step of a run is shown, and "compiling" before the first; elsewhere nothing. Budget: 5 s."""

import io
import sys
from collections import deque
from pathlib import Path
from typing import Any

import pytest

import core.training.step_line
from core.console import Console
from core.data.bundled import open_data
from core.training.loop import train
from core.training.step_line import AHEAD
from shared_tests.support.numpy_runs import config_of, start


def shown_by(path: Path, **changes: Any) -> tuple[list[str], list[int], bytes]:
    """Train and return the lines, the steps whose loss was read for them before it was due, and a weight's bytes."""
    dataset = open_data("sample")
    run, engine = start(path, config_of(**changes), dataset)
    under_way, early = deque(maxlen=AHEAD), []
    step = engine.train_step

    def started(batch: Any, plan: Any) -> Any:
        pending = step(batch, plan)
        result = pending.result

        def read() -> Any:
            if (pending in under_way) and sys._getframe(1).f_code.co_filename == core.training.step_line.__file__:
                early.append(plan.step)
            return result()

        pending.result = read
        under_way.append(pending)
        return pending

    engine.train_step = started
    lines: list[str] = []
    train(run, engine, dataset, lambda line: None, lines.append)
    return lines, early, engine.params()["embed.weight"].tobytes()


def test_every_step_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core.training.step_line, "EVERY", 0.0)
    lines, early, weight = shown_by(tmp_path / "run")
    assert lines[0].startswith("compiling: a step of ") and lines[1] == "step 1/24: under way"
    assert [line.partition(":")[0] for line in lines[2:]] == [f"step {step}/24" for step in range(1, 25)]
    assert not early, "reading the loss of a step that may be under way would stall the device"
    assert ["loss" in line for line in lines[2:6]] == [False, False, True, True]
    assert all(" tok/s, " in line and line.endswith(" left") for line in lines[2:])
    silent, engine = start(tmp_path / "silent", config_of(), dataset := open_data("sample"))
    train(silent, engine, dataset, lambda line: None)
    assert engine.params()["embed.weight"].tobytes() == weight


def test_lines_that_nobody_could_read_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core.training.step_line, "EVERY", 3600.0)
    lines, _, _ = shown_by(tmp_path / "run")
    assert [line.partition(":")[0] for line in lines] == ["compiling", "step 1/24", "step 1/24"]


def test_the_time_left_is_the_clocks_where_the_clock_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core.training.step_line, "EVERY", 0.0)
    lines: list[str] = []
    seconds = iter([0.0, 2.0, 4.0])
    settings = config_of(seconds=10.0, steps=1000).train
    line = core.training.step_line.StepLine(settings, lambda: next(seconds), 0, 0, lines.append)
    for step in (1, 2):
        line(step, 300 * step, None)  # type: ignore[arg-type]
    assert lines[-1].endswith(" 150 tok/s, 6s left")


@pytest.mark.parametrize("terminal", [True, False])
def test_only_a_terminal_has_the_line(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(sys, "stdout", stream)
    say = Console()
    say.moving("step 3/9: 10 tok/s")
    say.clear()
    assert ("step 3/9" in stream.getvalue()) is terminal
