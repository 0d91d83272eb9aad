"""The loss as a picture in a terminal, memory in the moving line, and what comes next. Budget: 10 s."""

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyte
import pytest

import core.training.step_line
from core.cli import VERBS, _parse, main
from core.config import MOST_STEPS
from core.console import Console
from core.training.loss_plot import BRAILLE, HIGH, MARGIN, Letters, LossPlot, draw, letters_for
from core.training.step_line import StepLine, of_steps
from core.verbs.train import next_commands
from shared_tests.support.command_line import SHORT, Capture
from shared_tests.support.numpy_runs import config_of

DOTS, STARS = Letters(2, 4, True), Letters(1, 1, False)


def dots_of(lines: list[str], letters: Letters, wide: int) -> np.ndarray:
    """Return the dots of a picture, (rows, columns), read back from its letters."""
    found = np.zeros((len(lines) * letters.down, wide * letters.across), bool)
    for row, line in enumerate(lines):
        for column, letter in enumerate(line[MARGIN:]):
            bits = (ord(letter) - 0x2800 if letters.braille else 1) if letter != " " else 0
            cell = np.array(BRAILLE) & bits if letters.braille else np.array([[bits]])
            place = found[row * letters.down :, column * letters.across :]
            place[: letters.down, : letters.across] = cell > 0
    return found


@pytest.mark.parametrize("letters", [DOTS, STARS])
def test_the_picture_is_the_curve(letters: Letters) -> None:
    steps, losses, wide = np.array([10, 20, 30, 50]), np.array([7.0, 5.0, 6.0, 3.0]), 30
    lines = draw(steps, losses, wide, HIGH, letters)
    assert len(lines) == HIGH + 1 and lines[0].startswith("   7.000 ") and lines[-2].startswith("   3.000 ")
    assert lines[-1].split() == ["step", "10", "50"] and all(len(line) <= MARGIN + wide for line in lines)
    dots = dots_of(lines[:-1], letters, wide)
    rows, columns = dots.shape
    curve = np.interp(np.linspace(10, 50, columns), steps, losses)
    heights = (7.0 - curve) / 4.0 * (rows - 1)
    assert dots.any(0).all(), "no gaps"
    nearest = np.array([np.abs(np.flatnonzero(dots[:, i]) - heights[i]).min() for i in range(columns)])
    assert nearest.max() <= 0.5
    assert dots.sum() < 3 * max(rows, columns), "a line, not a surface"
    assert dots[0, 0] and dots[-1, -1] and not dots[0, -1]


def test_a_flat_curve_and_one_of_few_points() -> None:
    assert draw(np.array([1, 2]), np.array([2.0, 2.0]), 8, 2, STARS)[0] == "   2.000 ********"
    plot = LossPlot(STARS, lambda *_: None)
    plot.row(1, {"train/loss": 3.0})
    plot.row(1, {"val/bpb": 3.0})
    assert plot.lines() == []
    plot.row(2, {"train/loss": 2.0})
    assert len(plot.lines()) == HIGH + 1


def test_letters_are_those_of_the_terminal() -> None:
    assert letters_for("utf-8") == DOTS
    assert letters_for("ascii") == letters_for("latin-1") == letters_for("nonsense") == letters_for(None) == STARS


class Terminal(io.StringIO):
    """A stream that says that it is a terminal, of an encoding."""

    encoding = "utf-8"  # pyright: ignore[reportAssignmentType]

    def isatty(self) -> bool:
        """Return True."""
        return True


def test_a_run_draws_while_it_trains_and_at_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(core.training.step_line, "EVERY", 0.0)
    for name, value in {"TERM": "xterm", "COLUMNS": "100", "LINES": "60"}.items():
        monkeypatch.setenv(name, value)
    stream = Terminal()
    monkeypatch.setattr(sys, "stdout", stream)
    argv = ["train", "debug", *SHORT[:-1], "mlx", "--train.log-every", "1", "--plot"]
    moving: list[tuple[str, list[str]]] = []
    show = Console.moving

    def shown(self: Console, line: str, below: Any = ()) -> None:
        moving.append((line, list(below)))
        show(self, line, below)

    monkeypatch.setattr(Console, "moving", shown)
    assert main([*argv, "--out", str(tmp_path / "run")]) == 0
    assert moving[-1][0].startswith("step 6/6") and len(moving[-1][1]) == HIGH + 1
    assert moving[0][1] == [] and " at most (arrays), " in moving[-1][0]
    screen = pyte.Screen(100, 300)
    pyte.Stream(screen).feed(stream.getvalue().replace("\n", "\r\n"))
    last = max(i for i, line in enumerate(screen.display) if line.split()[:2] == ["step", "1"])
    picture = [line.rstrip() for line in screen.display[last - HIGH : last + 1]]
    assert picture[-1].split() == ["step", "1", "6"] and any(letter > "\u2800" for letter in picture[1])
    for letters in (picture, (tmp_path / "run" / "log.txt").read_text().splitlines()):
        assert sum(line.split() == ["step", "1", "6"] for line in letters) == 1


def test_nothing_is_drawn_where_nobody_sees_it(tmp_path: Path, capsys: Capture) -> None:
    assert main(["train", "debug", *SHORT[:-1], "mlx", "--plot", "--out", str(tmp_path / "a run")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "--plot draws on a terminal only; curve.png will have the losses" in lines
    assert not any("\u2800" <= letter < "\u2900" for line in lines for letter in line)
    following = [line.removeprefix("next: ") for line in lines if line.startswith("next: ")]
    assert lines[-len(following) :] == [f"next: {command}" for command in following]
    assert following[0] == f"skc sample '{tmp_path}/a run'"


def test_every_next_command_is_one() -> None:
    import shlex

    commands = next_commands(Path("runs/it's mine"), VERBS)
    assert len(commands) == 3 and next_commands(Path("runs/x"), ()) == []
    for command in commands:
        program, verb, *words = shlex.split(command)
        assert program == "skc" and words[0].startswith("runs/it's mine")
        options = _parse(verb, words)
        assert getattr(options, "path", None) == words[0] or options.paths == (words[0],)


def test_the_moving_line_has_memory_and_steps() -> None:
    told: list[str] = []
    for stats in ({"peak_bytes": 2.5e9, "active_bytes": 1.0}, {"process_bytes": 3e8, "traces": 1.0}, {"traces": 0.0}):
        line = StepLine(config_of().train, lambda: 1.0, 0, 0, told.append, lambda stats=stats: stats)
        line(1, 300, None)  # type: ignore[arg-type]
    endings = [line.partition("tok/s, ")[2].rpartition(", ")[0] for line in told[1::2]]
    assert endings == ["2.5 GB at most (arrays)", "0.3 GB at most (process)", ""]
    assert of_steps(3, config_of(steps=9).train) == "step 3/9"
    assert of_steps(3, config_of(steps=MOST_STEPS, seconds=9.0).train) == "step 3", "only the clock ends it"
