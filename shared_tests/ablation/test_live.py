"""The table that is seen while an ablation runs, on a terminal that is read back, and its time left. Budget: 25 s."""

import copy
import fcntl
import io
import os
import pty
import re
import signal
import struct
import sys
import termios
import textwrap
from pathlib import Path

import pyte
import pytest

from core.ablation.plan import read_plan
from core.ablation.report import live_table
from core.ablation.report.live_table import Live
from core.ablation.runner import RunnerProgress
from core.ablation.stats.results import Result
from core.ablation.store import Place, RunStore
from core.console import Console
from core.training.run import Run
from shared_tests.support.ablation_runs import PLAN, places, write
from shared_tests.support.killed import small_data

LONG = "a-rather-long-name-of-a-variant+engram+bank"
TWO = PLAN.replace("wide", f'"{LONG}"')
START = """
import sys
from core.ablation import runner
from core.cli import main
runner.run_all.__kwdefaults__["worker"] = (sys.executable, "-m", "shared_tests.support.ablation_worker")
sys.exit(main(sys.argv[1:]))
"""
HEAD = re.compile(r"^\d of \d runs done(, about \w+ left)?$")


class Terminal:
    """What a command shows on a terminal of so many columns, each time that something changes."""

    def __init__(self, arguments: list[str], columns: int, interrupt: str = "") -> None:
        """Run `skc` with the stand-in worker to its end; Ctrl-C is typed when a line has the text `interrupt`."""
        process, terminal = pty.fork()
        if process == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a script's background job has it ignored
            variables = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")}
            variables |= {"TERM": "xterm-256color", "SKC_TEST_STEP": "0.25"}
            os.execve(sys.executable, [sys.executable, "-c", START, *arguments], variables)
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
        self.columns, self.written = columns, b""
        while True:
            try:
                more = os.read(terminal, 1 << 16)
            except OSError:  # Linux's way to say that the other end is closed
                break
            if not more:
                break
            self.written += more
            if interrupt and interrupt.encode() in self.written:
                os.write(terminal, b"\x03")
                interrupt = ""
        os.close(terminal)
        self.code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        self.shots, self.hidden = self.read(self.written)

    def read(self, written: bytes) -> tuple[list[list[str]], bool]:
        """Return the screens that are seen when this is written, before each change, and whether the cursor is lost."""
        screen = pyte.Screen(self.columns, 50)
        stream, shots = pyte.ByteStream(screen), []
        for part in re.split(rb"(?=\x1b\[\?25)|(?=\r\x1b\[2K)", written):
            stream.feed(part)
            shots.append([line.rstrip() for line in screen.display])
        return shots, screen.cursor.hidden


def heads(shot: list[str]) -> int:
    """Return how many first lines of the table a screen shows."""
    return sum(bool(HEAD.match(line)) for line in shot)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """Return a command of four runs, one of them done already, and its store."""
    folder = tmp_path_factory.mktemp("live")
    file = folder / "p.toml"
    file.write_text(textwrap.dedent(TWO).replace("[1, 2, 3, 4]", "[1]"))
    arguments = ["ablate", str(file), "--data", small_data(folder), "--store", str(folder / "store"), "--parallel", "2"]
    return arguments, file


def test_the_table_on_a_terminal(ran: tuple[list[str], Path]) -> None:
    """Step, bits per byte, time left; names give way, figures never; it goes, and the lines said above it stay."""
    arguments, file = ran
    first = Terminal(arguments, 200)
    assert first.code == 0 and not first.hidden
    file.write_text(file.read_text().replace("seeds = [1]", "seeds = [1, 2]"))
    seen = Terminal(arguments, 80)
    assert seen.code == 0 and not seen.hidden
    assert max(map(heads, seen.shots)) == 1 and heads(seen.shots[-1]) == 0, "something of the table was left behind"
    rows = [line.split() for shot in seen.shots for line in shot if re.search(r" 2 +cuda +\d+/10 ", line)]
    assert {row[0] for row in rows} >= {"plain"} and all(re.fullmatch(r"\d+s|-|scoring", row[-1]) for row in rows)
    # a look may come after the first line of metrics: then no run is seen without bits per byte
    assert {"2.0000"} <= {row[-2] for row in rows} <= {"-", "2.0000"} and any(row[-1] != "-" for row in rows)
    assert any(row[0] != LONG and row[0].startswith("a-rather-long") and row[0].endswith("…") for row in rows)
    assert any("about" in line and line.startswith("2 of 4 runs done") for shot in seen.shots for line in shot)
    means = {tuple(line.split()[-3:]) for shot in seen.shots for line in shot if line.startswith("  plain, cuda")}
    assert ("1", "1.9681", "1.9681") in means
    said = f"{LONG}, seed 1, cuda: 1.9361 bits per byte"
    first_said = next(i for i, shot in enumerate(seen.shots) if said in shot)
    assert all(shot.count(said) == 1 for shot in seen.shots[first_said:]), "a line said above the table was lost"
    last = "\n".join(seen.shots[-1])
    assert last.count("seed 2, cuda: ") == 2 and "training" not in last and "lowest" not in last
    assert any(LONG in line and "/10 " in line for shot in first.shots for line in shot), "cut where there is room"

    blind = seen.written.replace(b"\x1b[2K", b"").replace(b"\x1b[1A", b"")  # a table that is not taken away
    shots, _ = seen.read(blind)
    assert max(map(heads, shots)) > 1


def test_ctrl_c_takes_the_table_away(ran: tuple[list[str], Path], tmp_path: Path) -> None:
    arguments, _ = ran
    seen = Terminal([*arguments[:-4], "--store", str(tmp_path / "s"), "--parallel", "2"], 100, interrupt="2.0000")
    assert seen.code == 130 and not seen.hidden
    assert any(heads(shot) for shot in seen.shots) and not heads(seen.shots[-1])
    last = "\n".join(seen.shots[-1])
    assert "interrupted; the same command goes on" in last and "training" not in last


def test_ctrl_c_waits_until_a_table_is_drawn() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    drawn = []
    try:
        with pytest.raises(KeyboardInterrupt), live_table._whole():
            os.kill(os.getpid(), signal.SIGINT)
            drawn.append("half")
            drawn.append("whole")
        assert drawn == ["half", "whole"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


class Clock:
    """Stands for module `time`."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Watched:
    """A Live with a clock, and runs that get on as a test says."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, parallel: int, plan: str = PLAN) -> None:
        self.clock = Clock()
        patch.setattr(live_table, "time", self.clock)
        self.store = RunStore(folder / "store")
        self.plan = read_plan(write(folder, plan))
        self.places = places(self.store, self.plan)
        self.said = io.StringIO()
        say = Console()
        say.stream, say.terminal = self.said, False
        self.live = Live(say, parallel)

    def log(self, place: Place, step: int, seconds: float) -> None:
        """Let a run record a step at a time of its own clock."""
        Run.create(place.folder, place.job.config, b"x").log(
            step, {"train/loss": 1.0, "train/bpb": 2.5, "clock/seconds": seconds}
        )

    def left(self, running: int, done: int = 0, failed: int = 0) -> float | None:
        """Return the time left: after those done, so many run, the rest wait."""
        ended = done + failed
        under_way, waiting = self.places[ended : ended + running], self.places[ended + running :]
        progress = RunnerProgress(tuple(under_way), done, failed, len(self.places), tuple(waiting))
        seen = {place.key: self.live._look(place, self.clock.now) for place in under_way}
        return self.live.left(progress, seen)

    def end(self, place: Place, bpb: float | None = 2.0) -> None:
        job = place.job
        self.live.ended(place, Result(job.variant, job.seed, job.backend, "done", place.folder, bpb=bpb))


def test_a_row_before_and_after_a_run_has_recorded_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is known of a run that has only started, bits per byte and step of one that trains."""
    made = Watched(tmp_path, monkeypatch, 1)
    place = made.places[0]
    made.live.started(place)
    assert made.live._row(place, made.live._look(place, made.clock.now))[-3:-1] == ("0/10", "-")
    made.log(place, 4, 4.0)
    made.clock.now += 10
    assert made.live._row(place, made.live._look(place, made.clock.now))[-3:-1] == ("4/10", "2.5000")


@pytest.mark.parametrize(("parallel", "left"), [(1, 4 + 7 * 12), (2, 4 + 3 * 12), (8, 4)])
def test_time_left_before_any_run_has_ended(
    parallel: int, left: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the pace of those under way: 2 s to start, a step each second, 6 of 10 done: a whole one takes 12 s."""
    made = Watched(tmp_path, monkeypatch, parallel)
    now = made.places[:parallel]
    for place in now:
        made.live.started(place)
    assert made.left(parallel) is None, "nothing is known yet"
    for second in (4, 5, 6):
        made.clock.now = Clock.now + 2 + second
        for place in now:
            made.log(place, second, 0.1 * second)  # its own clock leaves most of the time out
        found = made.left(parallel)
    assert found == pytest.approx(left)
    made.clock.now += 1  # nothing new is recorded, but time goes on
    assert made.left(parallel) == pytest.approx(left - 1)


def test_time_left_by_runs_that_have_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By variant: plain takes 20 s, wide 50 s, scoring included; failed, resumed and earlier runs say nothing."""
    made = Watched(tmp_path, monkeypatch, 2)
    plain, wide = made.places[:2]
    for place in (plain, wide):
        made.live.started(place)
    made.clock.now += 20
    made.end(plain)
    made.clock.now += 30
    made.end(wide)
    assert made.left(0, done=2) == pytest.approx(120), "one slot: 20 + 20 + 50, the other: 50 + 20 + 50"
    third = made.places[2]
    made.live.started(third)
    made.clock.now += 8
    assert made.live._left(third, made.live._look(third, made.clock.now))[0] == pytest.approx(12)
    made.clock.now += 1
    before = copy.deepcopy(made.live._took)
    made.end(third, None)
    assert made.live._took == before, "a run that failed after 9 s is not one that takes 9 s"
    made.end(made.places[3])
    assert made.live._took == before, "a run that was there before took no time"
    fourth = made.places[4]
    made.log(fourth, 5, 10.0)
    made.live.started(fourth)
    made.clock.now += 4
    assert made.live._left(fourth, made.live._look(fourth, made.clock.now))[0] == pytest.approx(10 - 4)
    made.end(fourth)
    assert made.live._took == before, "half a run is not a whole one"


def test_time_left_with_a_budget_of_seconds_and_off_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shares are of the time; a line every ten seconds says where things stand."""
    made = Watched(tmp_path, monkeypatch, 1, PLAN.replace("steps = 10", "seconds = 100").replace("[1, 2, 3, 4]", "[1]"))
    first, second = made.places
    made.live.started(first)
    made.clock.now += 30
    made.log(first, 7, 20.0)
    progress = RunnerProgress((first,), 0, 0, 2, (second,))
    made.live(progress)
    assert made.said.getvalue() == "0 of 2 runs done, about 3m10s left: plain 1 cuda 7 2.5000 1m20s\n"
    made.clock.now += 9
    made.live(progress)
    assert made.said.getvalue().count("\n") == 1
    (first.folder / "metrics.jsonl").write_text("nonsense\n")
    made.clock.now += 2
    made.live(progress)
    assert made.said.getvalue().splitlines()[1].endswith("plain 1 cuda 0 - -")
