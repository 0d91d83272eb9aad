"""What a watcher of one run is told: everything at first, then every new line of metrics.jsonl."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from core.config import ConfigError, RunConfig, differences, from_json
from core.files import FileError
from core.model.params import count
from core.presets import PRESETS
from core.serve.tail import Tail, file_stamp
from core.training.records import MAX_ROWS, METRICS, RunError, read_environment, read_object, read_row

MOST_POINTS = 1000
"""Points of a curve that a watcher is sent at first; of twice as many every second one is dropped."""
LOOKS = 8
"""Blocks that are read at once: seconds of work, so that a page shows what there is and Ctrl-C is heard."""
PACE_ROWS = 20
"""Last lines that the time left is reckoned from."""
ENDS = ("final/score", "final/artifact")
FILES = ("artifact.skc", "report.md", "curve.png")
"""What a run has when it has ended, as in core.training.run.Run.finished."""


CURVE = METRICS.keys() - {"samples"} - {name for name in METRICS if name.startswith(("final/", "twin/"))} | {"step"}


class WatchEvent(NamedTuple):
    """One server-sent event: its name, and a value for JSON."""

    name: str
    value: dict[str, Any]


class MetricsFeed:
    """The lines of a run's metrics.jsonl as they come, and a thinned copy of all of them."""

    def __init__(self, folder: Path, points: int = MOST_POINTS) -> None:
        self._tail, self._points = Tail(folder / "metrics.jsonl"), points
        self._forget()

    def _forget(self) -> None:
        self.rows: list[dict[str, Any]] = []
        """What a page shows: lines of a curve are thinned, the newest and those of samples and of the end are kept."""
        self.pace: list[dict[str, Any]] = []
        """The last lines with a loss."""
        self.unread = 0
        """Lines that are no line of a run's."""
        self.names: set[str] = set()
        self._count = 0
        """Lines that were read."""

    def look(self) -> tuple[list[dict[str, Any]], bool]:
        """Return the lines that came since the last look, and whether `rows` replace all that was told; FileError.

        They do when the file began anew, and when more lines came than a page shows.
        """
        fresh, anew = [], False
        for _ in range(LOOKS):
            lines, restarted, more = self._tail.look()
            if restarted:
                self._forget()
                fresh, anew = [], True
            self._count += len(lines)
            if self._count > MAX_ROWS:
                raise FileError(f"{self._tail.path}: over {MAX_ROWS:,} lines: this is not a run's")
            for line in lines:
                with suppress(RunError, UnicodeDecodeError):
                    fresh.append(row := read_row("line", line.decode()))
                    self._take(row)
                    continue
                self.unread += 1
            if len(fresh) > 2 * self._points:
                fresh, anew = [], True
            if not more:
                break
        return (self.rows if anew else fresh), anew

    def _take(self, row: dict[str, Any]) -> None:
        self.names |= row.keys()
        row.pop("progress/each", None)  # a number for every step
        self.rows.append(row)
        if "train/loss" in row:
            self.pace = [*self.pace, row][-PACE_ROWS:]
        if len(self.rows) >= 2 * self._points:
            curve = [i for i, one in enumerate(self.rows) if one.keys() <= CURVE]
            dropped = set(curve[-2::-2])
            rows = [one for i, one in enumerate(self.rows) if i not in dropped]
            self.rows = rows if len(rows) < 1.5 * self._points else rows[-self._points :]

    def left(self, config: RunConfig) -> float | None:
        """Return the seconds of training that are left, by the last lines; None where they do not say."""
        train = config.train
        if not self.pace:
            return None
        first, last = self.pace[0], self.pace[-1]
        if train.train_stop is not None:
            return max(0.0, train.train_stop - last["clock/seconds"])
        steps, seconds = last["step"] - first["step"], last["clock/seconds"] - first["clock/seconds"]
        if steps <= 0 or seconds <= 0:
            steps, seconds = last["step"], last["clock/seconds"]
        return max(0.0, (train.steps - last["step"]) * seconds / steps) if steps else None


class RunFeed:
    """What is told of one run folder, which may not be there yet."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._metrics = MetricsFeed(folder)
        self._head: dict[str, Any] | None = None
        self._config: RunConfig | None = None
        self._stamps: object = None
        self._problem = ""
        """What is wrong with the settings."""
        self._told: object = None

    def look(self) -> list[WatchEvent]:
        """Return what to tell since the last look: `all` at first and after a change of the whole, else `more`."""
        changed = self._read_head()
        rows, anew, problem = [], False, self._problem
        try:
            rows, anew = self._metrics.look()
        except (FileError, OSError) as error:
            problem = problem or str(error)
        state = self._state(problem)
        if changed or anew:
            self._told = state
            return [WatchEvent("all", {"kind": "run", "run": self._head, "rows": self._metrics.rows, **state})]
        if rows or state != self._told:
            self._told = state
            return [WatchEvent("more", {"rows": rows, **state})]
        return []

    def _state(self, problem: str) -> dict[str, Any]:
        names, config = self._metrics.names, self._config
        state, words = "training", problem
        needed = [*ENDS, *(["final/plugins"] if config and config.eval.learns else [])]
        if config is None:
            state = "waiting"
            words = problem or f"{self._folder} is no run yet: this page shows one as soon as it begins"
        elif not names:
            state, words = "waiting", problem or "nothing is recorded yet: the first line comes when training has begun"
        elif all(name in names for name in needed) and all((self._folder / file).is_file() for file in FILES):
            state = "finished"
        left = self._metrics.left(config) if config and state == "training" else None
        return {"state": state, "words": words, "left": left, "unread": self._metrics.unread}

    def _read_head(self) -> bool:
        """Read the settings again if their files changed; return whether they did."""
        stamps = tuple(file_stamp(self._folder / name) for name in ("config.json", "env.json"))
        if stamps == self._stamps:
            return False
        self._stamps, self._problem = stamps, ""
        self._head = self._config = None
        if stamps[0] is None:
            return True
        try:
            where = self._folder / "config.json"
            config = from_json(RunConfig, read_object(where), str(where))
            self._head = _head(self._folder, config, read_environment(self._folder / "env.json"))
            self._config = config
        except (ConfigError, RunError, OSError) as error:
            self._problem = str(error)
        return True


def _head(folder: Path, config: RunConfig, env: dict[str, Any]) -> dict[str, Any]:
    """Return what a page says of a run beside its metrics."""
    preset = PRESETS.get(config.preset)
    train = config.train
    commit = env.get("commit") and f"{env['commit'][:12]}{' (with uncommitted changes)' if env.get('dirty') else ''}"
    facts = {
        "parameters": f"{count(config.model):,}", "backend": env.get("backend"), "device": env.get("device"),
        "computed in": env.get("dtype"), "data": config.data.path, "commit": commit,
    }  # fmt: skip
    return {
        "name": folder.resolve().name, "preset": config.preset, "seed": config.seed,
        "purpose": preset.purpose if preset else "", "steps": train.steps, "seconds": train.train_stop,
        "facts": [[name, str(value)] for name, value in facts.items() if value],
        "settings": _settings(config), "command": env.get("command"), "notes": env.get("notes", []),
    }  # fmt: skip


def _settings(config: RunConfig) -> Sequence[str]:
    """Return what the run changed of its preset."""
    preset = PRESETS.get(config.preset)
    return differences(preset.config if preset else RunConfig(), config)
