"""A training run that is killed again and again must end as one that nobody killed.

python -m shared_tests.support.kills --backend mlx --kills 100 --seed 0
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from core import rng
from core.training.run import Run, RunError
from shared_tests.support.killed import fingerprint, marks_of, small_data, timeless

ROOT = Path(__file__).resolve().parents[2]
SAVE = 0.008
"""About the seconds that a save takes."""


class Kill(NamedTuple):
    """What a kill left."""

    when: str
    """start: before training; save: while a checkpoint was saved; step: between those."""
    saved: int
    """Step of the checkpoint; 0 where there is none."""
    lost: int
    """Steps that were recorded and must be done again."""


class Life(NamedTuple):
    """One process."""

    kill: Kill | None
    """None: it came to the end of the run."""
    start: float
    """Seconds until it began to train."""
    trained: float
    """Seconds from there to its end."""


class Moment(NamedTuple):
    """When to kill: `seconds` after the child has said `mark` so many times ("": after it was started)."""

    mark: str
    count: int
    seconds: float


def live(backend: str, run: Path, data: str, *, moment: Moment | None = None, die: str = "") -> Life:
    """Let a child train `run` until its end, or until it is killed at `moment` or kills itself (`die`, see `child`).

    RuntimeError holds what the child said if it failed; AssertionError says what of the folder cannot be read.
    """
    program = "import sys; from shared_tests.support.killed import child; child(*sys.argv[1:])"
    threads = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS")}
    marks, errors = marks_of(run), run.with_name(f"{run.name}.stderr")
    marks.write_bytes(b"")
    began = time.monotonic()
    started = come = None
    with open(errors, "wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-c", program, backend, str(run), data, die],
            stderr=stderr,
            env={**os.environ, **threads, "PYTHONPATH": str(ROOT)},
        )
    try:
        while process.poll() is None:
            said, now = marks.read_text(), time.monotonic()
            started = started or (now if said else None)
            if moment is not None and said.count(moment.mark) >= moment.count:
                come = come or now
                if now >= come + moment.seconds:
                    break
            time.sleep(0.0005)
    finally:
        process.kill()
        code = process.wait()
    ended = time.monotonic()
    started = started or ended
    if code not in (0, -signal.SIGKILL):
        raise RuntimeError(f"the child ended with {code}: {errors.read_text()}")
    return Life(inspect(run) if code else None, started - began, ended - started)


def inspect(path: Path) -> Kill:
    """Read everything in a run folder that a kill left; RunError or AssertionError if it cannot be."""
    marks = marks_of(path).read_text()
    when = "start" if not marks else "save" if marks.endswith("(") else "step"
    if not (path / "config.json").exists():
        return Kill(when, 0, 0)
    run = Run.open(path)
    run.environment()
    last = run.checkpoint()
    saved, recorded = last.step if last else 0, max((row["step"] for row in run.metrics()), default=0)
    for step in run.kept():
        kept = run.checkpoint(step)
        assert kept and kept.step == step <= saved, f"{run.kept_path(step)} is not a checkpoint of step {step}"
    assert saved <= recorded, f"{path}: the checkpoint of step {saved} is ahead of what is recorded, step {recorded}"
    return Kill(when, saved, recorded - saved)


def compare(path: Path, whole: Path) -> str:
    """Return the fingerprint of a finished run; AssertionError unless it is in every bit the run that nobody killed."""
    ours, theirs = Run.open(path), Run.open(whole)
    prints = []
    for run in (ours, theirs):
        saved = [run.checkpoint(), *(run.checkpoint(step) for step in run.kept())]
        prints.append([fingerprint(each) for each in saved if each])
        left = [file.name for file in run.path.rglob("*.tmp")]
        assert not left, f"{run.path}: left behind: {left}"
    assert ours.kept() == theirs.kept(), f"{path}: kept {ours.kept()}, not {theirs.kept()}"
    assert prints[0] == prints[1], f"{path}: other weights or optimizer state: {prints[0]}, not {prints[1]}"
    assert timeless(ours) == timeless(theirs), f"{path}: other metrics"
    return prints[0][0]


class Campaign(NamedTuple):
    """What a campaign found: every run ended like the one that nobody killed."""

    kills: list[Kill]
    runs: int
    starts: int
    fingerprint: str


def campaign(backend: str, kills: int, seed: int, folder: Path, say: Callable[[str], None]) -> Campaign:
    """Kill runs at random moments, `kills` times in all, and let each come to its end; errors as `live`, `compare`.

    Of eight lives, one on average is killed at a random moment of its start, four at one of their training and three
    at one of a save.
    """
    data, whole = small_data(folder), folder / "whole"
    calm = live(backend, whole, data)
    found, runs, starts, digest = [], 0, 0, ""
    while len(found) < kills:
        run = folder / f"run-{runs}"
        done = False
        while not done:
            share, kind = (rng.below(seed, f"{what}/{starts}", n) for what, n in (("moment", 1 << 20), ("kind", 8)))
            share /= 1 << 20
            if kind == 0:
                moment = Moment("", 0, share * calm.start)
            elif kind < 4:
                moment = Moment("(", 1 + rng.below(seed, f"save/{starts}", 3), share * SAVE)
            else:  # not the whole length: most lives should end by the kill
                moment = Moment("T", 1, share * 0.7 * calm.trained)
            life = live(backend, run, data, moment=moment if len(found) < kills else None)
            starts, done = starts + 1, life.kill is None
            found += [life.kill] if life.kill else []
            if starts > 10 * kills + 10:
                raise RuntimeError(f"{starts} starts and no end: training takes too long for the time between kills")
        digest = compare(run, whole)
        shutil.rmtree(run)
        runs += 1
        say(f"{backend}: {len(found)} of {kills} kills, {runs} runs came to their end like the one that nobody killed")
    return Campaign(found, runs, starts, digest)


def main() -> int:
    """Run one campaign and print what it found; 1 if a run ended otherwise."""
    parser = argparse.ArgumentParser(prog="python -m shared_tests.support.kills", description=__doc__)
    parser.add_argument("--backend", choices=("mlx", "cuda"), default="mlx")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="skc-kills-") as folder:
        try:
            found = campaign(options.backend, options.kills, options.seed, Path(folder), print)
        except (AssertionError, RunError) as error:
            print(f"FAILED: {error}", file=sys.stderr)
            return 1
    when, lost = Counter(kill.when for kill in found.kills), max(kill.lost for kill in found.kills)
    print(
        f"{options.backend}, one thread, seed {options.seed}: {len(found.kills)} kills over {found.runs} runs "
        f"({found.starts} starts, {time.monotonic() - began:.0f} s): {when['start']} before training, {when['step']} "
        f"between saves, {when['save']} in a save; at most {lost} steps lost; every run ended with the weights, "
        f"optimizer state and metrics of the one that nobody killed: {found.fingerprint[:16]}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
