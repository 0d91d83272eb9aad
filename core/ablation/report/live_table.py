"""Shows an ablation under way: a table that is redrawn on a terminal, elsewhere a line now and then."""

import heapq
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from types import FrameType
from typing import Any, NamedTuple

from core.ablation.runner import RunnerProgress
from core.ablation.stats.results import Result
from core.ablation.store import Place
from core.console import PLAIN_EVERY, Console, duration
from core.files import MAX_TEXT, open_file, parse_json

TAIL = 1 << 15
"""Bytes of a metrics file that are looked at first."""
LONGEST = 1e12
"""Seconds, and bits per byte, beyond which a record is none of ours."""
EVERY = 0.5
"""Seconds between two looks at a terminal's table."""


class Recorded(NamedTuple):
    """What a run under way has recorded so far."""

    step: int = 0
    share: float = 0.0
    """Of its training."""
    seconds: float = 0.0
    """Of training."""
    bpb: float | None = None
    """Of the training batches since the line before."""


class Pace(NamedTuple):
    """How fast a run trains by wall time, evaluations included, its start-up left out."""

    first: tuple[float, float]
    """(time of time.monotonic, share of its training) when it was first seen here to train."""
    last: tuple[float, float]
    """The same when it was last seen to have got on."""

    def left(self, now: float) -> float | None:
        """Return the seconds to the end of the training; None until two records of it were read."""
        (began, start), (then, share) = self
        return max(0.0, (1 - share) * (then - began) / (share - start) - (now - then)) if share > start else None


class Live:
    """Shows the runs under way, each with its step, bits per byte and time left, and what the variants gave so far."""

    def __init__(self, say: Console, parallel: int) -> None:
        self._say, self._parallel = say, parallel
        self._shown = time.monotonic()
        self._live: Any = None
        self._starts: dict[str, tuple[float, float]] = {}
        """Key of a run -> (when it was started here, the share of its training that was done then)."""
        self._paces: dict[str, Pace] = {}
        self._took: dict[tuple[str, str], list[float]] = {}
        """(variant, backend) -> seconds from start to end of runs that were trained here as a whole."""
        self._found: dict[str, tuple[str, float]] = {}
        """Key of a run -> (variant, and backend where there are several; its bits per byte)."""

    def started(self, place: Place) -> None:
        """Note when a run began."""
        self._starts[place.key] = time.monotonic(), _read(place).share
        self._paces.pop(place.key, None)

    def ended(self, place: Place, result: Result | None = None) -> None:
        """Note how long a run took that was trained here, and what it gave."""
        began, share = self._starts.pop(place.key, (0.0, 1.0))
        if result is None or result.bpb is None:  # failed: how soon says nothing about the others
            return
        if share == 0:
            self._took.setdefault((result.variant, result.backend), []).append(time.monotonic() - began)
        self._found[place.key] = f"{result.variant}, {result.backend}", result.bpb

    def __call__(self, progress: RunnerProgress) -> None:
        """Show where things stand."""
        now = time.monotonic()
        every = EVERY if self._say.terminal else PLAIN_EVERY
        if now - self._shown < every:
            return
        self._shown = now
        records = {place.key: self._look(place, now) for place in progress.running}
        if self._say.terminal:
            with _whole():
                self._draw(progress, records)
        else:
            places = "; ".join(" ".join(self._row(place, records[place.key])) for place in progress.running)
            self._say(f"{self._head(progress, records)}{': ' if places else ''}{places}")

    def close(self) -> None:
        """Take the table away."""
        if self._live is not None:
            with _whole():
                self._live.stop()
            self._live = None

    def _look(self, place: Place, now: float) -> Recorded:
        """Return what a run has recorded, and note how fast it gets on."""
        record = _read(place)
        if place.key not in self._starts or record.share > self._starts[place.key][1]:
            here = now, record.share
            pace = self._paces.setdefault(place.key, Pace(here, here))
            if record.share > pace.last[1]:
                self._paces[place.key] = pace._replace(last=here)
        return record

    def left(self, progress: RunnerProgress, records: dict[str, Recorded]) -> float | None:
        """Return the seconds until this process's runs are done; None as long as no run shows a pace.

        Runs under way end one by one, and those that wait begin where one ends, in their order.
        """
        places = {place.key: place for place in progress.running}
        under_way = {key: self._left(place, records[key]) for key, place in places.items()}
        wholes = {kind: fmean(took) for kind, took in self._took.items()}
        for key, (_, whole) in under_way.items():
            if whole is not None:
                wholes.setdefault(_kind(places[key]), whole)
        if not wholes:
            return None
        usual = fmean(wholes.values())
        ends = [usual if left is None else left for left, _ in under_way.values()]
        ends += [0.0] * (self._parallel - len(ends))
        heapq.heapify(ends)
        for place in progress.waiting:
            heapq.heappush(ends, heapq.heappop(ends) + wholes.get(_kind(place), usual))
        return max(ends)

    def _left(self, place: Place, record: Recorded) -> tuple[float | None, float | None]:
        """Return (seconds left of a run, seconds of a whole run of its variant); None for what is not known."""
        began, share = self._starts.get(place.key, (time.monotonic(), 0.0))
        now, took, pace = time.monotonic(), self._took.get(_kind(place)), self._paces.get(place.key)
        spent = now - began
        training = pace.left(now) if pace else None
        if took:  # what comes after the training counts too
            whole = fmean(took)
            return max(whole * (1 - share) - spent, training or 0.0), whole
        if training is None and record.share > share:  # by its own clock, which leaves out evaluations
            training = record.seconds * (1 - record.share) / record.share
        if training is None:
            return None, None
        return training, (spent + training) / (1 - share) if share < 1 else None

    def _head(self, progress: RunnerProgress, records: dict[str, Recorded]) -> str:
        failed = f", {progress.failed} failed" if progress.failed else ""
        others = progress.total - progress.done - progress.failed - len(progress.running) - len(progress.waiting)
        elsewhere = f", {others} under way in another process" if others else ""  # which this one waits for
        text = f"{progress.done} of {progress.total} runs done{failed}{elsewhere}"
        left = self.left(progress, records)
        return text if left is None else f"{text}, about {duration(left)} left"

    def _draw(self, progress: RunnerProgress, records: dict[str, Recorded]) -> None:
        from rich.console import Console as Rich
        from rich.console import Group
        from rich.live import Live as RichLive
        from rich.text import Text

        if self._live is None:
            self._live = RichLive(console=Rich(file=self._say.stream), auto_refresh=False, transient=True)
            self._live.start()
        width = self._live.console.width
        parts: list[Any] = [Text(self._head(progress, records), no_wrap=True, overflow="ellipsis")]
        rows = [self._row(place, records[place.key]) for place in progress.running]
        if rows:
            parts.append(_table(("training", "seed", "backend", "step", "bits per byte", "left"), rows, width))
        if self._found:
            parts.append(_table(("done", "runs", "mean bits per byte", "lowest"), self._so_far(), width))
        self._live.update(Group(*parts), refresh=True)

    def _so_far(self) -> list[tuple[str, ...]]:
        """Return what the variants gave so far, the best mean first; seeds may be missing on one side."""
        groups: dict[str, list[float]] = {}
        for variant, bpb in self._found.values():
            groups.setdefault(variant, []).append(bpb)
        ranked = sorted(groups.items(), key=lambda group: fmean(group[1]))
        return [(name, str(len(of)), f"{fmean(of):.4f}", f"{min(of):.4f}") for name, of in ranked]

    def _row(self, place: Place, record: Recorded) -> tuple[str, ...]:
        """Return what is known of a run under way."""
        job, train = place.job, place.job.config.train
        step = f"{record.step}" if train.seconds else f"{record.step}/{train.steps}"
        left = self._left(place, record)[0]
        text = "scoring" if record.share >= 1 else "-" if left is None else duration(left)
        return job.variant, str(job.seed), job.backend, step, "-" if record.bpb is None else f"{record.bpb:.4f}", text


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]], width: int) -> Any:
    """Return a rich table; on a narrow terminal only the names in the first column are cut."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD)
    widths = [max(map(len, cells)) for cells in zip(head, *rows, strict=True)]
    names = max(8, width - sum(widths[1:]) - 3 * len(widths) - 1)  # 3: what Rich puts between two columns
    for i, name in enumerate(head):
        table.add_column(name, justify="right" if i else "left", no_wrap=True, max_width=widths[i] if i else names)
    for row in rows:
        table.add_row(*map(Text, row))  # a name may look like markup
    return table


def _kind(place: Place) -> tuple[str, str]:
    return place.job.variant, place.job.backend


def _read(place: Place) -> Recorded:
    """Return what a run has recorded; what another version or half a write left counts as nothing."""
    train = place.job.config.train
    try:
        last = _last_row(place.folder / "metrics.jsonl")
        step, seconds, bpb = last["step"], last["clock/seconds"], last.get("train/bpb")
        share = seconds / train.train_stop if train.train_stop else step / train.steps
        if type(step) is not int or not 0 <= seconds <= LONGEST or not (bpb is None or 0 <= bpb <= LONGEST):
            return Recorded()
        return Recorded(step, min(1.0, share), float(seconds), None if bpb is None else float(bpb))
    except (OSError, KeyError, TypeError, ValueError, ArithmeticError):
        return Recorded()


def _last_row(path: Path) -> dict[str, Any]:
    """Return the last line of a metrics file that has a training loss; KeyError without any, FileError, OSError.

    Read from the end: the whole of a long run twice a second would take this process from the runs.
    """
    size = TAIL
    with open_file(path, MAX_TEXT) as file:  # without such a line all of it is read
        end = file.seek(0, os.SEEK_END)
        while True:
            file.seek(max(0, end - size))
            *lines, _ = file.read(end - file.tell()).split(b"\n")  # what follows the last line end is cut short
            for line in reversed(lines if size >= end else lines[1:]):
                if b'"train/loss"' in line:
                    return parse_json(path, line.decode())
            if size >= end:
                raise KeyError("train/loss")
            size *= 8


@contextmanager
def _whole() -> Iterator[None]:
    """Let Ctrl-C wait until something is drawn: half a table cannot be taken away."""
    before = signal.getsignal(signal.SIGINT)
    if not callable(before) or threading.current_thread() is not threading.main_thread():
        yield
        return
    noted: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: noted.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if noted:
        before(*noted[0])
