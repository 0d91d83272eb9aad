"""Trackers: copies of what a run records, for TensorBoard or Weights & Biases; metrics.jsonl stays the source."""

import importlib.util
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from core.config import ConfigError, RunConfig, to_json
from core.files import own_folder

Name = Literal["tensorboard", "wandb"]
PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}


class Tracker(Protocol):
    """What gets a copy of a run's lines."""

    def row(self, step: int, values: dict[str, Any]) -> None:
        """Take one line of metrics.jsonl: after `step` steps, these values were measured."""

    def close(self) -> None:
        """Write what is still held back, and end."""


class TensorBoard:
    """Event files in FOLDER/tensorboard: scalars by their names, samples and settings as text.

    Every start writes all lines again and purges those of earlier starts from TensorBoard's view, so that it shows each
    line once. TensorBoard's relative time is training time.
    """

    def __init__(self, folder: Path, name: str, group: str, config: RunConfig) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=0, flush_secs=10)
        self._began, self._seconds = time.time(), 0.0
        settings = json.dumps(to_json(config), indent=1)
        about = f"{group}/{name}" if group else name
        self._writer.add_text("settings", f"{about}\n\n```json\n{settings}\n```", 0, self._began)

    def row(self, step: int, values: dict[str, Any]) -> None:
        """Write one line's values at `step`."""
        self._seconds = values.get("clock/seconds", self._seconds)
        when = self._began + self._seconds
        for name, value in flat(values).items():
            if isinstance(value, str):
                self._writer.add_text(name, value, step, when)
            else:
                self._writer.add_scalar(name, value, step, when)

    def close(self) -> None:
        """Write what is still held back."""
        self._writer.close()


class WandB:
    """A run at Weights & Biases; WANDB_MODE=offline keeps it in FOLDER/wandb until `wandb sync`.

    A start resumes the run by its id, which stands in the names of the folders in FOLDER/wandb. Project, entity and
    account are wandb's own business (WANDB_PROJECT, `wandb login`).
    """

    def __init__(self, folder: Path, name: str, group: str, config: RunConfig) -> None:
        import wandb

        earlier = sorted((folder / "wandb").glob("*run-*-*"))
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT") or "skc-lab", dir=str(folder),
                id=earlier[-1].name.rpartition("-")[2] if earlier else None,
                name=name, group=group or None, config=to_json(config), resume="allow",
                settings=wandb.Settings(silent=True, console="off", save_code=False),
            )  # fmt: skip
        except wandb.Error as error:
            raise ConfigError(
                f"--track wandb: {' '.join(str(error).split())}; or set WANDB_MODE=offline, and send it by: wandb sync"
            ) from error
        for old in earlier:
            if self._run.offline and old.name.startswith("offline-"):  # this start holds every line again
                shutil.rmtree(old, ignore_errors=True)
        self._first = self._run.step

    def row(self, step: int, values: dict[str, Any]) -> None:
        """Send a line. W&B takes no step again: of a line at such a step only the run's summary gets the values."""
        if step < self._first:
            self._run.summary.update(flat(values))
        else:
            self._run.log(flat(values), step=step)

    def close(self) -> None:
        """Wait until all is written or sent."""
        self._run.finish()


KINDS: dict[str, Callable[[Path, str, str, RunConfig], Tracker]] = {"tensorboard": TensorBoard, "wandb": WandB}


class Copies:
    """The trackers of one run. One that fails is named once and left out from then on: the run matters more."""

    def __init__(self, trackers: dict[str, Tracker], say: Callable[[str], None]) -> None:
        self._trackers, self._say = trackers, say
        self.lost: list[str] = []
        """Names of those that failed."""

    def add(self, name: str, tracker: Tracker) -> None:
        """Give one more tracker the lines from here on."""
        self._trackers[name] = tracker

    def row(self, step: int, values: dict[str, Any]) -> None:
        """Give one line to every tracker."""
        self._each(lambda tracker: tracker.row(step, values))

    def rows(self, rows: Iterable[dict[str, Any]]) -> None:
        """Give every line of metrics.jsonl to every tracker."""
        for row in rows:
            self.row(row["step"], {name: value for name, value in row.items() if name != "step"})

    def close(self) -> None:
        """Close every tracker."""
        self._each(lambda tracker: tracker.close())

    def _each(self, act: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                act(tracker)
            except Exception as error:  # whatever goes wrong in a tracker is no reason to lose a run
                del self._trackers[name]
                self.lost.append(name)
                self._say(f"{name} got no more of this run ({type(error).__name__}: {error}); metrics.jsonl has it all")


def check(names: Iterable[str]) -> None:
    """Raise ConfigError unless each tracker is known, named once, and its package is installed."""
    names = list(names)
    if len(set(names)) < len(names):
        raise ConfigError(f"--track {' '.join(names)}: one is named twice; name each once")
    for name in names:
        if name not in PACKAGES:
            raise ConfigError(f"--track {name}: expected {' or '.join(get_args(Name))}")
        spec = importlib.util.find_spec(PACKAGES[name])
        if spec is None or spec.origin is None:  # a folder `wandb` that it once made here is no package
            raise ConfigError(f"--track {name}: {PACKAGES[name]} is not installed; pip install -e '.[{name}]'")


def start(
    names: Iterable[str], folder: Path, config: RunConfig, say: Callable[[str], None], name: str = "", group: str = ""
) -> Copies:
    """Start trackers that write into `folder`; ConfigError where one cannot begin (see `check`, or no account)."""
    check(names := list(names))
    folder.mkdir(parents=True, exist_ok=True)
    trackers: dict[str, Tracker] = {}
    try:
        for kind in names:
            own_folder(folder / kind)
            trackers[kind] = KINDS[kind](folder, name or folder.name, group, config)
    except BaseException:
        Copies(trackers, say).close()
        raise
    for kind in names:
        say(f"what is recorded also goes to {kind} ({folder / kind})")
    return Copies(trackers, say)


def flat(values: dict[str, Any]) -> dict[str, float | str]:
    """Return what trackers show of a line: numbers, parts of an object under its name, samples as one text."""
    figures: dict[str, float | str] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            figures |= {f"{name}/{part}": inner for part, inner in flat(value).items()}
        elif isinstance(value, bool) or value is None:
            continue
        elif isinstance(value, (int, float)):
            figures[name] = float(value)
        elif isinstance(value, list) and value and all(isinstance(text, str) for text in value):
            figures[name] = "\n\n---\n\n".join(value)
    return figures
